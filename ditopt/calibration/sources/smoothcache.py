"""SmoothCache: one mask for each type of layer, from how far its outputs move within a few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ditopt.calibration.profile import Array, Profile
from ditopt.calibration.sources import with_caches
from ditopt.pipeline import Value

REGIONS = ("blocks.*.attn", "blocks.*.mlp")


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """A cache for each type of layer."""
    alpha, lookahead = float(parameters["alpha"]), int(parameters["lookahead"])
    masks = {r: mask(errors(list(profile.of(r).values()), lookahead), alpha) for r in REGIONS}
    return with_caches(masks, f"the outputs of every layer type move by more than alpha={alpha:g} in each step")


def errors(values: Sequence[Array], lookahead: int) -> NDArray[np.float64]:
    """How far outputs of one type move: (T, lookahead) where [t, k - 1] is the mean over layers and recordings of
    |F(t) - F(t + k)| / |F(t)| in the L1 norm; inf where t + k lies beyond the last step. ``values``: by layer
    (N, T, P, C)."""
    steps = values[0].shape[1]
    out = np.full((steps, lookahead), np.inf)
    for k in range(1, min(lookahead, steps - 1) + 1):
        moved = []
        for layer in values:
            before = layer[:, :-k].astype(np.float64)
            size = np.abs(before).sum((2, 3))
            moved.append(np.abs(before - layer[:, k:]).sum((2, 3)) / np.maximum(size, np.finfo(np.float32).tiny))
        out[: steps - k, k - 1] = np.mean(moved, (0, 1))
    return out


def mask(curves: NDArray[np.float64], alpha: float) -> list[bool]:
    """The greedy schedule: from a computed step on, as many steps reuse as stay within ``alpha`` of it. The first and
    the last step compute."""
    steps, computed = len(curves), 0
    out = [False] * steps
    while computed < steps:
        out[computed] = True
        within = curves[computed] <= alpha
        reach = len(within) if within.all() else int(within.argmin())
        computed += reach + 1
    out[-1] = True
    return out
