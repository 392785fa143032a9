"""Systems that decide while sampling, from one number a step: TeaCache, EasyCache, AdaCache.

Here they are simulated on a recording of the uncached run, which turns them into static schedules: exact where the
signal depends on the timestep only, otherwise what they would decide if reuse did not change the trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from ditopt.calibration.mask import Floats, alike, check, numbers, real, recording, relative_l1, text, whole
from ditopt.errors import BadInput

# -- TeaCache ----------------------------------------------------------------------------------------------------------


def relative_changes(values: ArrayLike) -> Floats:
    """``mean|v[t] - v[t-1]| / mean|v[t-1]|`` over tokens and channels: (N, T, P, C) -> (N, T - 1)."""
    array = recording(values)
    if array.shape[1] < 2:
        raise BadInput("a change from step to step was asked of a recording of one step; record at least two")
    out = np.array([[relative_l1(one[t], one[t - 1]) for t in range(1, len(one))] for one in array])
    if np.isinf(out).any():
        step = int(np.argmax(np.isinf(out).any(axis=0)))
        raise BadInput(f"the recorded value is zero everywhere at step {step}, so its relative change has no size")
    return out


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation of two equally shaped arrays; 0 where one of them is constant."""
    a, b = numbers(x, "x").ravel(), numbers(y, "y").ravel()
    alike(a, b, "the two series")
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else 0.0


def choose_signal(signals: Mapping[str, ArrayLike], target: ArrayLike) -> tuple[str, dict[str, float]]:
    """TeaCache: the signal whose changes follow those of the output best, and all correlations.

    ``signals``: changes of each candidate (noisy input, time embedding, modulated input), shaped as ``target``, the
    changes of the blocks' output. The highest absolute correlation wins; of equal ones the first.
    """
    if not signals:
        raise BadInput("choose_signal: no signal given; record at least one")
    found = {name: pearson(series, target) for name, series in signals.items()}
    return max(found, key=lambda name: abs(found[name])), found


@dataclass(frozen=True)
class Rescale:
    """TeaCache's polynomial from a change of the signal to one of the output.

    ``coefficients``: the highest degree first. ``low``, ``high``: the changes that it was fitted on, into which others
    are clamped, since these polynomials explode outside (published ones come without: None). ``correlation``: of the
    points of the fit. ``source``: where published ones are from.
    """

    coefficients: tuple[float, ...]
    low: float | None = None
    high: float | None = None
    correlation: float | None = None
    source: str = ""

    def raw(self, change: float) -> float:
        """The polynomial at ``change``, as it stands."""
        return float(np.polyval(self.coefficients, change))

    def __call__(self, change: float) -> float:
        """What the output is expected to change by, at least 0, for a change of the signal."""
        low = change if self.low is None else max(change, self.low)
        return max(0.0, self.raw(low if self.high is None else min(low, self.high)))


def fit_rescale(signal: ArrayLike, output: ArrayLike, degree: int = 4) -> Rescale:
    """TeaCache's fit (arXiv 2411.19108): least squares of degree 4 over all pooled points.

    ``signal``, ``output``: changes of both between neighbouring steps (``relative_changes``), of one shape. BadInput
    with fewer than ``degree + 1`` different changes of the signal.
    """
    x, y = numbers(signal, "signal"), numbers(output, "output")
    alike(x, y, "signal and output")
    x, y = x.ravel(), y.ravel()
    whole("degree", degree, 0)
    if len(np.unique(x)) <= degree:
        raise BadInput(
            f"teacache: {len(np.unique(x))} different changes of the signal cannot fix a polynomial of degree {degree}"
            "; record more steps or prompts, or choose a signal that is not constant"
        )
    # The fit is made on [-1, 1]: changes of a few percent to the fourth power are lost beside 1.
    middle, half = (x.max() + x.min()) / 2, (x.max() - x.min()) / 2 or 1.0
    fitted = np.polyfit((x - middle) / half, y, degree)
    coefficients = np.poly1d(fitted)(np.poly1d([1 / half, -middle / half])).coeffs
    coefficients = np.concatenate([np.zeros(degree + 1 - len(coefficients)), coefficients])
    return Rescale(tuple(map(float, coefficients)), float(x.min()), float(x.max()), pearson(x, y))


def teacache(changes: ArrayLike, rescale: Rescale, threshold: float, first: int = 1, last: int = 1) -> str:
    """TeaCache's schedule for a series of changes of its signal: (T - 1,), that into step 1 first -> mask.

    Rescaled changes add up; below ``threshold`` the step is reused, else it computes and the sum starts anew. The
    ``first`` and ``last`` steps compute (Wan's "ret" mode: first 5, last 0).
    """
    series = numbers(changes, "changes", 1)
    steps = len(series) + 1
    real("threshold", threshold, 0.0)
    whole("first", first, 1, steps)
    whole("last", last, 0, steps)
    total, done = 0.0, [0]
    for step in range(1, steps):
        if first <= step < steps - last:
            total += rescale(float(series[step - 1]))
            if total < threshold:
                continue
        total = 0.0
        done.append(step)
    return text(steps, done)


_TEACACHE = "TeaCache, arXiv 2411.19108; code: ali-vilab/TeaCache, "

TEACACHE: Mapping[str, Rescale] = MappingProxyType(
    {
        name: Rescale(coefficients, source=_TEACACHE + where)
        for name, where, coefficients in (
            ("flux", "TeaCache4FLUX", (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)),
            ("hunyuan-video", "TeaCache4HunyuanVideo", (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)),
            ("ltx-video", "TeaCache4LTX-Video", (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326)),
            ("open-sora", "eval", (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624)),
            (
                "wan2.1-t2v-1.3b-ret",
                "TeaCache4Wan2.1, retention mode",
                (-5.21862437e4, 9.23041404e3, -5.28275948e2, 13.6987616, -0.0499875664),
            ),
            (
                "wan2.1-t2v-1.3b",
                "TeaCache4Wan2.1",
                (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
            ),
            (
                "wan2.1-t2v-14b-ret",
                "TeaCache4Wan2.1, retention mode",
                (-3.03318725e5, 4.90537029e4, -2.65530556e3, 58.7365115, -0.315583525),
            ),
            (
                "wan2.1-t2v-14b",
                "TeaCache4Wan2.1",
                (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
            ),
        )
    }
)
"""Published polynomials. Each is for its own model, scheduler and resolution, and for changes like those of its fit."""

# -- EasyCache ---------------------------------------------------------------------------------------------------------


def easycache(inputs: ArrayLike, outputs: ArrayLike, threshold: float, first: int = 10, last: int = 1) -> str:
    """EasyCache's decisions (arXiv 2507.02860) on a recorded run: the model's inputs and outputs (N, T, P, C) -> mask.

    The rate ``mean|o_c - o_p| / mean|x_c - x_p|`` of the last two computed steps times the change of the input since
    the previous step, over ``mean|o_c|``, adds up; below ``threshold`` the step is reused. ``first`` 10 for Wan2.1
    (threshold 0.05), 5 for HunyuanVideo (0.025). Recordings decide together.
    """
    x, o = recording(inputs, "inputs"), recording(outputs, "outputs")
    if x.shape[:2] != o.shape[:2]:
        raise BadInput(f"easycache: inputs {x.shape} and outputs {o.shape} differ in recordings or steps")
    steps = x.shape[1]
    real("threshold", threshold, 0.0)
    whole("first", first, 1)
    whole("last", last, 0)
    done, total = [0], 0.0
    for step in range(1, steps):
        if first <= step < steps - last and len(done) > 1:
            before, newest = done[-2], done[-1]
            moved = np.abs(x[:, newest] - x[:, before]).mean()
            rate = np.abs(o[:, newest] - o[:, before]).mean() / moved if moved else math.inf
            size = np.abs(o[:, newest]).mean()
            change = np.abs(x[:, step] - x[:, step - 1]).mean()
            total += rate * change / size if size and change else (math.inf if change else 0.0)
            if total < threshold:
                continue
        total = 0.0
        done.append(step)
    return text(steps, done)


# -- AdaCache ----------------------------------------------------------------------------------------------------------

Codebook = Sequence[tuple[float, int]]
"""Pairs (bound, steps): below the bound, the value serves until ``steps`` later. Bounds ascend; the last is inf."""

ADACACHE: Mapping[str, Codebook] = MappingProxyType(
    {
        "100": ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (math.inf, 3)),
        "30-fast": ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.4, 2), (math.inf, 1)),
        "30-slow": ((0.08, 3), (0.16, 2), (math.inf, 1)),
    }
)
"""Published codebooks of AdaCache (arXiv 2411.02397; code: AdaCache-DiT), for 100 and for 30 steps."""


def interval_of(change: float, codebook: Codebook) -> int:
    """AdaCache: the number of steps from this computed step to the next one."""
    bounds = [b for b, _ in codebook]
    if not bounds or bounds[-1] != math.inf or bounds != sorted(bounds) or any(n < 1 for _, n in codebook):
        raise BadInput(f"codebook {list(codebook)} given; expected (bound, steps) with ascending bounds up to inf")
    if not change >= 0:
        raise BadInput(f"a change of {change} given to a codebook; expected a number from 0 on")
    return next((n for bound, n in codebook if change < bound), codebook[-1][1])


def adacache(probe: ArrayLike, codebook: Codebook) -> str:
    """AdaCache's decisions on a recorded probe layer's residual (N, T, P, C) -> mask, without motion regularization.

    At a computed step, the relative L1 change since the computed step before, over the steps between them, is looked
    up in the codebook: the answer is when the next step computes. The first two and the last two steps compute.
    """
    array = recording(probe, "the probe")
    steps = array.shape[1]
    done, step = [0], 1
    while step < steps:
        held = step - done[-1]
        change = np.mean([relative_l1(one[step], one[done[-1]]) for one in array]) / held
        done.append(step)
        step = step + interval_of(float(change), codebook)
    return check(text(steps, [*done, *range(max(0, steps - 2), steps)]))
