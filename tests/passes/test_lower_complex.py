"""A pair of real numbers is laid out in memory as the complex value it stands for: later views were captured on it."""

import pytest
import torch
from torch.testing import assert_close

from ditopt.ir.example import Builder
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.program import Program
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
