"""Which steps to compute so that the others are served best: ordered partition by dynamic programming.

A run of T steps is cut into groups; a group is computed at its first step and reused until its end. Three published
systems differ in what a stale value costs and in how long a group may be:

BAC          cosine of whole values, one partition for each module, and a union that refreshes volatile MLPs together
             with what they feed (arXiv 2506.13456).
CacheQuant   L1, groups between half and twice the interval (arXiv 2503.01323).
DDT          mean cosine of tokens of the encoder's states (MCG-NJU/DDT, sharing_sampling).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike

from ditopt.calibration.mask import Floats, real, recording, text, whole
from ditopt.errors import BadInput


def partition(cost: ArrayLike, groups: int, shortest: int = 1, longest: int | None = None) -> list[int]:
    """The first steps of ``groups`` consecutive groups of least total cost.

    ``cost``: (T, T); ``cost[i, j]`` is that of serving steps i..j, both included, by a computation at step i. What
    lies below the diagonal is not read. Groups have ``shortest`` to ``longest`` steps (None: any number). Of several
    best partitions the one with the earlier last group is taken. O(groups * T^2).

    BadInput where ``cost`` is not square or not finite, or where no such groups exist.
    """
    matrix = np.asarray(cost, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise BadInput(f"partition: the cost has shape {matrix.shape}; expected (steps, steps)")
    steps = len(matrix)
    if not np.isfinite(matrix[np.triu_indices(steps)]).all():
        raise BadInput("partition: the cost holds NaN or infinity on or above its diagonal")
    whole("groups", groups, 1)
    whole("shortest", shortest, 1)
    longest = steps if longest is None else whole("longest", longest, shortest)
    if not groups * shortest <= steps <= groups * longest:
        raise BadInput(
            f"partition: {steps} steps do not divide into {groups} groups of {shortest} to {longest} steps; "
            "change the number of groups or the limits of their length"
        )
    best = np.full((groups + 1, steps + 1), math.inf)  # best[m, j]: the first j steps in m groups
    begin = np.zeros((groups + 1, steps + 1), dtype=np.int64)  # where the last of them begins
    best[0, 0] = 0.0
    for m in range(1, groups + 1):
        for end in range(m * shortest, min(m * longest, steps) + 1):
            low, high = max(0, end - longest), end - shortest
            totals = best[m - 1, low : high + 1] + matrix[low : high + 1, end - 1]
            first = int(np.argmin(totals))
            best[m, end], begin[m, end] = totals[first], low + first
    found, end = [], steps
    for m in range(groups, 0, -1):
        end = int(begin[m, end])
        found.append(end)
    return found[::-1]


def segments(distance: Floats) -> Floats:
    """Distances of single steps as costs of groups: (T, T) -> (T, T), ``cost[i, j] = sum over k = i..j`` of
    ``distance[i, k]``; 0 below the diagonal."""
    return np.triu(np.cumsum(np.triu(distance), axis=1))


def _cosines(rows: Floats) -> Floats:
    """(..., T, D) -> (..., T, T) cosines of the rows. A zero row is like another zero row and unlike all others."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit = rows / np.where(norms == 0, 1.0, norms)
    zero = norms[..., 0] == 0
    return unit @ np.swapaxes(unit, -1, -2) + (zero[..., :, None] & zero[..., None, :])


def cosine_distance(values: ArrayLike) -> Floats:
    """BAC: one minus the cosine of whole values, mean over recordings: (N, T, P, C) -> (T, T)."""
    array = recording(values)
    return 1.0 - _cosines(array.reshape(*array.shape[:2], -1)).mean(axis=0)


def token_cosine_distance(values: ArrayLike) -> Floats:
    """DDT: one minus the mean, over recordings and tokens, of the cosine over channels: (N, T, P, C) -> (T, T)."""
    array = recording(values)
    return 1.0 - np.mean([_cosines(np.swapaxes(one, 0, 1)).mean(axis=0) for one in array], axis=0)


def l1_distance(values: ArrayLike) -> Floats:
    """CacheQuant: the sum of absolute differences, mean over recordings: (N, T, P, C) -> (T, T)."""
    array = recording(values)
    steps = array.shape[1]
    out = np.zeros((steps, steps))
    for i in range(steps):
        for k in range(i + 1, steps):
            out[i, k] = out[k, i] = np.abs(array[:, k] - array[:, i]).sum() / len(array)
    return out


def volatility(values: ArrayLike) -> float:
    """BAC: how much a module changes from one step to the next, the mean absolute difference: (N, T, P, C) -> number.
    0 for a single step."""
    array = recording(values)
    return float(np.abs(np.diff(array, axis=1)).mean()) if array.shape[1] > 1 else 0.0


def bubbling_union(
    refreshed: Mapping[str, Iterable[int]], mlps: Collection[str], volatilities: Mapping[str, float], n: int
) -> dict[str, list[int]]:
    """BAC: a volatile MLP refreshes whenever an MLP that it feeds does, lest its stale error spreads through them.

    ``refreshed``: the computed steps of each module, in the order in which the modules run. ``mlps``: those that are
    MLPs. The ``n`` MLPs of highest ``volatilities`` take the union with all MLPs behind them, the deepest first, so
    that what a deep one gained reaches the volatile ones before it.
    """
    order = [name for name in refreshed if name in mlps]
    unknown = sorted(set(mlps) - set(refreshed))
    if unknown:
        raise BadInput(f"bac: {unknown[0]!r} is named as an MLP and has no recording")
    whole("volatile", n, 0)
    for name in order:
        real(f"volatility of {name}", volatilities.get(name, math.nan), 0.0)
    out = {name: set(steps) for name, steps in refreshed.items()}
    volatile = sorted(order, key=lambda name: -volatilities[name])[:n]
    for name in sorted(volatile, key=order.index, reverse=True):
        for behind in order[order.index(name) + 1 :]:
            out[name] |= out[behind]
    return {name: sorted(steps) for name, steps in out.items()}


def bac(
    modules: Mapping[str, ArrayLike], refreshes: int, mlps: Collection[str] = (), volatile: int = 3
) -> dict[str, str]:
    """Block-wise Adaptive Caching: the mask of each module.

    ``modules``: a recording (N, T, P, C) of each, in the order in which they run; all of as many steps. ``refreshes``:
    computed steps of a module before the union (10 of 100 in the paper). ``volatile``: how many of the ``mlps`` are
    refreshed with those behind them (3 to 5 in the paper; 0: none).
    """
    if not modules:
        raise BadInput("bac: no recording given; record at least one module")
    lengths = {name: recording(values, name).shape[1] for name, values in modules.items()}
    steps = next(iter(lengths.values()))
    if set(lengths.values()) != {steps}:
        raise BadInput(f"bac: the recordings have {sorted(set(lengths.values()))} steps; record all in the same runs")
    _fits(refreshes, steps)
    found = {n: partition(segments(cosine_distance(v)), refreshes) for n, v in modules.items()}
    changes = {n: volatility(modules[n]) for n in mlps if n in modules}
    return {n: text(steps, s) for n, s in bubbling_union(found, mlps, changes, volatile).items()}


def cachequant(values: ArrayLike, interval: int) -> str:
    """CacheQuant's dynamic programming schedule of one region: (N, T, P, C) -> mask.

    ``ceil(T / interval)`` groups of ``ceil(interval / 2)`` to ``2 * interval`` steps.
    """
    distance = l1_distance(values)
    steps = len(distance)
    whole("interval", interval, 1, steps)
    found = partition(segments(distance), math.ceil(steps / interval), math.ceil(interval / 2), 2 * interval)
    return text(steps, found)


def ddt_sharing(values: ArrayLike, rate: float) -> str:
    """DDT's encoder sharing: (N, T, P, C) states of the encoder -> mask with ``int(T / rate)`` computed steps, the
    first among them; ``rate`` from 1 to T."""
    distance = token_cosine_distance(values)
    steps = len(distance)
    real("rate", rate, 1.0, steps)
    return text(steps, partition(segments(distance), int(steps / rate)))


def _fits(groups: int, steps: int) -> None:
    if whole("refreshes", groups, 1) > steps:
        raise BadInput(f"bac: refreshes={groups} given for recordings of {steps} steps; expected at most {steps}")


__all__ = [
    "bac",
    "bubbling_union",
    "cachequant",
    "cosine_distance",
    "ddt_sharing",
    "l1_distance",
    "partition",
    "segments",
    "token_cosine_distance",
    "volatility",
]
