"""``ditopt::quantize`` and ``ditopt::dequantize``: numbers as small integers with a scale, along the last axis.

    quantize(x, bits, group=0, packed=False) -> (values, scale)
    quantize_unsigned(x) -> (values, scale)
    dequantize(values, scale, dtype) -> x

x (*B, K) floating -> values (*B, K) int8 in [-q, q] with q = 2^(bits-1) - 1, and scale (*B, K / group) float32, one for
each group of ``group`` numbers in a row; group 0 is the whole row, scale (*B, 1)::

    scale  = max(max|x| of the group, EPS) / q
    values = round(x / scale)                       half to even

``packed`` (4 bits, even K) stores values (*B, K/2) uint8: value + 8, two in a byte, the even one in the low half.
``quantize_unsigned`` is quantize(x, 8) with values + OFFSET as uint8: x86 and onnxruntime multiply unsigned by signed
bytes faster. ``dequantize`` is values * scale in float32, then ``dtype``. Integers of products are those of
``ditopt::int8_linear``; written out, the two are what quantization does to a program, on any backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditopt.ops.attention import _run

aten = torch.ops.aten

EPS = 1e-8
"""The least magnitude of a group: zeros have a scale too."""

OFFSET = 128
"""What unsigned values are larger by."""

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define("quantize(Tensor x, int bits, int group=0, bool packed=False) -> (Tensor, Tensor)")
_library.define("quantize_unsigned(Tensor x) -> (Tensor, Tensor)")
_library.define("dequantize(Tensor values, Tensor scale, ScalarType dtype) -> Tensor")

quantize = torch.ops.ditopt.quantize.default
quantize_unsigned = torch.ops.ditopt.quantize_unsigned.default
dequantize = torch.ops.ditopt.dequantize.default


def decompose_quantize(
    emit: Callable[..., Any],
    x: Any,
    bits: int,
    group: int = 0,
    packed: bool = False,
    *,
    shape: tuple[int, ...],
) -> tuple[Any, Any]:
    """The operators that quantize x, which has ``shape``, made by ``emit(target, *args, **kwargs)``."""
    rows, width = shape[:-1], shape[-1]
    groups = width // group if group else 1
    wide = x if _type(x).dtype is torch.float32 else emit(aten._to_copy.default, x, dtype=torch.float32)
    if groups > 1:
        wide = emit(aten.reshape.default, wide, [*rows, groups, width // groups])
    most = emit(aten.amax.default, emit(aten.abs.default, wide), [-1], True)
    scale = emit(aten.div.Tensor, emit(aten.clamp_min.default, most, EPS), float(2 ** (bits - 1) - 1))
    values = emit(aten.round.default, emit(aten.div.Tensor, wide, scale))
    if groups > 1:
        values = emit(aten.reshape.default, values, list(shape))
        scale = emit(aten.reshape.default, scale, [*rows, groups])
    if not packed:
        return emit(aten._to_copy.default, values, dtype=torch.int8), scale
    pairs = emit(aten.reshape.default, emit(aten.add.Tensor, values, 8.0), [*rows, width // 2, 2])
    low, high = (emit(aten.select.int, pairs, -1, k) for k in (0, 1))
    both = emit(aten.add.Tensor, low, emit(aten.mul.Tensor, high, 16.0))
    return emit(aten._to_copy.default, both, dtype=torch.uint8), scale


def decompose_dequantize(
    emit: Callable[..., Any], values: Any, scale: Any, dtype: torch.dtype, *, shape: tuple[int, ...], groups: int
) -> Any:
    """The operators that make numbers of values; ``shape`` is that of the result, ``groups`` are those of a row."""
    rows, width = shape[:-1], shape[-1]
    x = emit(aten._to_copy.default, values, dtype=torch.float32)
    if _type(values).dtype is torch.uint8:  # halves of a byte, in floating point: exact, and every backend has it
        high = emit(aten.floor.default, emit(aten.mul.Tensor, x, 1 / 16))
        low = emit(aten.sub.Tensor, x, emit(aten.mul.Tensor, high, 16.0))
        x = emit(aten.reshape.default, emit(aten.stack.default, [low, high], -1), list(shape))
        x = emit(aten.sub.Tensor, x, 8.0)
    if groups > 1:
        x = emit(aten.reshape.default, x, [*rows, groups, width // groups])
        x = emit(aten.mul.Tensor, x, emit(aten.unsqueeze.default, scale, -1))
        x = emit(aten.reshape.default, x, list(shape))
    else:
        x = emit(aten.mul.Tensor, x, scale)
    return x if dtype is torch.float32 else emit(aten._to_copy.default, x, dtype=dtype)


def _type(value: Any) -> Any:
    """The tensor that a value is, or that a node stands for."""
    return value.meta["val"] if hasattr(value, "meta") else value


def _groups(width: int, group: int, what: str) -> int:
    if group < 0 or (group and width % group):
        raise ValueError(f"{what}: groups of {group} do not divide {width} numbers; expected a divisor, or 0")
    return width // group if group else 1


def quantize_reference(x: Tensor, bits: int, group: int = 0, packed: bool = False) -> tuple[Tensor, Tensor]:
    """What the formulas above say. ValueError for groups that do not divide, and for what cannot be packed."""
    if not 2 <= bits <= 8 or not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"quantize takes a floating (*B, K) tensor and 2 to 8 bits; given {x.dtype}, {bits} bits")
    _groups(x.shape[-1], group, "quantize")
    if packed and (bits != 4 or x.shape[-1] % 2):
        raise ValueError(f"only 4 bits and even rows are packed in bytes; given {bits} bits, rows of {x.shape[-1]}")
    return decompose_quantize(_run, x, bits, group, packed, shape=tuple(x.shape))


def dequantize_reference(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale."""
    width = values.shape[-1] * (2 if values.dtype is torch.uint8 else 1)
    groups = scale.shape[-1]
    if values.shape[:-1] != scale.shape[:-1] or width % groups:
        raise ValueError(
            f"dequantize takes values (*B, K) and a scale (*B, groups), groups dividing K; given {list(values.shape)} "
            f"and {list(scale.shape)}"
        )
    out: Tensor = decompose_dequantize(_run, values, scale, dtype, shape=(*values.shape[:-1], width), groups=groups)
    return out


def unsigned_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """quantize(x, 8), the values moved up."""
    values, scale = quantize_reference(x, 8)
    return (values.to(torch.int16) + OFFSET).to(torch.uint8), scale


_REFERENCES: dict[str, Callable[..., Any]] = {
    "quantize": quantize_reference,
    "quantize_unsigned": unsigned_reference,
    "dequantize": dequantize_reference,
}
for _name, _reference in _REFERENCES.items():
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditopt::{_name}", _reference, lib=_library)
