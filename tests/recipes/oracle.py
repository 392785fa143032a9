"""A small denoiser in parts, for transcriptions of papers in NumPy; the loop around it, and what ditopt does in it.

The parts take and return float32 arrays. A transcription calls them where its paper computes; the rest is its own.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

import ditopt
from ditopt.capture import capture
from ditopt.errors import DitoptWarning
from tests.tiny_models import Plain, noise

STEPS, DEPTH, PACE = 16, 6, 0.25

Array = Any
Step = Callable[[int, Array, float], tuple[Sequence[str], Array]]
"""Step index, latent, time -> what was decided, by decision; the model's output."""


@functools.cache
def model() -> Plain:
    """Six blocks with noise in their gates."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return noise(Plain(width=32, depth=DEPTH), scale=0.3).requires_grad_(False)  # type: ignore[return-value]


LABELS = torch.tensor([3, 7])
TIMES = [3.0 * (1 - k / STEPS) for k in range(STEPS)]


def start(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def loop(step: Step, seed: int = 0) -> tuple[list[tuple[str, ...]], Array]:
    """What ``step`` decides and gives over a request: a row of decisions a step, and the outputs (steps, ...)."""
    x, chosen, outputs = start(seed).numpy(), [], []
    for k, t in enumerate(TIMES):
        decided, v = step(k, x, t)
        chosen.append(tuple(decided))
        outputs.append(v)
        x = x - np.float32(PACE) * v
    return chosen, np.stack(outputs)


@dataclass(frozen=True)
class Run:
    """A request through ditopt. ``choices``: a row a step, one entry a decision; ``reads``: of the host, all; ``told``:
    warnings; ``again``: the outputs of a second request on the same object, after one of another seed."""

    choices: list[tuple[str, ...]]
    outputs: Array
    again: Array
    reads: int
    told: tuple[str, ...]


_captures: list[Any] = []


def _captured(*args: Any) -> Any:
    if not _captures:
        _captures.append(capture(*args))
    return _captures[0]


@functools.cache
def run(recipe: str) -> Run:
    """The recipe over the loop, on eager; one capture serves all recipes."""
    fast = ditopt.optimize(model(), recipe, steps=STEPS, target="eager")

    def request(seed: int) -> Array:
        x, outputs = start(seed), []
        with fast.session(steps=STEPS):
            for t in TIMES:
                v = fast(x, torch.full((2,), t), LABELS)
                outputs.append(v.numpy().copy())
                x = x - PACE * v
        return np.stack(outputs)

    with warnings.catch_warnings(record=True) as told, mock.patch("ditopt.capture.captures.capture", _captured):
        warnings.simplefilter("always", DitoptWarning)
        first = request(0)
        choices = [tuple(row.choices.values()) for row in fast.schedule_rows]
        reads = fast.stats.reads
        request(1)
        again = request(0)
    return Run(choices, first, again, reads, tuple(str(w.message) for w in told))


def error(a: Array, b: Array) -> float:
    """Largest difference relative to the largest value of ``b``."""
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())


def change(a: Array, b: Array) -> float:
    """mean|a - b| / mean|b|, the distance of all these papers; ``b`` is the older."""
    return float(np.abs(a.astype(np.float64) - b).mean() / np.abs(b.astype(np.float64)).mean())


class Parts:
    """The denoiser's parts for one call: ``begin`` sets the time."""

    def __init__(self) -> None:
        self.m: Any = model()
        self.c = torch.empty(0)

    def begin(self, x: Array, t: float) -> Array:
        """The stream before the first block."""
        rates = torch.exp(-torch.arange(self.m.width // 2) * 0.5)
        angles = torch.full((2, 1), t) * rates
        self.c = self.m.time(torch.cat([angles.sin(), angles.cos()], -1)) + self.m.label(LABELS)
        return self.m.patch(torch.from_numpy(x)).flatten(2).transpose(1, 2).numpy()

    def block(self, i: int, h: Array) -> Array:
        return self.m.blocks[i](_torch(h), self.c).numpy()

    def blocks(self, h: Array, first: int = 0, stop: int = DEPTH) -> Array:
        for i in range(first, stop):
            h = self.block(i, h)
        return h

    def end(self, h: Array) -> Array:
        """The model's output, from the stream behind the last block."""
        v = self.m.head(_torch(h)).view(2, 4, 4, 4, 2, 2)
        return v.permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 8).numpy()

    def parameters(self, i: int) -> list[torch.Tensor]:
        """Scale, shift and gate of the attention, then of the MLP."""
        return list(self.m.blocks[i].mod(F.silu(self.c)).unsqueeze(1).chunk(6, -1))

    def modulated(self, h: Array) -> Array:
        """What the first layer of the first block reads."""
        scale, shift, *_ = self.parameters(0)
        return (self.m.blocks[0].norm1(_torch(h)) * (1 + scale) + shift).numpy()

    def attention(self, i: int, h: Array) -> Array:
        """Before the gate."""
        b, (scale, shift, *_) = self.m.blocks[i], self.parameters(i)
        q, k, v = b.qkv(b.norm1(_torch(h)) * (1 + scale) + shift).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return b.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).numpy()

    def mlp(self, i: int, h: Array) -> Array:
        """Before the gate."""
        b, (*_, scale, shift, _gate) = self.m.blocks[i], self.parameters(i)
        return b.down(F.gelu(b.up(b.norm2(_torch(h)) * (1 + scale) + shift))).numpy()

    def gates(self, i: int) -> tuple[Array, Array]:
        """Of attention and MLP."""
        p = self.parameters(i)
        return p[2].numpy(), p[5].numpy()


def _torch(h: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(h, dtype=np.float32))


@dataclass(frozen=True)
class Case:
    """Recipe text, and a transcription of what it does."""

    recipe: str
    transcription: Callable[[], Step]


_read: dict[str, tuple[list[tuple[str, ...]], Array]] = {}


def wanted(case: Case) -> tuple[list[tuple[str, ...]], Array]:
    """What the transcription decides and gives over the request."""
    if case.recipe not in _read:
        with torch.no_grad():
            _read[case.recipe] = loop(case.transcription())
    return _read[case.recipe]


NEAR, FAR = 1e-4, 1e-3


def agrees(case: Case) -> None:
    """The session decides as the transcription does, gives its outputs, reuses, and repeats itself."""
    choices, outputs = wanted(case)
    found = run(case.recipe)
    assert found.choices == choices
    assert error(found.outputs, outputs) < NEAR
    reused = sum(row.count("reuse") for row in choices)
    assert 0 < reused < len(choices) * len(choices[0])
    assert error(found.outputs, run("lossless").outputs) > FAR, "reuse that changes nothing is no test"
    assert np.array_equal(found.again, found.outputs)
    assert not found.told


def differs(case: Case, recipe: str) -> bool:
    """Whether ``recipe`` decides otherwise than the transcription, or gives something else."""
    choices, outputs = wanted(case)
    found = run(recipe)
    return found.choices != choices or error(found.outputs, outputs) > FAR


@functools.cache
def _plain() -> Array:
    x, outputs = start(0), []
    for t in TIMES:
        v = model()(x, torch.full((2,), t), LABELS)
        outputs.append(v.numpy().copy())
        x = x - PACE * v
    return np.stack(outputs)


def exact(recipe: str) -> None:
    """The recipe gives the plain model's bits, and says that its cache is of no use."""
    found = run(recipe)
    assert np.array_equal(found.outputs, _plain())
    assert not any("reuse" in row for row in found.choices)
    assert any("never reused" in t for t in found.told)
