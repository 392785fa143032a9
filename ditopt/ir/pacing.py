"""The pace of a sampler: by how much each of its steps is shortened.

ERTACache (arXiv 2508.21091) shortens the steps that reuse, and spreads what is left over the steps that follow. The
numbers are data of the Program; a pipeline's scheduler is told its new times by ditopt/pacing.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ditopt.errors import RecipeError


def read_factors(text: str) -> tuple[float, ...]:
    """Factors from recipe text, numbers with spaces between. RecipeError where it holds anything else."""
    try:
        found = tuple(float(word) for word in text.split())
    except ValueError:
        found = ()
    if not found or not all(0 <= f <= 1 for f in found) or not found[0]:
        raise RecipeError(
            f"factors={text!r} given; expected one number a step with spaces between, or one for all, each from 0 (the "
            "step goes nowhere) to 1 (as the scheduler has it), and the first above 0"
        )
    return found


def write_factors(factors: Sequence[float]) -> str:
    """The reverse, four digits each."""
    return " ".join(f"{f:.4g}" for f in factors)


def paced(times: Sequence[float], factors: Sequence[float]) -> list[float]:
    """The times of T steps, (T + 1) of them that fall (or rise), at the pace of T factors; one factor is for all.

    Each step goes its share of what is left, in the proportions of the steps as given, times its factor; the last one
    goes to the end. The first and the last time stay, and so does every time in front of the first factor below 1.
    """
    steps = [b - a for a, b in itertools.pairwise(times)]
    every = list(factors) * len(steps) if len(factors) == 1 else list(factors)
    out = list(times)
    changed = False
    for i, (own, factor) in enumerate(zip(steps[:-1], every[:-1], strict=True)):
        changed = changed or factor != 1
        if changed:
            out[i + 1] = out[i] + (times[-1] - out[i]) * (own / math.fsum(steps[i:])) * factor
    return out
