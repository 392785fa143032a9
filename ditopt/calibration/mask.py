"""Masks, and the checks that the solvers beside this file share.

A schedule is a mask: a text of 1 (compute) and 0 (reuse), one digit a step. A recording is an array
(N recordings, T steps, P tokens, C channels); everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditopt.errors import BadInput
from ditopt.recipes.masks import check, whole

__all__ = [
    "Floats",
    "alike",
    "anchors",
    "check",
    "computed",
    "numbers",
    "real",
    "recording",
    "relative_l1",
    "text",
    "times",
    "whole",
]

Floats = NDArray[np.float64]


def text(steps: int, computed: Iterable[int]) -> str:
    """The mask of ``steps`` digits that computes at the steps ``computed``."""
    there = set(computed)
    if not all(0 <= s < steps for s in there):
        raise BadInput(f"computed steps {sorted(there)} given for {steps} steps; expected steps from 0 to {steps - 1}")
    return "".join("1" if s in there else "0" for s in range(steps))


def computed(mask: str) -> list[int]:
    """The steps at which ``mask`` computes, ascending."""
    return [s for s, digit in enumerate(mask) if digit == "1"]


def anchors(mask: str) -> NDArray[np.int64]:
    """For each step, the computed step whose value it uses: (T,) of step numbers."""
    check(mask)
    where = np.arange(len(mask))
    return np.maximum.accumulate(np.where(np.array(list(mask)) == "1", where, 0))


def recording(values: ArrayLike, what: str = "values") -> Floats:
    """``values`` as float64 (N, T, P, C). BadInput where it has another rank, is empty, or is not finite."""
    array = numbers(values, what)
    if array.ndim != 4:
        raise BadInput(f"{what} have shape {array.shape}; expected (recordings, steps, tokens, channels)")
    return array


def alike(first: Floats, second: Floats, what: str) -> None:
    """BadInput where two arrays differ in shape."""
    if first.shape != second.shape:
        raise BadInput(f"{what} have shapes {first.shape} and {second.shape}; expected one shape")


def numbers(values: ArrayLike, what: str, ndim: int | None = None) -> Floats:
    """``values`` as float64. BadInput where they are no numbers, empty, not finite, or not of rank ``ndim``."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{what} are not an array of numbers ({error})") from error
    if ndim is not None and array.ndim != ndim:
        raise BadInput(f"{what} have shape {array.shape}; expected {ndim} dimension{'s' * (ndim != 1)}")
    if not array.size:
        raise BadInput(f"{what} are empty (shape {array.shape})")
    if not np.isfinite(array).all():
        raise BadInput(f"{what} hold NaN or infinity; record again (a value overflowed)")
    return array


def real(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """``value`` as a float in [least, most], finite. BadInput names it."""
    fits = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or not least <= value <= most:
        upper = "on" if most == math.inf else f"to {most:g}"
        raise BadInput(f"{name}={value} given; expected a number from {least:g} {upper}")
    return float(value)


def times(timesteps: Sequence[float]) -> list[float]:
    """The model's time at each step of a run, as floats: (T,), at least one, finite."""
    return [float(t) for t in numbers(timesteps, "timesteps", 1)]


def relative_l1(new: Floats, old: Floats) -> float:
    """``mean|new - old| / mean|old|`` over everything: 0 where both are equal, inf where only ``old`` is zero."""
    difference, size = float(np.abs(new - old).sum()), float(np.abs(old).sum())
    if size:
        return difference / size
    return math.inf if difference else 0.0
