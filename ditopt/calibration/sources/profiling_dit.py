"""ProfilingDiT: blocks that attend to what stays are reused; those that attend to what moves always compute."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ditopt.calibration.focus import focus, numbers_of
from ditopt.calibration.intervals import profiling_dit
from ditopt.calibration.profile import Profile
from ditopt.calibration.sources import by_region, with_caches
from ditopt.errors import RecipeError
from ditopt.pipeline import Value

REGIONS = ("blocks.*.attn",)


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """A cache of what each run of background blocks adds; all of them refresh at the same steps."""
    listed, limit = str(parameters["background"]), float(parameters["focus"])
    attention = {int(name.split(".")[1]): name for name in by_region(profile, REGIONS[0])}
    labels = numbers_of(listed, max(attention) + 1) if listed else _background(profile, attention, limit)
    if not labels:
        raise RecipeError(
            f"profiling_dit: no block is background-focused at focus={limit:g}; give more, or background="
        )
    words = str(parameters["refresh"]).replace(",", " ").split()
    if not words or not all(w.isdigit() for w in words):
        raise RecipeError(f"profiling_dit{{refresh={parameters['refresh']}}}: expected an interval, or a list of steps")
    steps, start = profile.steps, int(parameters["start"])
    refresh = int(words[0]) if len(words) == 1 else [int(w) for w in words]
    mask = profiling_dit(steps, start, refresh)
    region = "|".join(f"blocks.{first}:{last + 1}" for first, last in _runs(labels))
    return with_caches({region: mask}, f"start={start} and refresh leave none of the {steps} steps", residual="yes")


def _background(profile: Profile, attention: Mapping[int, str], limit: float) -> list[int]:
    """The blocks whose focus is at most ``limit``. Blocks are compared where they hold the same tokens: as many
    positions in as many streams."""
    values = by_region(profile, REGIONS[0])
    names = profile.of(REGIONS[0])
    alike: dict[tuple[int, ...], list[int]] = {}
    for block, name in sorted(attention.items()):
        streams = sum(bool(re.fullmatch(rf"{re.escape(name)}(/\d+)?", other)) for other in names)
        alike.setdefault((streams, *values[name].shape), []).append(block)
    found = []
    for blocks in alike.values():
        told = focus([values[attention[b]] for b in blocks])
        found += [b for b, f in zip(blocks, told, strict=True) if f <= limit]
    return sorted(found)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1] = runs[-1][0], n
        else:
            runs.append((n, n))
    return runs
