"""One graph for many shapes: specialised it is the static one, and where it does not fit, the reason is said."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.capture import Captures, bind
from ditopt.errors import BadInput
from ditopt.ir.verify import verify
from ditopt.pipeline import PassManager
from tests.capture.use import run, same, take
from tests.tiny_models import equal, noise, snapshot


class Mixes(nn.Module):
    """Attention over tokens and text; x (batch, tokens, 8), text (batch, words, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        h = torch.cat([self.a(x) * t[:, None, None], self.b(text)], 1)
        h = h + torch.arange(h.shape[1], device=h.device)[:, None] / h.shape[1]
        q = h.view(x.shape[0], -1, 2, 4).transpose(1, 2)
        h = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return self.out(self.more(h.narrow(1, 0, x.shape[1])))

    def more(self, h: Tensor) -> Tensor:
        return h


def make(cls: type[Mixes] = Mixes) -> Mixes:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noise(cls()).requires_grad_(False)  # type: ignore[return-value]


def call(batch: int, tokens: int, words: int = 5, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, text = (torch.randn(batch, n, 8, generator=g) for n in (tokens, words))
    return {"x": x, "t": torch.rand(batch, generator=g) + 0.5, "text": text}


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of torch.export had dynamic sizes."""
    seen: list[bool] = []
    plain = torch.export.export

    def export(*args, dynamic_shapes=None, **named):
        seen.append(dynamic_shapes is not None)
        return plain(*args, dynamic_shapes=dynamic_shapes, **named)

    monkeypatch.setattr(torch.export, "export", export)
    return seen


def right(model: nn.Module, c, **args) -> bool:
    with torch.no_grad():
        return same(run(model, c, **args), model(**args))


def test_one_export_serves_all_shapes(exports):
    model = make()
    before = snapshot(model)
    captures = Captures(model, dynamic=True)
    for shape in ((2, 6, 5), (3, 9, 5), (1, 4, 7), (2, 6, 5)):  # a size of one too, which torch.export keeps apart
        c = captures.take(*bind(model, (), call(*shape)))
        assert exports == [True], c.notes
        verify(c.program)
        assert right(model, c, **call(*shape, seed=1))
        assert c.program.params["a.weight"] is model.a.weight
        assert c.notes[0] == (
            "captured by torch.export with dynamic sizes, once for all shapes: x axes 0, 1; t axis 0; text axes 0, 1 "
            "(fixed by the model's code: x.shape[2] = 8, text.shape[2] = 8)"
        )
        assert len(c.notes) == 2
    assert equal(before, snapshot(model))


def test_what_is_specialised_is_what_is_captured_alone():
    """After the pass that every recipe begins with, the two are one text."""
    model = make()
    captures = Captures(model, dynamic=True)
    captures.take(*bind(model, (), call(2, 6)))
    texts = []
    for c in (captures.take(*bind(model, (), call(3, 8))), take(model, **call(3, 8))):
        texts.append(str(PassManager("canonicalize").run(c.program)[-1].program.replace(applied=())))
    assert texts[0] == texts[1]


def test_the_third_shape_makes_the_graph(exports):
    model = make()
    captures = Captures(model)
    notes = []
    for shape in ((2, 6), (2, 6), (2, 7), (2, 9), (2, 11), (2, 12)):
        c = captures.take(*bind(model, (), call(*shape)))
        assert right(model, c, **call(*shape, seed=1))
        notes.append(c.notes[0])
    assert exports == [False, False, False, True]
    assert notes[:3] == ["captured by torch.export"] * 3
    assert set(notes[3:]) == {
        "captured by torch.export with dynamic sizes, once for all shapes: x axis 1"  # no other size varied
    }
    c = captures.take(*bind(model, (), call(3, 9)))  # now another one does: a second graph
    assert exports[4:] == [True]
    assert c.notes[0].startswith("graph with dynamic sizes (x axis 1): ")
    assert "x.shape[0] is 3, and 2 is fixed in the graph" in c.notes[0]
    assert "x axes 0, 1; t axis 0; text axis 0" in c.notes[1]


def test_the_example_of_the_graph_has_no_size_of_one(exports):
    model = make()
    captures = Captures(model)
    for shape in ((2, 6), (1, 6), (1, 8), (2, 9), (1, 3)):
        c = captures.take(*bind(model, (), call(*shape)))
        assert right(model, c, **call(*shape, seed=1))
    assert exports == [False, False, True]
    assert "x axes 0, 1" in c.notes[0]


def test_it_can_be_forbidden(exports):
    model = make()
    captures = Captures(model, dynamic=False)
    for tokens in (6, 7, 8, 9):
        captures.take(*bind(model, (), call(2, tokens)))
    assert exports == [False] * 4


def test_another_value_is_refused():
    with pytest.raises(BadInput, match="dynamic='yes' given; expected True"):
        ditopt.optimize(make(), dynamic="yes")  # type: ignore[arg-type]


# -- what the model's code does with sizes ---------------------------------------------------------------------------


class Branches(Mixes):
    """Has a table for one size, as models with learned positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 8))

    def more(self, h: Tensor) -> Tensor:
        return h + self.table if h.shape[1] == 6 else h * 2


def test_a_branch_on_a_size_is_a_note_and_a_graph_of_its_own(exports):
    model = make(Branches)
    captures = Captures(model, dynamic=True)
    assert "x.shape[1] = 6" in captures.take(*bind(model, (), call(2, 6))).notes[0]
    c = captures.take(*bind(model, (), call(2, 7)))  # off the size of the table
    assert c.notes[0].endswith("x.shape[1] is 7, and 6 is fixed in the graph")
    assert "captured by torch.export with dynamic sizes, once for all shapes: x axis 1" in c.notes[1]
    assert right(model, c, **call(2, 7, seed=1))
    captures.take(*bind(model, (), call(2, 8)))
    assert exports == [True, True]


class Capped(Mixes):
    def more(self, h: Tensor) -> Tensor:
        return h * 2 if h.shape[1] > 7 else h.tanh()


def test_a_broken_guard_is_said_in_words(exports):
    model = make(Capped)
    captures = Captures(model, dynamic=True)
    captures.take(*bind(model, (), call(2, 6)))
    for _ in range(2):
        c = captures.take(*bind(model, (), call(2, 9)))
        assert right(model, c, **call(2, 9, seed=1))
    said = "the model's code takes another way for this shape: x.shape[1] <= 7 held where the graph was made"
    assert c.notes[0].endswith(said)
    assert exports == [True, True]  # of the other side of the branch


class One(Mixes):
    """A branch that torch.export does not see: a symbol is never one."""

    def more(self, h: Tensor) -> Tensor:
        return h * 2 if h.shape[0] == 1 else h.tanh()


def test_a_graph_that_differs_is_found_by_the_check(exports):
    model = make(One)
    captures = Captures(model, dynamic=True)
    captures.take(*bind(model, (), call(2, 6)))
    c = captures.take(*bind(model, (), call(1, 6)))
    assert "the graph of One differs from the model by" in c.notes[0]
    assert c.notes[-1] == "captured by torch.export"
    assert right(model, c, **call(1, 6, seed=1))


@functools.lru_cache
def table(length: int) -> Tensor:
    return torch.arange(float(length))[:, None]


class Remembers(Mixes):
    def more(self, h: Tensor) -> Tensor:
        return h + table(h.shape[1])


def test_a_cache_by_size_is_captured_shape_by_shape(exports):
    model = make(Remembers)
    captures = Captures(model, dynamic=True)
    for tokens in (6, 7, 8, 9):
        c = captures.take(*bind(model, (), call(2, tokens)))
        assert right(model, c, **call(2, tokens, seed=1))
        assert "no graph with dynamic sizes: Remembers cannot be traced at " in c.notes[0]
        assert "unhashable" in c.notes[0]
        assert c.notes[1:] == ("captured by torch.export",)
    assert exports.count(True) == 3


# -- on the road -----------------------------------------------------------------------------------------------------


def test_optimize_and_explain(exports):
    model = make()
    fast = ditopt.optimize(model, "canonicalize", target="eager", dynamic=True, example_inputs=call(2, 6))
    for shape in ((2, 6), (3, 10), (1, 8), (2, 4), (2, 3), (2, 12)):  # more than are kept
        with torch.no_grad():
            assert torch.equal(fast(**call(*shape, seed=3)), model(**call(*shape, seed=3)))
    assert exports == [True]
    text = ditopt.explain(fast, "canonicalize", example_inputs=call(2, 5), target="eager")
    assert "Capture\n  captured by torch.export with dynamic sizes, once for all shapes: x axes 0, 1;" in text
    assert exports == [True]
    with torch.no_grad():
        model.out.weight.add_(1)
    fast.refresh()
    assert torch.equal(fast(**call(2, 6)), model(**call(2, 6)))
    assert exports == [True, True]
