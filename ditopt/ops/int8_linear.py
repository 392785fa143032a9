"""``ditopt::int8_linear``: a linear layer over 8 bit integers, with all that follows it point by point.

    int8_linear(values, scale, weight, weight_scale, bias=None, dtype=float32, activation="none", gate=None,
                residual=None) -> Tensor

values (*B, K) int8 with scale (*B, 1) float32 of ``ditopt::quantize``, weight (N, K) int8 with weight_scale (N, 1)
float32, bias (N,) -> (*B, N) of ``dtype``::

    y = activation((values @ weight^T) * scale * weight_scale^T + bias)
    y = residual + gate * y                          gate and residual broadcast to (*B, N)

The product and its sum are integers and exact (K up to 2^17); the rest is float32 and rounded to ``dtype`` once.
values may be those of ``ditopt::quantize_unsigned`` instead.
``activation`` is one of ``ACTIVATIONS``. Without gate or residual that part is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditopt._torch import int_mm
from ditopt.ops.attention import _run
from ditopt.ops.quantize import OFFSET, _type

aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[[Callable[..., Any], Any], Any]] = {
    "none": lambda emit, x: x,
    "relu": lambda emit, x: emit(aten.relu.default, x),
    "silu": lambda emit, x: emit(aten.silu.default, x),
    "gelu": lambda emit, x: emit(aten.gelu.default, x),
    "gelu_tanh": lambda emit, x: emit(aten.gelu.default, x, approximate="tanh"),
}
"""What may follow the product, and the operators that it is."""

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "int8_linear(Tensor values, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
    'ScalarType dtype=float, str activation="none", Tensor? gate=None, Tensor? residual=None) -> Tensor'
)

int8_linear = torch.ops.ditopt.int8_linear.default


def decompose(
    emit: Callable[..., Any],
    values: Any,
    scale: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any = None,
    dtype: torch.dtype = torch.float32,
    activation: str = "none",
    gate: Any = None,
    residual: Any = None,
    *,
    shape: tuple[int, ...],
) -> Any:
    """The operators that the layer stands for, made by ``emit(target, *args, **kwargs)``; values have ``shape``."""
    rows, width = math.prod(shape[:-1]), shape[-1]
    if _type(values).dtype is torch.uint8:
        values = emit(aten.sub.Tensor, emit(aten._to_copy.default, values, dtype=torch.int16), OFFSET)
        values = emit(aten._to_copy.default, values, dtype=torch.int8)
    flat = emit(aten.reshape.default, values, [rows, width])
    sums = emit(int_mm, flat, emit(aten.t.default, weight))
    y = emit(aten._to_copy.default, sums, dtype=torch.float32)
    y = emit(aten.mul.Tensor, y, emit(aten.reshape.default, scale, [rows, 1]))
    y = emit(aten.mul.Tensor, y, emit(aten.reshape.default, weight_scale, [-1]))
    y = emit(aten.add.Tensor, y, bias) if bias is not None else y
    y = ACTIVATIONS[activation](emit, y)
    y = emit(aten.reshape.default, y, [*shape[:-1], -1])
    y = emit(aten.mul.Tensor, gate, y) if gate is not None else y
    y = emit(aten.add.Tensor, residual, y) if residual is not None else y
    return y if dtype is torch.float32 else emit(aten._to_copy.default, y, dtype=dtype)


def reference(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """What the formula says, with torch's int8 product."""
    check(values, scale, weight, weight_scale, bias, dtype, activation, gate, residual)
    more = (bias, dtype, activation, gate, residual)
    out: Tensor = decompose(_run, values, scale, weight, weight_scale, *more, shape=tuple(values.shape))
    return out.to(dtype)  # where a gate of float64 widened it


def check(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The result without values; ValueError where the operands do not fit."""
    if (
        values.dtype not in (torch.int8, torch.uint8)
        or weight.dtype is not torch.int8
        or weight.ndim != 2
        or values.ndim < 2
    ):
        raise ValueError(
            f"int8_linear takes values (*B, K) and a weight (N, K), both int8; given {values.dtype}{list(values.shape)}"
            f" and {weight.dtype}{list(weight.shape)}"
        )
    rows, (columns, width) = values.shape[:-1], weight.shape
    if values.shape[-1] != width or scale.shape != (*rows, 1) or weight_scale.shape != (columns, 1):
        raise ValueError(
            f"int8_linear takes scales {[*rows, 1]} and {[columns, 1]} for values {list(values.shape)} and a weight "
            f"{list(weight.shape)}; given {list(scale.shape)} and {list(weight_scale.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"int8_linear: no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    out = torch.empty((*rows, columns), dtype=dtype, device=values.device)
    for name, extra in (("gate", gate), ("residual", residual)):
        if extra is not None and torch.broadcast_shapes(extra.shape, out.shape) != out.shape:
            raise ValueError(f"int8_linear: a {name} {list(extra.shape)} does not broadcast to {list(out.shape)}")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"int8_linear: a bias {list(bias.shape)} does not fit {columns} columns")
    return out


_library.impl("int8_linear", reference, "CompositeExplicitAutograd")
torch.library.register_fake("ditopt::int8_linear", check, lib=_library)
