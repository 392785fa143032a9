"""The table of regions of an outlined Program: what each holds, what it costs, which streams run through it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import fx

from ditopt.ir.binding import Binding, bind
from ditopt.ir.cost import flops, function_flops
from ditopt.ir.edit import Editor
from ditopt.ir.modules import find_modules
from ditopt.ir.program import Function, Program, Region, callee
from ditopt.ir.streams import find_streams

INSIDE = ("attn", "mlp", "mod")
"""Roles of the regions inside a block, in the order in which they are listed."""


def describe(program: Program) -> Program:
    """``program`` with the function, the FLOPs and the streams of every region, as they are now."""
    cost = {name: function_flops(program, f) for name, f in program.functions.items()}
    body = {str(n.meta["region"]): callee(n) for n in program.calls()}
    entry: dict[str, int] = {}
    for node in program.step.graph.nodes:
        where = str(node.meta.get("region", ""))
        entry[where] = entry.get(where, 0) + flops(node)
    streams = find_streams(program, bind(program))
    regions: list[Region] = []
    for r in program.regions:
        function = body.get(r.id, "")
        if r.role == "model":
            work = cost[program.entry]
        elif r.role == "stage":
            work = sum(cost[body[b.id]] for b in program.blocks() if b.stage == r.stage and b.id in body)
        elif r.role in INSIDE:
            work = _marked(program.functions[body[r.parent]], r.role) if r.parent in body else 0
        else:
            work = cost[function] if function else entry.get(r.id, 0)
        regions.append(dataclasses.replace(r, function=function, flops=work, streams=streams.get(r.id, ())))
    return program.replace(regions=tuple(regions))


def _marked(body: Function, role: str) -> int:
    return sum(flops(n) for n in body.graph.nodes if n.meta.get("region") == f".{role}")


def with_modules(program: Program, origin: str) -> Program:
    """``program`` with the attention, MLP and modulation of each block marked in its body, and listed as regions."""
    binding = bind(program)
    functions, roles = dict(program.functions), {}
    for name in {r.function for r in program.regions if r.function}:
        functions[name], roles[name] = _mark(program.functions[name], binding, origin)
    regions: list[Region] = []
    for r in program.regions:
        regions.append(r)
        regions += [Region(f"{r.id}.{role}", role, r.id, r.stage) for role in roles.get(r.function, [])]  # type: ignore[arg-type]
    return describe(program.replace(functions=functions, regions=tuple(regions)))


def _mark(body: Function, binding: Mapping[fx.Node, Binding], origin: str) -> tuple[Function, list[str]]:
    role = {n: m.role for m in find_modules(body, binding) for n in m.nodes}
    for node in body.graph.nodes:
        timed = binding.get(node, Binding.CONSTANT) & (Binding.TIMESTEP | Binding.LATENT) == Binding.TIMESTEP
        if node.op == "call_function" and timed:
            role[node] = "mod"
    with Editor(body, origin) as e:
        for node, name in role.items():
            e[node].meta["region"] = f".{name}"
    return e.function(), [r for r in INSIDE if r in role.values()]
