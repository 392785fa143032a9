"""A function on part of its tokens: beside each operator its twin, which computes the same for the chosen tokens only.

A *token set* is a tensor of positions, int64 (rows, count), one row for each sample: the count is static, the positions
are data. ``Short`` follows a value whose tokens were gathered through a graph. What treats each token by itself gets a
twin on the short value; what is made for all tokens and meets them (position embeddings, rotary tables, masks,
modulation for each token) is gathered by the same positions. Only attention reads other tokens: there the keys and
values of the chosen ones are put into those that are kept of all, and the queries are the chosen ones alone. Whatever
else would let tokens mix has no twin: ``Mixes`` says what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ditopt.ir.edit import Editor

aten = torch.ops.aten


class Mixes(Exception):
    """An operator that has no twin on part of the tokens; the text says why."""


@dataclass(frozen=True)
class Place:
    """Where the tokens are in a value of full length: positions ``start`` to ``start + tokens`` of dimension ``dim``,
    which has ``size`` of them (the others are another stream's). ``batch``: the dimension of the samples, -1 where they
    have none of their own."""

    dim: int
    start: int
    size: int
    batch: int


@dataclass(frozen=True)
class TokenSet:
    """``count`` of ``tokens`` positions in each of ``rows`` samples."""

    tokens: int
    count: int
    rows: int

    def short(self, size: int) -> int:
        """The length of a dimension of ``size`` positions, the tokens among them, in a twin."""
        return size - self.tokens + self.count


@dataclass
class Short:
    """The twins in the graph that ``e`` edits, which keeps its full operators beside them.

    ``index``: the node of the positions. ``twins``: node -> (twin, place of the tokens in the node; None where it has
    none and yet depends on the choice). ``keep``: asked for what is kept of a value that attention reads, gives the
    node that holds it. ``formal``: where a placeholder can be handed over gathered, the placeholder for that. ``merged``:
    what attention reads -> (all positions, the tokens among them: the kept ones with the chosen ones put in, place).
    ``here``: in front of which a twin is made.
    """

    e: Editor
    set: TokenSet
    index: fx.Node
    keep: Callable[[fx.Node, Place], fx.Node]
    formal: Callable[[fx.Node, Place, int], fx.Node | None] = lambda node, place, rank: None
    twins: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    merged: dict[fx.Node, tuple[fx.Node, fx.Node, Place]] = field(default_factory=dict)
    here: fx.Node | None = None
    _taken: dict[tuple[fx.Node, Place, int], fx.Node] = field(default_factory=dict)
    _spread: dict[tuple[tuple[int, ...], tuple[int, ...]], fx.Node] = field(default_factory=dict)

    # -- gather and scatter ------------------------------------------------------------------------------------------

    def take(self, node: fx.Node, place: Place, rank: int) -> fx.Node:
        """``node`` with the chosen tokens alone: its dimensions, counted from the right, are those of a value of
        ``rank`` dimensions in which ``place`` is."""
        key = (node, place, rank)
        if key not in self._taken:
            self._taken[key] = self.formal(node, place, rank) or self.gather(
                node, place, rank, after(node, self.index, *self._spread.values())
            )
        return self._taken[key]

    def gather(self, node: fx.Node, place: Place, rank: int, at: fx.Node) -> fx.Node:
        """Nodes before ``at`` that do so."""
        e = self.e
        shape = [1] * (rank - node.meta["val"].ndim) + [int(n) for n in node.meta["val"].shape]
        if self.set.rows == 1:
            dim = place.dim - rank + node.meta["val"].ndim
            return self._around(node, replace(place, dim=dim), at, lambda part: self._select(part, dim, at))
        if place.batch < 0:
            raise Mixes("samples and tokens lie in one dimension, so each sample cannot choose its own")
        shape[place.batch] = self.set.rows
        wide = self.move(aten.expand.default, node, shape, at=at)
        ids = self._positions(place, shape)
        return self._around(wide, place, at, lambda part: e.op(aten.gather.default, part, place.dim, ids, at=at))

    def put(self, kept: fx.Node, chosen: fx.Node, place: Place, at: fx.Node) -> fx.Node:
        """``kept``, a value of all tokens and nothing else, with ``chosen`` in the place of the chosen ones; its layout in
        memory stays."""
        order = _layout(kept.meta["val"])
        inside, e = permuted(place, order), self.e
        if self.set.rows > 1 and place.batch < 0:
            raise Mixes("samples and tokens lie in one dimension, so each sample cannot choose its own")
        kept, chosen = (self.move(aten.permute.default, n, order, at=at) for n in (kept, chosen))
        ids = self._positions(inside, [int(n) for n in kept.meta["val"].shape])
        made = e.op(aten.scatter.src, kept, inside.dim, ids, chosen, at=at)
        return self.move(aten.permute.default, made, [order.index(d) for d in range(len(order))], at=at)

    def move(self, target: Any, node: fx.Node, arg: list[int], at: fx.Node) -> fx.Node:
        """``target(node, arg)``, or ``node`` where that is no other: expand, reshape, permute."""
        shape = list(range(len(arg))) if target is aten.permute.default else list(node.meta["val"].shape)
        return node if arg == shape else self.e.op(target, node, arg, at=at)

    def _select(self, node: fx.Node, dim: int, at: fx.Node) -> fx.Node:
        flat = self._ids((self.set.count,), (self.set.count,))
        return self.e.op(aten.index_select.default, node, dim, flat, at=at)

    def _positions(self, place: Place, shape: Sequence[int]) -> fx.Node:
        """The positions spread over all other dimensions of ``shape``."""
        thin = [1] * len(shape)
        thin[place.dim] = self.set.count
        if place.batch >= 0:
            thin[place.batch] = self.set.rows
        wide = [*shape]
        wide[place.dim] = self.set.count
        return self._ids(tuple(thin), tuple(wide))

    def _ids(self, thin: tuple[int, ...], wide: tuple[int, ...]) -> fx.Node:
        if (thin, wide) not in self._spread:
            at = after(self.index)
            ids = self.move(aten.view.default, self.index, [*thin], at=at)
            self._spread[thin, wide] = self.move(aten.expand.default, ids, [*wide], at=at)
        return self._spread[thin, wide]

    def _around(self, node: fx.Node, place: Place, at: fx.Node, change: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """``node`` with its tokens changed and what lies before and behind them as it is."""
        first, parts = place.start, []
        last = first + self.set.tokens
        if first == 0 and last == place.size:
            return change(node)
        for a, b in ((0, first), (first, last), (last, place.size)):
            if a < b:
                part = self.e.op(aten.slice.Tensor, node, place.dim, a, b, at=at)
                parts.append(change(part) if a == first else part)
        return self.e.op(aten.cat.default, parts, place.dim, at=at)

    def own(self, node: fx.Node, place: Place, at: fx.Node, short: bool = False) -> fx.Node:
        """The tokens alone of a value (with ``short``: of a twin) that holds other positions too."""
        if place.size == self.set.tokens:
            return node
        length = self.set.count if short else self.set.tokens
        return self.e.op(aten.slice.Tensor, node, place.dim, place.start, place.start + length, at=at)

    def whole(self, twin: fx.Node, tokens: fx.Node, place: Place, at: fx.Node) -> fx.Node:
        """``tokens``, all of them, between the other positions of ``twin``."""
        if place.size == self.set.tokens:
            return tokens
        a, b = place.start, place.start + self.set.count
        ends = [(0, a), (b, self.set.short(place.size))]
        before, behind = (
            [self.e.op(aten.slice.Tensor, twin, place.dim, i, j, at=at)] if i < j else [] for i, j in ends
        )
        return self.e.op(aten.cat.default, [*before, tokens, *behind], place.dim, at=at)

    def merge(self, node: fx.Node, at: fx.Node) -> fx.Node:
        """What attention reads for ``node``, keys or values: those of the chosen tokens among the kept ones."""
        twin, place = self.twins[node]
        if node not in self.merged:
            kept = self.keep(node, place)
            tokens = self.put(kept, self.own(twin, place, at, short=True), place, at)
            self.merged[node] = self.whole(twin, tokens, place, at), tokens, place
        return self.merged[node][0]

    # -- twins ---------------------------------------------------------------------------------------------------------

    def place(self, node: Any) -> Any:
        """Where the tokens are in ``node``; None where it has no twin or no tokens."""
        return self.twins[node][1] if isinstance(node, fx.Node) and node in self.twins else None

    def twin(self, node: Any) -> Any:
        """The twin of a node, else the node; of other arguments the argument."""
        if isinstance(node, (list, tuple)):
            return [self.twin(n) for n in node]
        return self.twins[node][0] if isinstance(node, fx.Node) and node in self.twins else node

    def emit(self, node: fx.Node, place: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        """The twin of ``node`` behind it."""
        more: dict[str, Any] = {k: self.twin(v) for k, v in kwargs.items()}
        twin = self.e.op(target, *args, at=self.here or after(node), region=str(node.meta["region"]), **more)
        self.twins[node] = twin, place


def after(*nodes: fx.Node) -> fx.Node:
    """What follows the last of ``nodes``, and all placeholders."""
    at = max(nodes).next
    while at.op == "placeholder":
        at = at.next
    return at


def permuted(place: Place, order: list[int]) -> Place:
    """The place after the dimensions were put in this order."""
    return replace(place, dim=order.index(place.dim), batch=order.index(place.batch) if place.batch >= 0 else -1)


def _layout(value: Any) -> list[int]:
    """The dimensions of a (fake) value, the outermost in memory first."""
    if value.is_contiguous():
        return list(range(value.ndim))
    return sorted(range(value.ndim), key=lambda d: (-value.stride(d), d))
