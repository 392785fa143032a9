"""A function on part of its tokens: beside each operator its twin, which computes the same for the chosen tokens only.

A *token set* is a tensor of positions, int64 (rows, count), one row for each sample: the count is static, the positions
are data. ``Short`` follows a value whose tokens were gathered through a graph. What treats each token by itself gets a
twin on the short value; what is made for all tokens and meets them (position embeddings, rotary tables, masks,
modulation for each token) is gathered by the same positions. Only attention reads other tokens: there the keys and
values of the chosen ones are put into those that are kept of all, and the queries are the chosen ones alone. Whatever
else would let tokens mix has no twin: ``Mixes`` says what it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ditopt.ir.cost import is_attention
from ditopt.ir.edit import Editor
from ditopt.ops import attention

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
    node that holds it. ``merged``: what attention reads -> (the kept value with the chosen tokens put into it, place).
    ``formal``: where a placeholder can be handed over gathered, the placeholder for that.
    """

    e: Editor
    set: TokenSet
    index: fx.Node
    keep: Callable[[fx.Node, Place], fx.Node]
    formal: Callable[[fx.Node, Place, int], fx.Node | None] = lambda node, place, rank: None
    twins: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    merged: dict[fx.Node, tuple[fx.Node, fx.Node, Place]] = field(default_factory=dict)
    _taken: dict[tuple[fx.Node, Place, int], fx.Node] = field(default_factory=dict)
    _at: fx.Node | None = None  # in front of which the twin of the visited node goes

    # -- gather and scatter ------------------------------------------------------------------------------------------

    def take(self, node: fx.Node, place: Place, rank: int) -> fx.Node:
        """``node`` with the chosen tokens alone: its dimensions, counted from the right, are those of a value of
        ``rank`` dimensions in which ``place`` is."""
        key = (node, place, rank)
        if key not in self._taken:
            self._taken[key] = self.formal(node, place, rank) or self.gather(
                node, place, rank, after(node, self.index)
            )
        return self._taken[key]

    def gather(self, node: fx.Node, place: Place, rank: int, at: fx.Node) -> fx.Node:
        """Nodes before ``at`` that do so."""
        e, region = self.e, str(node.meta["region"])
        shape = [1] * (rank - node.meta["val"].ndim) + [int(n) for n in node.meta["val"].shape]
        if self.set.rows == 1:
            dim = place.dim - rank + node.meta["val"].ndim
            return self._around(node, replace(place, dim=dim), at, lambda part: self._select(part, dim, at))
        if place.batch < 0:
            raise Mixes("samples and tokens lie in one dimension, so each sample cannot choose its own")
        shape[place.batch] = self.set.rows
        wide = e.op(aten.expand.default, node, shape, at=at, region=region)
        ids = self._positions(place, shape, at)
        return self._around(wide, place, at, lambda part: e.op(aten.gather.default, part, place.dim, ids, at=at))

    def put(self, kept: fx.Node, chosen: fx.Node, place: Place, at: fx.Node) -> fx.Node:
        """``kept``, a value of all tokens and nothing else, with ``chosen`` in the place of the chosen ones; its layout in
        memory stays."""
        order = _layout(kept.meta["val"])
        if order != sorted(order):
            e = self.e
            inside = _permuted(place, order)
            made = self.put(
                e.op(aten.permute.default, kept, order, at=at), e.op(aten.permute.default, chosen, order, at=at), inside, at
            )
            return e.op(aten.permute.default, made, [order.index(d) for d in range(len(order))], at=at)
        shape = [int(n) for n in kept.meta["val"].shape]
        if self.set.rows > 1 and place.batch < 0:
            raise Mixes("samples and tokens lie in one dimension, so each sample cannot choose its own")
        ids = self._positions(place, shape, at)
        return self.e.op(aten.scatter.src, kept, place.dim, ids, chosen, at=at)

    def _select(self, node: fx.Node, dim: int, at: fx.Node) -> fx.Node:
        flat = self.e.op(aten.view.default, self.index, [self.set.count], at=at)
        return self.e.op(aten.index_select.default, node, dim, flat, at=at)

    def _positions(self, place: Place, shape: Sequence[int], at: fx.Node) -> fx.Node:
        """The positions spread over all other dimensions of ``shape``."""
        thin = [1] * len(shape)
        thin[place.dim] = self.set.count
        if place.batch >= 0:
            thin[place.batch] = self.set.rows
        wide = [*shape]
        wide[place.dim] = self.set.count
        ids = self.e.op(aten.view.default, self.index, thin, at=at)
        return self.e.op(aten.expand.default, ids, wide, at=at)

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

    @property
    def here(self) -> fx.Node:
        """In front of which the twin of the visited node is made."""
        assert self._at is not None
        return self._at

    def visit(self, node: fx.Node) -> bool:
        """Give ``node`` its twin where an operand has one; ``Mixes`` where it cannot have one."""
        operands = [n for n in node.all_input_nodes if n in self.twins]
        if not operands:
            return False
        self._at = after(node)
        if not any(_flat(self.twins[n][1]) for n in operands):
            self.emit(node, None, node.target, *self.twin(node.args), **node.kwargs)
            return True
        rule = RULES.get(node.target)
        if rule is not None:
            rule(self, node)
        elif is_attention(node):
            _attend(self, node)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
            _pointwise(self, node)
        else:
            raise Mixes(f"{name(node)} mixes tokens, or treats them in a way that is not known")
        return True

    def emit(self, node: fx.Node, place: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        """The twin of ``node`` behind it."""
        more: dict[str, Any] = {k: self.twin(v) for k, v in kwargs.items()}
        twin = self.e.op(target, *args, at=self._at, region=str(node.meta["region"]), **more)
        self.twins[node] = twin, place


def after(*nodes: fx.Node) -> fx.Node:
    """What follows the last of ``nodes``, and all placeholders."""
    at = max(nodes).next
    while at.op == "placeholder":
        at = at.next
    return at


def name(node: fx.Node) -> str:
    """An operator as a sentence names it."""
    return str(node.target).removesuffix(".default")


def _flat(places: Any) -> bool:
    return any(places) if isinstance(places, tuple) else places is not None


def _only(s: Short, node: fx.Node) -> tuple[fx.Node, Place, list[int]]:
    """The operand of a move, its place, and the shape of the result."""
    source: Any = node.args[0]
    place = s.place(source)
    if place is None or sum(n in s.twins for n in node.all_input_nodes) > 1:
        raise Mixes(f"{name(node)} has tokens where they are not expected")
    value = node.meta["val"]
    return source, place, [int(n) for n in value.shape] if isinstance(value, torch.Tensor) else []


# -- one token at a time -------------------------------------------------------------------------------------------------


def _pointwise(s: Short, node: fx.Node) -> None:
    rank = node.meta["val"].ndim
    place = _agreed(s, node, node.all_input_nodes, rank)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _fitting(s, node, n, place, rank))
    s.emit(node, place, node.target, *args, **kwargs)


def _agreed(s: Short, node: fx.Node, operands: Sequence[fx.Node], rank: int) -> Place:
    """The one place that the tokens of all operands have in a result of ``rank`` dimensions."""
    found = set()
    for n in operands:
        if (p := s.place(n)) is not None:
            shift = rank - n.meta["val"].ndim
            found.add(replace(p, dim=p.dim + shift, batch=p.batch + shift if p.batch >= 0 else -1))
    if len(found) != 1:
        raise Mixes(f"{name(node)} joins tokens with others at other places")
    return found.pop()


def _fitting(s: Short, node: fx.Node, operand: fx.Node, place: Place, rank: int) -> fx.Node:
    """An operand beside tokens at ``place``: short, or the same for all of them."""
    if s.place(operand) is not None:
        return s.twin(operand)  # type: ignore[no-any-return]
    at = place.dim - rank + operand.meta["val"].ndim
    size = int(operand.meta["val"].shape[at]) if at >= 0 else 1
    if size == 1:
        return s.twin(operand)  # type: ignore[no-any-return]
    if operand in s.twins:
        return s.gather(s.twin(operand), place, rank, s.here)
    return s.take(operand, place, rank)


def _linear(s: Short, node: fx.Node) -> None:
    source, place, shape = _only(s, node)
    if place.dim == len(shape) - 1:
        raise Mixes(f"{name(node)} sums over tokens")
    s.emit(node, place, node.target, s.twin(source), *node.args[1:], **node.kwargs)


def _matmul(s: Short, node: fx.Node) -> None:
    args: Any = node.args
    at = 1 if node.target in (aten.addmm.default, aten.baddbmm.default) else 0
    left, right = args[at : at + 2]
    place = s.place(left)
    if place is None or right in s.twins or place.dim != left.meta["val"].ndim - 2:
        raise Mixes(f"{name(node)} multiplies tokens with each other outside of attention")
    bias = [_fitting(s, node, args[0], place, node.meta["val"].ndim)] if at else []
    s.emit(node, place, node.target, *bias, s.twin(left), right, *args[at + 2 :], **node.kwargs)


def _norm(s: Short, node: fx.Node) -> None:
    source, place, _ = _only(s, node)
    normed: Any = node.args[1]
    if place.dim >= source.meta["val"].ndim - len(normed):
        raise Mixes(f"{name(node)} norms over tokens")
    s.emit(node, place, node.target, s.twin(source), *node.args[1:], **node.kwargs)


def _reduce(s: Short, node: fx.Node) -> None:
    source, place, _ = _only(s, node)
    rank = source.meta["val"].ndim
    given: Any = node.args[_DIMS.get(node.target, 1)] if len(node.args) > _DIMS.get(node.target, 1) else None
    given = node.kwargs.get("dim", given)
    dims = {d % rank for d in ([given] if isinstance(given, int) else given or range(rank))}
    if place.dim in dims:
        raise Mixes(f"{name(node)} sums over tokens, or compares them")
    if node.meta["val"].ndim < rank:
        gone = [d for d in dims if d < place.dim]
        batch = -1 if place.batch in dims else place.batch - sum(d < place.batch for d in dims)
        place = replace(place, dim=place.dim - len(gone), batch=batch if place.batch >= 0 else -1)
    s.emit(node, place, node.target, s.twin(source), *node.args[1:], **node.kwargs)


_DIMS = {aten.linalg_vector_norm.default: 2}
"""Where an operator takes the dimensions that it reduces, if not in place 1."""


# -- moves ---------------------------------------------------------------------------------------------------------------


def _view(s: Short, node: fx.Node) -> None:
    source, place, shape = _only(s, node)
    old = [int(n) for n in source.meta["val"].shape]
    dim = _same(old, place.dim, shape)
    if dim < 0:
        raise Mixes(f"{name(node)} lays tokens out as {shape}, where they are no dimension of their own")
    batch = _same(old, place.batch, shape) if place.batch >= 0 else -1
    short = [*shape]
    short[dim] = s.set.short(place.size)
    s.emit(node, replace(place, dim=dim, batch=batch), aten.reshape.default, s.twin(source), short)


def _pairs(s: Short, node: fx.Node) -> None:
    """Pairs of numbers as complex ones, and back: the last dimension."""
    source, place, _ = _only(s, node)
    if place.dim == source.meta["val"].ndim - (node.target is aten.view_as_complex.default):
        raise Mixes(f"{name(node)} pairs tokens")
    s.emit(node, place, node.target, s.twin(source))


def _same(old: Sequence[int], dim: int, new: Sequence[int]) -> int:
    """The dimension of shape ``new`` that is dimension ``dim`` of ``old``; -1 where there is none."""
    before, at = math.prod(old[:dim]), 1
    for i, n in enumerate(new):
        if at == before and n == old[dim]:
            return i
        at *= n
    return -1


def _permute(s: Short, node: fx.Node) -> None:
    source, place, _ = _only(s, node)
    rank = source.meta["val"].ndim
    order: list[int] = list(range(rank))
    if node.target is aten.permute.default:
        order = [d % rank for d in node.args[1]]  # type: ignore[union-attr]
    else:
        i, j = (int(d) % rank for d in node.args[1:3]) if len(node.args) > 2 else (0, 1)  # type: ignore[call-overload]
        order[i], order[j] = order[j], order[i]
    s.emit(node, _permuted(place, order), node.target, s.twin(source), *node.args[1:])


def _permuted(place: Place, order: list[int]) -> Place:
    """The place after the dimensions were put in this order."""
    return replace(place, dim=order.index(place.dim), batch=order.index(place.batch) if place.batch >= 0 else -1)


def _layout(value: Any) -> list[int]:
    """The dimensions of a (fake) value, the outermost in memory first."""
    if value.is_contiguous():
        return list(range(value.ndim))
    return sorted(range(value.ndim), key=lambda d: (-value.stride(d), d))


def _unsqueeze(s: Short, node: fx.Node) -> None:
    source, place, shape = _only(s, node)
    at = int(node.args[1]) % len(shape)  # type: ignore[call-overload]
    s.emit(node, _shifted(place, at, 1), node.target, s.twin(source), at)


def _shifted(place: Place, at: int, by: int) -> Place:
    """The place after dimensions were put in (or taken out) at ``at``."""
    batch = place.batch + by * (place.batch >= at) if place.batch >= 0 else -1
    return replace(place, dim=place.dim + by * (place.dim >= at), batch=batch)


def _pick(s: Short, node: fx.Node) -> None:
    """select and unbind along another dimension."""
    source, place, _ = _only(s, node)
    given: Any = [*node.args[1:], 0]
    at = int(node.kwargs.get("dim", given[0])) % source.meta["val"].ndim  # type: ignore[call-overload]
    if at == place.dim:
        raise Mixes(f"{name(node)} takes single tokens")
    moved = replace(place, batch=-1) if place.batch == at else place
    moved = _shifted(moved, at, -1)
    places = moved if isinstance(node.meta["val"], torch.Tensor) else (moved,) * len(node.meta["val"])
    s.emit(node, places, node.target, s.twin(source), *node.args[1:], **node.kwargs)


def _slice(s: Short, node: fx.Node) -> None:
    source, place, _ = _only(s, node)
    dim, start, stop, step = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]  # type: ignore[misc]
    rank = source.meta["val"].ndim
    if dim % rank != place.dim:
        s.emit(node, place, node.target, s.twin(source), dim, start, stop, step)
        return
    first, last, step = slice(start, stop, step).indices(place.size)
    if step != 1:
        raise Mixes(f"{name(node)} takes every {step}th token")
    found, low, high = _part(s, node, place, first, max(last, first))
    s.emit(node, found, node.target, s.twin(source), dim, low, high)


def _part(s: Short, node: fx.Node, place: Place, first: int, last: int) -> tuple[Place | None, int, int]:
    """Positions ``first`` to ``last`` of a full value: the place of the tokens among them, and the range of them in the
    twin."""
    begin, end = place.start, place.start + s.set.tokens
    less = s.set.tokens - s.set.count
    if last <= begin or first >= end:
        less = less if first >= end else 0
        return None, first - less, last - less
    if first <= begin and end <= last:
        return replace(place, start=begin - first, size=last - first), first, last - less
    raise Mixes(f"{name(node)} takes some of the tokens by their number")


def _split(s: Short, node: fx.Node) -> None:
    source, place, _ = _only(s, node)
    given: Any = [*node.args[2:], 0]
    dim = int(node.kwargs.get("dim", given[0])) % source.meta["val"].ndim  # type: ignore[call-overload]
    sizes = [int(v.shape[dim]) for v in node.meta["val"]]
    if dim != place.dim:
        s.emit(node, (place,) * len(sizes), node.target, s.twin(source), *node.args[1:], **node.kwargs)
        return
    places, short, at = [], [], 0
    for size in sizes:
        found, low, high = _part(s, node, place, at, at + size)
        places.append(found)
        short.append(high - low)
        at += size
    s.emit(node, tuple(places), aten.split_with_sizes.default, s.twin(source), short, dim)


def _getitem(s: Short, node: fx.Node) -> None:
    source, at = node.args
    twin, places = s.twins[source]  # type: ignore[index]
    s.emit(node, places[at], node.target, twin, at)


def _cat(s: Short, node: fx.Node) -> None:
    parts: Any = node.args[0]
    rank = node.meta["val"].ndim
    given: Any = [*node.args[1:], 0]
    dim = int(node.kwargs.get("dim", given[0])) % rank  # type: ignore[call-overload]
    there = [p for p in parts if s.place(p) is not None]
    place = s.place(there[0])
    if dim != place.dim:
        place = _agreed(s, node, parts, rank)
        s.emit(node, place, node.target, [_fitting(s, node, p, place, rank) for p in parts], dim)
        return
    if len(there) > 1:
        raise Mixes(f"{name(node)} puts tokens behind tokens")
    before = sum(int(p.meta["val"].shape[dim]) for p in parts[: parts.index(there[0])])
    joined = replace(place, start=before + place.start, size=int(node.meta["val"].shape[dim]))
    s.emit(node, joined, node.target, s.twin(parts), dim)


def _stack(s: Short, node: fx.Node) -> None:
    parts: Any = node.args[0]
    rank = parts[0].meta["val"].ndim
    given: Any = [*node.args[1:], 0]
    at = int(node.kwargs.get("dim", given[0])) % (rank + 1)  # type: ignore[call-overload]
    place = _agreed(s, node, parts, rank)
    fitting = [_fitting(s, node, p, place, rank) for p in parts]
    s.emit(node, _shifted(place, at, 1), node.target, fitting, at)


def _expand(s: Short, node: fx.Node) -> None:
    source, place, shape = _only(s, node)
    shift = len(shape) - source.meta["val"].ndim
    moved = replace(place, dim=place.dim + shift, batch=place.batch + shift if place.batch >= 0 else -1)
    short = [*shape]
    short[moved.dim] = s.set.short(place.size)
    s.emit(node, moved, node.target, s.twin(source), short)


# -- attention -----------------------------------------------------------------------------------------------------------


def _attend(s: Short, node: fx.Node) -> None:
    sdpa = node.target is aten.scaled_dot_product_attention.default
    if not sdpa and node.target is not attention:
        raise Mixes(f"{name(node)} sums over all tokens")
    names = ("query", "key", "value", *(("attn_mask", "dropout_p", "is_causal") if sdpa else ("mask", "scale", "is_causal")))
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("is_causal"):
        raise Mixes("causal attention looks at the order of tokens")
    query, key, value = (given[n] for n in names[:3])
    mask = given.get(names[3])
    at = s.here
    if (s.place(key) is None) != (s.place(value) is None):
        raise Mixes(f"{name(node)} has keys and values of different tokens")
    read = []
    for n in (key, value):
        place = s.place(n)
        if place is not None and place.dim != n.meta["val"].ndim - 2:
            raise Mixes(f"{name(node)} does not read keys along tokens")
        read.append(s.twin(n) if place is None else s.merge(n, at))
    place = s.place(query)
    if place is not None and place.dim != query.meta["val"].ndim - 2:
        raise Mixes(f"{name(node)} has tokens that are no queries")
    if mask is not None:
        if s.place(mask) is not None:
            raise Mixes(f"{name(node)} has a mask that is made of tokens")
        mask = s.twin(mask) if place is None else _fitting(s, node, mask, place, query.meta["val"].ndim)
    more: dict[str, Any] = {} if given.get("scale") is None else {"scale": given["scale"]}
    if given.get("enable_gqa"):
        more["enable_gqa"] = True
    target = aten.scaled_dot_product_attention.default
    s.emit(node, place, target, s.twin(query), *read, *([] if mask is None else [mask]), **more)


_SAME = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
)

RULES: dict[Any, Callable[[Short, fx.Node], None]] = {
    **dict.fromkeys(_SAME, _pointwise),
    aten.linear.default: _linear,
    **dict.fromkeys(
        (aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default, aten.baddbmm.default), _matmul
    ),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _norm),
    **dict.fromkeys(
        (
            aten.mean.dim,
            aten.sum.dim_IntList,
            aten.var.correction,
            aten.std.correction,
            aten.amax.default,
            aten.amin.default,
            aten.softmax.int,
            aten._softmax.default,
            aten.linalg_vector_norm.default,
        ),
        _reduce,
    ),
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
        ),
        _view,
    ),
    **dict.fromkeys((aten.view_as_complex.default, aten.view_as_real.default), _pairs),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), _permute),
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys((aten.select.int, aten.unbind.int), _pick),
    aten.slice.Tensor: _slice,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default), _split),
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.expand.default: _expand,
    operator.getitem: _getitem,
}
"""How the twin of an operator is made; operators tagged pointwise, and attention, have rules of their own."""
