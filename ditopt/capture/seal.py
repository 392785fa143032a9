"""A guard inside a graph: for a program that leaves the process, where nobody could capture it again."""

from __future__ import annotations

import math
import warnings

import torch
from torch import fx

from ditopt.capture.guard import Guard
from ditopt.errors import DitoptWarning
from ditopt.ir.edit import Editor
from ditopt.ir.program import Formal, Program, TensorType, formal

aten = torch.ops.aten


def seal(program: Program, guard: Guard | None) -> Program:
    """``program`` with results that are NaN wherever ``guard`` does not hold, and a DitoptWarning that says so.

    ``program`` itself where there is no guard.
    """
    if guard is None:
        return program
    params = {f.ref: guard.params[f.ref] for f in guard.formals if f.kind == "param"}
    with Editor(program.step, "capture") as e:
        results, n = e.results, program.step.n_results
        valid = None
        for i, (read, node) in enumerate(zip(guard.reads, _inlined(e, guard, program), strict=True)):
            if read.value.ndim == 0:
                one = e.op(aten.eq.Scalar, node, read.value.item())
            else:
                name = f"const.guard{i}"
                params[name] = TensorType.of(node.meta["val"]).pairs(read.value).to(node.meta["val"].device)
                expected = e.placeholder(f"guard{i}", Formal("param", name), node.meta["val"])
                one = e.op(aten.all.default, e.op(aten.eq.Tensor, node, expected))
            valid = one if valid is None else e.op(aten.logical_and.default, valid, one)
        e.set_results([*(_unless(e, valid, r) for r in results[:n]), *results[n:]])
    warnings.warn(
        f"what is written {guard.reads[0].held}: its results are NaN for inputs "
        f"({', '.join(guard.inputs) or 'weights'}) that change them",
        DitoptWarning,
        stacklevel=4,
    )
    return program.replace(
        functions={**program.functions, program.entry: e.function()}, params={**params, **program.params}
    )


def _inlined(e: Editor, guard: Guard, program: Program) -> list[fx.Node]:
    """The values that the guard computes, in the graph that ``e`` edits: the step of ``program``."""
    types = {Formal("input", i.name): i.type for i in program.inputs}
    there = {formal(p): p for p in e.graph.find_nodes(op="placeholder")}
    values: dict[fx.Node, fx.Node] = {}
    for node in guard.graph.graph.nodes:
        if node.op == "placeholder":
            what = formal(node)
            with e.mode:
                value = types[what].pairs(node.meta["val"]) if what in types else node.meta["val"]
            values[node] = there.get(what) or e.placeholder(node.name, what, value)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = e.op(node.target, *args, **kwargs)
    return [values[node] for node in guard.results]


def _unless(e: Editor, valid: fx.Node | None, result: fx.Node) -> fx.Node:
    """``result``, or NaN where ``valid`` is false. Results without a NaN (integers) stay as they are."""
    kind = result.meta["val"]
    if valid is None or not kind.is_floating_point():
        return result
    nan = e.op(aten.full.default, [], math.nan, dtype=kind.dtype, device=kind.device)
    return e.op(aten.where.self, valid, result, nan)
