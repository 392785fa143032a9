"""Residual branches: the parts of a network that read a value and are added to it.

``x + gate * f(norm(x))`` is how every transformer is written, whatever its classes are called, and it can be seen in
the dataflow alone: an addition one operand of which is an ancestor of the other, with a product of matrices between
them. Nothing else is needed to find the modules of a model:

* a position embedding, a control residual or the shift of a norm is added to what it is not computed from;
* a branch *attends* where it multiplies two activations so that tokens are mixed (in any spelling: fused, softmax
  written out, linear; ir/mixing.py), because all other products of a network are with weights, or route tokens to
  experts. One that attends and has an activated layer beside the attention
  (parallel blocks) also *feeds*, as one without attention does;
* a part of a value is not continued by what is computed from other parts of it alone: a scan adds to each frame what
  the frames before it have come to;
* an addition around other branches that attend (a skip over the whole model, or half of a U) is no module but a
  container, and an addition inside a branch, whose sum nobody else reads, is a detail of that branch; so is one that
  attends again to what the branch has attended to. What attends and is then fed forward before both are added to the
  stream, ``x + mlp(x + attention(x))``, is two branches.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ditopt.ir.binding import Binding, data_operands
from ditopt.ir.cost import is_attention, is_matmul
from ditopt.ir.mixing import VARIES, among_tokens, mixes
from ditopt.ir.program import Function
from ditopt.ir.reach import Reach, places

aten = torch.ops.aten

CASTS = {aten._to_copy.default, aten.to.dtype, aten.type_as.default, aten.clone.default, aten.contiguous.default}
"""Operators that keep the values of a stream and its shape."""

JOINS = {
    aten.cat.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    operator.getitem,
}
"""Operators that join or split streams."""

LAYOUTS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
"""Operators that keep all values of a stream: blocks of frames and blocks of rows read it in another order."""

MOVES = {
    *CASTS,
    *LAYOUTS,
    *(JOINS - {aten.cat.default}),
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.expand.default,
    aten.select.int,
    aten.unbind.int,
    aten.chunk.default,
}
"""Operators that only move the values of their one operand."""

_ACTIVATIONS = {
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.leaky_relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.mish.default,
    aten.softplus.default,
    aten.hardswish.default,
    aten.elu.default,
    aten.exp.default,
    aten.erf.default,
}


@dataclass(frozen=True)
class Branch:
    """``sum = stream + value``: ``inside`` are the nodes from the stream to the value, ``nodes`` also what lies between
    stream, value and sum. ``attention``: the products of activations among them. ``feeds``: holds an MLP."""

    stream: fx.Node
    value: fx.Node
    sum: fx.Node
    inside: int
    nodes: int
    attention: int
    feeds: bool

    @property
    def attends(self) -> bool:
        return bool(self.attention)


def find_branches(function: Function, binding: Mapping[fx.Node, Binding], reach: Reach) -> list[Branch]:
    """The residual branches of a flat function or a block body, in the order of their sums."""
    work = reach.bits(n for n in reach.nodes if is_matmul(n) or is_attention(n))
    attention = reach.bits(n for n in reach.nodes if n.op == "call_function" and mixes(n, binding))
    active = reach.bits(n for n in reach.nodes if n.target in _ACTIVATIONS)
    found: dict[fx.Node, Branch] = {}
    for node in reach.nodes:
        for skip, value in _sums(node):
            if not binding[value] & VARIES or skip.meta["val"].shape != node.meta["val"].shape:
                continue
            path = _origins(skip, found)
            stream = next((s for s in path if reach.above[reach.place[value]] >> reach.place[s] & 1), None)
            if stream is None or not binding[stream] & VARIES:
                continue
            inside = reach.between(stream, value)
            if inside & work and not _of_others(stream, path, inside, reach):
                nodes = inside | reach.bits([*path[: path.index(stream)], node])
                mixing = among_tokens(stream, inside, inside & attention, binding, reach)
                feeds = not mixing or _parallel(inside, mixing, work, active, reach)
                found[node] = Branch(stream, value, node, inside, nodes, mixing, feeds)
                break
    return _modules(list(found.values()), reach)


def _sums(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What a node may be the sum of, as (what is continued, what is added to it)."""
    if node.target is aten.add.Tensor and len(data_operands(node)) == 2:
        a, b = data_operands(node)
        yield a, b
        yield b, a
    elif node.target is aten.addcmul.default:
        start, left, right = data_operands(node) if len(data_operands(node)) == 3 else (None, None, None)
        if start is not None and left is not None and right is not None:
            yield start, left
            yield start, right


def _origins(node: fx.Node, sums: Mapping[fx.Node, Branch]) -> list[fx.Node]:
    """``node`` and what it is a moved copy of; a sum that only the next sum reads counts as moved: parallel branches
    are added to one stream one after the other."""
    path = [node]
    while True:
        operands = data_operands(node)
        if node in sums and len(node.users) == 1:
            node = sums[node].stream
        elif node.target in MOVES and len(operands) == 1:
            node = operands[0]
        else:
            return path
        path.append(node)


def _of_others(stream: fx.Node, path: Sequence[fx.Node], inside: int, reach: Reach) -> bool:
    """Whether ``path`` takes one part of ``stream``, and ``inside`` reads nothing but other parts of it."""
    at = path.index(stream)
    part = _part(path[at - 1]) if at else None
    others = [_part(u) for u in stream.users if u.op != "output" and inside >> reach.place[u] & 1]
    return part is not None and all(o is not None and _apart(part, o) for o in others)


def _part(node: fx.Node) -> tuple[int, int, int] | None:
    """Which part of its operand a node takes, as (dimension, first, end); getitem takes from dimension -1. None where
    it takes no part, or one with gaps."""
    args: tuple[Any, ...] = node.args
    if node.target is operator.getitem:
        return -1, args[1], args[1] + 1
    if node.target not in (aten.select.int, aten.slice.Tensor):
        return None
    shape = args[0].meta["val"].shape
    dim = (args[1] if len(args) > 1 else 0) % len(shape)
    if node.target is aten.select.int:
        return dim, args[2] % shape[dim], args[2] % shape[dim] + 1
    first, end, step = (*args[2:], None, None, None)[:3]
    if step not in (None, 1):
        return None
    first, end, _ = slice(first, end).indices(shape[dim])
    return dim, first, end


def _apart(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether two parts of one value have nothing in common."""
    return a[0] == b[0] and (a[2] <= b[1] or b[2] <= a[1])


def _parallel(inside: int, attention: int, work: int, active: int, reach: Reach) -> bool:
    """Whether an activated layer joins the attention's result by concatenation or addition (a gate multiplies)."""
    after = before = 0
    for i in places(attention):
        after |= reach.below[i]
        before |= reach.above[i]
    for i in places(inside & after & ~before):
        if reach.nodes[i].target in (aten.cat.default, aten.add.Tensor):
            for a in reach.reads[i]:
                history = reach.above[a] & inside
                if not after >> a & 1 and history & work and history & active & ~before:
                    return True
    return False


def _modules(branches: Sequence[Branch], reach: Reach) -> list[Branch]:
    """Without containers and without details of other branches."""
    kept: dict[fx.Node, Branch] = {}
    for outer in branches:
        others = [b for b in kept.values() if _starts_in(b, outer, reach)]
        details = [b for b in others if _ends_in(b, outer, reach)]
        attending = [b for b in others if b.attends]
        if attending and others == details == [attending[0]] and attending[0].stream is outer.stream:
            kept[outer.sum] = _after(attending[0], outer, reach)
        elif (not attending and (outer.attends or len(details) < 2)) or (
            attending and others == details == [attending[0]] and _refines(attending[0], outer, reach)
        ):
            kept = {s: b for s, b in kept.items() if b not in details} | {outer.sum: outer}
    return list(kept.values())


def _after(inner: Branch, outer: Branch, reach: Reach) -> Branch:
    """``x + f(x + attention(x))``: the part of ``outer`` that follows ``inner``, a branch of its own."""
    inside = reach.between(inner.sum, outer.value)
    nodes = outer.nodes & ~outer.inside | inside
    return dataclasses.replace(outer, inside=inside, nodes=nodes, attention=0, feeds=True)


def _refines(inner: Branch, outer: Branch, reach: Reach) -> bool:
    """Whether ``inner`` continues what ``outer`` itself attended to, a detail of its attention: ``a = attention(x)``,
    ``x + f(a + attention(a))``."""
    before = reach.above[reach.place[inner.stream]] | 1 << reach.place[inner.stream]
    return bool(outer.attention & ~inner.attention & before)


def _starts_in(inner: Branch, outer: Branch, reach: Reach) -> bool:
    """Whether stream and sum of ``inner`` are values of ``outer``."""
    values = outer.inside | 1 << reach.place[outer.stream]
    return bool(values >> reach.place[inner.stream] & outer.inside >> reach.place[inner.sum] & 1)


def _ends_in(inner: Branch, outer: Branch, reach: Reach) -> bool:
    """Whether nothing but ``outer`` reads the sum of ``inner``."""
    values = outer.inside | 1 << reach.place[outer.sum]
    return all(u.op != "output" and values >> reach.place[u] & 1 for u in inner.sum.users)
