"""Who multiplies with packed weights."""

from __future__ import annotations

from typing import Any

from torch import fx

from ditopt.codegen.claims._entry import Entry, Form, shape_of
from ditopt.codegen.claims._nbits import why_not_nbits
from ditopt.codegen.onnx.quantized import packed
from ditopt.ops import packed_linear
from ditopt.ops.packed_linear import decompose


def _claim(node: fx.Node, target: str) -> tuple[Form, str]:
    if target == "eager":
        return "kernel", "one call of torch operators"
    if target != "onnxruntime":
        return "written out", "Inductor fuses it with what stands around"
    why = why_not_nbits(*node.args[1:3])
    return ("written out", why) if why else ("kernel", "MatMulNBits reads packed weights")


def _write(emit: Any, node: fx.Node, target: str) -> Any:
    args: Any = node.args
    x, values, scale, *bias = args
    shape = (shape_of(values)[0], shape_of(x)[-1])
    dtype = x.meta["val"].dtype
    return decompose(emit, x, values, scale, *bias, dtype=dtype, shape=shape, groups=shape_of(scale)[-1])


def _integer(node: fx.Node, target: str) -> tuple[bool, str]:
    return False, "only their weight is integers, so they are multiplied in floating point"


ENTRIES = (Entry(packed_linear, _claim, _write, onnx={packed_linear: packed}, integer=_integer),)
