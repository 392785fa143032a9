"""The table of regions of an outlined Program: what each holds, what it costs, which streams run through it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import get_args

from torch import fx

from ditopt.ir.binding import Binding, bind
from ditopt.ir.cost import flops, function_flops
from ditopt.ir.edit import Editor
from ditopt.ir.modules import Module, find_modules
from ditopt.ir.positions import with_rasters
from ditopt.ir.program import Function, Program, Region, call_args, callee
from ditopt.ir.sites import Kind, attention_kinds
from ditopt.ir.streams import find_streams

KINDS: tuple[Kind, ...] = get_args(Kind)
"""What attention can be (ir/sites.py): each module is of one kind."""

INSIDE = ("attn", *(f"attn.{kind}" for kind in KINDS), "mlp", "mod")
"""What the regions inside a block are called behind its id, in the order in which they are listed."""


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
        elif inner := _inside(r.id):
            block = r.id.removesuffix(f".{inner}")
            work = _marked(program.functions[body[block]], inner) if block in body else 0
        else:
            work = cost[function] if function else entry.get(r.id, 0)
        here = with_rasters(streams.get(r.id, ()), r.streams)
        regions.append(dataclasses.replace(r, function=function, flops=work, streams=here))
    return program.replace(regions=tuple(regions))


def _inside(id: str) -> str:
    """``attn.self`` for ``blocks.3.attn.self``; "" for a region that is no part of a block."""
    return next((name for name in INSIDE if id.endswith(f".{name}")), "")


def _marked(body: Function, name: str) -> int:
    return sum(flops(n) for n in body.graph.nodes if f"{n.meta.get('region', '')}.".startswith(f".{name}."))


def with_modules(program: Program, origin: str) -> Program:
    """``program`` with the attention, by its kinds, the MLP and the modulation of each block marked in its body, and
    listed as regions."""
    program, kinds = _by_kinds(program, origin)
    binding = bind(program)
    functions, names = dict(program.functions), {}
    for r in program.regions:
        if r.function and r.function not in names:
            body = program.functions[r.function]
            functions[r.function], names[r.function] = _mark(body, binding, kinds.get(r.id, {}), origin)
    regions: list[Region] = []
    for r in program.regions:
        regions.append(r)
        for name in names.get(r.function, []):
            above, _, role = f"{r.id}.{name}".rpartition(".")
            regions.append(Region(f"{above}.{role}", role, above, r.stage))  # type: ignore[arg-type]
    return describe(program.replace(functions=functions, regions=tuple(regions)))


def _by_kinds(program: Program, origin: str) -> tuple[Program, dict[str, dict[fx.Node, Kind]]]:
    """The kinds of attention by block, and ``program`` with a body of its own for blocks that differ in nothing but the
    kinds of their attention (as many frames as tokens in a frame)."""
    kinds = attention_kinds(program)
    copies: dict[str, dict[tuple[Kind, ...], str]] = {}
    functions, changed = dict(program.functions), dict[fx.Node, str]()
    for call in program.calls():
        body, asked = callee(call), tuple(kinds[str(call.meta["region"])].values())
        known = copies.setdefault(body, {})
        if asked not in known:
            known[asked] = f"{body}_{len(known)}" if known else body
            functions[known[asked]] = Function(known[asked], functions[body].graph)
        if known[asked] != body:
            changed[call] = known[asked]
    if not changed:
        return program, kinds
    with Editor(program.step, origin) as e:
        for call, name in changed.items():
            node = e[call]
            results = e.call(name, call_args(node), node.meta["val"], node.next, str(node.meta["region"]))
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        e.drop_dead(formals=False)
    apart = describe(program.replace(functions={**functions, program.entry: e.function()}))
    return apart, attention_kinds(apart)


def _mark(
    body: Function, binding: Mapping[fx.Node, Binding], kinds: Mapping[fx.Node, Kind], origin: str
) -> tuple[Function, list[str]]:
    marks: dict[fx.Node, str] = {}
    modules = [(m, _named(m, kinds)) for m in find_modules(body, binding)]
    for module, name in modules:
        marks |= dict.fromkeys(module.nodes, name)
    marks |= {module.output: name for module, name in modules}
    for node in body.graph.nodes:
        timed = binding.get(node, Binding.CONSTANT) & (Binding.TIMESTEP | Binding.LATENT) == Binding.TIMESTEP
        if node.op == "call_function" and timed:
            marks[node] = "mod"
    with Editor(body, origin) as e:
        for node, name in marks.items():
            e[node].meta["region"] = f".{name}"
    there = set(marks.values()) | {name.partition(".")[0] for name in marks.values()}
    return e.function(), [name for name in INSIDE if name in there]


def _named(module: Module, kinds: Mapping[fx.Node, Kind]) -> str:
    """The name of a module's region; what mixes several kinds of attention is joint. Attention in no known spelling is
    of no kind."""
    found = {kinds[n] for n in module.attention if n in kinds}
    if not found:
        return module.role
    return f"{module.role}.{found.pop() if len(found) == 1 else 'joint'}"
