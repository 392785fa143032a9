"""MagCache: one mask for the stack of blocks, from the ratio of its residual's magnitude in neighbouring steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ditopt.calibration.profile import Array, Profile
from ditopt.calibration.sources import with_caches
from ditopt.pipeline import Value

REGIONS = ("blocks",)


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """A cache of what the blocks add to their input."""
    threshold = float(parameters["threshold"])
    found = ratios(list(profile.of("blocks").values()))
    chosen = mask(found, threshold, int(parameters["max_skip_steps"]), float(parameters["retention_ratio"]))
    why = f"the magnitudes of what the blocks add differ by more than threshold={threshold:g} in each step"
    return with_caches({"blocks": chosen}, why, residual="yes")


def ratios(values: Sequence[Array]) -> list[float]:
    """The magnitude ratios, one a step: the mean over tokens (of all streams and recordings) of |r(t)| / |r(t - 1)| in
    the L2 norm over channels; 1 at the first step. ``values``: the residual's streams, (N, T, P, C) each."""
    norms = np.concatenate(
        [np.linalg.norm(v.astype(np.float64), axis=-1).swapaxes(0, 1).reshape(v.shape[1], -1) for v in values], axis=1
    )
    before = np.maximum(norms[:-1], np.finfo(np.float32).tiny)
    return [1.0, *(norms[1:] / before).mean(1).tolist()]


def mask(ratios: Sequence[float], threshold: float, max_skip_steps: int, retention_ratio: float) -> list[bool]:
    """The schedule that the published rule gives: True where a step computes.

    After the first ``retention_ratio`` of the steps, the ratios since the last computed step are multiplied; the
    distances of these products from 1 add up, and a step is skipped while the sum is at most ``threshold`` and at most
    ``max_skip_steps`` follow one another.
    """
    out, product, skipped, error = [], 1.0, 0, 0.0
    kept = int(retention_ratio * len(ratios) + 0.5)
    for step, ratio in enumerate(ratios):
        if step < max(kept, 1):  # the first step has nothing to reuse
            out.append(True)
            continue
        product, skipped = product * ratio, skipped + 1
        error += abs(1 - product)
        computes = error > threshold or skipped > max_skip_steps
        out.append(computes)
        if computes:
            product, skipped, error = 1.0, 0, 0.0
    return out
