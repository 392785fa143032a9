"""K-means over the tokens of a sample, and the rank of each token in its cluster, as operators of fixed shapes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ditopt.ir.edit import Editor, moved

aten = torch.ops.aten


def clusters(e: Editor, features: fx.Node, weight: fx.Node, count: int, iterations: int) -> fx.Node:
    """The cluster of each token, one-hot and 0 for tokens of weight 0: float32 (rows, tokens, count).

    ``features``: float32 (rows, tokens, channels); ``weight``: float32 (rows, tokens), 1 for tokens that are clustered,
    else 0. Lloyd's algorithm on squared Euclidean distances: ``iterations`` rounds from centroids that are the tokens
    at a fixed stride; a cluster without tokens keeps its centroid.
    """
    stride = int(features.meta["val"].shape[1]) // count
    centroids = moved(e, aten.slice.Tensor, features, 1, 0, stride * count, stride)
    numbers = e.op(aten.arange.start, 0, count, dtype=torch.int64, device=features.meta["val"].device)
    mass = e.op(aten.unsqueeze.default, weight, -1)

    def nearest() -> fx.Node:
        cross = e.op(aten.bmm.default, features, e.op(aten.transpose.int, centroids, 1, 2))
        square = e.op(aten.sum.dim_IntList, e.op(aten.mul.Tensor, centroids, centroids), [-1])
        far = e.op(aten.sub.Tensor, e.op(aten.unsqueeze.default, square, 1), e.op(aten.mul.Tensor, cross, 2.0))
        label = e.op(aten.unsqueeze.default, e.op(aten.argmin.default, far, -1), -1)
        return e.op(aten.mul.Tensor, _number(e, e.op(aten.eq.Tensor, label, numbers)), mass)

    found = nearest()
    for _ in range(iterations):
        size = e.op(aten.unsqueeze.default, e.op(aten.sum.dim_IntList, found, [1]), -1)
        total = e.op(aten.bmm.default, e.op(aten.transpose.int, found, 1, 2), features)
        mean = e.op(aten.div.Tensor, total, e.op(aten.clamp_min.default, size, 1.0))
        centroids = e.op(aten.where.self, e.op(aten.gt.Scalar, size, 0), mean, centroids)
        found = nearest()
    return found


def ranking(e: Editor, found: fx.Node, worth: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The tokens from the one of highest ``worth`` down, int64 (rows, tokens), and the rank of each of them in its
    cluster as a share of the cluster, from 0 (the first) to below 1: float32, in the same order.

    ``found``: see ``clusters``; tokens of no cluster have rank 0. ``worth``: float32 (rows, tokens).
    """
    shape = [int(n) for n in found.meta["val"].shape]
    order = item(e, e.op(aten.sort.default, worth, -1, True), 1)
    where = e.op(aten.expand.default, e.op(aten.unsqueeze.default, order, -1), shape)
    own = e.op(aten.gather.default, found, 1, where)
    before = e.op(aten.sub.Tensor, e.op(aten.cumsum.default, own, 1), own)
    sizes = e.op(aten.unsqueeze.default, e.op(aten.sum.dim_IntList, found, [1]), 1)
    rank, size = (e.op(aten.sum.dim_IntList, e.op(aten.mul.Tensor, own, n), [-1]) for n in (before, sizes))
    return order, e.op(aten.div.Tensor, rank, e.op(aten.clamp_min.default, size, 1.0))


def _number(e: Editor, truth: fx.Node) -> fx.Node:
    return e.op(aten._to_copy.default, truth, dtype=torch.float32)


def item(e: Editor, node: fx.Node, at: int) -> Any:
    """One of several results."""
    return e.op(operator.getitem, node, at)
