"""Binding times: what values depend on."""

from __future__ import annotations

import pytest
import torch

from ditopt.ir.binding import Binding, bind
from ditopt.ir.example import Builder, tiny_dit
from ditopt.ir.program import formal
from ditopt.pipeline import PassManager
from tests.ir.build import add, mul
from tests.tiny_models import captured

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("write", "want"),
    [
        (lambda b, x, t, c: b(aten.zeros_like.default, x), Binding.CONSTANT),
        (lambda b, x, t, c: b(aten.full_like.default, x, 2.0), Binding.CONSTANT),
        (lambda b, x, t, c: add(b, c, b(aten.ones_like.default, x)), Binding.PROMPT),
        (lambda b, x, t, c: b(aten.expand_as.default, t, x), Binding.TIMESTEP),
        (lambda b, x, t, c: b(aten.type_as.default, t, x), Binding.TIMESTEP),
        (lambda b, x, t, c: b(aten.expand_as.default, add(b, t, c), x), Binding.TIMESTEP | Binding.PROMPT),
        (lambda b, x, t, c: b(aten.new_zeros.default, x, [2, 8]), Binding.CONSTANT),
        # the same value read for its content too
        (lambda b, x, t, c: b(aten.expand_as.default, x, x), Binding.LATENT),
        (lambda b, x, t, c: b(aten.type_as.default, x, x), Binding.LATENT),
        (lambda b, x, t, c: b(aten.type_as.default, x, t), Binding.LATENT),
        (lambda b, x, t, c: add(b, mul(b, x, 0.0), c), Binding.LATENT | Binding.PROMPT),
    ],
)
def test_an_operator_that_reads_only_a_type_does_not_depend_on_the_value(write, want):
    b = Builder()
    x, t, c = b.input("x", "latent", 2, 8), b.input("t", "timestep", 2, 1), b.input("c", "prompt", 2, 8)
    program = b.program(write(b, x, t, c))
    assert bind(program)[program.step.results[0]] == want


def test_the_time_embedding_of_wan_is_not_tainted_by_the_prompt():
    """``type_as`` there reads the dtype of the text (CAPTURE, point 23)."""
    program = captured("wan")[1].program
    binding = bind(program)
    model, _ = captured("wan")
    weight = model.condition_embedder.time_proj.weight
    (node,) = [p for p in program.step.placeholders if program.params.get(formal(p).ref) is weight]
    (product,) = node.users
    assert binding[product] == Binding.TIMESTEP


def test_bindings_of_body_nodes_join_over_their_calls():
    program = PassManager("outline_blocks").run(tiny_dit())[-1].program
    binding = bind(program)
    body = program.functions["block0"]
    by_result = {binding[r] for r in body.results}
    assert by_result == {Binding.LATENT | Binding.TIMESTEP | Binding.PROMPT}
    free = [n for n in body.graph.nodes if n.op == "call_function" and not binding[n] & Binding.LATENT]
    assert len([n for n in free if n.target is aten.linear.default]) == 2
