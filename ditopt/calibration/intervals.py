"""Closed-form schedules: systems whose steps follow from a few numbers, without a recording.

Each function returns a mask of ``steps`` digits (ditopt/calibration/mask.py), or one for each thing that it schedules.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from ditopt.calibration.mask import real, text, times, whole
from ditopt.errors import BadInput

# -- every N steps -----------------------------------------------------------------------------------------------------


def fora(steps: int, interval: int) -> str:
    """FORA (arXiv 2407.01425): a step computes when its number is a multiple of ``interval``."""
    whole("steps", steps, 1)
    return text(steps, range(0, steps, whole("interval", interval, 1)))


def taylorseer(steps: int, interval: int, first: int) -> str:
    """TaylorSeer (arXiv 2503.06923): the ``first`` steps compute, then every ``interval``-th, counted from the last of
    them. No forced last step."""
    whole("steps", steps, 1)
    whole("interval", interval, 1)
    first = min(whole("first", first, 1), steps)
    return text(steps, [*range(first), *range(first - 1, steps, interval)])


def diffusers_taylorseer(steps: int, interval: int = 5, before: int = 3, after: int | None = None) -> str:
    """TaylorSeer as diffusers runs it: ``cache_interval``, ``disable_cache_before_step``, ``disable_cache_after_step``.

    Its interval is counted from step ``before + 1``, one later than in the paper: 3 and 5 compute 0, 1, 2, 4, 9, 14.
    """
    whole("steps", steps, 1)
    whole("interval", interval, 1)
    whole("before", before, 0)
    late = steps if after is None else whole("after", after, 0)
    # The first step always computes: it has nothing to extrapolate.
    return text(
        steps, [s for s in range(steps) if s == 0 or s < before or (s - before - 1) % interval == 0 or s >= late]
    )


def deepcache(steps: int, interval: int, center: int | None = None, power: float = 1.4) -> str:
    """DeepCache (arXiv 2312.00858): uniform, or, with ``center``, denser around that step.

    The non-uniform schedule has ``steps // interval`` computed steps. The authors space points evenly in the
    ``1 / power`` scale between ``-center`` and ``steps - center`` and raise them to ``power`` again, where the root of
    a negative number is the complex one, of which the real part counts; ``power`` falls by 0.02 until the points give
    that many different steps. BadInput where none does.
    """
    if center is None:
        return fora(steps, interval)
    whole("steps", steps, 1)
    whole("interval", interval, 1, steps)
    whole("center", center, 0, steps - 1)
    power, wanted = real("power", power, 1.0), steps // interval
    while power > 1:
        points = np.linspace(complex(-center) ** (1 / power), (steps - center) ** (1 / power), wanted + 1)
        inner = np.unique((points**power).real.astype(np.int64))[1:-1]
        found = {0, *(int(x) + center for x in inner)}
        if len(found) == wanted == len(inner) + 1 and max(found) < steps:
            return text(steps, found)
        power -= 0.02
    raise BadInput(
        f"deepcache: no power above 1 gives {wanted} computed steps of {steps} around step {center}; "
        "choose a smaller center or another interval"
    )


def cfg_delta(steps: int, every: int, first: int = 1, last: int = 0) -> str:
    """Reuse of the guidance difference: the mask of the unconditional branch.

    The ``first`` and ``last`` steps evaluate it, and one in ``every`` from step ``first - 1`` on; between, the newest
    difference between both branches is taken off the conditional one.
    """
    whole("last", last, 0, whole("steps", steps, 1))
    first = min(whole("first", first, 1), steps)
    counted = range(first - 1, steps, whole("every", every, 1))
    return text(steps, [*range(first), *counted, *range(steps - last, steps)])


def step_rehash(steps: int, begin: int, end: int) -> str:
    """Streamlined Inference's step rehash (arXiv 2411.01171): in the middle of the run, steps ``begin`` to ``end - 1``,
    one step of each neighbouring pair is reused; the others compute. How the authors find the middle is unpublished."""
    whole("steps", steps, 1)
    whole("begin", begin, 0, steps)
    whole("end", end, begin, steps)
    return text(steps, [s for s in range(steps) if not begin <= s < end or (s - begin) % 2 == 0])


# -- stages ------------------------------------------------------------------------------------------------------------


def delta_dit(steps: int, interval: int, boundary: int) -> tuple[str, str]:
    """Delta-DiT (arXiv 2406.01125): the masks of the front span and of the rear span of blocks.

    Before step ``boundary`` (outlines form) the rear span is reused and the front computes; from it on, the other way
    round. Multiples of ``interval`` compute everything, and so does the first step of the second stage, whose span has
    nothing kept.
    """
    whole("steps", steps, 1)
    whole("interval", interval, 1)
    whole("boundary", boundary, 0, steps)
    full = {s for s in range(steps) if s % interval == 0 or s == boundary}
    front = text(steps, full | set(range(min(boundary, steps))))
    return front, text(steps, full | set(range(boundary, steps)))


def profiling_dit(steps: int, start: int, refresh: Collection[int] | int) -> str:
    """ProfilingDiT (arXiv 2504.03140): the mask of the runs of background blocks.

    Steps before ``start`` compute, and so do those in ``refresh``, or every ``refresh``-th from ``start`` on. The
    authors' HunyuanVideo run (50 steps): start 6, refresh 6, 18, 26, 32, 38, 42, 46, 48.
    """
    whole("steps", steps, 1)
    start = min(whole("start", start, 1), steps)
    if isinstance(refresh, int):
        return text(steps, [*range(start), *range(start, steps, whole("refresh", refresh, 1))])
    outside = [s for s in refresh if not start <= s < steps]
    if outside:
        raise BadInput(f"profiling_dit: refresh step {outside[0]} given; expected steps from {start} to {steps - 1}")
    return text(steps, [*range(start), *refresh])


def tgate(steps: int, gate: int) -> str:
    """T-GATE: the mask of cross-attention, which computes in the first ``gate`` steps and is kept from then on."""
    whole("steps", steps, 1)
    return text(steps, range(whole("gate", gate, 1, steps)))


def interval_guidance(steps: int, begin: int, end: int) -> str:
    """Guidance in an interval: the mask of the unconditional branch, evaluated at steps ``begin`` to ``end - 1``.

    At a 0 there is no guidance: the conditional output is used alone, nothing is reused, so the first digit may be 0.
    """
    whole("steps", steps, 1)
    whole("begin", begin, 0, steps)
    return text(steps, range(begin, whole("end", end, begin, steps)))


# -- windows of the model's time ---------------------------------------------------------------------------------------

Window = tuple[float, float]

PAB: Mapping[str, Mapping[str, tuple[int, Window]]] = MappingProxyType(
    {
        "open-sora": {"spatial": (2, (100, 800)), "temporal": (4, (100, 800)), "cross": (6, (100, 800))},
        "latte": {"spatial": (2, (100, 800)), "temporal": (3, (100, 800)), "cross": (6, (100, 800))},
        "cogvideox": {"spatial": (2, (100, 850))},
    }
)
"""Published strides and windows of PAB by kind of attention (code: NUS-HPC-AI-Lab/VideoSys)."""


def pab(timesteps: Sequence[float], kinds: Mapping[str, tuple[int, Window]]) -> dict[str, str]:
    """Pyramid Attention Broadcast (arXiv 2408.12588): the mask of each kind of attention.

    ``timesteps``: the model's time at each step. ``kinds``: stride and open window of each kind, as in ``PAB``. Inside
    its window a kind computes when the number of the step is a multiple of its stride; outside, and at step 0, always.
    """
    return {kind: _strided(times(timesteps), *_window(kind, *given)) for kind, given in kinds.items()}


def fastercache(
    timesteps: Sequence[float],
    attention_every: int = 2,
    attention_window: Window = (-1, 681),
    uncond_every: int = 5,
    uncond_window: Window = (-1, 641),
) -> tuple[str, str]:
    """FasterCache (arXiv 2410.19355): the masks of attention and of the unconditional branch.

    ``timesteps``: the model's time at each step. Inside its open window attention computes every second step and the
    unconditional branch every fifth; outside, and at step 0, always.
    """
    given = times(timesteps)
    attention = _strided(given, *_window("attention", attention_every, attention_window))
    return attention, _strided(given, *_window("uncond", uncond_every, uncond_window))


def ramp(steps: int) -> list[float]:
    """FasterCache's weight of the newest difference of attention outputs, from 0 at the first step to 1 at the last:
    a reused output is ``newest + (newest - older) * weight``. 0 for a single step."""
    whole("steps", steps, 1)
    return [s / (steps - 1) if steps > 1 else 0.0 for s in range(steps)]


def _strided(timesteps: Sequence[float], stride: int, window: Window) -> str:
    low, high = window
    free = (s for s, t in enumerate(timesteps) if not low < t < high or s % stride == 0)
    return text(len(timesteps), free)


def _window(kind: str, stride: int, window: Window) -> tuple[int, Window]:
    low, high = window
    if math.isnan(low) or math.isnan(high) or low >= high:
        raise BadInput(f"{kind}: window {window} given; expected (low, high) with low below high")
    return whole(f"{kind} stride", stride, 1), window
