"""``ditopt::int8_linear`` in Triton: int8 matrix product, everything that follows it on the accumulator.

One program computes a tile of rows and columns: it adds up int8 products in int32, and in float32 multiplies
with the scales of rows and columns, adds the bias, applies the activation, the gate and the residual, and rounds once.
The reference is ``ditopt.ops.int8_linear.reference``; sums are exact, so the two differ by rounding only.
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
from ditopt.ops.int8_linear import check

ROWS = {128: 8, 64: 4}
"""Rows of a tile, for many and for few rows in all, and the warps that compute it."""

BLOCK_N, BLOCK_K, STAGES = 64, 64, 3


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    values,
    scale,
    weight,
    weight_scale,
    bias,
    gate,
    residual,
    out,
    rows,
    columns,
    width,
    tokens,  # rows of one sample: gate and residual are addressed by sample and token
    gate_sample,
    gate_token,
    gate_column,
    residual_sample,
    residual_token,
    residual_column,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """values (rows, width) and weight (columns, width) int8, both dense; scales float32; out (rows, columns) dense."""
    across = tl.cdiv(columns, BLOCK_N)
    m = (tl.program_id(0) // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_in, n_in = m < rows, n < columns
    m_far, n_far = m.to(tl.int64), n.to(tl.int64)
    left = values + m_far[:, None] * width + k[None, :]
    right = weight + n_far[None, :] * width + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, width, BLOCK_K):
        k_in = start + k < width
        a = tl.load(left, mask=m_in[:, None] & k_in[None, :], other=0)
        b = tl.load(right, mask=n_in[None, :] & k_in[:, None], other=0)
        sums = tl.dot(a, b, acc=sums, out_dtype=tl.int32)
        left += BLOCK_K
        right += BLOCK_K
    y = sums.to(tl.float32)
    y = y * tl.load(scale + m, mask=m_in, other=0.0)[:, None]
    y = y * tl.load(weight_scale + n, mask=n_in, other=0.0)[None, :]
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
    dtype: torch.dtype = torch.float32,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    blocks: tuple[int, int, int] | None = None,
) -> Tensor:
    """The operator, on a GPU (or, with TRITON_INTERPRET=1 set before triton is imported, interpreted on CPU).

    ``blocks``: the tile, for tests. ValueError where the operands do not fit, or values are not int8.
    """
    out = check(values, scale, weight, weight_scale, bias, dtype, activation, gate, residual)
    if values.dtype is not torch.int8:
        raise ValueError(f"the Triton kernel of int8_linear takes int8 values, not {values.dtype}")
    rows, (columns, width) = math.prod(values.shape[:-1]), weight.shape
    if out.numel() == 0:
        return out
    tokens = values.shape[-2]
    gated, added, at = extras(gate, residual, out)
    block_m, block_n, block_k = blocks or (128 if rows > 64 else 64, BLOCK_N, BLOCK_K)
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)
    kernel[grid](
        values.contiguous(),
        scale.contiguous(),
        weight.contiguous(),
        weight_scale.contiguous(),
        bias if bias is not None else out,
        gated,
        added,
        out,
        rows,
        columns,
        width,
        tokens,
        *at,
        ACTIVATION=NUMBERS[activation],
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=ROWS.get(block_m, 4),
        num_stages=STAGES,
    )
    return out


@functools.cache
def register() -> Any:
    """Let CUDA run ``ditopt::int8_linear`` by this kernel. The library that holds the registration."""
    library = torch.library.Library("ditopt", "IMPL")
    library.impl("int8_linear", launch, "CUDA")
    return library
