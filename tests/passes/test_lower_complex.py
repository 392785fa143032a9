"""A pair of real numbers is laid out in memory as the complex value it stands for: later views were captured on it."""

import operator

import pytest
import torch
from torch.testing import assert_close

from ditopt.ir.example import Builder
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.program import Program
from ditopt.ops import gather_tokens, scatter_tokens
from ditopt.passes.lower_complex import _is_complex
from ditopt.pipeline import Context, PassManager

aten = torch.ops.aten


def turned(conjugate: bool) -> Program:
    """Rotary positions on (rows, heads, tokens, width): heads are moved in front of tokens, and back before a view."""
    b = Builder()
    x, angle = b.input("hidden_states", "latent", 2, 6, 16), b.input("angle", "shape", 6, 4)
    turn = b(aten.polar.default, b(aten.ones_like.default, angle), angle)
    heads = b(aten.transpose.int, b(aten.view.default, x, [2, 6, 2, 8]), 1, 2)
    pairs = b(aten.view_as_complex.default, b(aten.view.default, heads, [2, 2, 6, 4, 2]))
    pairs = b(aten.mul.Tensor, b(aten._conj.default, pairs) if conjugate else pairs, turn)
    flat = b(aten.view.default, b(aten.view_as_real.default, pairs), [2, 2, 6, 8])
    return b.program(b(aten.view.default, b(aten.transpose.int, flat, 1, 2), [2, 6, 16]))


@pytest.mark.parametrize("conjugate", [False, True])
def test_a_view_still_reads_what_it_read_when_it_was_captured(conjugate):
    before = turned(conjugate)
    (result,) = PassManager("lower_complex", Context("eager")).run(before)
    assert result.applied
    for was, now in zip(before.step.results, result.program.step.results, strict=True):
        assert was.meta["val"].stride() == now.meta["val"].stride()
    values = random_inputs(before)
    assert_close(run_program(result.program, values)[0], run_program(before, values)[0])
    views = [n for n in result.program.step.graph.nodes if n.target is aten.view.default]
    assert views
    assert all(n.args[0].meta["val"].view(n.args[1]).shape == n.meta["val"].shape for n in views)


@pytest.mark.parametrize("samples", [1, 2])
def test_chosen_tokens_of_a_complex_table(samples):
    """Rotary tables are gathered, and turned keys put back, as pairs; a real value beside them stays what it is."""
    b = Builder()
    x, angle = b.input("hidden_states", "latent", samples, 6, 8), b.input("angle", "shape", 1, 6, 4)
    index = b.input("index", "latent", samples, 3, dtype=torch.int64)
    turn = b(aten.polar.default, b(aten.ones_like.default, angle), angle)
    where = index, [1, 1], [0, 0] if samples > 1 else [-1, -1], [0, 0], 6
    short = b(gather_tokens, [turn, x], *where)
    table, own = (b(operator.getitem, short, k) for k in range(2))
    pairs = b(aten.view_as_complex.default, b(aten.view.default, own, [samples, 3, 4, 2]))
    pairs = b(aten.mul.Tensor, pairs, table)
    whole = b(aten.view_as_complex.default, b(aten.view.default, x, [samples, 6, 4, 2]))
    back = b(operator.getitem, b(scatter_tokens, [whole], [pairs], index, [1], where[2][:1], [0], 6), 0)
    before = b.program(b(aten.view_as_real.default, back))
    (result,) = PassManager("lower_complex", Context("eager")).run(before)
    assert not any(_is_complex(n.meta.get("val")) for n in result.program.step.graph.nodes)
    values = random_inputs(before)
    values["index"] = torch.tensor([[5, 0, 2], [1, 4, 3]])[:samples]
    assert_close(run_program(result.program, values)[0], run_program(before, values)[0])


def given_turns(result: bool = False) -> Program:
    """Complex rotations that the caller passes, as they are or (with ``result``) given back too."""
    b = Builder()
    x = b.input("hidden_states", "latent", 2, 6, 8)
    turn = b.input("turn", "shape", 6, 4, dtype=torch.complex64)
    pairs = b(aten.view_as_complex.default, b(aten.view.default, x, [2, 6, 4, 2]))
    out = b(aten.view.default, b(aten.view_as_real.default, b(aten.mul.Tensor, pairs, turn)), [2, 6, 8])
    return b.program(out, turn) if result else b.program(out)


def test_a_complex_input_becomes_pairs_and_is_called_as_before():
    before = given_turns()
    (result,) = PassManager("lower_complex", Context("eager")).run(before)
    after = result.program
    assert result.applied
    assert {i.name: (i.type.dtype, i.type.shape) for i in after.inputs}["turn"] == (torch.float32, (6, 4, 2))
    assert not any(n.meta["val"].is_complex() for n in after.step.graph.nodes if n.op != "output")
    values = random_inputs(before)
    assert values["turn"].imag.any()
    assert_close(run_program(after, values)[0], run_program(before, values)[0])
    assert PassManager("lower_complex", Context("eager")).run(after)[0].refused == ("no value is complex",)


def test_a_complex_output_stays_as_it_is():
    (result,) = PassManager("lower_complex", Context("eager")).run(given_turns(result=True))
    assert not result.applied
    assert result.refused == ("output out1 is complex, and what the caller gets stays as it is",)
