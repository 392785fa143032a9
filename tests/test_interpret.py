"""The reference interpreter: shared bodies, memos, state, control inputs."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from ditopt._torch import FakeTensorMode, invoke_subgraph
from ditopt.errors import BadInput
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.program import Formal, Function, Input, Memo, Program, StateSlot, TensorType

aten = torch.ops.aten
TYPE = TensorType(torch.float32, (2, 3))


@pytest.fixture
def program() -> Program:
    """y = x + w + w + 2 t + slot + weights, both additions of w by one shared body, 2 t by a memo; slot' = y."""
    with FakeTensorMode() as mode:
        val = mode.from_tensor(torch.empty(2, 3))

    def formal(graph: fx.Graph, name: str, kind, ref: str) -> fx.Node:
        node = graph.placeholder(name)
        node.meta = {"val": val, "region": "", "origin": "test", "formal": Formal(kind, ref)}
        return node

    body = fx.Graph()
    a, b = formal(body, "a", "formal", "a"), formal(body, "b", "formal", "b")
    body.output((body.call_function(aten.add.Tensor, (a, b)),))
    table = fx.Graph()
    table.output((table.call_function(aten.mul.Scalar, (formal(table, "t", "input", "t"), 2.0)),))
    step = fx.Graph()
    h, w = formal(step, "x", "input", "x"), formal(step, "w", "param", "w")
    others = [
        formal(step, "m", "memo", "m.0"),
        formal(step, "s", "state", "slot"),
        formal(step, "c", "control", "d.weights"),
    ]
    for _ in range(2):
        call = step.call_function(invoke_subgraph, (step.get_attr("body"), "body", h, w))
        h = step.call_function(operator.getitem, (call, 0))
    for other in others:
        h = step.call_function(aten.add.Tensor, (h, other))
    step.output((h, h))
    return Program(
        functions={
            "step": Function("step", step, ("slot",)),
            "body": Function("body", body),
            "table": Function("table", table),
        },
        entry="step",
        params={"w": torch.full((2, 3), 0.5)},
        inputs=(Input("x", "latent", TYPE), Input("t", "timestep", TYPE)),
        outputs=("y",),
        state=(StateSlot("slot", TYPE), StateSlot("idle", TYPE)),
        memos=(Memo("m", "table", ("t",), ("m.0",), "schedule"),),
    )


def test_two_steps_hand_on_their_state(program):
    x = random_inputs(program)
    (first,), state = run_program(program, x)
    expected = x["x"] + 0.5 + 0.5 + x["t"] * 2
    assert torch.equal(first, expected)
    assert list(state) == ["slot"]
    (second,), state = run_program(program, x, {**state, "idle": torch.ones(2, 3)})
    assert torch.equal(second, expected + first)
    assert torch.equal(state["slot"], second)
    assert torch.equal(state["idle"], torch.ones(2, 3)), "a slot that the step does not write stays as it was"


def test_given_memos_and_controls_are_used(program):
    x = random_inputs(program)
    (y,), _ = run_program(program, x, memo={"m.0": torch.zeros(2, 3)}, control={"d.weights": torch.full((2, 3), 7.0)})
    assert torch.equal(y, x["x"] + 0.5 + 0.5 + 0.0 + 0.0 + 7.0)


def test_a_missing_input_is_named(program):
    with pytest.raises(BadInput, match="the inputs t are missing; the program takes x, t"):
        run_program(program, {"x": torch.zeros(2, 3)})


def test_random_inputs_have_their_types(program):
    types = {
        "f": TensorType(torch.float16, (4, 5)),
        "i": TensorType(torch.int64, (50,)),
        "b": TensorType(torch.bool, (3,)),
        "s": TensorType(torch.float32, (2, 3), (1, 2)),
    }
    inputs = random_inputs(program.replace(inputs=tuple(Input(k, "latent", t) for k, t in types.items())))
    assert {k: TensorType.of(v) for k, v in inputs.items()} == types
    assert set(inputs["i"].tolist()) == {0, 1}
    assert inputs["b"].all()
