"""Where the axes of a value are in what one operator makes of it: views, permutations, joins, products.

Each dimension of a value is a list of atoms, factors of its size from the outermost on, and each atom names the axes of
the source that it runs along.

Only types are read. Where an operator is not understood its result carries nothing: an answer may be missing, but is
not wrong.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ditopt.ir.binding import data_operands
from ditopt.ir.cost import is_attention, is_convolution
from ditopt.ops import gather_tokens, int4_linear, int8_linear, packed_linear, scatter_tokens, select_blocks

aten = torch.ops.aten


@dataclass(frozen=True)
class Atom:
    """A factor of a dimension that runs along these axes of the source; along none where it is new."""

    size: int
    axes: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Dim:
    """One dimension: ``atoms`` cover its positions from ``start`` on, other positions come from elsewhere."""

    size: int
    atoms: tuple[Atom, ...] = ()
    start: int = 0

    @staticmethod
    def of(size: int, axis: int) -> Dim:
        """The dimension of the source itself that is its ``axis``."""
        return Dim(size, (Atom(size, frozenset({axis})),))

    @property
    def length(self) -> int:
        """How many positions come from the source."""
        return math.prod(a.size for a in self.atoms)

    @property
    def axes(self) -> frozenset[int]:
        return frozenset().union(*(a.axes for a in self.atoms))

    @property
    def whole(self) -> bool:
        return not self.axes or (self.start == 0 and self.length == self.size)


Dims = tuple[Dim, ...]
"""The dimensions of a tensor."""

Known = dict[fx.Node, Any]
"""The Dims of each node that the source reaches; of one with several results a tuple of them, () for those that it does
not reach."""


def through(node: fx.Node, known: Known) -> Dims | tuple[Dims, ...]:
    """The dimensions of the results of an operator, given those of its operands; () where the source ends."""
    if not any(known.get(a) for a in data_operands(node)):
        return ()
    args: Any = node.args
    val = node.meta["val"]
    if node.target is operator.getitem:
        item: Dims = known[args[0]][args[1]]
        return item
    if node.target in _PARTS:
        return _PARTS[node.target](node, args, known)
    if node.target is select_blocks:
        return ((), ())  # blocks, no tokens
    if isinstance(val, (tuple, list)):
        return tuple(_aligned(node, v.shape, known) if isinstance(v, torch.Tensor) else () for v in val)
    if node.target in _RESHAPES:
        return _regroup(known[args[0]], val.shape)
    if is_attention(node):
        return _attention(node, args, known)
    if is_convolution(node):
        return _convolution(node, args, known)
    if node.target in _RULES:
        return _RULES[node.target](node, args, known)
    return _aligned(node, val.shape, known)


def equation(node: fx.Node) -> tuple[list[str], str]:
    """The letters of the operands of an einsum, and those of its result."""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    return terms.split(","), result or "".join(sorted(c for c in terms if terms.count(c) == 1 and c != ","))


# -- moves -------------------------------------------------------------------------------------------------------------


def _regroup(dims: Dims, shape: Sequence[int]) -> Dims:
    """The same values with other boundaries between dimensions."""
    queue: list[Atom | Dim] = []
    for dim in dims:
        queue += (dim.atoms or (Atom(dim.size),)) if dim.whole else (dim,)
    out: list[Dim] = []
    for size in map(int, shape):
        taken: list[Atom] = []
        need, part = size, None
        while need > 1 and queue:
            unit = queue.pop(0)
            if isinstance(unit, Dim):
                if unit.size == need and not taken:
                    part, need = unit, 1
                    continue
                unit = Atom(unit.size)  # a range of a dimension that is cut up is not followed
            if need % unit.size == 0:
                taken += [unit] if unit.size > 1 else []
                need //= unit.size
            elif unit.size % need == 0:
                taken.append(Atom(need, unit.axes))
                queue.insert(0, Atom(unit.size // need, unit.axes))
                need = 1
            else:
                return ()
        out.append(part or Dim(size, tuple(taken)))
    return tuple(out)


def _permute(node: fx.Node, args: Any, known: Known) -> Dims:
    return tuple(known[args[0]][i] for i in args[1])


def _transpose(node: fx.Node, args: Any, known: Known) -> Dims:
    dims = list(known[args[0]])
    i, j = args[1:3] if len(args) > 2 else (0, 1)
    dims[i], dims[j] = dims[j], dims[i]
    return tuple(dims)


def _range(dim: Dim, start: int, stop: int) -> Dim | None:
    """Positions ``start`` to ``stop`` of a dimension; None where none of them comes from the source."""
    if not dim.axes or (start <= dim.start and dim.start + dim.length <= stop):
        return Dim(stop - start, dim.atoms if dim.axes else (), max(dim.start - start, 0))
    low, high = max(start, dim.start), min(stop, dim.start + dim.length)
    return Dim(stop - start, (Atom(high - low, dim.axes),), low - start) if low < high else None


def _cut(dims: Dims, at: int, start: int, stop: int) -> Dims:
    part = _range(dims[at], start, stop)
    return () if part is None else (*dims[:at], part, *dims[at % len(dims) + 1 :])


def _filled(args: Any, *defaults: Any) -> list[Any]:
    """Positional arguments with the defaults of those that are left out."""
    return [*args, *defaults[len(args) :]]


def _dim(node: fx.Node, args: Any, place: int) -> int:
    """The argument ``dim`` of a node, given by place or by name."""
    at: Any = args[place] if len(args) > place else node.kwargs.get("dim", 0)
    return int(at)


def _slice(node: fx.Node, args: Any, known: Known) -> Dims:
    at, start, stop, step = _filled(args[1:], 0, None, None, 1)
    start, stop, step = slice(start, stop, step).indices(known[args[0]][at].size)
    if step != 1:
        return _aligned(node, node.meta["val"].shape, known)
    return _cut(known[args[0]], at, start, max(stop, start))


def _split(node: fx.Node, args: Any, known: Known) -> tuple[Dims, ...]:
    at = _dim(node, args, 2)
    ends = [0, *itertools.accumulate(int(v.shape[at]) for v in node.meta["val"])]
    return tuple(_cut(known[args[0]], at, start, stop) for start, stop in itertools.pairwise(ends))


def _select(node: fx.Node, args: Any, known: Known) -> Dims:
    dims: Dims = known[args[0]]
    at = args[1] % len(dims)
    return (*dims[:at], *dims[at + 1 :])


def _unbind(node: fx.Node, args: Any, known: Known) -> tuple[Dims, ...]:
    return (_select(node, (args[0], _dim(node, args, 1)), known),) * len(node.meta["val"])


def _chosen(node: fx.Node, args: Any, known: Known) -> tuple[Dims, ...]:
    """gather_tokens and scatter_tokens: those of the tensors, with the samples of the positions."""
    *lists, index, _, batches, _, _ = args
    out: list[Dims] = []
    for k, value in enumerate(node.meta["val"]):
        dims = list(_merge([known[part[k]] for part in lists if known.get(part[k])], [int(n) for n in value.shape]))
        if batches[k] >= 0 and known.get(index) and known[index][0].axes:
            dims[batches[k]] = known[index][0]
        out.append(tuple(dims) if any(d.axes for d in dims) else ())
    return tuple(out)


def _cat(node: fx.Node, args: Any, known: Known) -> Dims:
    at = _dim(node, args, 1)
    starts = itertools.accumulate((int(p.meta["val"].shape[at]) for p in args[0]), initial=0)
    return _joined(node, at, zip(args[0], starts, strict=False), known)


def _slice_scatter(node: fx.Node, args: Any, known: Known) -> Dims:
    whole, part, at, start, stop, step = _filled(args, None, None, 0, None, None, 1)
    start, _, step = slice(start, stop, step).indices(int(node.meta["val"].shape[at]))
    return _joined(node, at, [(whole, 0), (part, start)], known) if step == 1 else ()


def _joined(node: fx.Node, at: int, parts: Iterable[tuple[fx.Node, int]], known: Known) -> Dims:
    """Values side by side along dimension ``at``, each from its position on."""
    shape = [int(n) for n in node.meta["val"].shape]
    at %= len(shape)
    there: list[tuple[Dims, int]] = [(known[p], start) for p, start in parts if known.get(p)]
    found = [(d[at], start + d[at].start) for d, start in there if d[at].axes]
    if len(found) == 1:
        joined = Dim(shape[at], found[0][0].atoms, found[0][1])
    else:
        axes = frozenset[int]().union(*(d.axes for d, _ in found))
        joined = Dim(shape[at], (Atom(shape[at], axes),) if axes else ())
    others = _merge([(*d[:at], Dim(shape[at]), *d[at + 1 :]) for d, _ in there], shape)
    return (*others[:at], joined, *others[at + 1 :])


def _stack(node: fx.Node, args: Any, known: Known) -> Dims:
    there: list[Dims] = [known[p] for p in args[0] if known.get(p)]
    at = _dim(node, args, 1)
    return _inserted(node, at, _merge(there, [d.size for d in there[0]]))


def _select_scatter(node: fx.Node, args: Any, known: Known) -> Dims:
    whole, part = (known.get(a, ()) for a in args[:2])
    inside = _inserted(node, args[2], part) if part else ()
    return _merge([d for d in (whole, inside) if d], node.meta["val"].shape)


def _inserted(node: fx.Node, at: int, dims: Dims) -> Dims:
    at %= len(dims) + 1
    return (*dims[:at], Dim(int(node.meta["val"].shape[at])), *dims[at:])


# -- products and the rest ---------------------------------------------------------------------------------------------


def _linear(node: fx.Node, args: Any, known: Known) -> Dims:
    dims: Dims = known.get(args[0], ())
    return (*dims[:-1], Dim(int(node.meta["val"].shape[-1]))) if dims else ()


def _product(node: fx.Node, args: Any, known: Known) -> Dims:
    """Rows of the left operand, columns of the right one, batches of either."""
    a, b = (known.get(x, ()) for x in factors(node))
    shape = [int(n) for n in node.meta["val"].shape]
    if len(shape) < 2 or any(len(d) == 1 for d in (a, b)):
        return ()
    row = a[-2] if a else Dim(shape[-2])
    column = b[-1] if b else Dim(shape[-1])
    return (*_merge([d[:-2] for d in (a, b) if d], shape[:-2]), row, column)


def _outer(node: fx.Node, args: Any, known: Known) -> Dims:
    shape = node.meta["val"].shape
    return tuple((known.get(a) or (Dim(int(n)),))[0] for a, n in zip(args[:2], shape, strict=True))


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two matrices that a node multiplies."""
    args: Any = node.args
    left, right = args[1:3] if node.target in (aten.addmm.default, aten.baddbmm.default) else args[:2]
    return left, right


def _attention(node: fx.Node, args: Any, known: Known) -> Dims:
    query, value = known.get(args[0], ()), known.get(args[2], ())
    shape = [int(n) for n in node.meta["val"].shape]
    row = query[-2] if query else Dim(shape[-2])
    return (*_merge([d[:-2] for d in (query, value) if d], shape[:-2]), row, Dim(shape[-1]))


def _convolution(node: fx.Node, args: Any, known: Known) -> Dims:
    dims: Dims = known.get(args[0], ())
    shape = [int(n) for n in node.meta["val"].shape]
    if len(dims) != len(shape):
        return ()
    return (dims[0], Dim(shape[1]), *(_resized(d, n) for d, n in zip(dims[2:], shape[2:], strict=True)))


def _einsum(node: fx.Node, args: Any, known: Known) -> Dims:
    terms, result = equation(node)
    shape = node.meta["val"].shape
    letters: dict[str, Dim] = {}
    for term, operand in zip(terms, args[1], strict=True):
        for letter, dim in zip(_lettered(term, operand.meta["val"].ndim), known.get(operand, ()), strict=False):
            if letter not in letters or len(dim.axes) > len(letters[letter].axes):
                letters[letter] = dim
    return tuple(
        letters.get(c, Dim(int(n))) for c, n in zip(_lettered(result, len(shape)), map(int, shape), strict=True)
    )


def _lettered(term: str, rank: int) -> list[str]:
    """A letter for each dimension; those that three dots stand for are numbered from the right."""
    before, dots, behind = term.partition("...")
    count = rank - len(before) - len(behind)
    return [*before, *(f".{count - k}" for k in range(count if dots else 0)), *behind]


def _embedding(node: fx.Node, args: Any, known: Known) -> Dims:
    dims: Dims = known.get(args[1], ())
    return (*dims, Dim(int(node.meta["val"].shape[-1]))) if dims else ()


def _as_complex(node: fx.Node, args: Any, known: Known) -> Dims:
    dims: Dims = known[args[0]]
    return dims[:-1]


def _as_real(node: fx.Node, args: Any, known: Known) -> Dims:
    return (*known[args[0]], Dim(2))


def _aligned(node: fx.Node, shape: Sequence[int], known: Known) -> Dims:
    """Dimension by dimension from the right, as operators broadcast; () where the rank is another than theirs."""
    dims: list[Any] = [known[a] for a in data_operands(node) if known.get(a)]
    ranks = [a.meta["val"].ndim for a in data_operands(node) if isinstance(a.meta["val"], torch.Tensor)]
    grows = node.target in (aten.expand.default, aten.repeat.default)
    if max(ranks, default=0) != len(shape) and not (grows and len(ranks) == 1):
        return ()
    return _merge(dims, [int(n) for n in shape])


def _merge(operands: Sequence[Dims], shape: Sequence[int]) -> Dims:
    out: list[Dim] = []
    for k in range(-len(shape), 0):
        size = shape[k]
        there = [d[k] for d in operands if len(d) >= -k and d[k].axes and (d[k].size != 1 or size == 1)]
        best = max(there, key=lambda d: (d.size == size, sum(bool(a.axes) for a in d.atoms)), default=Dim(size))
        out.append(_resized(best, size))
    return tuple(out)


def _resized(dim: Dim, size: int) -> Dim:
    if dim.size == size:
        return dim
    return Dim(size, (Atom(size, dim.axes),) if dim.axes else ())


_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
}

_PARTS: dict[Any, Callable[[fx.Node, Any, Known], tuple[Dims, ...]]] = {
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _unbind,
    gather_tokens: _chosen,
    scatter_tokens: _chosen,
}

_RULES: dict[Any, Callable[[fx.Node, Any, Known], Dims]] = {
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.linear.default: _linear,
    int4_linear: _linear,
    int8_linear: _linear,
    packed_linear: _linear,
    aten.embedding.default: _embedding,
    aten.view_as_complex.default: _as_complex,
    aten.view_as_real.default: _as_real,
    aten.einsum.default: _einsum,
    aten.outer.default: _outer,
    **dict.fromkeys(
        (aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default, aten.baddbmm.default), _product
    ),
}
