"""From marked nodes to shared block bodies.

Nodes of the entry whose ``region`` is a block become a call; blocks that are equal up to their weights share one
Function, so that fifty blocks are one text and one compile. ``inline`` (ir/edit.py) is the way back: a pass that works
on a flat graph inlines, edits, and outlines again, and the marks on the nodes survive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ditopt.ir.cost import flops, function_flops
from ditopt.ir.edit import Editor, inline, prune
from ditopt.ir.program import Formal, Function, Program, TensorType, formal
from ditopt.ir.structure import trace

aten = torch.ops.aten


@dataclass
class _Site:
    """One block in the flat entry: its nodes, what they read from outside, and what outside reads."""

    id: str
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[int]
    key: Hashable


def flatten(program: Program) -> Program:
    """The Program with every block body inlined at its call sites."""
    return prune(program.replace(functions={**program.functions, program.entry: inline(program)}))


def outline(program: Program, origin: str) -> Program:
    """``program`` (flat, blocks marked by ``region``) with a shared Function for each class of blocks."""
    sites = _sites(program.step)
    classes: dict[Hashable, list[_Site]] = {}
    for site in sites:
        classes.setdefault(site.key, []).append(site)
    functions = dict(program.functions)
    bodies: dict[str, str] = {}
    shapes: dict[str, tuple[_Site, list[int]]] = {}
    with Editor(program.step, origin) as e:
        now: dict[fx.Node, fx.Node] = {}  # what reads of an original node read by now
        for number, members in enumerate(classes.values()):
            name = f"block{number}"
            # members may be read from outside in different places (the last block drops a stream): offer them all
            outputs = sorted(set().union(*(set(m.outputs) for m in members)))
            # of those whose inputs have no gaps in memory where there are some: any layout can be copied to theirs
            model = max(members, key=lambda m: (sum(_dense(n) for n in m.inputs), m is members[-1]))
            functions[name] = _body(name, model, outputs, origin)
            bodies |= {site.id: name for site in members}
            shapes[name] = (model, outputs)
        for site in sites:
            _call(e, site, *shapes[bodies[site.id]], bodies[site.id], now)
        e.drop_dead()
    functions[program.entry] = e.function()
    return _with_cost(prune(program.replace(functions=functions)), bodies)


def _with_cost(program: Program, bodies: Mapping[str, str]) -> Program:
    """Regions with their block's function and the FLOPs of one call."""
    cost = {name: function_flops(program, f) for name, f in program.functions.items()}
    stages: dict[int, int] = {}
    for r in program.regions:
        stages[r.stage] = stages.get(r.stage, 0) + (cost[bodies[r.id]] if r.id in bodies else 0)
    regions = []
    for r in program.regions:
        if r.id in bodies:
            r = dataclasses.replace(r, function=bodies[r.id], flops=cost[bodies[r.id]])
        elif r.role in ("model", "stage"):
            r = dataclasses.replace(r, flops=cost[program.entry] if r.role == "model" else stages[r.stage])
        elif r.role in ("attn", "mlp"):
            body = program.functions[bodies[r.parent]]
            r = dataclasses.replace(
                r, flops=sum(flops(n) for n in body.graph.nodes if n.meta.get("region") == f".{r.role}")
            )
        regions.append(r)
    return program.replace(regions=tuple(regions))


def _block_of(node: fx.Node) -> str:
    """``blocks.3`` for a node marked ``blocks.3`` or ``blocks.3.attn``."""
    parts = str(node.meta.get("region", "")).split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else ""


def _relative(node: fx.Node) -> str:
    parts = str(node.meta.get("region", "")).split(".")
    return "".join(f".{p}" for p in parts[2:])


def _sites(function: Function) -> list[_Site]:
    groups: dict[str, list[fx.Node]] = {}
    for node in trace(function):
        if _block_of(node):
            groups.setdefault(_block_of(node), []).append(node)
    return [_site(id, nodes) for id, nodes in groups.items()]


def _site(id: str, nodes: list[fx.Node]) -> _Site:
    local = {n: i for i, n in enumerate(nodes)}
    inputs: dict[fx.Node, int] = {}
    parts: list[Hashable] = []

    def encode(node: fx.Node) -> Any:
        if node in local:
            return _Ref(f"%{local[node]}")
        return _Ref(f"${inputs.setdefault(node, len(inputs))}")

    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), encode)
        parts.append((str(node.target), repr(args), repr(kwargs), _relative(node)))
    types = tuple((n.meta["val"].dtype, tuple(n.meta["val"].shape)) for n in inputs)
    outputs = [i for i, n in enumerate(nodes) if any(u not in local for u in n.users)]
    return _Site(id, nodes, list(inputs), outputs, (tuple(parts), types))


class _Ref:
    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _body(name: str, model: _Site, outputs: Sequence[int], origin: str) -> Function:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(model.inputs):
        kind = formal(node).kind if node.op == "placeholder" else "input"
        p = graph.placeholder(f"{'p' if kind == 'param' else 'x'}{i}")
        p.meta = {"val": node.meta["val"], "formal": Formal("formal", p.name), "region": "", "origin": origin}
        values[node] = p
    for node in model.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
        values[node].meta["region"] = _relative(node)
    graph.output(tuple(values[model.nodes[i]] for i in outputs))
    return Function(name, graph)


def _call(e: Editor, site: _Site, model: _Site, outputs: Sequence[int], name: str, now: dict[fx.Node, fx.Node]) -> None:
    """Replace the nodes of ``site`` by a call at the place of its last node."""
    last = e[site.nodes[-1]]
    anchor = last.next
    args = []
    for node, like in zip(site.inputs, model.inputs, strict=True):
        arg = now.get(node, e[node])
        if TensorType.of(node.meta["val"]) != TensorType.of(like.meta["val"]):
            arg = _as_strided_like(e, arg, like, anchor)
        args.append(arg)
    values = [model.nodes[i].meta["val"] for i in outputs]
    results = e.call(name, args, values, anchor, site.id)
    inside = {e[n] for n in site.nodes}
    for i, result in zip(outputs, results, strict=True):
        e.replace(e[site.nodes[i]], result, keep=inside)
        now[site.nodes[i]] = result


def _dense(node: fx.Node) -> bool:
    value = node.meta["val"]
    return bool(torch.empty_like(value).stride() == value.stride())  # keeps the strides of dense values, and only those


def _as_strided_like(e: Editor, arg: fx.Node, like: fx.Node, at: fx.Node) -> fx.Node:
    """``arg`` in the memory layout that the shared body was written for (same values)."""
    if TensorType.of(like.meta["val"]).stride is None:
        return e.op(aten.clone.default, arg, at=at, memory_format=torch.contiguous_format)
    order = sorted(range(arg.meta["val"].ndim), key=lambda d: -like.meta["val"].stride(d))
    back = [order.index(d) for d in range(len(order))]
    dense = e.op(
        aten.clone.default, e.op(aten.permute.default, arg, order, at=at), at=at, memory_format=torch.contiguous_format
    )
    return e.op(aten.permute.default, dense, back, at=at)


def clone_body(body: Function, name: str, origin: str) -> Editor:
    """An Editor on a copy of a shared body, to become the Function ``name``."""
    return Editor(Function(name, body.graph, body.state_out), origin)
