"""``ditopt::scatter_tokens``: rows of the chosen tokens put into several tensors of all tokens.

    scatter_tokens(bases, rows, index, dims, batches, starts, tokens) -> Tensor[]

The way back of ``ditopt::gather_tokens``, whose words ``index``, ``dims``, ``batches``, ``starts`` and ``tokens`` are:
``rows[i]`` has the shape and dtype of what is gathered of ``bases[i]``. Result ``i`` is ``rows[i]`` at the chosen
positions and at those that are no tokens, and ``bases[i]`` at the tokens that were not chosen. It has the base's order
of dimensions in memory, and shares no memory with it. The samples are a dimension of the base, of size R, unless R = 1.

Keys and values of an attention, or what the model said last, are brought up to date so, all in one launch on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ditopt.ops.gather_tokens import _run, _shape, _val, check, positions, short

aten = torch.ops.aten

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "scatter_tokens(Tensor[] bases, Tensor[] rows, Tensor index, int[] dims, int[] batches, int[] starts, "
    "int tokens) -> Tensor[]"
)

scatter_tokens = torch.ops.ditopt.scatter_tokens.default


def decompose(
    emit: Callable[..., Any],
    bases: Sequence[Any],
    rows: Sequence[Any],
    index: Any,
    dims: Sequence[int],
    batches: Sequence[int],
    starts: Sequence[int],
    tokens: int,
) -> list[Any]:
    """The operators that it stands for, made by ``emit(target, *args, **kwargs)`` from nodes or tensors."""
    where: dict[tuple[int, int], Any] = {}
    out = []
    for base, own, dim, batch, start in zip(bases, rows, dims, batches, starts, strict=True):
        size = _shape(base)[dim]
        if (start, size) not in where:
            where[start, size] = positions(emit, index, start, tokens, size)
        out.append(_scattered(emit, base, own, where[start, size], dim, batch))
    return out


def _scattered(emit: Callable[..., Any], base: Any, rows: Any, at: Any, dim: int, batch: int) -> Any:
    samples, count = _shape(at)
    if samples == 1:  # the copy is contiguous: with the dimensions in the order of memory it is the base's layout
        order = sorted(range(len(_shape(base))), key=lambda d: (-_val(base).stride(d), d))
        inside, new = (_permuted(emit, x, order) for x in (base, rows))
        made = emit(aten.index_copy.default, inside, order.index(dim), emit(aten.reshape.default, at, [count]), new)
        return _permuted(emit, made, [order.index(d) for d in range(len(order))])
    order = [batch, dim, *(d for d in range(len(_shape(base))) if d not in (batch, dim))]
    sample = emit(aten.arange.default, samples, dtype=torch.int64, device=_val(at).device)
    ids = [emit(aten.reshape.default, sample, [samples, 1]), at]
    inside, new = (_permuted(emit, x, order) for x in (base, rows))
    made = emit(aten.index_put.default, inside, ids, new)
    return _permuted(emit, made, [order.index(d) for d in range(len(order))])


def _permuted(emit: Callable[..., Any], x: Any, order: list[int]) -> Any:
    return x if order == list(range(len(order))) else emit(aten.permute.default, x, order)


def reference(
    bases: Sequence[Tensor],
    rows: Sequence[Tensor],
    index: Tensor,
    dims: Sequence[int],
    batches: Sequence[int],
    starts: Sequence[int],
    tokens: int,
) -> list[Tensor]:
    """What the module says, one base after the other; ValueError where the operands do not fit."""
    check_rows(bases, rows, index, dims, batches, starts, tokens)
    return decompose(_run, bases, rows, index, dims, batches, starts, tokens)


def check_rows(
    bases: Sequence[Tensor],
    rows: Sequence[Tensor],
    index: Tensor,
    dims: Sequence[int],
    batches: Sequence[int],
    starts: Sequence[int],
    tokens: int,
) -> None:
    """ValueError, with what was given and what was expected, where the operands do not fit."""
    check("scatter_tokens", bases, index, dims, batches, starts, tokens)
    if len(rows) != len(bases):
        raise ValueError(f"scatter_tokens takes rows for each base; given {len(rows)} for {len(bases)}")
    for base, own, dim, batch in zip(bases, rows, dims, batches, strict=True):
        wanted = short(base, index, dim, batch, tokens)
        if batch >= 0 and base.shape[batch] != index.shape[0]:
            raise ValueError(f"scatter_tokens: {list(base.shape)} does not hold {index.shape[0]} samples")
        if list(own.shape) != wanted or own.dtype is not base.dtype:
            raise ValueError(
                f"scatter_tokens takes rows {wanted} of {base.dtype} for a base {list(base.shape)}; given "
                f"{own.dtype}{list(own.shape)}"
            )


def _fake(
    bases: Sequence[Tensor],
    rows: Sequence[Tensor],
    index: Tensor,
    dims: Sequence[int],
    batches: Sequence[int],
    starts: Sequence[int],
    tokens: int,
) -> list[Tensor]:
    check_rows(bases, rows, index, dims, batches, starts, tokens)
    return [torch.empty_like(base) for base in bases]


_library.impl("scatter_tokens", reference, "CompositeExplicitAutograd")
torch.library.register_fake("ditopt::scatter_tokens", _fake, lib=_library)
