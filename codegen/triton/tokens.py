"""``ditopt::gather_tokens`` and ``ditopt::scatter_tokens`` in Triton: one launch copies rows of several tensors.

Both are the same copy, between positions of a short sequence and those of the whole one; what is read is at the whole
one's when tokens are gathered, and at the short one's when they are scattered. A program copies a tile of positions and
columns of one sample of one tensor. Nothing is computed: values of any dtype go through as integers of their size.
The references are ``reference`` of ``ditopt.ops.gather_tokens`` and ``ditopt.ops.scatter_tokens``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditopt.ops.gather_tokens import check, short
from ditopt.ops.gather_tokens import reference as gather_reference
from ditopt.ops.scatter_tokens import check_rows
from ditopt.ops.scatter_tokens import reference as scatter_reference

TENSORS = 8
"""How many tensors one launch copies at most: each number, and each mix of dtypes, is compiled once."""

ELEMENTS, COLUMNS, WARPS = 4096, 256, 4
"""Of a tile: elements, columns at most, and the warps that copy it."""

_SIZES: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _copy(  # type: ignore[no-untyped-def]
    SOURCE, INTO, SHAPE, FROM, TO, INDEX, sample, tokens, count, GATHER: tl.constexpr, BLOCK: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """One tile of one tensor. SHAPE: start of the tokens, short positions, outer, inner; FROM, TO: strides of sample,
    position, outer and inner."""
    start, positions, outer, inner = SHAPE
    blocks = tl.cdiv(inner, COLS)
    part = tl.program_id(1) // blocks
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = (tl.program_id(1) % blocks) * COLS + tl.arange(0, COLS)
    inside = rows < tl.where(part < outer, positions, 0)
    chosen = (rows >= start) & (rows < start + count)
    token = tl.load(INDEX + sample.to(tl.int64) * count + rows - start, mask=chosen & inside, other=0)
    near = rows.to(tl.int64)
    whole = tl.where(chosen, token + start, tl.where(rows < start, near, near - count + tokens))
    if GATHER:
        read, written = whole, near
    else:
        read, written = near, whole
    mask = inside[:, None] & (cols < inner)[None, :]
    far = cols.to(tl.int64)[None, :]
    source = SOURCE + sample.to(tl.int64) * FROM[0] + part.to(tl.int64) * FROM[2]
    into = INTO + sample.to(tl.int64) * TO[0] + part.to(tl.int64) * TO[2]
    value = tl.load(source + read[:, None] * FROM[1] + far * FROM[3], mask=mask)
    tl.store(into + written[:, None] * TO[1] + far * TO[3], value, mask=mask)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    SOURCES, INTOS, SHAPES, FROMS, TOS, INDEX, samples, tokens, count, GATHER: tl.constexpr, BLOCK: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Program (tile of positions, tile of columns, tensor * samples + sample); tuples have an entry for each tensor.
    INDEX (samples, count) int64, dense."""
    which, sample = tl.program_id(2) // samples, tl.program_id(2) % samples
    for k in tl.static_range(len(SOURCES)):
        if which == k:
            _copy(
                SOURCES[k], INTOS[k], SHAPES[k], FROMS[k], TOS[k], INDEX, sample, tokens, count, GATHER, BLOCK, COLS
            )  # fmt: skip


Strides = tuple[int, int, int, int]
Job = tuple[Tensor, Tensor, tuple[int, int, int, int], Strides, Strides]
"""A tensor that is read, one that is written, the shape of the copy (start, short positions, outer, inner), strides."""


def tile(inner: int) -> tuple[int, int]:
    """Positions and columns of a tile, where rows are ``inner`` long at most."""
    columns = min(triton.next_power_of_2(inner), COLUMNS)
    return min(ELEMENTS // columns, 64), columns


def gather_tokens(
    values: Sequence[Tensor],
    index: Tensor,
    dims: Sequence[int],
    batches: Sequence[int],
    starts: Sequence[int],
    tokens: int,
) -> list[Tensor]:
    """The operator, on a GPU (or, with TRITON_INTERPRET=1 set before triton is imported, interpreted on CPU).

    ValueError where the operands do not fit.
    """
    check("gather_tokens", values, index, dims, batches, starts, tokens)
    outs = [v.new_empty(short(v, index, d, b, tokens)) for v, d, b in zip(values, dims, batches, strict=True)]
    jobs = []
    for v, o, d, b, s in zip(values, outs, dims, batches, starts, strict=True):
        jobs.append(_job(v.expand(*v.shape[:b], index.shape[0], *v.shape[b + 1 :]) if b >= 0 else v, o, o, d, b, s))
    if any(job is None for job in jobs):
        return gather_reference(values, index, dims, batches, starts, tokens)
    _launch(jobs, index, tokens, gather=True)
    return outs


def scatter_tokens(
    bases: Sequence[Tensor],
    rows: Sequence[Tensor],
    index: Tensor,
    dims: Sequence[int],
    batches: Sequence[int],
    starts: Sequence[int],
    tokens: int,
) -> list[Tensor]:
    """The operator, as ``gather_tokens`` above: the bases are copied, and all rows are put into the copies at once."""
    check_rows(bases, rows, index, dims, batches, starts, tokens)
    outs = [torch.empty_like(base).copy_(base) for base in bases]
    jobs = [_job(r, o, r, d, b, s) for r, o, d, b, s in zip(rows, outs, dims, batches, starts, strict=True)]
    if any(job is None for job in jobs):
        return scatter_reference(bases, rows, index, dims, batches, starts, tokens)
    _launch(jobs, index, tokens, gather=False)
    return outs


def _job(source: Tensor, into: Tensor, shorter: Tensor, dim: int, batch: int, start: int) -> Job | None:
    """The copy between two tensors that differ in the length of ``dim`` alone, of which ``shorter`` is one; None where
    more than two strides are needed for what is no sample and no position, or an element has 16 bytes."""
    if source.element_size() not in _SIZES:
        return None
    rest = _merged(source, into, (dim, batch))
    if len(rest) > 2:
        source = source.contiguous()
        rest = _merged(source, into, (dim, batch))
    if len(rest) > 2:
        return None
    (outer, *far), (inner, *near) = [(1, 0, 0)] * (2 - len(rest)) + rest
    own = [(0 if batch < 0 else x.stride(batch), x.stride(dim)) for x in (source, into)]
    strides: list[Strides] = [(*own[i], far[i], near[i]) for i in (0, 1)]
    words = _SIZES[source.element_size()]
    return source.view(words), into.view(words), (start, shorter.shape[dim], outer, inner), strides[0], strides[1]


def _merged(one: Tensor, other: Tensor, without: Sequence[int]) -> list[tuple[int, int, int]]:
    """Size and both strides of each dimension but these; neighbours that are one dimension in both tensors joined."""
    found: list[tuple[int, int, int]] = []
    for d in range(one.ndim):
        if d in without or one.shape[d] == 1:
            continue
        size, a, b = one.shape[d], one.stride(d), other.stride(d)
        if found and found[-1][1:] == (size * a, size * b):
            size *= found.pop()[0]
        found.append((size, a, b))
    return found or [(1, 0, 0)]


def _launch(jobs: Sequence[Any], index: Tensor, tokens: int, gather: bool) -> None:
    samples, count = index.shape
    index = index.contiguous()
    for first in range(0, len(jobs), TENSORS):
        sources, intos, shapes, froms, tos = zip(*jobs[first : first + TENSORS], strict=True)
        block, columns = tile(max(inner for *_, inner in shapes))
        positions = max(n for _, n, *_ in shapes)
        across = max(outer * triton.cdiv(inner, columns) for *_, outer, inner in shapes)
        if not positions or not across:
            continue
        grid = (triton.cdiv(positions, block), across, len(sources) * samples)
        kernel[grid](
            sources, intos, shapes, froms, tos, index, samples, tokens, count, GATHER=gather, BLOCK=block, COLS=columns,
            num_warps=WARPS,
        )  # fmt: skip


@functools.cache
def register() -> Any:
    """Let CUDA run both operators by this kernel. The library that holds the registration."""
    library = torch.library.Library("ditopt", "IMPL")
    library.impl("gather_tokens", gather_tokens, "CUDA")
    library.impl("scatter_tokens", scatter_tokens, "CUDA")
    return library
