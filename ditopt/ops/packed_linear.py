"""``ditopt::packed_linear``: a linear layer whose weight alone is small integers.

    packed_linear(x, values, scale, bias=None) -> Tensor

x (*B, K) floating, values and scale of ``ditopt::quantize`` of a weight (N, K), bias (N,) -> (*B, N) of x's dtype::

    x @ dequantize(values, scale)^T + bias

The same numbers, bit for bit, as these operators; a backend that reads packed weights has no weight in full to read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditopt.ops.attention import _run
from ditopt.ops.quantize import decompose_dequantize

aten = torch.ops.aten

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor values, Tensor scale, Tensor? bias=None) -> Tensor")

packed_linear = torch.ops.ditopt.packed_linear.default


def decompose(
    emit: Callable[..., Any],
    x: Any,
    values: Any,
    scale: Any,
    bias: Any = None,
    *,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    groups: int,
) -> Any:
    """The operators that the layer stands for, made by ``emit(target, *args, **kwargs)``; the weight has ``shape``, and
    x ``dtype``."""
    weight = decompose_dequantize(emit, values, scale, dtype, shape=shape, groups=groups)
    return emit(aten.linear.default, x, weight, *([bias] if bias is not None else []))


def reference(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the formula says. ValueError where the operands do not fit."""
    width = values.shape[-1] * (2 if values.dtype is torch.uint8 else 1)
    if values.ndim != 2 or x.shape[-1] != width or scale.shape[:-1] != values.shape[:-1] or width % scale.shape[-1]:
        raise ValueError(
            f"packed_linear takes x (*B, K), values (N, K) and a scale (N, groups); given {list(x.shape)}, "
            f"{values.dtype}{list(values.shape)} and {list(scale.shape)}"
        )
    shape = (values.shape[0], width)
    out: Tensor = decompose(_run, x, values, scale, bias, dtype=x.dtype, shape=shape, groups=scale.shape[-1])
    return out


_library.impl("packed_linear", reference, "CompositeExplicitAutograd")
torch.library.register_fake("ditopt::packed_linear", reference, lib=_library)
