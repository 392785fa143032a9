"""``ditopt::block_sparse_attention`` as one Triton kernel: flash attention over lists of blocks of keys, with LSE.

A program handles one block of queries of one head: it walks first over the dense keys, then over its list, with a
running maximum and sum. Programs of dense queries walk over all keys. No score leaves the chip.

Everything is computed in float32 except the two products, which take the type of the operands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditopt.ops.block_sparse_attention import blocks, check

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _step(q, k, v, bias, keep, best, total, acc):  # type: ignore[no-untyped-def]
    """One block of keys: scores in base 2, running maximum, sum and result."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") + bias[None, :]
    scores = tl.where(keep[None, :], scores, float("-inf"))
    new = tl.maximum(best, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # no key yet: exp2 of nothing, not of inf - inf
    weights = tl.math.exp2(scores - safe[:, None])
    decay = tl.math.exp2(best - safe)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new, total, acc


@triton.jit
def _tile(P, rows, inside, stride_row, stride_col, COLS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rows, WIDTH) of a matrix with COLS columns; zeros outside."""
    cols = tl.arange(0, WIDTH)
    at = P + rows.to(tl.int64)[:, None] * stride_row + cols[None, :] * stride_col
    return tl.load(at, mask=inside[:, None] & (cols < COLS)[None, :], other=0.0)


@triton.jit
def block_sparse_attention_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, INDEX, COUNT, MASK, OUT, LSE,
    q_batch, q_head, q_row, q_col, k_batch, k_head, k_row, k_col, v_batch, v_head, v_row, v_col,
    i_batch, i_head, i_row, c_batch, c_head, m_batch, m_head, m_col,
    heads, n, m, head_q, tail_q, head_k, tail_k, length, scale,
    D: tl.constexpr, E: tl.constexpr, WIDTH_D: tl.constexpr, WIDTH_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    HAS_COUNT: tl.constexpr, HAS_MASK: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """Program (i, batch * head): ROWS queries of one block, or where i is behind the last block, dense ones. KEYS of a
    block of BLOCK_K keys are walked over at a time; both divide."""
    i = tl.program_id(0)
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    between = n - head_q - tail_q
    parts: tl.constexpr = BLOCK_Q // ROWS
    sparse = tl.cdiv(between, BLOCK_Q) * parts
    is_dense = i >= sparse
    j = i - sparse
    ahead = tl.cdiv(head_q, ROWS)
    first = tl.where(j < ahead, j * ROWS, n - tail_q + (j - ahead) * ROWS)
    first = tl.where(is_dense, first, head_q + i * ROWS)
    last = tl.where(j < ahead, head_q, n)
    last = tl.where(is_dense, last, n - tail_q)
    rows = first + tl.arange(0, ROWS)
    inside = rows < last
    q = _tile(Q + batch.to(tl.int64) * q_batch + head * q_head, rows, inside, q_row, q_col, D, WIDTH_D)
    q = (q.to(tl.float32) * (scale * LOG2E)).to(Q.dtype.element_ty)
    K += batch.to(tl.int64) * k_batch + head * k_head
    V += batch.to(tl.int64) * v_batch + head * v_head
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH_E], tl.float32)

    # The walk: pieces of KEYS keys; dense keys at the beginning, listed blocks, dense keys at the end. A dense query
    # takes all keys as if they were at the beginning.
    begin = tl.where(is_dense, m, head_k)
    end = tl.where(is_dense, 0, tail_k)
    listed = 0
    row = tl.where(is_dense, 0, i // parts)
    if HAS_COUNT:  # noqa: SIM108 - Triton takes one branch when it compiles
        listed = tl.load(COUNT + batch * c_batch + head * c_head + row)
    else:
        listed = length
    listed = tl.where(is_dense, 0, listed)
    pieces: tl.constexpr = BLOCK_K // KEYS
    n_begin, n_listed, n_end = tl.cdiv(begin, KEYS), listed * pieces, tl.cdiv(end, KEYS)
    lists = INDEX + batch.to(tl.int64) * i_batch + head * i_head + row.to(tl.int64) * i_row
    for t in range(n_begin + n_listed + n_end):
        t_list = t - n_begin
        t_end = t_list - n_listed
        in_list = (t_list >= 0) & (t_end < 0)
        block = tl.load(lists + t_list // pieces, mask=in_list, other=0)
        start = tl.where(t_list < 0, t * KEYS, m - tail_k + t_end * KEYS)
        start = tl.where(in_list, head_k + block * BLOCK_K + (t_list % pieces) * KEYS, start)
        stop = tl.where(t_list < 0, begin, m)
        stop = tl.where(in_list, m - tail_k, stop)
        keys = start + tl.arange(0, KEYS)
        keep = keys < stop
        k = _tile(K, keys, keep, k_row, k_col, D, WIDTH_D)
        v = _tile(V, keys, keep, v_row, v_col, E, WIDTH_E)
        bias = tl.zeros([KEYS], tl.float32)
        if HAS_MASK:
            at = MASK + batch.to(tl.int64) * m_batch + head * m_head + keys.to(tl.int64) * m_col
            bias = tl.load(at, mask=keep, other=0.0).to(tl.float32) * LOG2E
        best, total, acc = _step(q, k, v, bias, keep, best, total, acc)

    divisor = tl.where(total == 0.0, 1.0, total)
    out = acc / divisor[:, None]
    at_row = tl.program_id(1).to(tl.int64) * n + rows
    cols = tl.arange(0, WIDTH_E)
    write = inside[:, None] & (cols < E)[None, :]
    tl.store(OUT + at_row[:, None] * E + cols[None, :], out.to(OUT.dtype.element_ty), mask=write)
    if WITH_LSE:
        lse = tl.where(total == 0.0, float("-inf"), (best + tl.math.log2(divisor)) / LOG2E)
        tl.store(LSE + at_row, lse, mask=inside)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    dense_q: Sequence[int] = (0, 0),
    dense_k: Sequence[int] = (0, 0),
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As the operator; any strides. Blocks are multiples of 16. The LSE is None unless asked for."""
    check(query, key, value, index, count, mask, block_q, block_k, dense_q, dense_k)
    why = refusal(query.shape[-1], value.shape[-1], block_q, block_k)
    if why:
        raise ValueError(why)
    *layout, n, d = query.shape
    m, e = value.shape[-2:]
    q, k, v = (_four(x, layout, x.shape[-2:]) for x in (query, key, value))
    batch, heads = q.shape[:2]
    lists = _four(index.contiguous(), layout, index.shape[-2:])
    counts = None if count is None else _four(count.contiguous().unsqueeze(-2), layout, (1, count.shape[-1]))
    bias = None
    if mask is not None:
        added = (
            mask
            if mask.dtype is not torch.bool
            else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        )
        bias = _four(added, layout, (1, m))
    out = torch.empty((batch, heads, n, e), dtype=q.dtype, device=q.device)
    sums = torch.empty((batch, heads, n), dtype=torch.float32, device=q.device) if lse else out
    size = pieces(d, e, block_q, block_k, q.dtype)
    rows = size["ROWS"]
    programs = blocks(n, dense_q, block_q) * (block_q // rows) + sum(-(-x // rows) for x in dense_q)
    index_strides = lists.stride()[:3]
    options = warps(d, e, q.dtype)
    block_sparse_attention_kernel[(programs, batch * heads)](
        q, k, v, lists, lists if counts is None else counts, q if bias is None else bias, out, sums,
        *q.stride(), *k.stride(), *v.stride(), *index_strides,
        *(counts.stride()[:2] if counts is not None else (0, 0)),
        *((bias.stride(0), bias.stride(1), bias.stride(3)) if bias is not None else (0, 0, 0)),
        heads, n, m, *dense_q, *dense_k, index.shape[-1], d**-0.5 if scale is None else scale,
        D=d, E=e, WIDTH_D=_width(d), WIDTH_E=_width(e), BLOCK_Q=block_q, BLOCK_K=block_k, **size,
        HAS_COUNT=counts is not None, HAS_MASK=bias is not None, WITH_LSE=lse, **options,
    )  # fmt: skip
    shape = (*layout, n)
    return out.reshape(*shape, e), sums.reshape(shape) if lse else None


def piece(block: int, dtype: torch.dtype, most: int = 64) -> int:
    """How much of a block is handled at a time: the largest power of two that divides it, up to ``most``, or to what
    registers hold in float32, whose products run on no matrix unit."""
    return math.gcd(block, min(most, 32) if dtype is torch.float32 else most)


def pieces(d: int, e: int, block_q: int, block_k: int, dtype: torch.dtype) -> dict[str, int]:
    """How many queries and keys of their blocks are handled at a time."""
    return {"ROWS": piece(block_q, dtype), "KEYS": piece(block_k, dtype, 64 if max(d, e) <= 64 else 32)}


def warps(d: int, e: int, dtype: torch.dtype) -> dict[str, int]:
    """Launch options, with which no register is spilled (tests/codegen/test_triton_aot_sparse.py)."""
    return {"num_warps": 8 if max(d, e) > 64 or dtype is torch.float32 else 4, "num_stages": 2}


def refusal(d: int, e: int, block_q: int, block_k: int) -> str:
    """Why the kernel does not take such operands, or ""."""
    if block_q % 16 or block_k % 16:
        return f"blocks of {block_q} and {block_k} are no multiples of 16, which the products of the kernel need"
    if max(d, e) > 128:
        return f"heads of {max(d, e)} channels do not fit the registers; at most 128"
    return ""


def _width(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def _four(x: Tensor, layout: Sequence[int], shape: Sequence[int]) -> Tensor:
    """``x`` as (batch, heads, *shape); batches of a broadcast operand get stride 0."""
    full = x.expand(*layout, *shape)
    if len(layout) == 2:
        return full
    if len(layout) < 2:
        return full.reshape(1, *(layout or (1,)), *shape)
    return full.reshape(math.prod(layout[:-1]), layout[-1], *shape)
