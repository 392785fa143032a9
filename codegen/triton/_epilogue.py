"""What follows a product on its accumulator: activation, gate, residual sum, in float32, one rounding."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ditopt.ops.int8_linear import ACTIVATIONS

NUMBERS = {name: k for k, name in enumerate(ACTIVATIONS)}
"""Activations as the kernels know them."""


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``y`` (float32) through the activation of this number."""
    if ACTIVATION == 1:
        y = tl.maximum(y, 0.0)
    elif ACTIVATION == 2:
        y = y * tl.sigmoid(y)
    elif ACTIVATION == 3:
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif ACTIVATION == 4:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y * tl.sigmoid(2.0 * inner)  # (1 + tanh(x)) / 2
    return y


def strides(extra: Tensor | None, out: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """``extra`` as (samples, tokens, columns) with its strides there: 0 along what it is broadcast over."""
    if extra is None:
        return out, (0, 0, 0)
    wide = extra.expand(out.shape)
    if wide.ndim != 3:
        wide = wide.reshape(-1, *out.shape[-2:])
    return wide, tuple(wide.stride())  # type: ignore[return-value]


def extras(gate: Tensor | None, residual: Tensor | None, out: Tensor) -> tuple[Any, ...]:
    """The tensors of gate and residual, and their six strides."""
    (g, g_at), (r, r_at) = strides(gate, out), strides(residual, out)
    return g, r, (*g_at, *r_at)
