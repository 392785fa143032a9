"""Products of matrices in one form, whichever operator computes them: rows, columns and batches, and how each operand
and the result have to be permuted to end in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ditopt.ir.dims import equation

aten = torch.ops.aten

Order = tuple[int, ...]
"""A permutation of dimensions, as ``permute`` takes it."""


@dataclass(frozen=True)
class Product:
    """``node`` multiplies ``left`` (*batch, rows, inner) with ``right`` (*batch, inner, columns), each once it is
    permuted so; its result becomes (*batch, rows, columns) by ``order``. ``scale`` and ``added``: what ``baddbmm`` does
    besides."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_order: Order
    right_order: Order
    order: Order
    scale: float = 1.0
    added: fx.Node | None = None

    @property
    def swapped(self) -> Order:
        """The permutation by which ``right`` becomes (*batch, columns, inner)."""
        return (*self.right_order[:-2], self.right_order[-1], self.right_order[-2])


def product(node: fx.Node) -> Product | None:
    """The product that ``node`` computes; None for other operators and for sums over more than one dimension."""
    args: Any = node.args
    if node.target is aten.einsum.default:
        return _einsum(node, args)
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        left, right = args[:2]
    elif node.target is aten.baddbmm.default:
        left, right = args[1:3]
    else:
        return None
    if min(left.meta["val"].ndim, right.meta["val"].ndim) < 2:
        return None
    scale, added = 1.0, None
    if node.target is aten.baddbmm.default:
        beta, scale = node.kwargs.get("beta", 1), float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        if beta not in (0, 1):
            return None
        added = args[0] if beta == 1 else None
    first, second, order = (tuple(range(x.meta["val"].ndim)) for x in (left, right, node))
    return Product(node, left, right, first, second, order, scale, added)


def _einsum(node: fx.Node, args: Any) -> Product | None:
    terms, result = equation(node)
    if len(terms) != 2 or any("." in t or len(set(t)) < len(t) for t in (*terms, result)):
        return None
    left, right = terms
    inner = [c for c in left if c in right and c not in result]
    rows = [c for c in result if c not in right]
    columns = [c for c in result if c not in left]
    if not len(inner) == len(rows) == len(columns) == 1 or {*left, *right} != {*result, *inner}:
        return None
    batch = [c for c in result if c in left and c in right]
    first, second, order = (
        tuple(term.index(c) for c in (*batch, *ends))
        for term, ends in ((left, rows + inner), (right, inner + columns), (result, rows + columns))
    )
    return Product(node, args[1][0], args[1][1], first, second, order)


def is_plain(order: Sequence[int]) -> bool:
    """Whether a permutation changes nothing."""
    return list(order) == sorted(order)


def composed(first: Sequence[int], then: Sequence[int]) -> Order:
    """One permutation for two, one after the other."""
    return tuple(first[i] for i in then)


def permutation(node: fx.Node) -> Order | None:
    """The permutation that ``node`` is of its operand; None for other operators."""
    args: Any = node.args
    rank = node.meta["val"].ndim if isinstance(node.meta["val"], torch.Tensor) else 0
    if node.target is aten.permute.default:
        return tuple(d % rank for d in args[1])
    if node.target in (aten.transpose.int, aten.t.default) and rank > 1:
        a, b = args[1:3] if node.target is aten.transpose.int else (0, 1)
        order = list(range(rank))
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    return None
