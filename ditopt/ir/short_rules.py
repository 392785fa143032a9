"""Twins of operators on part of the tokens (ir/short.py): which operator treats each token by itself, and which cannot.

An operator has a twin where a rule here says so, or where it is tagged pointwise; of all others nothing is assumed, so
that a model whose tokens meet in an unknown way is refused and not miscomputed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ditopt.ir.cost import is_attention
from ditopt.ir.short import Mixes, Place, Short, after, permuted
from ditopt.ops import attention, select

aten = torch.ops.aten


def visit(s: Short, node: fx.Node) -> bool:
    """Give ``node`` its twin where an operand has one; ``Mixes`` where it cannot have one."""
    operands = [n for n in node.all_input_nodes if n in s.twins]
    if not operands:
        return False
    s.here = after(node)
    if not any(_flat(s.twins[n][1]) for n in operands):
        s.emit(node, None, node.target, *s.twin(node.args), **node.kwargs)
        return True
    rule = RULES.get(node.target)
    if rule is not None:
        rule(s, node)
    elif is_attention(node):
        _attend(s, node)
    elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
        _pointwise(s, node)
    else:
        raise Mixes(f"{name(node)} mixes tokens, or treats them in a way that is not known")
    return True


def name(node: fx.Node) -> str:
    """An operator as a sentence names it."""
    return str(node.target).removesuffix(".default")


def _named(node: fx.Node, default: Any) -> Any:
    """The argument ``dim`` where it is given by name."""
    return node.kwargs.get("dim", default)


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


# -- one token at a time -----------------------------------------------------------------------------------------------


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
        return s.short(operand)
    at = place.dim - rank + operand.meta["val"].ndim
    size = int(operand.meta["val"].shape[at]) if at >= 0 else 1
    if size == 1:
        return s.short(operand)
    if operand in s.twins:
        return s.gather(s.short(operand), place, rank, s.at)
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
    at = 2 if node.target is aten.linalg_vector_norm.default else 1
    given: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim")
    dims = {d % rank for d in ([given] if isinstance(given, int) else given or range(rank))}
    if place.dim in dims:
        raise Mixes(f"{name(node)} sums over tokens, or compares them")
    if node.meta["val"].ndim < rank:
        gone = [d for d in dims if d < place.dim]
        batch = -1 if place.batch in dims else place.batch - sum(d < place.batch for d in dims)
        place = replace(place, dim=place.dim - len(gone), batch=batch if place.batch >= 0 else -1)
    s.emit(node, place, node.target, s.twin(source), *node.args[1:], **node.kwargs)


# -- moves -------------------------------------------------------------------------------------------------------------


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
        pair: Any = node.args[1:3] if len(node.args) > 2 else (0, 1)
        i, j = (int(d) % rank for d in pair)
        order[i], order[j] = order[j], order[i]
    s.emit(node, permuted(place, order), node.target, s.twin(source), *node.args[1:])


def _unsqueeze(s: Short, node: fx.Node) -> None:
    source, place, shape = _only(s, node)
    given: Any = node.args[1]
    at = int(given) % len(shape)
    s.emit(node, _shifted(place, at, 1), node.target, s.twin(source), at)


def _shifted(place: Place, at: int, by: int) -> Place:
    """The place after dimensions were put in (or taken out) at ``at``."""
    batch = place.batch + by * (place.batch >= at) if place.batch >= 0 else -1
    return replace(place, dim=place.dim + by * (place.dim >= at), batch=batch)


def _pick(s: Short, node: fx.Node) -> None:
    """select and unbind along another dimension."""
    source, place, _ = _only(s, node)
    given: Any = [*node.args[1:], 0]
    at = int(_named(node, given[0])) % source.meta["val"].ndim
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


def _scatter(s: Short, node: fx.Node) -> None:
    """A write into a part of the channels; what is written into and what is written are both of tokens."""
    into, what, *where = node.args
    dim: Any = where[0] if where else node.kwargs.get("dim", 0)
    rank = node.meta["val"].ndim
    place = _agreed(s, node, node.all_input_nodes, rank)
    if dim % rank == place.dim:
        raise Mixes(f"{name(node)} writes into part of the tokens")
    args = [_fitting(s, node, n, place, rank) for n in (into, what)]  # type: ignore[arg-type]
    s.emit(node, place, node.target, *args, *where, **node.kwargs)


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
    dim = int(_named(node, given[0])) % source.meta["val"].ndim
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
    dim = int(_named(node, given[0])) % rank
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
    at = int(_named(node, given[0])) % (rank + 1)
    place = _agreed(s, node, parts, rank)
    fitting = [_fitting(s, node, p, place, rank) for p in parts]
    s.emit(node, _shifted(place, at, 1), node.target, fitting, at)


def _repeat(s: Short, node: fx.Node) -> None:
    """Copies along other dimensions."""
    source, place, shape = _only(s, node)
    shift = len(shape) - source.meta["val"].ndim
    given: Any = node.args[1]
    times = [int(n) for n in given]
    if times[place.dim + shift] != 1:
        raise Mixes(f"{name(node)} repeats the sequence")
    batch = place.batch + shift if place.batch >= 0 and times[place.batch + shift] == 1 else -1
    s.emit(node, replace(place, dim=place.dim + shift, batch=batch), node.target, s.twin(source), times)


def _expand(s: Short, node: fx.Node) -> None:
    source, place, shape = _only(s, node)
    shift = len(shape) - source.meta["val"].ndim
    moved = replace(place, dim=place.dim + shift, batch=place.batch + shift if place.batch >= 0 else -1)
    short = [*shape]
    short[moved.dim] = s.set.short(place.size)
    s.emit(node, moved, node.target, s.twin(source), short)


# -- attention ---------------------------------------------------------------------------------------------------------


def _attend(s: Short, node: fx.Node) -> None:
    sdpa = node.target is aten.scaled_dot_product_attention.default
    if not sdpa and node.target is not attention:
        raise Mixes(f"{name(node)} sums over all tokens")
    more_names = ("attn_mask", "dropout_p", "is_causal") if sdpa else ("mask", "scale", "is_causal", "enable_gqa")
    names = ("query", "key", "value", *more_names)
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("is_causal"):
        raise Mixes("causal attention looks at the order of tokens")
    query, key, value = (given[n] for n in names[:3])
    mask = given.get(names[3])
    at = s.at
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
    select,
)

RULES: dict[Any, Callable[[Short, fx.Node], None]] = {
    **dict.fromkeys((*_SAME, aten.copy.default), _pointwise),
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
    aten.slice_scatter.default: _scatter,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default), _split),
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    operator.getitem: _getitem,
}
"""How the twin of an operator is made; operators tagged pointwise, and attention, have rules of their own."""
