"""Who multiplies with packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ditopt.codegen.claims._entry import Entry, Form, shape_of
from ditopt.codegen.onnx.quantized import packed
from ditopt.ops import packed_linear
from ditopt.ops.packed_linear import decompose


def _claim(node: fx.Node, target: str) -> tuple[Form, str]:
    if target == "eager":
        return "kernel", "one call of torch operators"
    if target != "onnxruntime":
        return "written out", "Inductor fuses it with what stands around"
    why = _why_not_nbits(node)
    return ("written out", why) if why else ("kernel", "MatMulNBits reads packed weights")


def _why_not_nbits(node: fx.Node) -> str:
    """Why MatMulNBits cannot run it; "" where it can."""
    values, scale = (a.meta["val"] for a in node.args[1:3])  # type: ignore[union-attr]
    if values.dtype is not torch.uint8:
        return "MatMulNBits is for 4 bits here"
    group = 2 * values.shape[-1] // scale.shape[-1]
    if group < 16 or group & (group - 1):
        return f"MatMulNBits takes groups of 16 or a larger power of two, not of {group}"
    return ""


def _write(emit: Any, node: fx.Node, target: str) -> Any:
    args: Any = node.args
    x, values, scale, *bias = args
    shape = (shape_of(values)[0], shape_of(x)[-1])
    dtype = x.meta["val"].dtype
    return decompose(emit, x, values, scale, *bias, dtype=dtype, shape=shape, groups=shape_of(scale)[-1])


ENTRIES = (Entry(packed_linear, _claim, _write, onnx={packed_linear: packed}),)
