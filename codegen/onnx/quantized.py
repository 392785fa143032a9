"""Quantized layers as operators that onnxruntime has integer kernels for (domain com.microsoft)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ditopt.errors import require
from ditopt.ops import int8_linear, packed_linear
from ditopt.ops.int8_linear import OFFSET

DOMAIN = "com.microsoft"


def translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """For torch.onnx: how each operator that codegen/claims.py leaves for onnxruntime is written."""
    script = require("onnxscript", None)
    op, kinds = getattr(script, f"opset{opset}"), script.ir.DataType
    multiply = _contrib("MatMulIntegerToFloat", ("A:u", "B:s", "a_scale:f", "b_scale:f", "a_zero_point:u"))
    unpack = _contrib("MatMulNBits", ("A:f", "B:u", "scales:f"), ("K", "N", "bits", "block_size", "accuracy_level"))

    def constant(value: Any, kind: Any) -> Any:
        return op.Constant(value=script.ir.tensor(value, dtype=kind))

    def linear(
        values: Any,
        scale: Any,
        weight: Any,
        weight_scale: Any,
        bias: Any = None,
        dtype: int = 1,
        activation: str = "none",
        gate: Any = None,
        residual: Any = None,
    ) -> Any:
        # The kernel takes one scale for all rows, and its bias belongs behind theirs: 1, and a product and a sum after.
        one, zero = constant(1.0, kinds.FLOAT), constant(OFFSET, kinds.UINT8)
        columns = op.Reshape(weight_scale, constant([-1], kinds.INT64))
        y = op.Mul(multiply(values, op.Transpose(weight, perm=[1, 0]), one, columns, zero), scale)
        y = op.Add(y, bias) if bias is not None else y
        y = _activation(op, activation, y)
        y = op.Mul(gate, y) if gate is not None else y
        return op.Add(residual, y) if residual is not None else y

    def packed(x: Any, values: Any, scale: Any, bias: Any = None) -> Any:
        rows, half = (int(n) for n in values.shape)
        groups = int(scale.shape[1])
        blocks = op.Reshape(values, constant([rows, groups, half // groups], kinds.INT64))
        size = 2 * half // groups
        y = unpack(x, blocks, scale, K=2 * half, N=rows, bits=4, block_size=size, accuracy_level=1)
        return op.Add(y, bias) if bias is not None else y

    return {int8_linear: linear, packed_linear: packed}


def _contrib(name: str, inputs: Sequence[str], attributes: Sequence[str] = ()) -> Any:
    """An operator of onnxruntime, of which onnxscript knows nothing: its inputs as ``name:type`` and its attributes, all
    whole numbers, are told here."""
    script, schema = require("onnxscript", None), require("onnx", None).defs.OpSchema
    types = {"u": "tensor(uint8)", "s": "tensor(int8)", "f": "tensor(float)"}
    told = schema(
        name,
        DOMAIN,
        1,
        inputs=[schema.FormalParameter(n, types[t]) for n, t in (i.split(":") for i in inputs)],
        outputs=[schema.FormalParameter("Y", types["f"])],
        attributes=[schema.Attribute(a, schema.AttrType.INT) for a in attributes],
    )
    return script.values.Op(script.values.Opset(DOMAIN, 1), name, told)


def _activation(op: Any, name: str, y: Any) -> Any:
    if name in ("gelu", "gelu_tanh"):
        return op.Gelu(y, approximate="tanh" if name == "gelu_tanh" else "none")
    if name == "silu":
        return op.Mul(y, op.Sigmoid(y))
    return op.Relu(y) if name == "relu" else y
