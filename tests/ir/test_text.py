"""Program text: round trips, what it does not depend on, and diffs."""

from __future__ import annotations

import ast
import math
import operator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx

from ditopt._torch import FakeTensorMode
from ditopt.errors import TextError
from ditopt.ir.edit import Editor
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.program import Formal, Function, Program, TensorType
from ditopt.ir.text import diff, parse_program, print_program
from ditopt.ir.verify import verify
from tests.ir.build import Builder, aten, program, sample


def same_numbers(p, q):
    inputs = random_inputs(p)
    (outs, state), (outs_q, state_q) = run_program(p, inputs), run_program(q, inputs)
    assert len(outs) == len(outs_q)
    assert all(torch.equal(a, b) for a, b in zip(outs, outs_q, strict=True))
    assert state.keys() == state_q.keys()
    assert all(torch.equal(state[k], state_q[k]) for k in state)


def round_trip(p):
    text = print_program(p)
    ast.parse(text)
    q = parse_program(text, p.params)
    verify(q)
    assert print_program(q) == text
    assert q == p
    return q


def test_round_trip_of_every_part():
    p = sample()
    verify(p)
    q = round_trip(p)
    same_numbers(p, q)
    for field in ("entry", "inputs", "outputs", "state", "memos", "decisions", "regions", "applied"):
        assert getattr(q, field) == getattr(p, field)
    assert all(q.params[k] is p.params[k] for k in p.params)


def test_metadata_of_parsed_nodes():
    p = sample()
    q = parse_program(print_program(p), p.params)
    modes = set()
    for name, function in q.functions.items():
        shown = [n for n in p.functions[name].graph.nodes if n.op == "call_function"]
        parsed = [n for n in function.graph.nodes if n.op == "call_function"]
        assert [n.meta["region"] for n in shown] == [n.meta["region"] for n in parsed]
        for node in [*function.placeholders, *parsed]:
            assert node.meta["origin"] == "parse"
            modes |= {
                v.fake_mode for v in (node.meta["val"] if isinstance(node.meta["val"], tuple) else [node.meta["val"]])
            }
    assert len(modes) == 1
    assert [n.meta["formal"] for n in q.step.placeholders] == [n.meta["formal"] for n in p.step.placeholders]


def test_the_text_is_this():
    lines = print_program(sample()).splitlines()
    assert lines[0] == "# ditopt program 1"
    assert '    Input("hidden_states", "latent", f32[2, 8]),' in lines
    assert '    StateSlot("cache.1", f32[2, 8], lifetime="model"),' in lines
    assert '    cache_weights: f32[2] = Control("cache.weights"),' in lines
    assert f"{'    v0: f32[2, 8] = aten.linear.default(x, w)':<86}  # .mlp" in lines
    assert f"{'    v0: (f32[2, 8],) = block0(hidden_states, blocks_0_weight)':<86}  # blocks.0" in lines
    assert '    return (v10,), {"cache.0": v11, "cache.1": v12}' in lines
    assert lines[-1] == 'entry = "step"'


def test_text_does_not_depend_on_names_of_fx_or_order_of_dicts():
    p = sample()
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in p.step.graph.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
        if node.op == "call_function":
            values[node].name = f"other_{node.name}"
    step = Function("step", graph, p.step.state_out)
    functions = dict(reversed({**p.functions, "step": step}.items()))
    assert print_program(p.replace(functions=functions, params=dict(reversed(p.params.items())))) == print_program(p)


def test_params_stand_in_natural_order():
    b = Builder("step", FakeTensorMode())
    names = ["blocks.10.w", "blocks.9.w", "a"]
    total = b.op(aten.cat.default, [b.formal("param", n, 2) for n in names])
    text = print_program(program(b.function(total), {n: torch.zeros(2) for n in names}))
    assert text.index('"a"') < text.index('"blocks.9.w"') < text.index('"blocks.10.w"')


def test_every_kind_of_value():
    """What an argument can be; the program is only parsed, not run."""
    b = Builder("step", FakeTensorMode())
    x = b.formal("input", "x", 2, 8)
    val = {"val": b.fake(2, 8), "region": "", "origin": "test"}
    args: list[tuple[Any, Any, Any]] = [
        (aten.add.Tensor, (x, -3), {"alpha": -0.0}),
        (aten.add.Tensor, (x, math.inf), {"alpha": -math.inf}),
        (aten.mul.Tensor, (x, complex(1, -2)), {}),
        (aten.mul.Tensor, (x, 1e-30), {}),
        (aten.clamp.default, (x, None, True), {}),
        (aten.view.default, (x, [2, -1]), {}),
        (aten.permute.default, (x, ()), {}),
        (aten.permute.default, (x, (0,)), {}),
        (aten.index.Tensor, (x, [None, [x, (x, False)], slice(None, 2, -1)]), {}),
        (aten.einsum.default, ("q\"'\\\n# é\u2028😀", [x]), {}),
        (aten.zeros.default, ([2],), {"layout": torch.strided, "dtype": torch.float8_e4m3fn}),
        (aten._to_copy.default, (x,), {"device": torch.device("cuda:1"), "memory_format": torch.channels_last}),
        (aten.to.device, (x, torch.device("cpu"), torch.bool), {}),
        (aten.uniform.default, (x,), {"to": 1.0, "from": 0.5}),
    ]
    nodes = []
    for target, positional, named in args:
        nodes.append(b.graph.call_function(target, positional, named))
        nodes[-1].meta = dict(val)
    p = program(b.function(*nodes))
    text = print_program(p)
    q = parse_program(text, {})
    assert print_program(q) == text
    for node, (target, positional, named) in zip(q.step.results, args, strict=True):
        back, back_named = fx.map_arg((node.args, node.kwargs), lambda n: x)
        assert node.target is target
        assert repr(back) == repr(positional)  # repr tells True from 1 and -0.0 from 0
        assert repr(sorted(back_named.items())) == repr(sorted(named.items()))


def test_nan():
    b = Builder("step", FakeTensorMode())
    out = b.op(aten.full_like.default, b.formal("input", "x", 2), math.nan)
    q = round_trip(program(b.function(out)))
    assert math.isnan(q.step.results[0].args[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint16, torch.float8_e5m2, torch.complex64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 1)])
def test_constants_of_every_type(dtype, shape):
    tensor = torch.ones(shape).to(dtype)
    b = Builder("step", FakeTensorMode())
    p = program(b.function(b.formal("param", "const.c", *shape, dtype=dtype)), {"const.c": tensor})
    round_trip(p)
    if tensor.numel():
        with pytest.raises(TextError, match="the constant that the text was made of"):
            parse_program(print_program(p), {"const.c": torch.zeros(shape).to(dtype)})


def test_constants_without_content_are_not_compared():
    with FakeTensorMode():
        tensor = torch.ones(3)
    b = Builder("step", FakeTensorMode())
    text = print_program(program(b.function(b.formal("param", "const.c", 3)), {"const.c": tensor}))
    assert 'sha256=""' in text
    parse_program(text, {"const.c": torch.ones(3)})


def test_strides():
    b = Builder("step", FakeTensorMode())
    x = b.formal("input", "x", 2, 3, stride=(1, 2))
    y = b.op(aten.expand.default, b.formal("input", "y", 1, 3), [4, 3])
    p = program(b.function(x, y))
    assert "x: f32[2, 3] @ strides(1, 2) = " in print_program(p)
    assert "f32[4, 3] @ strides(0, 1)" in print_program(p)
    q = round_trip(p)
    assert TensorType.of(q.step.results[1].meta["val"]).stride == (0, 1)


def test_several_results():
    b = Builder("step", FakeTensorMode())
    x = b.formal("input", "x", 4, 6)
    parts = b.op(aten.split.Tensor, x, 2, 1)
    one = b.op(operator.getitem, parts, 1)
    norm = b.op(aten.native_layer_norm.default, one, [2], None, None, 1e-5)
    # A result that is a placeholder, and one that is returned twice.
    p = program(b.function(x, b.op(operator.getitem, norm, 0), one, one))
    q = round_trip(p)
    same_numbers(p, q)
    for kind in (tuple, list):
        parts.meta["val"] = kind(parts.meta["val"])
        q = round_trip(p)
        assert type(next(n for n in q.step.graph.nodes if n.op == "call_function").meta["val"]) is kind


@pytest.mark.parametrize("name", ["class", "f32", "v0", "1x", "aten", "step", "a b.c", "é", "", "device"])
def test_names_that_mean_something_else(name):
    b = Builder("step", FakeTensorMode())
    refs = [name, name + "_", name.replace(" ", "_"), "_" + name]
    p = program(b.function(*(b.formal("input", ref, 2) for ref in refs)))
    text = print_program(p)
    assert print_program(parse_program(text, {})) == text


def test_broken_programs_print():
    b = Builder("step", FakeTensorMode())
    odd: Any = object()
    node = b.graph.call_function(torch.nn.functional.relu, (b.graph.placeholder("x"), odd))
    text = str(program(Function("step", b.function(node).graph), inputs=()))
    assert 'unknown("object")' in text
    ast.parse(text)
    with pytest.raises(TextError):
        parse_program(text, {})


# Random graphs

UNARY = [aten.sin.default, aten.relu.default, aten.neg.default, aten.clone.default]
BINARY = [aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor]


@st.composite
def programs(draw):
    """Matrices through views, splits, scalars and shared values, with dead code and unit dimensions."""
    b = Builder("step", FakeTensorMode())
    rows, columns = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    params = {"w": torch.linspace(-1, 1, rows * columns).reshape(rows, columns)}
    values = [b.formal("input", "x", rows, columns), b.formal("param", "w", rows, columns)]
    for _ in range(draw(st.integers(0, 8))):
        x = draw(st.sampled_from(values))
        n, m = x.meta["val"].shape
        kind = draw(st.integers(0, 6))
        if kind == 0:
            values.append(b.op(draw(st.sampled_from(UNARY)), x))
        elif kind == 1:
            y = draw(st.sampled_from([v for v in values if v.meta["val"].shape == (n, m)]))
            values.append(b.op(draw(st.sampled_from(BINARY)), x, y))
        elif kind == 2:
            values.append(b.op(aten.add.Tensor, x, draw(st.floats(width=32)), alpha=draw(st.integers(-2, 2))))
        elif kind == 3:
            values.append(b.op(aten.permute.default, x, [1, 0]))
        elif kind == 4:
            parts = b.op(aten.split.Tensor, x, 1, 1)
            values.append(b.op(operator.getitem, parts, draw(st.integers(0, m - 1))))
        elif kind == 5:
            dtype = draw(st.sampled_from([torch.float64, torch.float32]))
            values.append(b.op(aten._to_copy.default, x, dtype=dtype))
        else:
            values.append(b.op(aten.slice.Tensor, x, -1, draw(st.integers(-1, 0)), None))
    results = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    return program(b.function(*results), params)


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(programs())
def test_random_programs_round_trip(p):
    verify(p)
    q = round_trip(p)
    inputs = random_inputs(p)
    for a, b in zip(run_program(p, inputs)[0], run_program(q, inputs)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# Differences


def edited(p: Program, edit) -> Program:
    with Editor(p.step, "test") as e:
        edit(e, [n for n in e.graph.nodes if n.op == "call_function"])
    return p.replace(functions={**p.functions, p.entry: e.function()})


def changes(text):
    return [line for line in text.splitlines()[3:] if line[0] in "+-"]


def test_equal_programs_have_no_difference():
    p = sample()
    assert diff(p, parse_program(print_program(p), p.params)) == "no change\n"


def test_an_inserted_node_is_two_changes():
    def edit(e, nodes):
        e.replace(nodes[1], e.op(aten.neg.default, nodes[1], after=nodes[1]))

    text = diff(sample(), edited(sample(), edit))
    assert text.splitlines()[0] == "step: 1 added, 0 removed, 1 changed"
    assert changes(text) == [
        "-    v2: f32[2, 8] = aten.add.Tensor(v1, prompt_0)",
        "+    n0: f32[2, 8] = aten.neg.default(v1)",
        "+    v2: f32[2, 8] = aten.add.Tensor(n0, prompt_0)",
    ]


def test_a_removed_node_is_two_changes():
    def edit(e, nodes):
        e.replace(nodes[2], nodes[1])
        e.graph.erase_node(nodes[2])

    text = diff(sample(), edited(sample(), edit))
    assert text.splitlines()[0] == "step: 0 added, 1 removed, 1 changed"
    assert len(changes(text)) == 3


def test_a_new_function_and_a_new_record_show():
    p = sample()
    body = Function("block1", p.functions["block0"].graph)
    text = diff(p, p.replace(functions={**p.functions, "block1": body}, applied=(*p.applied, "copy")))
    assert text.splitlines()[0] == "block1: new (2 nodes)"
    assert '+    "copy",' in changes(text)
    assert diff(p, p.replace(applied=())).splitlines()[0] == "no node changed"
    back = diff(p.replace(functions={**p.functions, "block1": body}), p)
    assert back.splitlines()[0] == "block1: removed (2 nodes)"


def test_a_formal_that_goes_does_not_rename_the_rest():
    p = sample()

    def edit(e, nodes):
        e.replace(nodes[2], nodes[1])
        e.drop_dead()

    after = edited(p, edit)
    assert Formal("memo", "prompt.0") not in [n.meta["formal"] for n in after.step.placeholders]
    assert "v10" in print_program(p)
    assert all("v10" not in line for line in changes(diff(p, after)))
