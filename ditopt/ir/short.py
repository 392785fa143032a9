"""A function on part of its tokens: beside each operator its twin, which computes the same for the chosen tokens only.

A *token set* is a tensor of positions, int64 (rows, count), one row for each sample: the count is static, the positions
are data. ``Short`` follows a value whose tokens were gathered through a graph. What treats each token by itself gets a
twin on the short value; what is made for all tokens and meets them (position embeddings, rotary tables, masks,
modulation for each token) is gathered by the same positions. Only attention reads other tokens: there the keys and
values of the chosen ones are put into those that are kept of all, and the queries are the chosen ones alone. Whatever
else would let tokens mix has no twin: ``Mixes`` says what it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ditopt.ir.edit import Editor
from ditopt.ops import gather_tokens, scatter_tokens

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
    node that holds it. ``formal``: where a placeholder can be handed over gathered, the placeholder for that.
    ``merged``: what attention reads -> (all positions with the chosen ones put in, place).
    ``here``: in front of which a twin is made.
    """

    e: Editor
    set: TokenSet
    index: fx.Node
    keep: Callable[[fx.Node, Place], fx.Node]
    formal: Callable[[fx.Node, Place, int], fx.Node | None] = lambda node, place, rank: None
    twins: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    merged: dict[fx.Node, tuple[fx.Node, Place]] = field(default_factory=dict)
    here: fx.Node | None = None
    _taken: dict[tuple[fx.Node, Place, int], fx.Node] = field(default_factory=dict)

    # -- gather and scatter --------------------------------------------------------------------------------------------

    def take(self, node: fx.Node, place: Place, rank: int) -> fx.Node:
        """``node`` with the chosen tokens alone: its dimensions, counted from the right, are those of a value of
        ``rank`` dimensions in which ``place`` is."""
        key = (node, place, rank)
        if key not in self._taken:
            self._taken[key] = self.formal(node, place, rank) or self.gather(node, place, rank, after(node, self.index))
        return self._taken[key]

    def gather(self, node: fx.Node, place: Place, rank: int, at: fx.Node) -> fx.Node:
        """Nodes before ``at`` that do so."""
        missing = rank - node.meta["val"].ndim
        if self.set.rows == 1:
            place = replace(place, dim=place.dim - missing)
        elif missing and self._batch(place) >= 0:
            node = self.move(aten.reshape.default, node, [1] * missing + [int(n) for n in node.meta["val"].shape], at)
        return self._moved(gather_tokens, [[node]], place, at)

    def put(self, kept: fx.Node, chosen: fx.Node, place: Place, at: fx.Node) -> fx.Node:
        """``kept``, a value of all positions, with the twin ``chosen`` put into it; its layout in memory stays."""
        return self._moved(scatter_tokens, [[kept], [chosen]], place, at)

    def _moved(self, target: Any, values: list[list[fx.Node]], place: Place, at: fx.Node) -> fx.Node:
        batch = self._batch(place)
        fits = {self.set.rows} | ({1} if target is gather_tokens else set())
        if batch >= 0 and any(int(n.meta["val"].shape[batch]) not in fits for part in values for n in part):
            raise Mixes(f"samples are taken apart, and positions are chosen for {self.set.rows} at once")
        where = [place.dim], [batch], [place.start]
        made = self.e.op(target, *values, self.index, *where, self.set.tokens, at=at)
        return self.e.op(operator.getitem, made, 0, at=at)

    def _batch(self, place: Place) -> int:
        if self.set.rows == 1:
            return -1
        if place.batch < 0:
            raise Mixes("samples and tokens lie in one dimension, so each sample cannot choose its own")
        return place.batch

    def move(self, target: Any, node: fx.Node, arg: list[int], at: fx.Node) -> fx.Node:
        """``target(node, arg)``, or ``node`` where that is no other: expand, reshape, permute."""
        shape = list(range(len(arg))) if target is aten.permute.default else list(node.meta["val"].shape)
        return node if arg == shape else self.e.op(target, node, arg, at=at)

    def merge(self, node: fx.Node, at: fx.Node) -> fx.Node:
        """What attention reads for ``node``, keys or values: those of the chosen tokens among the kept ones."""
        twin, place = self.twins[node]
        if node not in self.merged:
            self.merged[node] = self.put(self.keep(node, place), twin, place, at), place
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

    def short(self, node: fx.Node) -> fx.Node:
        """The twin of a node that is one tensor, else the node."""
        found: fx.Node = self.twin(node)
        return found

    @property
    def at(self) -> fx.Node:
        """Where the twin of the visited node goes."""
        assert self.here is not None
        return self.here

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


def together(e: Editor) -> None:
    """Gather (and scatter) in one operator what is gathered by the same positions before the first of it is read."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in list(e.graph.nodes):
        read = {r for n in node.all_input_nodes for r in n.all_input_nodes if n.target is operator.getitem}
        for key in [k for k, group in groups.items() if read.intersection(group)]:
            _join(e, groups.pop(key), node)
        if node.target in (gather_tokens, scatter_tokens):
            *_, index, _, _, _, tokens = node.args
            groups.setdefault((node.target, index, tokens), []).append(node)


def _join(e: Editor, group: list[fx.Node], at: fx.Node) -> None:
    """One operator before ``at`` in the place of those in ``group``."""
    if len(group) == 1:
        return
    lists = [[x for part in parts for x in part] for parts in zip(*(_lists(n) for n in group), strict=True)]
    *values, dims, batches, starts = lists
    index, tokens = group[0].args[-5], group[0].args[-1]
    made = e.op(group[0].target, *values, index, dims, batches, starts, tokens, at=at)
    first = 0
    for old in group:
        for user in list(old.users):
            user.replace_all_uses_with(e.op(operator.getitem, made, first + int(user.args[1]), at=at))  # type: ignore[arg-type]
            e.graph.erase_node(user)
        first += len(old.meta["val"])
        e.graph.erase_node(old)


def _lists(node: fx.Node) -> list[Any]:
    *values, _, dims, batches, starts, _ = node.args
    return [*values, dims, batches, starts]


def permuted(place: Place, order: list[int]) -> Place:
    """The place after the dimensions were put in this order."""
    return replace(place, dim=order.index(place.dim), batch=order.index(place.batch) if place.batch >= 0 else -1)
