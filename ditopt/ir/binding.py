"""Binding times: what a value depends on, by dataflow.

    CONSTANT < SHAPE < PROMPT, TIMESTEP < LATENT        (a join is a union of flags)

State and control inputs count as LATENT: they change every step. An operator that reads only an operand's type
(``zeros_like``, ``expand_as``, ...) does not depend on its values.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ditopt.ir.program import Function, Memo, Program, call_args, callee, formal, is_call

aten = torch.ops.aten

METADATA_ONLY: dict[Any, tuple[int, ...]] = {
    aten.zeros_like.default: (0,),
    aten.ones_like.default: (0,),
    aten.full_like.default: (0,),
    aten.empty_like.default: (0,),
    aten.rand_like.default: (0,),
    aten.new_zeros.default: (0,),
    aten.new_ones.default: (0,),
    aten.new_full.default: (0,),
    aten.new_empty.default: (0,),
    aten.expand_as.default: (1,),
    aten.type_as.default: (1,),
    aten.view_as.default: (1,),
    aten.reshape_as.default: (1,),
}
"""Operator -> positions of the operands of which only the type is read."""


def data_operands(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values ``node`` reads, each once, in order."""
    skip = METADATA_ONLY.get(node.target, ())
    read: dict[fx.Node, None] = {}
    fx.map_arg(([a for i, a in enumerate(node.args) if i not in skip], node.kwargs), read.setdefault)
    return list(read)


class Binding(enum.IntFlag):
    """What a value depends on."""

    CONSTANT = 0
    SHAPE = 1
    PROMPT = 2
    TIMESTEP = 4
    LATENT = 8


_ROLE = {"latent": Binding.LATENT, "timestep": Binding.TIMESTEP, "prompt": Binding.PROMPT, "shape": Binding.SHAPE}


def bind(program: Program) -> dict[fx.Node, Binding]:
    """The binding of every node of the entry, and of every body node joined over its call sites."""
    memo = {v: _of_memo(m) for m in program.memos for v in m.values}
    roles = {i.name: _ROLE[i.role] for i in program.inputs}
    found: dict[fx.Node, Binding] = {}
    start = {}
    for p in program.step.placeholders:
        what = formal(p)
        start[p] = {
            "input": lambda ref: roles[ref],
            "memo": lambda ref: memo[ref],
            "param": lambda ref: Binding.CONSTANT,
        }.get(what.kind, lambda ref: Binding.LATENT)(what.ref)
    _flow(program, program.step, start, found)
    return found


def _of_memo(memo: Memo) -> Binding:
    if not memo.keys:
        return Binding.CONSTANT  # made of weights alone
    return Binding.PROMPT if memo.lifetime == "request" else Binding.TIMESTEP | Binding.PROMPT


def _flow(
    program: Program, function: Function, start: Mapping[fx.Node, Binding], found: dict[fx.Node, Binding]
) -> list[Binding]:
    """Bindings of the results of ``function``; joins into ``found``."""
    local: dict[fx.Node, Binding] = {}
    parts: dict[fx.Node, list[Binding]] = {}
    for node in function.graph.nodes:
        if node.op == "placeholder":
            local[node] = start[node]
        elif is_call(node):
            body = program.functions[callee(node)]
            actual = {p: local[a] for p, a in zip(body.placeholders, call_args(node), strict=True)}
            parts[node] = _flow(program, body, actual, found)
            local[node] = Binding(0)
            for one in parts[node]:
                local[node] |= one
        elif node.op == "call_function" and node.args and node.args[0] in parts:
            local[node] = parts[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            local[node] = Binding(0)
            for used in data_operands(node):
                local[node] |= local[used]
        else:
            local[node] = Binding(0)
    for node, binding in local.items():
        found[node] = found.get(node, Binding(0)) | binding
    return [local[r] for r in function.results]
