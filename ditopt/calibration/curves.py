"""Static schedules from curves over the steps: how far a value can be carried on (SmoothCache), how its length changes
(MagCache). One calibration run or a few; nothing is measured while sampling."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ditopt.calibration.mask import Floats, check, numbers, real, recording, relative_l1, text, whole
from ditopt.errors import BadInput

# -- SmoothCache -------------------------------------------------------------------------------------------------------


def lookahead(values: ArrayLike, reach: int = 3) -> Floats:
    """SmoothCache's error curves of one layer (arXiv 2411.10510): (N, T, P, C) -> (reach, T).

    Row k - 1 at step t is what it costs to use the value of step t at step t + k: ``sum|F[t] - F[t + k]| / sum|F[t +
    k]|``, mean over recordings; inf where the run ends before. As in the authors' code the denominator is the value
    that would have been computed.
    """
    array = recording(values)
    steps = array.shape[1]
    whole("reach", reach, 1)
    out = np.full((reach, steps), math.inf)
    for k in range(1, min(reach, steps - 1) + 1):
        for t in range(steps - k):
            out[k - 1, t] = np.mean([relative_l1(one[t], one[t + k]) for one in array])
    return out


def smoothcache(curves: ArrayLike, alpha: float) -> str:
    """SmoothCache's schedule of one type of layer: its ``lookahead`` curves (reach, T), mean over layers -> mask.

    A greedy scan: a computed step is carried on for the most steps whose error, and that of all steps before them, is
    at most ``alpha``. The first and the last step are computed.
    """
    array = np.asarray(curves, dtype=np.float64)
    if array.ndim != 2 or not array.size or np.isnan(array).any() or (array < 0).any():
        raise BadInput(
            f"smoothcache: curves of shape {array.shape} given; expected (reach, steps), not negative or NaN"
        )
    real("alpha", alpha, 0.0)
    steps, done, step = array.shape[1], [], 0
    while step < steps:
        done.append(step)
        ahead = 0
        while ahead < len(array) and step + ahead + 1 < steps and array[ahead, step] <= alpha:
            ahead += 1
        step += ahead + 1
    return text(steps, [*done, steps - 1])


def smoothcache_by_type(layers: Mapping[str, Sequence[ArrayLike]], alpha: float, reach: int = 3) -> dict[str, str]:
    """SmoothCache: the mask of each type of layer, from one recording (N, T, P, C) of each layer of that type."""
    out = {}
    for kind, recordings in layers.items():
        if not len(recordings):
            raise BadInput(f"smoothcache: no layer of type {kind!r} was recorded")
        curves = [lookahead(values, reach) for values in recordings]
        if len({c.shape for c in curves}) > 1:
            raise BadInput(
                f"smoothcache: layers of type {kind!r} were recorded over {sorted({c.shape[1] for c in curves})} "
                "steps; record them in the same runs"
            )
        out[kind] = smoothcache(np.mean(curves, axis=0), alpha)
    return out


# -- MagCache ----------------------------------------------------------------------------------------------------------


def magnitude_ratios(residual: ArrayLike) -> Floats:
    """MagCache's gammas (arXiv 2506.09045) of a recorded residual of the blocks, out - in: (N, T, P, C) -> (T,).

    ``gamma[t]`` is the mean, over recordings and tokens, of the norm of a token's residual at step t over that at step
    t - 1; ``gamma[0] = 1``. Tokens whose earlier residual is zero are left out.
    """
    norms = np.linalg.norm(recording(residual, "the residual"), axis=-1)
    out = np.ones(norms.shape[1])
    for t in range(1, len(out)):
        before, now = norms[:, t - 1], norms[:, t]
        if not before.any():
            raise BadInput(f"magcache: the residual of step {t - 1} is zero everywhere; record out - in of the blocks")
        out[t] = np.mean(now[before > 0] / before[before > 0])
    return out


def resample(ratios: ArrayLike, steps: int) -> Floats:
    """MagCache's gammas for another number of steps: the nearest in normalised step index, (T,) -> (steps,)."""
    array = numbers(ratios, "ratios", 1)
    if whole("steps", steps, 1) == 1:
        return array[-1:]
    return array[np.round(np.arange(steps) * ((len(array) - 1) / (steps - 1))).astype(int)]


def magcache(
    ratios: ArrayLike, threshold: float = 0.06, longest: int = 3, retention: float = 0.2, never: Collection[int] = ()
) -> str:
    """MagCache's schedule from its gammas: (T,) -> mask.

    The first ``int(retention * T + 0.5)`` steps compute. From then on the product of the gammas since the last computed
    step says how much longer the residual would be: the step is reused while the sum of the distances of that product
    from 1 is at most ``threshold`` and no more than ``longest`` steps were reused in a row. Steps in ``never`` compute
    (the authors' code for FLUX computes step 11 of 28). Defaults are those of diffusers.
    """
    array = numbers(ratios, "ratios", 1)
    real("threshold", threshold, 0.0)
    whole("longest", longest, 0)
    real("retention", retention, 0.0, 1.0)
    steps = len(array)
    if not all(0 <= s < steps for s in never):
        raise BadInput(f"magcache: never={sorted(never)} given for {steps} steps; expected steps from 0 to {steps - 1}")
    product, error, reused, done = 1.0, 0.0, 0, []
    for step, gamma in enumerate(array):
        if step >= int(retention * steps + 0.5):
            product *= gamma
            error += abs(1.0 - product)
            reused += 1
            if step and error <= threshold and reused <= longest and step not in never:
                continue
            product, error, reused = 1.0, 0.0, 0
        done.append(step)
    return check(text(steps, done))


FLUX_RATIOS = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359),
    0.89062,
)
"""Published gammas of FLUX.1-dev at 28 steps (code: Zehong-Ma/MagCache). Schedules of the authors: threshold 0.24,
longest 5, retention 0.1, never 11."""
