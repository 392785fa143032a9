"""Attention that was found in a graph, whatever its spelling, and how it becomes one operator.

``ir/softmax.py`` and ``ir/linear.py`` find it; ``put`` writes the operator: queries, keys and values are permuted and
viewed to (*batch, tokens, channels), masks are joined to one, and what the model wrote becomes the text of the spelling
(ops/spelling.py). Permutations that the operator does not need any more are gone when it is opened (ir/opening.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ditopt.ir.edit import Editor
from ditopt.ir.product import Order, composed, is_plain, permutation
from ditopt.ir.program import TensorType
from ditopt.ops import attention, linear_attention
from ditopt.ops.spelling import Name, Step, named, write

aten = torch.ops.aten


class Refused(Exception):
    """Attention that cannot become an operator, with the reason in a sentence. ``nodes``: its operators."""

    def __init__(self, reason: str, nodes: Iterable[fx.Node] = ()) -> None:
        super().__init__(reason)
        self.nodes = tuple(nodes)


@dataclass(frozen=True)
class Operand:
    """A tensor that becomes (*batch, tokens, channels) by ``order``."""

    node: fx.Node
    order: Order

    def shape(self) -> tuple[int, ...]:
        return tuple(int(self.node.meta["val"].shape[i]) for i in self.order)


@dataclass(frozen=True)
class Mask:
    """What changes scores of ``shape`` before their softmax: ``means`` "add", "keep" (true lets see) or "drop"."""

    node: fx.Node
    means: Literal["add", "keep", "drop"]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """Attention in a function. ``inside``: its operators in trace order, the last one its ``output``, which becomes
    (*batch, queries, channels) by ``order``. ``layout``: the batch dimensions of the operator. ``plain``: it is
    ``aten.scaled_dot_product_attention`` and needs no spelling. ``refusal``: why it cannot be one operator, or ""."""

    kind: Literal["softmax", "linear"]
    inside: tuple[fx.Node, ...]
    query: Operand
    key: Operand
    value: Operand
    order: Order
    layout: tuple[int, ...]
    masks: tuple[Mask, ...] = ()
    scale: float | None = None
    is_causal: bool = False
    enable_gqa: bool = False
    eps: float = 0.0
    plain: bool = False
    refusal: str = ""

    @property
    def output(self) -> fx.Node:
        return self.inside[-1]

    @property
    def spelling(self) -> str:
        """How it is written, in a word."""
        return "sdpa" if self.plain else "explicit" if self.kind == "softmax" else "linear"


def unmoved(node: fx.Node, order: Order) -> tuple[Operand, tuple[fx.Node, ...]]:
    """``node`` in this order; where it is itself the transposition of a value that has the order already, that value,
    and the transposition, which then is a part of the spelling."""
    own = permutation(node)
    if own is not None and is_plain(composed(own, order)):
        source: Any = node.args[0]
        return Operand(source, tuple(range(len(order)))), (node,)
    return Operand(node, order), ()


def put(e: Editor, found: Found, now: dict[fx.Node, fx.Node]) -> fx.Node:
    """The operator in the place of ``found.output``, as the node that gives what the output gave.

    ``now``: what nodes of the original graph were replaced by; the output is added to it. Raises Refused where it
    cannot be one operator, or would give another memory layout.
    """
    if found.refusal:
        raise Refused(found.refusal)
    at = e[found.output]
    region, path = str(at.meta["region"]), at.meta.get("path", "")

    def op(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = e.op(target, *args, at=at, region=region, **kwargs)
        node.meta["path"] = path
        return node

    def current(node: fx.Node) -> fx.Node:
        return now.get(node, e[node])

    try:
        q, k, v = (_canonical(op, current(x.node), x, found.layout) for x in (found.query, found.key, found.value))
        mask = _joined(op, [_fitted(op, current(m.node), m, found.layout) for m in found.masks])
        spelled, reads = (
            ("sdpa", []) if found.plain else _spelling(found, current, {"q": q, "k": k, "v": v, "mask": mask})
        )
        more: list[Any] = [spelled, reads] if reads else [spelled] if not found.plain else []
        if found.kind == "linear":
            new = op(linear_attention, q, k, v, found.eps, *more)
        else:
            new = op(attention, q, k, v, *_short(mask, found.scale, found.is_causal, found.enable_gqa, more))
        result = _restored(op, new, found)
    except (RuntimeError, ValueError) as error:
        raise Refused(f"it cannot be written as one operator ({str(error).splitlines()[0]})") from error
    if TensorType.of(result.meta["val"]) != TensorType.of(found.output.meta["val"]):
        raise Refused("as one operator it would have another layout in memory")
    e.replace(at, result)
    now[found.output] = result
    return new


def _short(mask: Any, scale: Any, causal: bool, gqa: bool, more: list[Any]) -> list[Any]:
    """Arguments without the defaults at their end."""
    args = [mask, scale, causal, gqa]
    if more:
        return [*args, *more]
    while args and args[-1] in (None, False):
        args.pop()
    return args


def _canonical(op: Any, node: fx.Node, operand: Operand, layout: Sequence[int]) -> fx.Node:
    out = node if is_plain(operand.order) else op(aten.permute.default, node, list(operand.order))
    *batch, tokens, channels = operand.shape()
    if tuple(batch) != tuple(layout) and math.prod(batch) == math.prod(layout):
        out = op(aten.reshape.default, out, [*layout, tokens, channels])
    return out


def _fitted(op: Any, node: fx.Node, mask: Mask, layout: Sequence[int]) -> tuple[fx.Node, bool]:
    """A mask that broadcasts to scores of this layout, and whether it is a boolean one (true lets see)."""
    out = op(aten.logical_not.default, node) if mask.means == "drop" else node
    shape = [int(n) for n in node.meta["val"].shape]
    batch = mask.shape[:-2]
    own = shape[:-2]
    aligned = len(own) == 0 or (len(own) <= len(layout) and list(batch[-len(own) :]) == list(layout[-len(own) :]))
    if tuple(batch) != tuple(layout) and not aligned:
        out = op(aten.expand.default, out, [*batch, *shape[-2:]])
        out = op(aten.reshape.default, out, [*layout, *shape[-2:]])
    return out, mask.means != "add"


def _joined(op: Any, masks: Sequence[tuple[fx.Node, bool]]) -> fx.Node | None:
    """One mask for several: the sum of those that are added, minus infinity where a boolean one is false."""
    total = keep = None
    for node, boolean in masks:
        if boolean:
            keep = node if keep is None else op(aten.logical_and.default, keep, node)
        else:
            total = node if total is None else op(aten.add.Tensor, total, node)
    if total is None or keep is None:
        return keep if total is None else total
    value = total.meta["val"]
    least = op(aten.full.default, [], -torch.inf, dtype=value.dtype, device=value.device)
    return op(aten.where.self, keep, total, least)


def _spelling(found: Found, current: Any, operands: dict[str, fx.Node | None]) -> tuple[str, list[fx.Node]]:
    """The text of what the model wrote, and the tensors that only it reads."""
    names = {node: name for name, node in reversed(operands.items()) if node is not None}
    names = {source: names[current(source)] for source in _sources(found) if current(source) in names}
    reads: list[fx.Node] = []
    steps: list[Step] = []
    for node in found.inside:
        for source in node.all_input_nodes:
            if source not in names:
                names[source] = f"r{len(reads)}"
                reads.append(current(source))
        name = f"t{len(steps)}"
        steps.append(Step(name, node.target, named(node.args, names), named(dict(node.kwargs), names)))
        names[node] = name
    for target, argument in _moves(found):
        steps.append(Step(f"t{len(steps)}", target, (Name(steps[-1].name), argument), {}))
    return write(steps), reads


def _sources(found: Found) -> list[fx.Node]:
    return list(dict.fromkeys(a for n in found.inside for a in n.all_input_nodes if a not in found.inside))


def _moves(found: Found) -> list[tuple[Any, list[int]]]:
    """What makes the operator's result of the output."""
    moves: list[tuple[Any, list[int]]] = []
    if not is_plain(found.order):
        moves.append((aten.permute.default, list(found.order)))
    *batch, tokens, channels = Operand(found.output, found.order).shape()
    if list(batch) != list(found.layout):
        moves.append((aten.view.default, [*found.layout, tokens, channels]))
    return moves


def _restored(op: Any, new: fx.Node, found: Found) -> fx.Node:
    """The output again, from the operator's result."""
    out, shape = new, Operand(found.output, found.order).shape()
    if list(shape[:-2]) != list(found.layout):
        out = op(aten.view.default, out, list(shape))
    if not is_plain(found.order):
        out = op(aten.permute.default, out, [found.order.index(i) for i in range(len(found.order))])
    return out
