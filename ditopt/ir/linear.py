"""Linear attention in a graph: features of queries and keys multiplied without a softmax, divided by their sum.

The sums over the keys come first, so the products are (keys^T values) and (queries times that). The divisor is the
product of the queries with the sum of the keys: written out, or as a row of ones that is padded to the values. Without
a divisor a chain of three products is not taken for attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ditopt.ir.attention import Found, Operand, Refused, unmoved
from ditopt.ir.product import Order, Product, composed, is_plain, permutation, product
from ditopt.ir.program import Function

aten = torch.ops.aten


def find_linear(function: Function) -> Iterator[tuple[fx.Node, Found | Refused]]:
    """Each linear attention of ``function``: its last node, and what was found."""
    for node in function.graph.nodes:
        try:
            found = _divided(node)
        except Refused as refused:
            yield node, refused
        else:
            if found is not None:
                yield node, found


def _divided(node: fx.Node) -> Found | None:
    """The attention that ``node``, a quotient, is the last step of."""
    args: Any = node.args
    nodes: list[fx.Node] = [node]
    if node.target is aten.div.Tensor and not node.kwargs and isinstance(args[1], fx.Node):
        return _normalized(nodes, args[0], args[1])
    if node.target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in args):
        for above, inverse in (args, args[::-1]):
            way = _inverted(inverse)
            if way is not None:
                return _normalized([*nodes, *way], above, way[-1].args[0])
    return None


def _inverted(node: fx.Node) -> list[fx.Node] | None:
    """The nodes from ``1 / x``, also as ``reciprocal(x) * 1``, to the reciprocal."""
    args: Any = node.args
    if node.target is aten.mul.Tensor and args[1] == 1 and isinstance(args[0], fx.Node):
        rest = _inverted(args[0])
        return None if rest is None else [node, *rest]
    return [node] if node.target is aten.reciprocal.default else None


def _normalized(nodes: list[fx.Node], above: Any, below: Any) -> Found | None:
    eps = 0.0
    if below.target is aten.add.Tensor and isinstance(below.args[1], (int, float)) and not below.kwargs:
        nodes.append(below)
        eps, below = float(below.args[1]), below.args[0]
    if above.target is aten.slice.Tensor:
        return _with_ones(nodes, above, below, eps)
    return _with_sum(nodes, above, below, eps)


def _product_of(node: Any) -> Product | None:
    found = product(node) if isinstance(node, fx.Node) and node.op == "call_function" else None
    return found if found is not None and found.added is None and found.scale == 1.0 else None


def _with_sum(nodes: list[fx.Node], above: fx.Node, below: fx.Node, eps: float) -> Found | None:
    """``q (k^T v) / (q sum(k)^T + eps)``."""
    outer, divisor = _product_of(above), _product_of(below)
    state = _product_of(outer.right) if outer is not None else None
    if outer is None or divisor is None or state is None or outer.left is not divisor.left:
        return None
    plain = all(is_plain(o) for p in (outer, divisor, state) for o in (p.left_order, p.right_order, p.order))
    rank = above.meta["val"].ndim
    swap: Order = (*range(rank - 2), rank - 1, rank - 2)
    if not plain or rank != outer.left.meta["val"].ndim:
        return None
    summed, turned = divisor.right, permutation(divisor.right)
    if turned is not None and is_plain(composed(turned, swap)):
        nodes.append(summed)
        summed = summed.args[0]  # type: ignore[assignment]
    else:
        turned = None
    args: Any = summed.args
    if summed.target is not aten.sum.dim_IntList or len(args) < 3 or not args[2]:
        return None
    dims = [d % rank for d in args[1]]
    key, moved = unmoved(state.left, swap)
    over = args[0]
    sums_keys = (over is key.node and is_plain(key.order) and dims == [rank - 2] and turned is not None) or (
        over is state.left and dims == [rank - 1] and turned is None
    )
    if not sums_keys:
        return None
    query, value = (Operand(x, tuple(range(rank))) for x in (outer.left, state.right))
    return _found([*nodes, above, below, outer.right, summed, *moved], query, key, value, value.order, eps)


def _with_ones(nodes: list[fx.Node], above: fx.Node, below: fx.Node, eps: float) -> Found | None:
    """``h[:-1] / (h[-1:] + eps)`` of ``h = [v^T; 1] k q^T``: everything transposed, the values padded by a row."""
    args: Any = below.args
    whole: Any = above.args[0]
    outer = _product_of(whole)
    state = _product_of(outer.left) if outer is not None else None
    if outer is None or state is None or below.target is not aten.slice.Tensor or args[0] is not whole:
        return None
    rank = whole.meta["val"].ndim
    rows = int(whole.meta["val"].shape[-2])
    if _range(above, rank, rows) != (0, rows - 1) or _range(below, rank, rows) != (rows - 1, rows):
        return None
    pad: Any = state.left
    padded = pad.target is aten.pad.default and list(pad.args[1]) == [0, 0, 0, 1] and pad.args[2:] == ("constant", 1.0)
    plain = all(is_plain(o) for p in (outer, state) for o in (p.left_order, p.right_order, p.order))
    if not padded or not plain or outer.right.meta["val"].ndim != rank or state.right.meta["val"].ndim != rank:
        return None
    swap: Order = (*range(rank - 2), rank - 1, rank - 2)
    query, a = unmoved(outer.right, swap)
    value, b = unmoved(pad.args[0], swap)
    key = Operand(state.right, tuple(range(rank)))
    return _found([*nodes, above, below, whole, outer.left, pad, *a, *b], query, key, value, swap, eps)


def _range(node: fx.Node, rank: int, rows: int) -> tuple[int, int] | None:
    """The rows that a slice takes; None where it is one of another dimension."""
    args: Any = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    dim, start, stop, step = args
    if dim % rank != rank - 2 or step != 1:
        return None
    first, last, _ = slice(start, stop).indices(rows)
    return first, last


def _found(
    nodes: list[fx.Node], query: Operand, key: Operand, value: Operand, order: Order, eps: float
) -> Found | None:
    inside = set(nodes)
    output = nodes[0]
    sources = {query.node, key.node, value.node}
    for node in inside - {output}:
        if any(u not in inside for u in node.users) and permutation(node) is None:
            raise Refused("its sums are read by something else too", inside)
    if any(s in inside for s in sources) or query.shape()[:-2] != key.shape()[:-2] != value.shape()[:-2]:
        return None
    return Found("linear", tuple(sorted(inside)), query, key, value, order, query.shape()[:-2], eps=eps)
