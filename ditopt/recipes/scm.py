"""cache-dit's step computation masks: runs of computed and of reused steps in turn, and its four presets.

The presets are tables for 28, 9 to 15, 9, 8, 6 and 4 steps; other numbers of steps shrink or stretch them as cache-dit
does (vipshop/cache-dit, caching/cache_interface.py), so that a mask named there is the same one here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ditopt.errors import BadInput
from ditopt.recipes.masks import check, whole

Bins = tuple[Sequence[int], Sequence[int]]
"""Lengths of the computed runs and of the reused runs; a computed run comes first."""

_28: Mapping[str, Bins] = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
_15: Mapping[str, Bins] = {
    "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
    "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
    "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
    "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
}
_9: Mapping[str, Bins] = {
    "slow": ((5, 2, 1), (1,)),
    "medium": ((5, 1, 1), (1, 1)),
    "fast": ((4, 1, 1), (1, 2)),
    "ultra": ((3, 1, 1), (2, 2)),
}
_8: Mapping[str, Bins] = {
    "slow": ((5, 1, 1), (1,)),
    "medium": ((4, 1, 1), (1, 1)),
    "fast": ((3, 1, 1), (1, 2)),
    "ultra": ((2, 1, 1), (2, 2)),
}
_6: Mapping[str, Bins] = dict.fromkeys(_28, ((3, 1), (2,)))
_4: Mapping[str, Bins] = dict.fromkeys(_28, ((2, 1), (1,)))

POLICIES = tuple(_28)
"""Names of the presets, from the most to the fewest computed steps."""

_TABLES: Mapping[int, Mapping[str, Bins]] = MappingProxyType({4: _4, 6: _6, 8: _8, 9: _9})


def scm(compute_bins: Sequence[int], cache_bins: Sequence[int], steps: int | None = None) -> str:
    """The mask of these runs, cut to ``steps`` digits (None: all of them).

    BadInput where a length is not a whole number, where a computed run has none, or where the runs are too short.
    """
    for name, bins, least in (("compute_bins", compute_bins, 1), ("cache_bins", cache_bins, 0)):
        for n in bins:
            whole(name, n, least)
    if not compute_bins:
        raise BadInput("scm: compute_bins is empty; the first step has to compute")
    runs = max(len(compute_bins), len(cache_bins))
    padded = [[*bins, *[0] * (runs - len(bins))] for bins in (compute_bins, cache_bins)]
    mask = "".join("1" * c + "0" * r for c, r in zip(*padded, strict=True))
    if steps is not None and len(mask) < whole("steps", steps, 1):
        raise BadInput(f"scm: the bins cover {len(mask)} steps of a run of {steps}; lengthen them")
    return check(mask[:steps])


def scm_policy(policy: str, steps: int) -> str:
    """The mask of a preset ("slow", "medium", "fast", "ultra") for a run of ``steps`` steps. The last step computes."""
    if policy not in POLICIES:
        raise BadInput(f"scm: policy {policy!r} given; expected one of {', '.join(POLICIES)}")
    whole("steps", steps, 4)
    if steps in (5, 7):
        raise BadInput(f"scm: there is no preset for {steps} steps; give the mask itself (4, 6 and 8 or more have one)")
    table = _TABLES.get(steps, _15 if steps < 16 else _28)
    compute, cache = (list(bins) for bins in table[policy])
    if steps > 28:
        _stretch(compute, cache, steps)
    _shrink(compute, cache, steps)
    return scm(compute, cache, steps)[:-1] + "1"


def _stretch(compute: list[int], cache: list[int], steps: int) -> None:
    """Lengthens the runs in turn, each by about half of what the ratio of steps asks, until they cover ``steps``."""
    first = (tuple(compute), tuple(cache))
    pairs = min(len(compute), len(cache))
    while True:
        for i in range(pairs):
            for bins, own in zip((compute, cache), first, strict=True):
                bins[i] += max(int(own[i] * ((steps / 28) * 0.5)), 1)
                if sum(compute) + sum(cache) >= steps:
                    return
        compute[-1] += 1
        if sum(compute) + sum(cache) >= steps:
            return


def _shrink(compute: list[int], cache: list[int], steps: int) -> None:
    """Takes steps off the ends of both lists in turn, the reused ones first, until ``steps`` are left."""
    while True:
        for bins in (cache, compute):
            if sum(compute) + sum(cache) <= steps:
                return
            if bins:
                bins[-1] -= 1
                if not bins[-1]:
                    bins.pop()
