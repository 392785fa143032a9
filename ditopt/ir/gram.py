"""Inner products of kept values, from step to step: what "dmd" is fitted to without the values leaving the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ditopt.ir.reuse import Reuse, decode

aten = torch.ops.aten


def inner_products(reuse: Reuse, kept: Sequence[tuple[fx.Node, Sequence[Sequence[fx.Node]]]]) -> str:
    """A slot (float64, (n, n)) with the inner products of the n newest computed values, newest first, summed over all
    kept values; its name. Moves where the step computes: a row for the new value, the other ones shifted."""
    e, n = reuse.e, reuse.predictor.anchors
    at = e.graph.output_node()
    with e.mode:
        slot = reuse.slot("gram", torch.empty(n, n, dtype=torch.float64))
    row: fx.Node | None = None
    for value, slots in kept:
        like = value.meta["val"]
        older = [decode(e, [group[i] for group in slots], like, at) for i in range(n - 1)]
        wide = [e.op(aten._to_copy.default, v, dtype=torch.float64) for v in (value, *older)]
        products = [_one(reuse, e.op(aten.mul.Tensor, wide[0], w)) for w in wide]
        added = e.op(aten.cat.default, products)
        row = added if row is None else e.op(aten.add.Tensor, row, added)
    assert row is not None
    column = e.op(aten.view.default, e.op(aten.slice.Tensor, row, 0, 1, n), [n - 1, 1])
    corner: Any = e.op(aten.slice.Tensor, e.op(aten.slice.Tensor, slot, 0, 0, n - 1), 1, 0, n - 1)
    below = e.op(aten.cat.default, [column, corner], 1)
    reuse.update(slot, e.op(aten.cat.default, [e.op(aten.view.default, row, [1, n]), below]), "computed")
    return str(slot.meta["formal"].ref)


def _one(reuse: Reuse, product: fx.Node) -> fx.Node:
    return reuse.e.op(aten.view.default, reuse.e.op(aten.sum.default, product), [1])
