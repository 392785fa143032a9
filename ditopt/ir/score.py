"""How a model's prediction scores its tokens: by the spread of its channels at each of them.

Which pixels of the output a token makes is read off the graph: from where the tokens are whole again, their dimension
is followed to the output (ir/dims.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ditopt.ir.axes import source
from ditopt.ir.dims import Dim, Dims, Known, through
from ditopt.ir.edit import Editor
from ditopt.ir.short import Mixes, Short

aten = torch.ops.aten

Metric = Literal["std", "norm"]
Share = Literal["sample", "halves", "batch"]


@dataclass(frozen=True)
class Scoring:
    """``metric``: over the channels of a pixel, the standard deviation or the Euclidean norm. ``starvation``: the score
    falls by exp(-starvation) each time a token is left out. ``high``: of the tokens that are left out, the share that
    has the highest scores; the others have the lowest. ``share``: each sample chooses for itself, both halves of the
    batch (with and without guidance) choose together, or all do."""

    metric: Metric = "std"
    starvation: float = 0.0
    high: float = 1.0
    share: Share = "sample"


def score(
    e: Editor, short: Short, output: fx.Node, met: Iterable[tuple[fx.Node, fx.Node]], o: Scoring, noise: int = 0
) -> fx.Node:
    """The score of each token of ``output``, float32 (rows, tokens), in nodes at the end of the graph. ``met``: where
    paths joined, a node and what is read from there on. ``noise``: how many channels of the output count, 0 for all.
    ``Mixes`` where the output does not show what each token makes."""
    for node, chosen in met:
        place = short.place(node)
        if place is None:
            continue
        shape = [int(n) for n in chosen.meta["val"].shape]
        start = list(source(shape))
        if place.size != short.set.tokens:
            start[place.dim] = Dim(place.size, Dim.of(short.set.tokens, place.dim).atoms, place.start)
        known: Known = {chosen: tuple(start)}
        for n in _behind(e, chosen):
            if n.op == "call_function" and (made := through(n, known)):
                known[n] = made
        dims: Dims = known.get(output, ())
        if dims and (found := _layout(dims, place.dim, place.batch, short.set.tokens)):
            return _spread(e, output, found, short, o.metric, noise)
    raise Mixes("the model's output does not show which part of it each token makes")


def _behind(e: Editor, node: fx.Node) -> list[fx.Node]:
    nodes = list(e.graph.nodes)
    return nodes[nodes.index(node) + 1 :]


@dataclass(frozen=True)
class _Layout:
    """The output as factors of its dimensions: sizes, and for each what it is: "rows", "token", "pixel", "channel"."""

    sizes: tuple[int, ...]
    kinds: tuple[str, ...]


def _layout(dims: tuple[Dim, ...], axis: int, batch: int, tokens: int) -> _Layout | None:
    sizes: list[int] = []
    kinds: list[str] = []
    for dim in dims:
        atoms = dim.atoms if dim.whole and dim.atoms else ()
        if math.prod(a.size for a in atoms) != dim.size:
            atoms = ()
        if axis not in dim.axes or not atoms:
            if axis in dim.axes:
                return None
            rows = batch >= 0 and dim.axes == {batch}
            sizes.append(dim.size)
            kinds.append("rows" if rows else "channel")
            continue
        for a in atoms:
            if axis in a.axes and len(a.axes) > 1:
                return None
            sizes.append(a.size)
            kinds.append("token" if axis in a.axes else "pixel")
    found = math.prod(s for s, k in zip(sizes, kinds, strict=True) if k == "token")
    return _Layout(tuple(sizes), tuple(kinds)) if found == tokens else None


def _spread(e: Editor, output: fx.Node, found: _Layout, short: Short, metric: Metric, noise: int) -> fx.Node:
    def at(*kinds: str) -> list[int]:
        return [i for i, k in enumerate(found.kinds) if k in kinds]

    value, sizes, end = output, list(found.sizes), e.graph.output_node()
    if value.meta["val"].dtype is not torch.float32:
        value = e.op(aten._to_copy.default, value, dtype=torch.float32)
    value = short.move(aten.reshape.default, value, sizes, end)
    channels = [i for i in at("channel") if sizes[i] > 1]
    if noise and len(channels) == 1 and sizes[channels[0]] == 2 * noise:  # the other half is a variance
        value = e.op(aten.slice.Tensor, value, channels[0], 0, noise)
        sizes[channels[0]] = noise
    kinds = ("rows", "token", "pixel", "channel")
    order = [i for k in kinds for i in at(k)]
    counts = [math.prod(sizes[i] for i in at(k)) for k in kinds[1:]]
    value = short.move(aten.permute.default, value, order, end)
    if counts[-1] == 1:  # one channel has no spread: that of the pixels of the token
        counts = [counts[0], 1, counts[1]]
    value = short.move(aten.reshape.default, value, [short.set.rows, *counts], end)
    if metric == "norm" or value.meta["val"].shape[-1] == 1:
        square = e.op(aten.sum.dim_IntList, e.op(aten.mul.Tensor, value, value), [-1])
        return _pixels(e, e.op(aten.sqrt.default, square))
    mean = e.op(aten.mean.dim, value, [-1], True)
    off = e.op(aten.sub.Tensor, value, mean)
    n = int(value.meta["val"].shape[-1])
    total = e.op(aten.sum.dim_IntList, e.op(aten.mul.Tensor, off, off), [-1])
    return _pixels(e, e.op(aten.sqrt.default, e.op(aten.div.Tensor, total, float(n - 1))))


def _pixels(e: Editor, value: fx.Node) -> fx.Node:
    return e.op(aten.mean.dim, value, [-1])
