"""State of a model that forward writes itself: sizes for later methods, limits put on weights, compiled parts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.errors import CaptureError, SessionError
from tests.foreign.image import ResearchDiT
from tests.foreign.image import research_call as given
from tests.tiny_models import noise


class Sized(ResearchDiT):
    """The grid of a call is kept for ``unpatchify``, as models of several sizes keep it."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.h = self.w = 0

    def unpatchify(self, x: Tensor) -> Tensor:
        c, p = self.out_channels, self.patch_size
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(x.shape[0], self.h, self.w, p, p, c))
        return x.reshape(x.shape[0], c, self.h * p, self.w * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.h, self.w = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        self.rows = self.h
        return super().forward(x, t, y)


class Scales(nn.Module):
    """A weight that forward keeps below a limit, and a table that it fills in."""

    limit = 0.5
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((32,), 0.9))
        self.register_buffer("table", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.clamp_(max=self.limit)
            self.table.copy_(torch.arange(32) / 32)
        return x * self.scale + self.table


class Clamped(ResearchDiT):
    def __init__(self) -> None:
        super().__init__(depth=2)
        self.scales = Scales()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.scales(self.x_embedder(x).flatten(2).transpose(1, 2)) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, False)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


class Halved(Clamped):
    """A weight that every call changes again."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = super().forward(x, t, y)
        self.pos_embed.copy_(self.pos_embed / 2 + 1)
        return out


class Late(Clamped):
    """A weight that the first call reads before it is limited."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = super().forward(x, t, y)
        with torch.no_grad():
            self.pos_embed.clamp_(max=0.1)
        return out


class Remembers(Clamped):
    """A weight that holds what the last call was given."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = super().forward(x, t, y)
        self.pos_embed.copy_(x.mean() + torch.zeros_like(self.pos_embed))
        return out


def call_of(step: int, seed: int) -> dict[str, Any]:
    call = given(step, seed)
    assert isinstance(call, dict)
    return call


def seeded(cls: type) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noise(cls())


def test_attributes_that_every_call_sets_anew_are_no_state():
    model = seeded(Sized)
    fast = ditopt.optimize(model, "lossless", example_inputs=call_of(0, 0), target="eager")
    assert (model.h, hasattr(model, "rows")) == (0, False)  # only copies have run
    with torch.no_grad():
        for step in range(3):
            call = call_of(step, step)
            assert torch.equal(fast(**call), model(**call))
    model.patch_size = 4  # what forward only reads is watched as ever
    fast.reset()
    with pytest.raises(SessionError, match="patch_size of the model changed"):
        fast(**call_of(0, 0))


def test_a_weight_that_every_call_sets_to_the_same_is_no_state():
    model = seeded(Clamped)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = ditopt.optimize(model, "fora{interval=2}", example_inputs=call_of(0, 0), target="eager", steps=4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    calls = [call_of(k, k) for k in range(4)]
    with torch.no_grad():
        plain = [seeded(Clamped)(**c) for c in calls]
        with fast.session(steps=4):
            assert [torch.equal(fast(**c), p) for c, p in zip(calls, plain, strict=True)] == [True, False, True, False]
        model(**calls[0])  # writes into the weights; they say the same afterwards
        with fast.session(steps=4):
            assert [torch.equal(fast(**c), p) for c, p in zip(calls, plain, strict=True)] == [True, False, True, False]


@pytest.mark.parametrize("cls", [Halved, Late, Remembers])
def test_a_weight_that_changes_from_call_to_call_is_refused(cls):
    with pytest.raises(CaptureError, match=rf"{cls.__name__} changes pos_embed during forward"):
        ditopt.optimize(seeded(cls), example_inputs=call_of(0, 0), target="eager")


class Compiled(ResearchDiT):
    """Gives a part of itself to torch.compile, and asks for the time after its blocks."""

    def __init__(self) -> None:
        super().__init__(depth=3)

    @torch.compile(backend="eager")
    def _half(self, x: Tensor) -> Tensor:
        return x * 0.5

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = self._half(super().forward(x, t, y))
        return out if t[0] < 500 else out * 2


def test_parts_that_the_model_compiles_are_captured_as_they_are_written():
    model = seeded(Compiled)
    fast = ditopt.optimize(model, "lossless", example_inputs=call_of(0, 0), target="eager")
    assert any(n.startswith("captured by blocks: blocks.0 ..") for n in fast.compiled.captured.notes)
    with torch.no_grad():
        for step in (0, 5):
            call = call_of(step, step)
            assert torch.equal(fast(**call), model(**call))
