"""The text of a mask, and whole numbers, checked."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from ditopt.errors import BadInput


def check(mask: str, steps: int | None = None, what: str = "mask") -> str:
    """``mask`` as given. BadInput where it holds another character, reuses at its first step, which has nothing to
    reuse, or has not ``steps`` digits."""
    if not isinstance(mask, str) or not mask or set(mask) - {"0", "1"}:
        raise BadInput(f"{what} {mask!r} given; expected a text of 1 (compute) and 0 (reuse), one digit a step")
    if steps is not None and len(mask) != steps:
        raise BadInput(f"{what} has {len(mask)} digits for a run of {steps} steps; give one digit a step")
    if mask[0] == "0":
        raise BadInput(f"{what} {mask!r} reuses at step 0, where there is nothing to reuse; its first digit must be 1")
    return mask


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value`` as an int in [least, most]. BadInput names it."""
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not fits or value < least or (most is not None and value > most):
        upper = "" if most is None else f" to {most}"
        raise BadInput(f"{name}={value} given; expected a whole number from {least}{upper or ' on'}")
    return int(value)
