"""Who multiplies 8 bit integers."""

from __future__ import annotations

from typing import Any

from torch import fx

from ditopt.codegen.claims._entry import Entry, Form, on_gpu, shape_of
from ditopt.codegen.onnx.quantized import linear
from ditopt.errors import require
from ditopt.ops import int8_linear
from ditopt.ops.int8_linear import decompose


def _claim(node: fx.Node, target: str) -> tuple[Form, str]:
    if target == "onnxruntime":
        return "kernel", "MatMulIntegerToFloat, of unsigned activations: several times faster than signed ones"
    if on_gpu(node):
        return "kernel", "the Triton kernel multiplies in int8 and has the epilogue in registers (codegen/triton)"
    if target == "eager":
        return "kernel", "torch's int8 product"
    return "written out", "torch's int8 product, around which Inductor fuses scales, bias, activation, gate and sum"


def _write(emit: Any, node: fx.Node, target: str) -> Any:
    args: Any = node.args
    return decompose(emit, *args, shape=shape_of(args[0]))


def _install(node: fx.Node) -> None:
    require("triton", None)
    from ditopt.codegen.triton.int8_linear import register  # imports triton

    register()


def _integer(node: fx.Node, target: str) -> tuple[bool, str]:
    return True, _claim(node, target)[1]


ENTRIES = (Entry(int8_linear, _claim, _write, _install, {int8_linear: linear}, _integer),)
