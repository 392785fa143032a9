"""The one pass that stands in for ``run_decompositions({})`` gives the same graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt._torch import weightless
from ditopt.capture import bind, capture, job
from ditopt.capture.functional import is_functional
from ditopt.pipeline import PassManager
from tests.capture.use import run, same, take
from tests.tiny_models import ZOO, captured


class Views(nn.Module):
    """Composite operators that return a view for some operands, a copy for others."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        a, b = x.chunk(2, -1)
        turned = a.transpose(1, 2)
        out = [turned.reshape(x.shape[0], -1), a.reshape(-1, 2), turned.contiguous(), b.contiguous(), b.flatten(1)]
        out += [x.to(torch.float64), x.to(x.dtype) + 1, t.type_as(x).expand_as(x), x.unflatten(-1, (2, -1)).mT]
        out += [
            nn.functional.dropout(x, 0.5, False) * 2,
            x.movedim(0, 2),
            x.narrow(1, 1, 2),
            x.squeeze(),
            x.unbind(1)[1],
        ]
        out += [*x.split([1, 2], 1), torch.einsum("abc,abd->acd", a, b), x.float().sum((0, 1)), *x.tensor_split(2, 1)]
        return tuple(o * 1 for o in out)


class Writes(Views):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        y = x * t
        y[:, 0] = 0
        return (y,)


def canonical(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> str:
    spec, tensors = bind(model, args, kwargs)
    program = capture(model, spec, tensors, verify=False).program
    return str(PassManager("canonicalize").run(program)[-1].program.replace(applied=()))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What ``is_functional`` said; the last entry is for the graph that is used."""
    said: list[bool] = []

    def noted(graph: Any) -> bool:
        said.append(is_functional(graph))
        return said[-1]

    monkeypatch.setattr(job, "is_functional", noted)
    return said


def test_operators_that_may_return_views(passes, monkeypatch):
    args = torch.randn(3, 3, 4), torch.rand(3, 1, 1)
    model = Views()
    mine = canonical(model, *args)
    assert passes[0]
    assert same(run(model, take(model, *args), *args), model(*args))
    monkeypatch.setattr(job, "is_functional", lambda graph: False)
    assert mine == canonical(model, *args)


@pytest.mark.parametrize("name", ["dit", "joint"])
def test_models(name, monkeypatch):
    model, c = captured(name)
    mine = str(PassManager("canonicalize").run(c.program)[-1].program.replace(applied=()))
    monkeypatch.setattr(job, "is_functional", lambda graph: False)
    assert mine == canonical(model, **ZOO[name].inputs())


def test_a_graph_that_writes_takes_the_long_way(passes):
    args = torch.randn(3, 3, 4), torch.rand(3, 1, 1)
    c = take(Writes(), *args)
    assert passes == [False, True]  # as traced, and after torch's own decompositions
    assert same(run(Writes(), c, *args), Writes()(*args))


class Table(nn.Module):
    """A table in a plain attribute, as rotary embeddings keep theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.table = nn.Linear(4, 4), torch.polar(torch.ones(9, 2), torch.arange(18.0).view(9, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.line(x).unflatten(-1, (2, 2))) * self.table[: x.shape[1]]
        return torch.view_as_real(pairs).flatten(-2) * t[:, None, None]


def test_a_model_without_weights_keeps_its_tables():
    with weightless():
        model, args = Table(), (torch.randn(2, 5, 4), torch.rand(2))
    program = capture(model, *bind(model, args, {})).program
    assert sorted(program.params) == ["const.table", "line.bias", "line.weight"]
    assert "table" in vars(model)  # only the copy that was traced has it as a buffer
    real = take(Table(), torch.randn(2, 5, 4), torch.rand(2)).program
    assert [str(n.target) for n in program.step.graph.nodes] == [str(n.target) for n in real.step.graph.nodes]
