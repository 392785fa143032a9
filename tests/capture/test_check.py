"""A graph is compared with its model on a second input, which differs from the first in everything."""

from __future__ import annotations

import pytest
import torch

from ditopt.capture import derive
from ditopt.ir.program import Input, TensorType
from tests.capture.test_capture import Packs
from tests.capture.use import take


def test_an_output_that_is_not_finite_proves_nothing_and_is_refused_nowhere():
    model = Packs("tensor")
    with torch.no_grad():
        model.line.weight.fill_(float("inf"))
    assert take(model, torch.randn(2, 4), torch.rand(2, 1)).program.params


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
