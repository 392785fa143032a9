"""Small Programs written by hand, for the tests of the IR."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ditopt._torch import FakeTensorMode, invoke_subgraph
from ditopt.ir.program import (
    Decision,
    Formal,
    Function,
    Input,
    Interval,
    Memo,
    Predictor,
    Program,
    Region,
    StateSlot,
    TensorType,
)
from ditopt.ops.select import select

aten = torch.ops.aten


class Builder:
    """One function under construction; every node gets the metadata that a Program asks for."""

    def __init__(self, name, mode):
        self.name, self.mode, self.graph = name, mode, fx.Graph()

    def fake(self, *shape, dtype=torch.float32, stride=None):
        with self.mode:
            if stride is not None:
                return torch.empty_strided(shape, stride, dtype=dtype)
            return torch.empty(shape, dtype=dtype)

    def formal(self, kind, ref, *shape, dtype=torch.float32, stride=None):
        node = self.graph.placeholder("".join(c if c.isalnum() else "_" for c in ref))
        val = self.fake(*shape, dtype=dtype, stride=stride)
        node.meta = {"val": val, "formal": Formal(kind, ref), "region": "", "origin": "test"}
        return node

    def op(self, target, *args, region="", **kwargs):
        node = self.graph.call_function(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta = {"val": target(*values, **named), "region": region, "origin": "test"}
        return node

    def call(self, body, *actuals, region=""):
        meta = {"region": region, "origin": "test"}
        name = self.graph.get_attr(body.name)
        name.meta = {**meta, "val": None}
        node = self.graph.call_function(invoke_subgraph, (name, body.name, *actuals))
        node.meta = {**meta, "val": tuple(r.meta["val"] for r in body.results)}
        outs = []
        for i, result in enumerate(body.results):
            outs.append(self.graph.call_function(operator.getitem, (node, i)))
            outs[-1].meta = {**meta, "val": result.meta["val"]}
        return outs

    def function(self, *results, **state):
        self.graph.output((*results, *state.values()))
        return Function(self.name, self.graph, tuple(k.replace("_", ".") for k in state))


def program(step, params=None, inputs=None, **fields):
    """A Program around one function whose inputs are what its placeholders say."""
    if inputs is None:
        inputs = [
            Input(n.meta["formal"].ref, "latent", TensorType.of(n.meta["val"]))
            for n in step.placeholders
            if n.meta["formal"].kind == "input"
        ]
    fields.setdefault("functions", {step.name: step})
    outputs = tuple(f"out{i}" for i in range(step.n_results))
    return Program(entry=step.name, params=params or {}, inputs=tuple(inputs), outputs=outputs, **fields)


def sample():
    """A step with every part that a Program can have: two calls of one body, a memo, and a cache of order 1."""
    mode = FakeTensorMode()
    b = Builder("block0", mode)
    x, w = b.formal("formal", "x", 2, 8), b.formal("formal", "w", 8, 8)
    hidden = b.op(aten.linear.default, x, w, region=".mlp")
    body = b.function(b.op(aten.add.Tensor, x, hidden, region=".mlp"))

    b = Builder("prompt", mode)
    text, scale = b.formal("input", "text", 2, 8), b.formal("param", "const.scale", 8)
    memo = b.function(b.op(aten.mul.Tensor, text, scale))

    b = Builder("step", mode)
    x = b.formal("input", "hidden_states", 2, 8)
    weights = [b.formal("param", f"blocks.{i}.weight", 8, 8) for i in range(2)]
    kept = b.formal("memo", "prompt.0", 2, 8)
    slots = [b.formal("state", f"cache.{i}", 2, 8) for i in range(2)]
    control = b.formal("control", "cache.weights", 2)
    first = b.op(aten.add.Tensor, b.call(body, x, weights[0], region="blocks.0")[0], kept)
    [last] = b.call(body, first, weights[1], region="blocks.1")
    parts = [b.op(aten.mul.Tensor, s, b.op(aten.select.int, control, 0, i)) for i, s in enumerate(slots)]
    chosen = b.op(select, last, b.op(aten.add.Tensor, *parts), "cache", region="blocks.1")
    newest = b.op(select, last, slots[0], "cache")
    older = b.op(select, slots[0], slots[1], "cache")
    step = b.function(chosen, cache_0=newest, cache_1=older)

    generator = torch.Generator().manual_seed(0)
    slot = TensorType(torch.float32, (2, 8))
    return Program(
        functions={"step": step, "block0": body, "prompt": memo},
        entry="step",
        params={
            "blocks.0.weight": torch.randn(8, 8, generator=generator),
            "blocks.1.weight": torch.randn(8, 8, generator=generator),
            "const.scale": torch.randn(8, generator=generator),
        },
        inputs=(Input("hidden_states", "latent", slot), Input("text", "prompt", slot)),
        outputs=("sample",),
        state=(StateSlot("cache.0", slot), StateSlot("cache.1", slot, "model")),
        memos=(Memo("prompt", "prompt", ("text",), ("prompt.0",), "request"),),
        decisions=(
            Decision(
                "cache",
                ("blocks.1",),
                Interval(every=3, first=2),
                Predictor("taylor", order=1),
                (("cache.0", "cache.1"),),
                "cache.weights",
            ),
        ),
        regions=(
            Region("model", "model", ""),
            Region("blocks.0", "block", "model", 0, 256, "block0", 'layers.0 "first"'),
            Region("blocks.1", "block", "model", 0, 256, "block0"),
        ),
        applied=("canonicalize", "cache{every=3}"),
    )


def add(b, x, y):
    return b(aten.add.Tensor, x, y)


def mul(b, x, y):
    return b(aten.mul.Tensor, x, y)
