"""Who runs the operators that make and read integers: as one call of torch operators in eager, else written out."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ditopt.codegen.claims._entry import Entry, Form, shape_of
from ditopt.codegen.onnx.quantized import unsigned
from ditopt.ops import dequantize, int8_linear, norm_quantize, quantize
from ditopt.ops.norm_quantize import decompose as open_norm_quantize
from ditopt.ops.norm_quantize import modulated
from ditopt.ops.quantize import decompose_dequantize, decompose_quantize, quantize_unsigned


def _claim(node: fx.Node, target: str) -> tuple[Form, str]:
    if target == "eager":
        return "kernel", "one call of torch operators"
    if target != "onnxruntime":
        return "written out", "Inductor fuses it with what stands around"
    if _wants_unsigned(node, target):
        return "written out", "a norm, two reductions over a row and QuantizeLinear, which is vectorized"
    return "written out", "onnxruntime has no such operator for a scale of each row"


def _wants_unsigned(node: fx.Node, target: str) -> bool:
    """Whether ``target`` multiplies unsigned values, and those that ``node`` makes are multiplied and read by nothing
    else."""
    values = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
    readers = [r for v in values for r in v.users]
    multiplied = bool(readers) and all(r.target is int8_linear and r.args[0] in values for r in readers)
    return target == "onnxruntime" and node.target in (quantize, norm_quantize) and multiplied


def _unsigned(emit: Any, x: Any) -> Any:
    made = emit(quantize_unsigned, x)
    return emit(operator.getitem, made, 0), emit(operator.getitem, made, 1)


def _quantize(emit: Any, node: fx.Node, target: str) -> Any:
    args: Any = node.args
    if _wants_unsigned(node, target):
        return _unsigned(emit, args[0])
    return decompose_quantize(emit, *args, shape=shape_of(args[0]))


def _norm_quantize(emit: Any, node: fx.Node, target: str) -> Any:
    args: Any = node.args
    if _wants_unsigned(node, target):
        return _unsigned(emit, modulated(emit, args[0], *args[2:], width=shape_of(args[0])[-1]))
    return open_norm_quantize(emit, *args, shape=shape_of(args[0]))


def _dequantize(emit: Any, node: fx.Node, target: str) -> Any:
    args: Any = node.args
    return decompose_dequantize(emit, *args, shape=shape_of(node), groups=shape_of(args[1])[-1])


ENTRIES = (
    Entry(quantize, _claim, _quantize, onnx={quantize_unsigned: unsigned}),
    Entry(norm_quantize, _claim, _norm_quantize),
    Entry(dequantize, _claim, _dequantize),
)
