"""``ditopt::int4_linear`` in Triton: products of 4 bit integers group by group, the branch of low rank on top.

One program computes a tile of rows and columns. It unpacks a piece of the weight to int8, multiplies int8 by int8 in
int32, and adds the piece in float32 with the scales of its group: no matrix unit that Triton reaches multiplies 4 bits,
so what 4 bits save is memory. The product of the branch is added to the accumulator (SVDQuant's fused kernel), then
bias, activation, gate and residual; the result is rounded once. The reference is ``ditopt.ops.int4_linear.reference``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditopt.codegen.triton._epilogue import NUMBERS, activated, extras
from ditopt.ops.int4_linear import check

ROWS = {128: 8, 64: 4}
"""Rows of a tile, for many and for few rows in all, and the warps that compute it."""

BLOCK_N, STAGES = 64, 3


def piece(group: int, groups: int) -> int:
    """Inputs that are multiplied at once: 64 or 32, all of one group; 0 where groups are too short for that."""
    if groups == 1:
        return 64
    return next((k for k in (64, 32) if group % k == 0), 0)


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    values,
    scale,
    weight,
    weight_scale,
    bias,
    thin,
    up,
    gate,
    residual,
    out,
    rows,
    columns,
    width,
    group,
    groups,
    rank,
    tokens,  # rows of one sample: gate and residual are addressed by sample and token
    gate_sample,
    gate_token,
    gate_column,
    residual_sample,
    residual_token,
    residual_column,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
):
    """values (rows, width) int8, weight (columns, width / 2) uint8, scales (rows, groups), (columns, groups) float32;
    thin (rows, rank), up (columns, rank), out (rows, columns); all dense. RANK: a power of two, at least 16."""
    across = tl.cdiv(columns, BLOCK_N)
    m = (tl.program_id(0) // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, half = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2)
    m_in, n_in = m < rows, n < columns
    m_far, n_far = m.to(tl.int64), n.to(tl.int64)
    left = values + m_far[:, None] * width + k[None, :]
    right = weight + n_far[:, None] * (width // 2) + half[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        a = tl.load(left, mask=m_in[:, None] & (start + k < width)[None, :], other=0)
        # beyond the row both halves are 8, which is 0
        both = tl.load(right, mask=n_in[:, None] & (start // 2 + half < width // 2)[None, :], other=136)
        low = (both & 15).to(tl.int8) - 8
        high = (both >> 4).to(tl.int8) - 8
        b = tl.interleave(low, high)  # (BLOCK_N, BLOCK_K)
        sums = tl.dot(a, tl.trans(b), out_dtype=tl.int32).to(tl.float32)
        g = start // group
        sums *= tl.load(scale + m_far * groups + g, mask=m_in, other=0.0)[:, None]
        y += sums * tl.load(weight_scale + n_far * groups + g, mask=n_in, other=0.0)[None, :]
        left += BLOCK_K
        right += BLOCK_K // 2
    if HAS_BRANCH:
        r = tl.arange(0, RANK)
        r_in = r < rank
        a = tl.load(thin + m_far[:, None] * rank + r[None, :], mask=m_in[:, None] & r_in[None, :], other=0.0)
        b = tl.load(up + n_far[None, :] * rank + r[:, None], mask=n_in[None, :] & r_in[:, None], other=0.0)
        y = tl.dot(a, b, acc=y, input_precision="ieee")
    if HAS_BIAS:
        y = y + tl.load(bias + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
    y = activated(y, ACTIVATION)
    inside = m_in[:, None] & n_in[None, :]
    sample, token = (m_far // tokens)[:, None], (m_far % tokens)[:, None]
    if HAS_GATE:
        at = gate + sample * gate_sample + token * gate_token + n_far[None, :] * gate_column
        y = y * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        at = residual + sample * residual_sample + token * residual_token + n_far[None, :] * residual_column
        y = y + tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m_far[:, None] * columns + n_far[None, :], y.to(out.dtype.element_ty), mask=inside)


def launch(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    thin: Tensor | None = None,
    up: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    blocks: tuple[int, int] | None = None,
) -> Tensor:
    """The operator, on a GPU (or, with TRITON_INTERPRET=1 set before triton is imported, interpreted on CPU).

    ``blocks``: rows and columns of the tile, for tests. ValueError where the operands do not fit, or groups are too
    short for the kernel.
    """
    out = check(values, scale, weight, weight_scale, bias, thin, up, dtype, activation, gate, residual)
    rows, columns, width, groups = math.prod(values.shape[:-1]), weight.shape[0], values.shape[-1], scale.shape[-1]
    block_k = piece(width // groups, groups)
    if not block_k:
        raise ValueError(f"the Triton kernel of int4_linear takes groups of a multiple of 32, not of {width // groups}")
    if out.numel() == 0:
        return out
    gated, added, at = extras(gate, residual, out)
    block_m, block_n = blocks or (128 if rows > 64 else 64, BLOCK_N)
    rank = thin.shape[-1] if thin is not None else 0
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)
    kernel[grid](
        values.contiguous(),
        scale.contiguous(),
        weight.contiguous(),
        weight_scale.contiguous(),
        bias if bias is not None else out,
        thin.contiguous() if thin is not None else out,
        up.to(thin.dtype).contiguous() if up is not None and thin is not None else out,
        gated,
        added,
        out,
        rows,
        columns,
        width,
        width // groups,
        groups,
        rank,
        values.shape[-2],
        *at,
        ACTIVATION=NUMBERS[activation],
        HAS_BIAS=bias is not None,
        HAS_BRANCH=thin is not None,
        HAS_GATE=gate is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        RANK=max(triton.next_power_of_2(rank), 16),
        num_warps=ROWS.get(block_m, 4),
        num_stages=STAGES,
    )
    return out


@functools.cache
def register() -> Any:
    """Let CUDA run ``ditopt::int4_linear`` by this kernel. The library that holds the registration."""
    library = torch.library.Library("ditopt", "IMPL")
    library.impl("int4_linear", launch, "CUDA")
    return library
