"""Constants that a model computes are computed once, by eager: frequencies of an embedding, tables of positions.

A compiler's exponential differs from eager's in its last bit. Times a timestep of 1000 it is the argument of a sine,
whose result is then off by a thousand such bits. Compiled targets are therefore given what is made of numbers alone as
a memo, which eager fills; for them its values are what eager's would be. Fills and ranges stay where they are: they
come out the same everywhere. Exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from ditopt.ir import example
from ditopt.ir.edit import Editor, prune
from ditopt.ir.program import Formal, Function, Memo, Program, callee, is_call
from ditopt.pipeline import Context, Outcome, Pass

aten = torch.ops.aten

MEMO = "folded"

_PLAIN = {
    "arange", "full", "zeros", "ones", "empty", "scalar_tensor", "eye", "view", "reshape", "expand", "unsqueeze",
    "squeeze", "permute", "transpose", "select", "slice", "repeat", "cat", "stack", "clone", "_to_copy", "to", "alias",
    "detach", "lift_fresh_copy", "flip", "meshgrid", "unbind", "split",
}  # fmt: skip
"""Operators that round nothing: what they make is the same on every target."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Let eager compute, once, what is made of numbers alone."""

    contract = "exact"
    legalizes = ("inductor", "onnxruntime")

    def run(self, program: Program, context: Context) -> Outcome:
        if any(m.name == MEMO for m in program.memos):
            return Outcome(program, 0, ("constants are computed once already",))
        elsewhere = {callee(n) for m in program.memos for n in program.functions[m.function].graph.nodes if is_call(n)}
        found = {
            name: values
            for name in dict.fromkeys((program.entry, *(callee(n) for n in program.calls())))
            if name not in elsewhere and (values := list(_folded(program.functions[name])))
        }
        if not found:
            return Outcome(program, 0, ("nothing is computed from numbers alone",))
        memo = fx.Graph()
        results: list[fx.Node] = []
        formals: dict[str, list[Formal]] = {}
        functions = dict(program.functions)
        for name, values in found.items():
            formals[name] = [Formal("memo", f"{MEMO}.{len(results) + i}") for i in range(len(values))]
            results += _copied(values, memo)
            if name != program.entry:
                functions[name] = self._reading(program.functions[name], values, formals[name], body=True)
        memo.output(tuple(results))
        memo_function = Function(f"memo_{MEMO}", memo)
        functions[memo_function.name] = memo_function
        functions[program.entry] = self._entry(program, found, formals)
        names = tuple(f"{MEMO}.{i}" for i in range(len(results)))
        memos = (Memo(MEMO, memo_function.name, (), names, "request"), *program.memos)
        return Outcome(prune(program.replace(functions=functions, memos=memos)), len(results))

    def _reading(self, function: Function, values: list[fx.Node], formals: list[Formal], body: bool) -> Function:
        """``function``, which reads ``values`` from formals."""
        with Editor(function, self.name) as e:
            for value, what in zip(values, formals, strict=True):
                name = what.ref.replace(".", "_")
                e.replace(e[value], e.placeholder(name, Formal("formal", name) if body else what, value.meta["val"]))
            e.drop_dead(formals=False)
        return e.function()

    def _entry(self, program: Program, found: dict[str, list[fx.Node]], formals: dict[str, list[Formal]]) -> Function:
        """The entry, which hands each body what it is to read."""
        own = self._reading(program.step, found.get(program.entry, []), formals.get(program.entry, []), body=False)
        with Editor(own, self.name) as e:
            made: dict[str, list[fx.Node]] = {}
            for node in [n for n in e.graph.nodes if is_call(n) and callee(n) in formals]:
                name = callee(node)
                if name not in made:
                    pairs = zip(formals[name], found[name], strict=True)
                    made[name] = [e.placeholder(f.ref.replace(".", "_"), f, v.meta["val"]) for f, v in pairs]
                node.args = (*node.args, *made[name])
        return e.function()

    @classmethod
    def example_applies(cls) -> Program:
        return example.tiny_dit(rates=True)

    @classmethod
    def example_refuses(cls) -> Program:
        return example.tiny_dit()


def _folded(function: Function) -> Iterator[fx.Node]:
    """The values of ``function`` that read no formal, round something, and are read by what does read one."""
    rounds: dict[fx.Node, bool] = {}
    for node in function.graph.nodes:
        constant = node.op == "call_function" and not is_call(node) and all(a in rounds for a in node.all_input_nodes)
        if constant and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            plain = node.target is getitem or str(node.target).removeprefix("aten.").partition(".")[0] in _PLAIN
            rounds[node] = not plain or any(rounds[a] for a in node.all_input_nodes)
    for node, rounded in rounds.items():
        if rounded and isinstance(node.meta["val"], torch.Tensor) and any(u not in rounds for u in node.users):
            yield node


def _copied(values: list[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    """Copies in ``graph`` of ``values`` and of all that they are made of."""
    needed: dict[fx.Node, None] = {}
    todo = list(values)
    while todo:
        node = todo.pop()
        needed[node] = None
        todo += node.all_input_nodes
    local: dict[fx.Node, fx.Node] = {}
    for node in values[0].graph.nodes:
        if node in needed:
            local[node] = graph.node_copy(node, local.__getitem__)
            local[node].meta["region"] = ""
    return [local[v] for v in values]
