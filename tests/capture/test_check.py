"""A graph is compared with its model on a second input, which differs from the first in everything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditopt.capture import derive
from ditopt.ir.program import Input, TensorType
from tests.capture.test_capture import Packs
from tests.capture.use import take


def test_an_output_that_is_not_finite_proves_nothing_and_is_refused_nowhere():
    model = Packs("tensor")
    with torch.no_grad():
        model.line.weight.fill_(float("inf"))
    assert take(model, torch.randn(2, 4), torch.rand(2, 1)).program.params


class Rounds(nn.Module):
    """A line whose result is multiplied by ``last``."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.line, self.last = nn.Linear(4, 4), last

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.line(x) * t)


def test_what_rounds_otherwise_is_named():
    def coarse(graph, example):  # a compiler that rounds otherwise
        return lambda *args: [v * (1 + 2**-22) for v in graph(*args)]

    def picked(x):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(x, x, x)

    given = torch.randn(2, 3, 4), torch.rand(2, 1, 1)
    compiled = Rounds(torch.compile(lambda x: x.sin(), backend=coarse))
    notes = take(compiled, *given).notes
    assert any("within rounding" in n and "a part of the model is under torch.compile" in n for n in notes), notes
    given = torch.randn(2, 3, 64, 4), torch.rand(2, 1, 1, 1)
    notes = take(Rounds(picked), *given).notes
    assert any("within rounding" in n and "torch.nn.attention.sdpa_kernel" in n for n in notes), notes
    assert not any("rounding" in n for n in take(Rounds(torch.sin), *given).notes)


@pytest.mark.parametrize(
    ("role", "tensor", "holds"),
    [
        ("latent", torch.randn(4, 5), lambda a, b: not torch.equal(a, b) and (a - b).std() < a.std()),
        ("latent", torch.full((3,), 2.0), lambda a, b: not (a == b).any()),
        ("prompt", torch.zeros(3), lambda a, b: not (a == b).any()),
        ("prompt", torch.arange(9), lambda a, b: not torch.equal(a, b) and set(b.tolist()) <= set(a.tolist())),
        ("prompt", torch.tensor([3, 10]), lambda a, b: not torch.equal(a, b)),
        ("prompt", torch.ones(2, 5), lambda a, b: b.sum() == 8 and not b[:, -1].any()),
        ("prompt", torch.ones(2, 5, dtype=torch.bool), lambda a, b: b.sum() == 8),
        ("prompt", torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]), lambda a, b: b.tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]),
        ("timestep", torch.tensor([500, 1]), lambda a, b: b.tolist() == [375, 0]),
        ("timestep", torch.tensor([0.5]), lambda a, b: b.tolist() == [0.375]),
        ("shape", torch.randn(4), lambda a, b: torch.equal(b, a.flip(0))),
        ("shape", torch.tensor(25.0), torch.equal),
        ("latent", torch.zeros(0, 3), torch.equal),
    ],
)
def test_derive(role, tensor, holds):
    before = tensor.clone()
    (new,) = derive([Input("a", role, TensorType.of(tensor))], [tensor])
    assert (new.dtype, new.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(tensor, before)
    assert holds(tensor, new)
    assert torch.equal(new, derive([Input("a", role, TensorType.of(tensor))], [tensor])[0])
