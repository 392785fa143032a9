"""Training of a stage-wise predictor of features: LESA (arXiv 2602.20497), on recorded trajectories.

The paper's: one expert for each stage of noise, each with a window of its own length over the newest features, computed
or predicted; a linear layer over the window, times a gate that a Kolmogorov-Arnold network (KAN) makes of the gaps in
time; two stages of training, first on recorded features, then in closed loop on the expert's own predictions; L1.

Ours: stages are equal parts of the steps. The linear layer is a number for each value of the window and a matrix of low
rank. What it reads are the newest value and the differences between neighbours in the window, each kind divided by its
size, so that one rate of learning suits all of it. The first stage of training is ridge regression in closed form, cut
to the rank; only the second one descends, by Adam, through whole requests. Errors count relative to how far features
move in the step, lest the last steps, where they move most, be all that is trained. The KAN is one layer: a cubic
spline and a SiLU for each gap, summed. It begins as a constant, the factor under which the result of the first stage
errs least in closed loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from ditopt.calibration.mask import Floats, check, recording
from ditopt.errors import BadInput

RIDGE = 0.1
"""Weight of the ridge penalty, relative to the mean square of what is regressed on."""

ROWS = 256
"""Tokens of each iteration."""

RATE = 3e-3
"""Largest rate of learning."""

INTERVALS = 5
"""Of the splines' grid."""

FACTORS = (1.0, 0.5, 0.25, 0.1)
"""What the gate may begin as."""


@dataclass(frozen=True)
class Plan:
    """When what is predicted, from what. ``predicted``: the steps; ``stage``: (T,) of each step; ``lengths``: of the
    window of each stage, 0 where the stage predicts nothing."""

    predicted: tuple[int, ...]
    stage: NDArray[np.int64]
    lengths: tuple[int, ...]


def plan(mask: str, windows: Sequence[int]) -> Plan:
    """Equal stages of the steps of ``mask``, one for each length in ``windows``; a window that would reach beyond the
    first step is shorter. BadInput where there are fewer steps than stages."""
    check(mask)
    steps, stages = len(mask), len(windows)
    if steps < stages:
        raise BadInput(
            f"lesa: {stages} windows given for {steps} steps; give one window for each stage, at most {steps}"
        )
    stage = np.arange(steps) * stages // steps
    predicted = tuple(t for t in range(steps) if mask[t] == "0")
    first = [next((t for t in predicted if stage[t] == s), 0) for s in range(stages)]
    return Plan(predicted, stage, tuple(min(k, t) for k, t in zip(windows, first, strict=True)))


def train(
    values: ArrayLike,
    times: ArrayLike,
    mask: str,
    windows: Sequence[int],
    rank: int,
    iterations: int,
    seed: int = 0,
) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """The tables of ``ditopt.ir.learned`` for a recording.

    values: (N, T, P, C) features. times: (T,) the model's time. mask: steps that compute. windows: longest window of
    each stage of the request. rank: of the linear layers. iterations: of the second stage of training, 0 leaves it out.
    Deterministic by ``seed`` on one machine. BadInput where something does not fit.
    """
    made, experts = _experts(values, times, mask, windows, rank, iterations, seed)
    return _tables(made, experts, max(windows))


def _experts(
    values: ArrayLike, times: ArrayLike, mask: str, windows: Sequence[int], rank: int, iterations: int, seed: int
) -> tuple[Plan, list[Expert]]:
    """See ``train``."""
    array = recording(values)
    check(mask, array.shape[1])
    made = plan(mask, windows)
    features = torch.from_numpy(np.ascontiguousarray(np.swapaxes(array, 0, 1), np.float32)).flatten(1, 2)
    gaps = splines(np.asarray(times, np.float64), max(windows))
    experts = [_expert(features, made, s, rank, gaps) for s in range(len(windows))]
    _begin(features, made, experts)
    if made.predicted:
        _descend(features, made, experts, iterations, seed)
    return made, experts


# -- an expert ---------------------------------------------------------------------------------------------------------


@dataclass
class Expert:
    """The predictor of one stage, for a window of k values and C channels, in units of ``sizes`` (k,), those of what it
    reads, and of ``size``, that of what it gives: ``mix`` (k,), ``down`` (k C, rank), ``up`` (rank, C), ``bias`` (C,);
    ``spline`` (k, bases) and ``silu`` (k,) of the gate, and ``bases`` (T, k, bases), ``gaps`` (T, k) that they weigh.
    """

    sizes: Tensor
    size: Tensor
    mix: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor
    spline: Tensor
    silu: Tensor
    bases: Tensor
    gaps: Tensor

    def parameters(self) -> list[Tensor]:
        return [self.mix, self.down, self.up, self.bias, self.spline, self.silu]

    def gate(self, step: int) -> Tensor:
        """The KAN of the gaps before ``step``: a number."""
        return (self.spline * self.bases[step]).sum() + (self.silu * F.silu(self.gaps[step])).sum()

    def __call__(self, window: Sequence[Tensor], step: int) -> Tensor:
        read = _read(window, self.sizes)  # (rows, k, C)
        z = (read * self.mix[:, None]).sum(1) + read.flatten(1) @ self.down @ self.up + self.bias
        return window[0] + self.gate(step) * self.size * z


def _read(window: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """The newest value and the differences of neighbours, in units of ``sizes``: (rows, k, C)."""
    parts = [window[0], *(a - b for a, b in itertools.pairwise(window))]
    return torch.stack(parts, 1) / sizes[:, None]


def _expert(features: Tensor, made: Plan, s: int, rank: int, gaps: tuple[Floats, Floats]) -> Expert:
    """The first stage of training: ridge regression on recorded features."""
    k, channels = made.lengths[s], features.shape[-1]
    rank = min(rank, channels)
    steps = [t for t in made.predicted if made.stage[t] == s]
    bases, raw = (torch.from_numpy(np.asarray(g[:, :k], np.float32)) for g in gaps)
    zeros = torch.zeros
    expert = Expert(
        torch.ones(k), torch.ones(()), zeros(k), zeros(k * channels, rank), zeros(rank, channels), zeros(channels),
        zeros(k, bases.shape[-1]), zeros(k), bases, raw,
    )  # fmt: skip
    if not steps:
        return expert
    windows = [_window(features, t, k) for t in steps]
    wanted = torch.cat([features[t] - features[t - 1] for t in steps])
    everything = torch.cat([_read(w, expert.sizes) for w in windows])
    expert.sizes = _size(everything, (0, 2))
    expert.size = _size(wanted, (0, 1))
    x, y = (everything / expert.sizes[:, None]).double(), (wanted / expert.size).double()
    mix = _ridge(x.transpose(0, 1).flatten(1).T, y.reshape(-1, 1))
    left = y - (x * mix[None]).sum(1)
    flat = x.flatten(1)
    center, mean = flat.mean(0), left.mean(0)
    whole = _ridge(flat - center, left - mean)
    basis = torch.linalg.svd((flat - center) @ whole, full_matrices=False)[2][:rank]
    expert.mix, expert.down, expert.up = mix[:, 0].float(), (whole @ basis.T).float(), basis.float().contiguous()
    expert.bias = (mean - center @ whole @ basis.T @ basis).float()
    return expert


def _window(values: Sequence[Tensor] | Tensor, step: int, k: int) -> list[Tensor]:
    """The k values before ``step``, newest first."""
    return [values[step - 1 - i] for i in range(k)]


def _size(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    found = (x**2).mean(dims).sqrt()
    return torch.where(found > 0, found, 1.0)


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    gram = x.T @ x
    return torch.linalg.solve(gram + (RIDGE * gram.diagonal().mean() + 1e-12) * torch.eye(len(gram)).to(gram), x.T @ y)


# -- the loop ----------------------------------------------------------------------------------------------------------


def _roll(features: Tensor, made: Plan, experts: Sequence[Expert]) -> list[Tensor]:
    """A request in closed loop: the recorded value where a step computes, else what is predicted from those before."""
    out = list(features)
    for t in made.predicted:
        s = made.stage[t]
        out[t] = experts[s](_window(out, t, made.lengths[s]), t)
    return out


def _loss(features: Tensor, made: Plan, experts: Sequence[Expert]) -> Tensor:
    """Mean over the predicted steps of the L1 error in closed loop, relative to how far features move in the step."""
    out = _roll(features, made, experts)
    moved = {t: (features[t] - features[t - 1]).abs().mean().clamp_min(1e-12) for t in made.predicted}
    return torch.stack([(out[t] - features[t]).abs().mean() / moved[t] for t in made.predicted]).mean()


@torch.no_grad()
def _begin(features: Tensor, made: Plan, experts: Sequence[Expert]) -> None:
    """The gates begin as the constant that errs least; a spline whose weights are equal is one."""

    def begin(factor: float) -> None:
        for expert in experts:
            expert.spline = torch.full_like(expert.spline, factor / max(len(expert.spline), 1))

    def error(factor: float) -> float:
        begin(factor)
        return float(torch.nan_to_num(_loss(features, made, experts), nan=torch.inf))

    begin(min(FACTORS, key=error) if made.predicted else 1.0)


def _descend(features: Tensor, made: Plan, experts: Sequence[Expert], iterations: int, seed: int) -> None:
    """The second stage of training: through requests in closed loop. What errs more than before it is not kept."""
    if not iterations:
        return
    parameters = [p.requires_grad_() for expert in experts for p in expert.parameters()]
    with torch.no_grad():
        before, start = float(_loss(features, made, experts)), [p.clone() for p in parameters]
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(parameters, lr=RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=max(iterations, 2), pct_start=0.1)
    for _ in range(iterations):
        rows = torch.randint(features.shape[1], (min(ROWS, features.shape[1]),), generator=generator)
        loss = _loss(features[:, rows], made, experts)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        rates.step()
    with torch.no_grad():
        if not float(_loss(features, made, experts)) < before:
            for p, old in zip(parameters, start, strict=True):
                p.copy_(old)


# -- gaps and tables ---------------------------------------------------------------------------------------------------


def splines(times: Floats, window: int) -> tuple[Floats, Floats]:
    """What the KAN reads of each step: cubic B-splines of the gaps, (T, window, INTERVALS + 3), and the gaps, (T,
    window), from 0, the smallest of the request, to 1, the largest. Gap k lies between value k of the window and the
    one after it, the step itself after value 0; before the request gaps are 0."""
    steps = len(times)
    own = np.abs(np.diff(times, prepend=times[:1]))  # that in front of each step
    low, high = (own[1:].min(), own[1:].max()) if steps > 1 else (0.0, 0.0)
    scaled = np.clip((own - low) / (high - low), 0, 1) if high - low > 1e-6 * max(high, 1e-30) else np.zeros(steps)
    gaps = np.array([[scaled[t - k] if t - k > 0 else 0.0 for k in range(window)] for t in range(steps)])
    knots = np.arange(-3, INTERVALS + 4) / INTERVALS
    x = np.minimum(gaps, 1 - 1e-9)[..., None]
    found = ((knots[:-1] <= x) & (x < knots[1:])).astype(np.float64)
    for degree in (1, 2, 3):
        left = (x - knots[: -degree - 1]) / (knots[degree:-1] - knots[: -degree - 1])
        right = (knots[degree + 1 :] - x) / (knots[degree + 1 :] - knots[1:-degree])
        found = left * found[..., :-1] + right * found[..., 1:]
    return found, gaps


@torch.no_grad()
def _tables(made: Plan, experts: Sequence[Expert], window: int) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """As ``ditopt.ir.learned.SHAPES`` says, where values are read as they are."""
    steps, (rank, channels) = len(made.stage), experts[0].up.shape
    mix, down = torch.zeros(len(experts), window), torch.zeros(len(experts), rank, window, channels)
    for s, expert in enumerate(experts):
        for i, value, sign in _undone(len(expert.sizes)):
            scale = sign * expert.size / expert.sizes[i]
            mix[s, value] += scale * expert.mix[i]
            down[s, :, value] += scale * expert.down.unflatten(0, (-1, channels))[i].T
    reads, gate = np.zeros(steps, np.int64), np.ones(steps, np.float32)
    for t in made.predicted:
        reads[t] = made.lengths[made.stage[t]]
        gate[t] = float(experts[made.stage[t]].gate(t))
    return {
        "reads": reads,
        "stage": made.stage.astype(np.int64),
        "gate": gate,
        "mix": mix.numpy(),
        "down": down.flatten(2).numpy(),
        "up": torch.stack([e.up.T for e in experts]).numpy(),
        "bias": torch.stack([e.size * e.bias for e in experts]).numpy(),
    }


def _undone(k: int) -> Iterator[tuple[int, int, float]]:
    """Which value stands in what an expert reads, and with which sign: value 0, then value i - 1 minus value i."""
    if k:
        yield 0, 0, 1.0
    for i in range(1, k):
        yield i, i - 1, 1.0
        yield i, i, -1.0
