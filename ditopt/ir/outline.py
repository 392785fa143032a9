"""From marked nodes to shared block bodies.

Nodes of the entry whose ``region`` is a block become a call; blocks that are equal up to their weights share one
Function, so that fifty blocks are one text and one compile. ``inline`` (ir/edit.py) is the way back: a pass that works
on a flat graph inlines, edits, and outlines again, and the marks on the nodes survive.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ditopt.errors import PassError
from ditopt.ir.edit import Editor, inline, prune
from ditopt.ir.extent import pattern
from ditopt.ir.program import Formal, Function, Program, TensorType, formal
from ditopt.ir.regions import describe
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
    step = _together(program.step, origin)
    sites = _sites(step)
    functions = dict(program.functions)
    bodies: dict[str, str] = {}
    shapes: dict[str, tuple[_Site, list[int]]] = {}
    with Editor(step, origin) as e:
        now: dict[fx.Node, fx.Node] = {}  # what reads of an original node read by now
        for number, (model, members) in enumerate(_classes(sites)):
            name = f"block{number}"
            # members may be read from outside in different places (the last block drops a stream): offer them all
            outputs = sorted(set().union(*(set(m.outputs) for m in members)))
            functions[name] = _body(name, model, outputs, origin)
            bodies |= {site.id: name for site in members}
            shapes[name] = (model, outputs)
        for site in sites:
            _call(e, site, *shapes[bodies[site.id]], bodies[site.id], now)
        e.drop_dead()
    functions[program.entry] = e.function()
    return describe(prune(program.replace(functions=functions)))


_BLOCK = re.compile(r"((?:blocks|aux\d+)\.\d+)(\..+)?$")


def _block_of(node: fx.Node) -> str:
    """``blocks.3`` for a node marked ``blocks.3`` or ``blocks.3.attn``, "" outside of blocks."""
    match = _BLOCK.match(str(node.meta.get("region", "")))
    return match[1] if match else ""


def _relative(node: fx.Node) -> str:
    """``.attn`` for a node marked ``blocks.3.attn``."""
    match = _BLOCK.match(str(node.meta.get("region", "")))
    return match[2] or "" if match else ""


def _sites(function: Function) -> list[_Site]:
    groups: dict[str, list[fx.Node]] = {}
    for node in trace(function):
        if _block_of(node):
            groups.setdefault(_block_of(node), []).append(node)
    return [_site(id, nodes) for id, nodes in groups.items()]


def _classes(sites: Sequence[_Site]) -> Iterator[tuple[_Site, list[_Site]]]:
    """Sites of one pattern, with the one that their shared body is made of."""
    patterns: dict[Hashable, list[_Site]] = {}
    for site in sites:
        patterns.setdefault(site.key, []).append(site)
    for alike in patterns.values():
        rest = alike
        while rest:
            # of those whose inputs have no gaps in memory where there are some: any layout can be copied to theirs
            model = max(rest, key=lambda m: (sum(_dense(n) for n in m.inputs), m is rest[-1]))
            fits = [m for m in rest if all(map(_can_be_laid_out, m.inputs, model.inputs))]
            yield model, fits
            rest = [m for m in rest if m not in fits]


def _can_be_laid_out(arg: fx.Node, like: fx.Node) -> bool:
    """Whether ``arg`` can have the memory layout of ``like``: one that keeps gaps cannot be copied to."""
    a, b = arg.meta["val"], like.meta["val"]
    return not isinstance(b, Tensor) or TensorType.of(a) == TensorType.of(b) or _dense(like)


def _site(id: str, nodes: list[fx.Node]) -> _Site:
    local = set(nodes)
    key, inputs = pattern(nodes, [_relative(n) for n in nodes])
    outputs = [i for i, n in enumerate(nodes) if any(u not in local for u in n.users)]
    return _Site(id, nodes, inputs, outputs, key)


def _together(function: Function, origin: str) -> Function:
    """``function`` in an order in which each block can be one call: what reads its results comes after all of it.

    Most traces have such an order already; then nothing moves. PassError where there is none.
    """
    nodes = trace(function)
    last = {_block_of(n): n for n in nodes}
    unit = {n: last[_block_of(n)] if _block_of(n) else n for n in nodes}
    members: dict[fx.Node, list[fx.Node]] = {}
    reads: dict[fx.Node, dict[fx.Node, None]] = {}
    for node in nodes:
        members.setdefault(unit[node], []).append(node)
        before = reads.setdefault(unit[node], {})
        before.update((unit[a], None) for a in node.all_input_nodes if unit.get(a, unit[node]) is not unit[node])
    placed: set[fx.Node] = set()
    order: list[fx.Node] = []
    for start in (n for n in nodes if unit[n] is n):
        path = [start]
        while path:
            missing = next((a for a in reads[path[-1]] if a not in placed), None)
            if missing in path:
                raise PassError("two blocks read each other: neither can be one call")
            if missing is not None:
                path.append(missing)
            elif (u := path.pop()) not in placed:
                placed.add(u)
                order += members[u]
    if order == nodes:
        return function
    with Editor(function, origin) as e:
        for node in order:
            e.graph.output_node().prepend(e[node])
    return e.function()


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
        if TensorType.of(arg.meta["val"]) != TensorType.of(like.meta["val"]):
            arg = _as_strided_like(e, arg, like, anchor)
        args.append(arg)
    values = [model.nodes[i].meta["val"] for i in outputs]
    results = e.call(name, args, values, anchor, site.id)
    inside = {e[n] for n in site.nodes}
    for i, result in zip(outputs, results, strict=True):
        node = site.nodes[i]
        now[node] = result
        if TensorType.of(result.meta["val"]) != TensorType.of(node.meta["val"]):
            result = _as_strided_like(e, result, node, anchor)  # its other readers were traced for the layout it had
        e.replace(e[node], result, keep={*inside, now[node]})


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
