"""A small denoiser in parts, for transcriptions of papers in NumPy; the loop around it, and what ditopt does in it.

The parts take and return float32 arrays. A transcription calls them where its paper computes; the rest is its own.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import ditopt
from ditopt.capture import capture
from ditopt.errors import DitoptWarning
from tests.tiny_models import Plain, noise

STEPS, DEPTH, PACE = 16, 6, 0.25

Array = Any
Step = Callable[[int, Array, float], tuple[Sequence[str], Array]]
"""Step index, latent, time -> what was decided, by decision; the model's output."""


# -- what runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """``model``: "plain" (single blocks, one stream) or "flux" (three double blocks, then three single ones).
    ``sampler``: "euler", "heun", and guided Euler by a "doubled" batch or by two "calls"."""

    model: str = "plain"
    dtype: torch.dtype = torch.float32
    sampler: str = "euler"
    size: int = 8


_subjects = [Subject()]


def subject() -> Subject:
    return _subjects[-1]


@contextmanager
def on(model: str = "plain", **more: Any) -> Iterator[None]:
    """Inside the block, transcriptions and sessions run this Subject."""
    _subjects.append(Subject(model, **more))
    try:
        yield
    finally:
        _subjects.pop()


@functools.cache
def _model(name: str, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Plain(width=32, depth=DEPTH) if name == "plain" else _flux()
        return noise(made, scale=0.3).to(dtype).requires_grad_(False)


def model() -> Any:
    """Six blocks with noise in their gates."""
    return _model(subject().model, subject().dtype)


def _flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=False,
    )


LABELS = torch.tensor([3, 7])
TEXT = 6
TIMES = [3.0 * (1 - k / STEPS) for k in range(STEPS)]


def given(x: Tensor, t: float, branch: int) -> dict[str, Any]:
    """A call of the model. ``branch``: 0 with the prompt, 1 without, 2 both in one batch."""
    s = subject()
    if s.model == "plain":
        label = (LABELS, torch.zeros_like(LABELS), torch.cat([LABELS, torch.zeros_like(LABELS)]))[branch]
        return {"x": x, "t": torch.full((len(x),), t, dtype=s.dtype), "y": label}
    side = round(x.shape[1] ** 0.5)
    ids = torch.stack([torch.zeros(side * side), torch.arange(side * side) // side, torch.arange(side * side) % side])
    prompts = _prompts(s.dtype)
    return {
        "hidden_states": x,
        "timestep": torch.full((len(x),), t / 3, dtype=s.dtype),
        **{k: torch.cat(v) if branch == 2 else v[branch] for k, v in prompts.items()},
        "img_ids": ids.T.to(s.dtype),
        "txt_ids": torch.zeros(TEXT, 3, dtype=s.dtype),
        "return_dict": False,
    }


@functools.cache
def _prompts(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    g = torch.Generator().manual_seed(5)
    text, pooled = torch.randn(2, 2, TEXT, 32, generator=g), torch.randn(2, 2, 16, generator=g)
    return {"encoder_hidden_states": list(text.to(dtype)), "pooled_projections": list(pooled.to(dtype))}


def start(seed: int) -> Tensor:
    s = subject()
    shape = (2, 4, s.size, s.size) if s.model == "plain" else (2, s.size * s.size // 4, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(s.dtype)


Call = Callable[[int, Tensor, float, int], Tensor]
"""Number of the evaluation, latent, time, branch (as ``given`` takes it) -> the model's output."""


@torch.no_grad()
def request(call: Call, seed: int = 0, stop: int | None = None) -> Array:
    """The model's outputs over a request of STEPS evaluations; ``stop``: cancelled after as many."""
    x = start(seed)
    outputs: list[Tensor] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        if len(outputs) == stop:
            raise StopIteration
        k = len(outputs)
        if subject().sampler == "doubled":
            outputs.append(call(k, torch.cat([x, x]), t, 2).clone())
            with_, without = outputs[-1].chunk(2)
            return without + 2 * (with_ - without)
        if subject().sampler == "calls":
            with_, without = (call(k, x, t, branch).clone() for branch in (0, 1))
            outputs.append(torch.cat([with_, without]))
            return without + 2 * (with_ - without)
        outputs.append(call(k, x, t, 0).clone())
        return outputs[-1]

    try:
        if subject().sampler == "heun":  # two Euler steps, seven of Heun: 16 evaluations
            grid = [3.0 * (1 - i / 10) for i in range(10)]
            for i, t in enumerate(grid[:-1]):
                v = velocity(x, t)
                x = x - PACE * (v if i < 2 else (v + velocity(x - PACE * v, grid[i + 1])) / 2)
        else:
            for t in TIMES:
                x = x - PACE * velocity(x, t)
    except StopIteration:
        pass
    return torch.stack(outputs).float().numpy()


def loop(make: Callable[[], Step], seed: int = 0) -> tuple[list[tuple[str, ...]], Array]:
    """What a transcription decides and gives over a request: a row of decisions a call of the model, and the outputs.
    Each guidance branch has a transcription of its own."""
    steps: dict[int, Step] = {}
    chosen: list[tuple[str, ...]] = []

    def call(k: int, x: Tensor, t: float, branch: int) -> Tensor:
        if branch not in steps:
            with mock.patch.object(Parts, "branch", branch):
                steps[branch] = make()
        decided, v = steps[branch](k, x.float().numpy(), t)
        chosen.append(tuple(decided))
        return _torch(v)

    outputs = request(call, seed)
    return chosen, outputs


@dataclass(frozen=True)
class Run:
    """A request through ditopt. ``choices``: a row a call, one entry a decision; ``reads``: of the host, all; ``told``:
    warnings; ``again``: the outputs of a later request on the same object, after one of another seed and one that was
    cancelled."""

    choices: list[tuple[str, ...]]
    outputs: Array
    again: Array
    reads: int
    told: tuple[str, ...]


_captures: dict[Any, Any] = {}


def _captured(model: Any, spec: Any, tensors: Any, *more: Any) -> Any:
    key = subject().model, *((t.dtype, *t.shape) for t in tensors)
    if key not in _captures:
        _captures[key] = capture(model, spec, tensors, *more)
    return _captures[key]


def captures_shared() -> Any:
    """One capture of a model serves all recipes."""
    return mock.patch("ditopt.capture.captures.capture", _captured)


def drive(fast: Any) -> Call:
    """Calls an optimized model."""

    def call(k: int, x: Tensor, t: float, branch: int) -> Tensor:
        out = fast(**given(x, t, branch))
        return out if isinstance(out, Tensor) else out[0]

    return call


def run(recipe: str) -> Run:
    """The recipe over the loop, on eager."""
    return _run(recipe, subject())


@functools.cache
def _run(recipe: str, _: Subject) -> Run:
    fast = ditopt.optimize(model(), recipe, steps=STEPS, target="eager")

    def once(seed: int, stop: int | None = None) -> Array:
        with fast.session(steps=STEPS):
            return request(drive(fast), seed, stop)

    with warnings.catch_warnings(record=True) as told, captures_shared():
        warnings.simplefilter("always", DitoptWarning)
        first = once(0)
        choices = [tuple(row.choices.values()) for row in fast.schedule_rows]
        reads = fast.stats.reads
        once(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a cancelled request may end before its first reuse
            once(1, stop=5)
        again = once(0)
    return Run(choices, first, again, reads, tuple(str(w.message) for w in told))


def error(a: Array, b: Array) -> float:
    """Largest difference relative to the largest value of ``b``."""
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())


def change(a: Array, b: Array) -> float:
    """mean|a - b| / mean|b|, the distance of all these papers; ``b`` is the older."""
    return float(np.abs(a.astype(np.float64) - b).mean() / np.abs(b.astype(np.float64)).mean())


# -- the model in parts ------------------------------------------------------------------------------------------------


class Parts:
    """The denoiser's parts for one call: ``begin`` sets the time. ``branch``: that of the parts made next."""

    branch = 0

    def __init__(self) -> None:
        self.m: Any = model()
        self.branch = Parts.branch
        self.c = torch.empty(0)

    def begin(self, x: Array, t: float) -> Array:
        """The stream before the first block."""
        latent = _torch(x)
        call = given(latent, t, self.branch)
        rates = torch.exp(-torch.arange(self.m.width // 2) * 0.5)
        angles = call["t"].reshape(-1, 1).float() * rates
        self.c = self.m.time(torch.cat([angles.sin(), angles.cos()], -1).to(latent.dtype)) + self.m.label(call["y"])
        return _numpy(self.m.patch(latent).flatten(2).transpose(1, 2))

    def block(self, i: int, h: Array) -> Array:
        return _numpy(self.m.blocks[i](_torch(h), self.c))

    def seen(self, h: Array, i: int = 1) -> Array:
        """What signals look at of a stream in front of block ``i``."""
        return h

    def blocks(self, h: Array, first: int = 0, stop: int = DEPTH) -> Array:
        for i in range(first, stop):
            h = self.block(i, h)
        return h

    def end(self, h: Array) -> Array:
        """The model's output, from the stream behind the last block."""
        v = self.m.head(_torch(h))
        side = round(v.shape[1] ** 0.5)
        v = v.view(len(v), side, side, 4, 2, 2)
        return _numpy(v.permute(0, 3, 1, 4, 2, 5).reshape(len(v), 4, 2 * side, 2 * side))

    def parameters(self, i: int) -> list[Tensor]:
        """Scale, shift and gate of the attention, then of the MLP."""
        return list(self.m.blocks[i].mod(F.silu(self.c)).unsqueeze(1).chunk(6, -1))

    def modulated(self, h: Array) -> Array:
        """What the first layer of the first block reads."""
        scale, shift, *_ = self.parameters(0)
        return _numpy(self.m.blocks[0].norm1(_torch(h)) * (1 + scale) + shift)

    def attention(self, i: int, h: Array) -> Array:
        """Before the gate."""
        b, (scale, shift, *_) = self.m.blocks[i], self.parameters(i)
        q, k, v = b.qkv(b.norm1(_torch(h)) * (1 + scale) + shift).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return _numpy(b.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    def mlp(self, i: int, h: Array) -> Array:
        """Before the gate."""
        b, (*_, scale, shift, _gate) = self.m.blocks[i], self.parameters(i)
        return _numpy(b.down(F.gelu(b.up(b.norm2(_torch(h)) * (1 + scale) + shift))))

    def gates(self, i: int) -> tuple[Array, Array]:
        """Of attention and MLP."""
        p = self.parameters(i)
        return _numpy(p[2]), _numpy(p[5])


class TwoStreams(Parts):
    """Flux: the tokens of the text, then those of the latent, in one array; double blocks take them apart."""

    def begin(self, x: Array, t: float) -> Array:
        call = given(_torch(x), t, self.branch)
        self.c = self.m.time_text_embed(call["timestep"] * 1000, call["pooled_projections"])
        self.places = self.m.pos_embed(torch.cat([call["txt_ids"], call["img_ids"]]))
        text, latent = self.m.context_embedder(call["encoder_hidden_states"]), self.m.x_embedder(call["hidden_states"])
        return _numpy(torch.cat([text, latent], 1))

    def block(self, i: int, h: Array) -> Array:
        block = [*self.m.transformer_blocks, *self.m.single_transformer_blocks][i]
        text, latent = _torch(h).tensor_split([TEXT], 1)
        return _numpy(torch.cat(block(latent, text, self.c, self.places), 1))

    def seen(self, h: Array, i: int = 1) -> Array:
        """That of the latent, up to where the first single block joins both."""
        return h[:, TEXT:] if i <= 3 else h

    def end(self, h: Array) -> Array:
        return _numpy(self.m.proj_out(self.m.norm_out(_torch(h[:, TEXT:]), self.c)))

    def modulated(self, h: Array) -> Array:
        return _numpy(self.m.transformer_blocks[0].norm1(_torch(h[:, TEXT:]), emb=self.c)[0])


def parts() -> Parts:
    return {"plain": Parts, "flux": TwoStreams}[subject().model]()


def _torch(h: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(h, dtype=np.float32)).to(subject().dtype)


def _numpy(h: Tensor) -> Array:
    return h.float().numpy()


# -- comparisons -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Recipe text, and a transcription of what it does."""

    recipe: str
    transcription: Callable[[], Step]


_read: dict[Any, tuple[list[tuple[str, ...]], Array]] = {}


def wanted(case: Case) -> tuple[list[tuple[str, ...]], Array]:
    """What the transcription decides and gives over the request."""
    key = case.recipe, subject()
    if key not in _read:
        with torch.no_grad():
            _read[key] = loop(case.transcription)
    return _read[key]


NEAR, FAR = 1e-4, 1e-3
ROUNDED = {torch.float32: NEAR, torch.float16: 0.02, torch.bfloat16: 0.1}


def agrees(case: Case) -> None:
    """The session decides as the transcription does, gives its outputs, reuses, and repeats itself."""
    choices, outputs = wanted(case)
    found = run(case.recipe)
    assert found.choices == choices
    assert error(found.outputs, outputs) < ROUNDED[subject().dtype]
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
    return request(drive(model()))


def exact(recipe: str) -> None:
    """The recipe gives the plain model's bits, and says that its cache is of no use."""
    found = run(recipe)
    assert np.array_equal(found.outputs, _plain())
    assert not any("reuse" in row for row in found.choices)
    assert any("never reused" in t for t in found.told)
