"""``ditopt::norm_quantize``: layer norm, modulation and quantization of tokens in one operator.

    norm_quantize(x, bits, weight=None, bias=None, eps=1e-5, scale=None, shift=None) -> (values, scale)

x (*B, K) -> values (*B, K) int8 and scale (*B, 1) float32::

    quantize(layer_norm(x, [K], weight, bias, eps) * scale + shift, bits)

``scale`` is what the norm is multiplied with (1 + s in an adaptive norm), ``shift`` what is added; both broadcast to x.
A backend that fuses reads x once and writes a quarter of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditopt.ops.attention import _run
from ditopt.ops.quantize import decompose_quantize, quantize_reference

aten = torch.ops.aten

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "norm_quantize(Tensor x, int bits, Tensor? weight=None, Tensor? bias=None, float eps=1e-5, Tensor? scale=None, "
    "Tensor? shift=None) -> (Tensor, Tensor)"
)

norm_quantize = torch.ops.ditopt.norm_quantize.default


def modulated(
    emit: Callable[..., Any],
    x: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    scale: Any = None,
    shift: Any = None,
    *,
    width: int,
) -> Any:
    """The norm and the modulation, made by ``emit(target, *args, **kwargs)``; rows of x have ``width`` numbers."""
    y = emit(aten.layer_norm.default, x, [width], weight, bias, eps)
    y = emit(aten.mul.Tensor, y, scale) if scale is not None else y
    return emit(aten.add.Tensor, y, shift) if shift is not None else y


def decompose(emit: Callable[..., Any], x: Any, bits: int, *more: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The operators that it all stands for; x has ``shape``."""
    return decompose_quantize(emit, modulated(emit, x, *more, width=shape[-1]), bits, shape=shape)


def reference(
    x: Tensor,
    bits: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the formula says. ValueError for a scale or shift that does not broadcast to x."""
    for name, extra in (("scale", scale), ("shift", shift)):
        if extra is not None and torch.broadcast_shapes(extra.shape, x.shape) != x.shape:
            raise ValueError(f"norm_quantize: a {name} {list(extra.shape)} does not broadcast to {list(x.shape)}")
    y: Tensor = modulated(_run, x, weight, bias, eps, scale, shift, width=x.shape[-1])
    return quantize_reference(y, bits)


_library.impl("norm_quantize", reference, "CompositeExplicitAutograd")
torch.library.register_fake("ditopt::norm_quantize", reference, lib=_library)
