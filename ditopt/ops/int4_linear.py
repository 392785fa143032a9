"""``ditopt::int4_linear``: a linear layer over 4 bit integers in groups, with a branch of low rank and what follows.

    int4_linear(values, scale, weight, weight_scale, bias=None, thin=None, up=None, dtype=float32, activation="none",
                gate=None, residual=None) -> Tensor

values (*B, K) int8 in [-7, 7] with scale (*B, K / group) float32, weight (N, K / 2) uint8, two values in a byte, with
weight_scale (N, K / group) float32: those of ``ditopt::quantize``; bias (N,) -> (*B, N) of ``dtype``::

    y = sum over groups of (values_g @ weight_g^T) * scale_g * weight_scale_g^T
    y = activation(y + thin @ up^T + bias)           thin (*B, rank) and up (N, rank): the branch (SVDQuant)
    y = residual + gate * y                          gate and residual broadcast to (*B, N)

The product in a group is one of integers; the rest is float32 and rounded to ``dtype`` once. Without branch, gate or
residual that part is left out. ``activation`` is one of those of ``ditopt::int8_linear``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditopt.ops.attention import _run
from ditopt.ops.int8_linear import ACTIVATIONS
from ditopt.ops.quantize import decompose_dequantize

aten = torch.ops.aten

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "int4_linear(Tensor values, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
    'Tensor? thin=None, Tensor? up=None, ScalarType dtype=float, str activation="none", Tensor? gate=None, '
    "Tensor? residual=None) -> Tensor"
)

int4_linear = torch.ops.ditopt.int4_linear.default


def decompose(
    emit: Callable[..., Any],
    values: Any,
    scale: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any = None,
    thin: Any = None,
    up: Any = None,
    dtype: torch.dtype = torch.float32,
    activation: str = "none",
    gate: Any = None,
    residual: Any = None,
    *,
    shape: tuple[int, ...],
    columns: int,
    groups: int,
    rank_dtype: torch.dtype | None = None,
) -> Any:
    """The operators that the layer stands for, made by ``emit(target, *args, **kwargs)``; values have ``shape``, the
    weight ``columns`` rows, a row ``groups``; ``rank_dtype``: that of thin."""
    x = decompose_dequantize(emit, values, scale, torch.float32, shape=shape, groups=groups)
    wide = decompose_dequantize(emit, weight, weight_scale, torch.float32, shape=(columns, shape[-1]), groups=groups)
    y = emit(aten.linear.default, x, wide)
    if thin is not None:
        branch = emit(aten.linear.default, thin, up)
        wide_branch = (
            branch if rank_dtype is torch.float32 else emit(aten._to_copy.default, branch, dtype=torch.float32)
        )
        y = emit(aten.add.Tensor, y, wide_branch)
    y = emit(aten.add.Tensor, y, bias) if bias is not None else y
    y = ACTIVATIONS[activation](emit, y)
    y = emit(aten.mul.Tensor, gate, y) if gate is not None else y
    y = emit(aten.add.Tensor, residual, y) if residual is not None else y
    return y if dtype is torch.float32 else emit(aten._to_copy.default, y, dtype=dtype)


def reference(
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
) -> Tensor:
    """What the formula says, of dequantized numbers."""
    more = (bias, thin, up, dtype, activation, gate, residual)
    check(values, scale, weight, weight_scale, *more)
    out: Tensor = decompose(
        _run,
        values,
        scale,
        weight,
        weight_scale,
        *more,
        shape=tuple(values.shape),
        columns=weight.shape[0],
        groups=scale.shape[-1],
        rank_dtype=thin.dtype if thin is not None else None,
    )
    return out.to(dtype)  # where a gate of float64 widened it


def check(
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
) -> Tensor:
    """The result without values; ValueError where the operands do not fit."""
    if values.dtype is not torch.int8 or weight.dtype is not torch.uint8 or weight.ndim != 2 or values.ndim < 2:
        raise ValueError(
            f"int4_linear takes values (*B, K) int8 and a weight (N, K / 2) uint8; given {values.dtype}"
            f"{list(values.shape)} and {weight.dtype}{list(weight.shape)}"
        )
    rows, width, columns, groups = values.shape[:-1], values.shape[-1], weight.shape[0], scale.shape[-1]
    if (
        weight.shape[1] * 2 != width
        or scale.shape != (*rows, groups)
        or weight_scale.shape != (columns, groups)
        or width % groups
    ):
        raise ValueError(
            f"int4_linear takes scales (*B, groups) and (N, groups) for values {list(values.shape)} and a packed "
            f"weight {list(weight.shape)}; given {list(scale.shape)} and {list(weight_scale.shape)}"
        )
    if (thin is None) != (up is None) or (
        thin is not None and up is not None and (thin.shape[:-1] != rows or up.shape != (columns, thin.shape[-1]))
    ):
        given = [None if t is None else list(t.shape) for t in (thin, up)]
        raise ValueError(f"int4_linear takes thin (*B, rank) and up (N, rank), or neither; given {given}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"int4_linear: no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    out = torch.empty((*rows, columns), dtype=dtype, device=values.device)
    for name, extra in (("gate", gate), ("residual", residual)):
        if extra is not None and torch.broadcast_shapes(extra.shape, out.shape) != out.shape:
            raise ValueError(f"int4_linear: a {name} {list(extra.shape)} does not broadcast to {list(out.shape)}")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"int4_linear: a bias {list(bias.shape)} does not fit {columns} columns")
    return out


_library.impl("int4_linear", reference, "CompositeExplicitAutograd")
torch.library.register_fake("ditopt::int4_linear", check, lib=_library)
