"""``ditopt::gather_tokens``: the chosen tokens of several tensors, by one list of positions for each sample.

    gather_tokens(values, index, dims, batches, starts, tokens) -> Tensor[]

index (R, n) int64: for each of R samples n distinct positions among ``tokens``. In ``values[i]``, of any dtype and
strides, the tokens are positions ``starts[i]`` to ``starts[i] + tokens`` of dimension ``dims[i]``; positions before and
behind them (another stream's, such as text) stay. ``batches[i]`` is the dimension of the samples: of size R, or of size
1 where the value is the same for all (a table of positions), or -1 where there is none, which needs R = 1. Result ``i``
is contiguous, with dimension ``dims[i]`` shorter by ``tokens - n`` and ``batches[i]`` of size R.

Hidden states and the tables of their positions are gathered together, so that a GPU does it in one launch.
``ditopt::scatter_tokens`` is the way back. ``decompose`` writes the operators that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "gather_tokens(Tensor[] values, Tensor index, int[] dims, int[] batches, int[] starts, int tokens) -> Tensor[]"
)

gather_tokens = torch.ops.ditopt.gather_tokens.default


def _val(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, fx.Node) else x


def _shape(x: Any) -> list[int]:
    return [int(n) for n in _val(x).shape]


def positions(emit: Callable[..., Any], index: Any, start: int, tokens: int, size: int) -> Any:
    """Which positions of a dimension of ``size`` stay, int64 (R, size - tokens + n), where the tokens begin at
    ``start``."""
    if size == tokens:
        return index
    rows, device = _shape(index)[0], _val(index).device
    parts = [emit(aten.add.Tensor, index, start) if start else index]
    for first, last, at in ((0, start, 0), (start + tokens, size, len(parts) + 1)):
        if first < last:
            other = emit(aten.arange.start, first, last, dtype=torch.int64, device=device)
            parts.insert(at, emit(aten.expand.default, other, [rows, last - first]))
    return emit(aten.cat.default, parts, 1)


def decompose(
    emit: Callable[..., Any],
    values: Sequence[Any],
    index: Any,
    dims: Sequence[int],
    batches: Sequence[int],
    starts: Sequence[int],
    tokens: int,
) -> list[Any]:
    """The operators that it stands for, made by ``emit(target, *args, **kwargs)`` from nodes or tensors."""
    where: dict[tuple[int, int], Any] = {}
    out = []
    for value, dim, batch, start in zip(values, dims, batches, starts, strict=True):
        size = _shape(value)[dim]
        if (start, size) not in where:
            where[start, size] = positions(emit, index, start, tokens, size)
        out.append(_gathered(emit, value, where[start, size], dim, batch))
    return out


def _gathered(emit: Callable[..., Any], value: Any, at: Any, dim: int, batch: int) -> Any:
    rows, count = _shape(at)
    if rows == 1:
        return emit(aten.index_select.default, value, dim, emit(aten.reshape.default, at, [count]))
    if batch > 0:  # samples first, and back
        order = [batch, *(d for d in range(len(_shape(value))) if d != batch)]
        made = _gathered(emit, emit(aten.permute.default, value, order), at, dim + (dim < batch), 0)
        back = emit(aten.permute.default, made, [order.index(d) for d in range(len(order))])
        return emit(aten.clone.default, back, memory_format=torch.contiguous_format)
    shape = _shape(value)
    lead, size, width = math.prod(shape[1:dim]), shape[dim], math.prod(shape[dim + 1 :])
    ids = emit(aten.reshape.default, at, [rows, 1, count])
    own = shape[0] if shape[0] > 1 else 0  # each sample has rows of its own
    if own or lead > 1:
        first = emit(aten.arange.default, max(own, 1) * lead, dtype=torch.int64, device=_val(at).device)
        first = emit(aten.reshape.default, emit(aten.mul.Tensor, first, size), [max(own, 1), lead, 1])
        ids = emit(aten.add.Tensor, ids, first)
    table = emit(aten.reshape.default, value, [shape[0] * lead * size, width])
    found = emit(aten.index_select.default, table, 0, emit(aten.reshape.default, ids, [rows * lead * count]))
    return emit(aten.reshape.default, found, [rows, *shape[1:dim], count, *shape[dim + 1 :]])


def _run(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def reference(
    values: Sequence[Tensor],
    index: Tensor,
    dims: Sequence[int],
    batches: Sequence[int],
    starts: Sequence[int],
    tokens: int,
) -> list[Tensor]:
    """What the module says, one value after the other; ValueError where the operands do not fit."""
    check("gather_tokens", values, index, dims, batches, starts, tokens)
    return decompose(_run, values, index, dims, batches, starts, tokens)


def check(
    name: str,
    values: Sequence[Tensor],
    index: Tensor,
    dims: Sequence[int],
    batches: Sequence[int],
    starts: Sequence[int],
    tokens: int,
) -> None:
    """ValueError, with what was given and what was expected, where the operands do not fit."""
    if index.ndim != 2 or index.dtype is not torch.int64 or not 0 < index.shape[1] <= tokens:
        raise ValueError(
            f"{name} takes positions (samples, 1 to {tokens} of them) in int64; given {index.dtype}{list(index.shape)}"
        )
    if not values or not len(values) == len(dims) == len(batches) == len(starts):
        raise ValueError(
            f"{name} takes for each of its tensors a dimension of tokens, one of samples and a start; given "
            f"{len(values)} tensors, {len(dims)}, {len(batches)} and {len(starts)}"
        )
    rows = index.shape[0]
    for value, dim, batch, start in zip(values, dims, batches, starts, strict=True):
        shape = list(value.shape)
        if not 0 <= dim < value.ndim or not 0 <= start <= shape[dim] - tokens:
            raise ValueError(f"{name}: {shape} has no {tokens} tokens from {start} on in dimension {dim}")
        fits = batch == -1 and rows == 1
        if 0 <= batch < value.ndim and batch != dim:
            fits = shape[batch] in (1, rows)
        if not fits:
            raise ValueError(f"{name}: dimension {batch} of {shape} is not that of {rows} samples")


def short(value: Tensor, index: Tensor, dim: int, batch: int, tokens: int) -> list[int]:
    """The shape of what is gathered of ``value``."""
    shape = list(value.shape)
    shape[dim] += index.shape[1] - tokens
    if batch >= 0:
        shape[batch] = index.shape[0]
    return shape


def _fake(
    values: Sequence[Tensor],
    index: Tensor,
    dims: Sequence[int],
    batches: Sequence[int],
    starts: Sequence[int],
    tokens: int,
) -> list[Tensor]:
    check("gather_tokens", values, index, dims, batches, starts, tokens)
    return [v.new_empty(short(v, index, d, b, tokens)) for v, d, b in zip(values, dims, batches, strict=True)]


_library.impl("gather_tokens", reference, "CompositeExplicitAutograd")
torch.library.register_fake("ditopt::gather_tokens", _fake, lib=_library)
