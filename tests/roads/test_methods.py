"""Samplers call a model by its own methods (``forward_with_cfg``): on an optimized model they run what is optimized."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ditopt
from ditopt.forwarding import calls_forward
from tests.foreign.image import ResearchDiT
from tests.foreign.image import research_call as given
from tests.tiny_models import noise


class Guided(ResearchDiT):
    """The methods by which samplers call a denoiser."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.calls = [len]
        self.factor = 1.0

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out.chunk(2, dim=1)
        cond, uncond = eps.chunk(2)
        return torch.cat([(uncond + scale * (cond - uncond)).repeat(2, 1, 1, 1), rest], dim=1)

    def called(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self(x, t, y)

    @torch.no_grad()
    def sampled(self, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        self.last_scale = scale
        return self.forward_with_cfg(x, t, y, scale) * self.last_scale

    def listed(self, *xs: Tensor) -> list[Tensor]:
        return [self(x, torch.zeros(2), torch.zeros(2).long()) for x in xs]

    def parent(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)

    def set_factor(self, factor: float) -> Any:
        self.factor = factor
        return self

    def count(self, x: Tensor) -> int:
        return self.calls[0](x)

    def applied(self, function: Any) -> Any:
        return function(self)


def call_of(step: int, seed: int) -> dict[str, Any]:
    call = given(step, seed)
    assert isinstance(call, dict)
    return call


def guided() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = noise(Guided())
    return model


def test_which_methods_lead_to_forward():
    leads = {"forward_with_cfg", "called", "sampled", "listed"}
    stay = {"parent", "set_factor", "count", "applied", "unpatchify"}
    assert {n for n in leads | stay if calls_forward(Guided, getattr(Guided, n))} == leads


@pytest.mark.parametrize("method", ["forward_with_cfg", "sampled"])
def test_methods_run_the_optimized_forward(method):
    model = guided()
    fast = ditopt.optimize(model, "fora{interval=2}", example_inputs=call_of(0, 0), target="eager", steps=4)
    calls = [{**call_of(k, k), "scale": 3.0} for k in range(4)]
    with torch.no_grad():
        plain = [getattr(guided(), method)(**c) for c in calls]
        with fast.session(steps=4):
            equal = [torch.equal(getattr(fast, method)(**c), p) for c, p in zip(calls, plain, strict=True)]
    assert equal == [True, False, True, False]
    assert fast.stats.share_block_flops < 0.8


def test_what_is_set_on_an_optimized_model_is_set_on_the_model():
    model = guided()
    fast = ditopt.optimize(model, example_inputs=call_of(0, 0), target="eager")
    fast.sampled(**call_of(0, 0), scale=2.0)
    assert model.last_scale == fast.last_scale == 2.0
    fast.note = "kept"
    assert model.note == "kept"
    del fast.note
    assert not hasattr(model, "note")
    assert fast.set_factor(2.0) is model  # a method that does not call forward is the model's own
    assert fast.factor == 2.0
    fast.training = False  # its own
    assert fast.original is model
