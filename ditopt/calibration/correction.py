"""Closed-form corrections of reused values: CacheQuant's decoupled error correction, ERTACache's rectification and its
redistributed time steps.

Both corrections are an affine map a step and channel, ``corrected = scale * reused + shift``. CacheQuant fits it to
the truth and bounds the scale; ERTACache fits the error, without a bound, and changes the size of the steps too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ditopt.calibration.mask import Floats, alike, anchors, check, numbers, real, recording, relative_l1, text
from ditopt.errors import BadInput
from ditopt.ir.pacing import paced

_FLAT = 1e-12
"""Variance over mean square below which a channel is constant up to rounding, and its slope unknown."""


def held(values: ArrayLike, mask: str) -> Floats:
    """What a schedule of plain reuse would see: (N, T, P, C), at each step the value of the newest computed step."""
    array = recording(values)
    check(mask, array.shape[1])
    return array[:, anchors(mask)]


def affine(truth: ArrayLike, reused: ArrayLike) -> tuple[Floats, Floats]:
    """CacheQuant's decoupled error correction (arXiv 2503.01323) of one step: (..., C) twice -> scale, shift (C,).

    ``scale = cov(truth, reused) / var(reused)``, bounded to [0, 2], and 1 for a channel that is constant;
    ``shift = mean(truth) - scale * mean(reused)``. The mean squared error on what it was fitted to never grows.
    """
    scale, shift = _slope(*_pair(truth, reused), flat=1.0, low=0.0, high=2.0)
    return scale, shift


def decoupled(values: ArrayLike, mask: str) -> tuple[Floats, Floats]:
    """CacheQuant's tables for a schedule of one region: (N, T, P, C) -> scale (T, C), shift (T, C).

    1 and 0 at computed steps; at the others ``affine`` of the recorded value and the one that is reused.
    """
    truth = recording(values)
    reused = held(truth, mask)
    scale, shift = np.ones(truth.shape[1::2]), np.zeros(truth.shape[1::2])
    for step in (s for s, digit in enumerate(mask) if digit == "0"):
        scale[step], shift[step] = affine(truth[:, step], reused[:, step])
    return scale, shift


def _pair(truth: ArrayLike, reused: ArrayLike) -> tuple[Floats, Floats]:
    y, x = numbers(truth, "truth"), numbers(reused, "reused values")
    alike(y, x, "truth and reused values")
    if y.ndim < 1:
        raise BadInput("a correction was asked of single numbers; expected arrays (..., channels)")
    return y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])


def _slope(y: Floats, x: Floats, flat: float, low: float = -np.inf, high: float = np.inf) -> tuple[Floats, Floats]:
    """Least squares ``y = slope * x + shift`` a column, the slope bounded, and ``flat`` where x is constant."""
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    variance = ((x - mean_x) ** 2).mean(axis=0)
    known = variance > _FLAT * (x**2).mean(axis=0)
    covariance = ((x - mean_x) * (y - mean_y)).mean(axis=0)
    slope = np.where(known, np.clip(covariance / np.where(known, variance, 1.0), low, high), flat)
    return slope, mean_y - slope * mean_x


# -- ERTACache ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Erta:
    """ERTACache's tables for T steps.

    ``mask``: its schedule. ``phi``: (T,) by how much a reused step is shortened. ``sigmas``: (T + 1,) the times to run
    at, ending at the given end. ``scale``, ``shift``: (T, C), ``v = scale * reused + shift``.
    """

    mask: str
    phi: Floats
    sigmas: Floats
    scale: Floats
    shift: Floats


def erta_mask(residual: ArrayLike, threshold: float) -> str:
    """ERTACache's reuse set by profiling (arXiv 2508.21091): residuals (output - input) of full runs -> mask.

    The residual is held; a step whose own one differs from it by less than ``threshold`` (relative L1, mean over
    recordings) is reused, else the held one is replaced.
    """
    array = recording(residual, "the residual")
    real("threshold", threshold, 0.0)
    steps, done = array.shape[1], [0]
    for step in range(1, steps):
        if not np.mean([relative_l1(one[done[-1]], one[step]) for one in array]) < threshold:
            done.append(step)
    return text(steps, done)


def erta_threshold(residual: ArrayLike, computed: int) -> float:
    """The smallest threshold at which ``erta_mask`` computes ``computed`` steps at most: its sweep for a given speed.

    A step is judged by its distance to one step that computed, so only distances between steps are worth trying.
    """
    array = recording(residual, "the residual")
    steps = array.shape[1]
    far = [[float(np.mean([relative_l1(r[i], r[j]) for r in array])) for j in range(steps)] for i in range(steps)]

    def count(threshold: float) -> int:
        last, done = 0, 1
        for step in range(1, steps):
            if not far[last][step] < threshold:
                last, done = step, done + 1
        return done

    tried = sorted({float(np.nextafter(d, np.inf)) for i, row in enumerate(far) for d in row[i + 1 :]})
    return next(t for t in tried if count(t) <= computed)


def reused_outputs(inputs: ArrayLike, outputs: ArrayLike, mask: str) -> Floats:
    """ERTACache's outputs on a recorded trajectory: the input plus the held residual, (N, T, P, C)."""
    x, v = _trajectory(inputs, outputs)
    return x + held(v - x, mask)


def phi(inputs: ArrayLike, outputs: ArrayLike, mask: str) -> Floats:
    """ERTACache's shortening of reused steps: (N, T, P, C) twice -> (T,) in [0, 1].

    ``1 - |reused - v[t]| / |v[t] - v[t + 1]|`` in L1, mean over recordings; 1 at computed steps and at the last one,
    which ends where the run ends.
    """
    x, v = _trajectory(inputs, outputs)
    error = np.abs(reused_outputs(x, v, mask) - v).sum(axis=(2, 3))
    out = np.ones(v.shape[1])
    for step in range(len(out) - 1):
        if mask[step] == "0":
            turn = np.abs(v[:, step] - v[:, step + 1]).sum(axis=(1, 2))
            # Where the velocity does not turn at all, any error is too much, and none is none.
            ratio = np.where(
                turn > 0, error[:, step] / np.where(turn > 0, turn, 1.0), np.where(error[:, step] > 0, 1, 0)
            )
            out[step] = np.clip(1.0 - ratio, 0.0, 1.0).mean()
    return out


def redistributed(sigmas: ArrayLike, shortening: ArrayLike) -> Floats:
    """ERTACache's time steps: sigmas (T + 1,) of the scheduler, phi (T,) -> sigmas (T + 1,) to run at.

    Each step goes its share of the time that is left, in the proportions of the scheduler's own steps, times phi; the
    last goes to the end. First and last sigma stay, and phi = 1 changes nothing (ir/pacing.py).
    """
    times, factor = numbers(sigmas, "sigmas", 1), numbers(shortening, "phi", 1)
    if len(times) != len(factor) + 1:
        raise BadInput(f"ertacache: {len(times)} sigmas given for phi of {len(factor)} steps; expected one sigma more")
    if (factor < 0).any() or (factor > 1).any():
        raise BadInput(f"ertacache: phi from {factor.min():g} to {factor.max():g} given; expected numbers from 0 to 1")
    steps = -np.diff(times)
    if not (np.all(steps > 0) or np.all(steps < 0)):
        raise BadInput("ertacache: the sigmas do not fall (or rise) at every step; give those of one run")
    return np.array(paced(times.tolist(), factor.tolist()))


def rectify(outputs: ArrayLike, reused: ArrayLike, mask: str) -> tuple[Floats, Floats]:
    """ERTACache's closed-form rectification: (N, T, P, C) twice -> scale (T, C), shift (T, C).

    The error ``reused - v`` is regressed on ``reused`` (slope ``K = cov / var``, intercept B) and taken off, hence
    ``scale = 1 - K`` and ``shift = -B``; 1 and 0 at computed steps. A channel that is constant keeps its scale of 1.
    """
    v, other = recording(outputs, "outputs"), recording(reused, "reused outputs")
    alike(v, other, "outputs and reused outputs")
    check(mask, v.shape[1])
    scale, shift = np.ones(v.shape[1::2]), np.zeros(v.shape[1::2])
    for step in (s for s, digit in enumerate(mask) if digit == "0"):
        true, guess = _pair(v[:, step], other[:, step])
        slope, intercept = _slope(guess - true, guess, flat=0.0)
        scale[step], shift[step] = 1.0 - slope, -intercept
    return scale, shift


def ertacache(inputs: ArrayLike, outputs: ArrayLike, sigmas: ArrayLike, threshold: float) -> Erta:
    """All of ERTACache from full runs: the model's inputs and outputs (N, T, P, C), sigmas (T + 1,), its lambda."""
    x, v = _trajectory(inputs, outputs)
    mask = erta_mask(v - x, threshold)
    shortening = phi(x, v, mask)
    scale, shift = rectify(v, reused_outputs(x, v, mask), mask)
    return Erta(mask, shortening, redistributed(sigmas, shortening), scale, shift)


def _trajectory(inputs: ArrayLike, outputs: ArrayLike) -> tuple[Floats, Floats]:
    x, v = recording(inputs, "inputs"), recording(outputs, "outputs")
    alike(x, v, "inputs and outputs")
    return x, v
