"""Quantized layers as operators that onnxruntime has integer kernels for (domain com.microsoft)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ditopt.errors import require
from ditopt.ops.quantize import EPS, OFFSET

DOMAIN = "com.microsoft"


def _written(opset: int) -> tuple[Any, Any, Callable[..., Any]]:
    """The operators of an opset, the names of types, and a constant of such a type."""
    script = require("onnxscript", None)
    op = getattr(script, f"opset{opset}")
    return op, script.ir.DataType, lambda value, kind: op.Constant(value=script.ir.tensor(value, dtype=kind))


def linear(opset: int) -> Callable[..., Any]:
    """``ditopt::int8_linear``, of unsigned values."""
    op, kinds, constant = _written(opset)
    multiply = _contrib("MatMulIntegerToFloat", ("A:u", "B:s", "a_scale:f", "b_scale:f", "a_zero_point:u"))

    def written(
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
        return _finished(op, y, activation, gate, residual)

    return written


def packed(opset: int) -> Callable[..., Any]:
    """``ditopt::packed_linear``, of 4 bits."""
    op, kinds, constant = _written(opset)
    unpack = _contrib("MatMulNBits", ("A:f", "B:u", "scales:f"), ("K", "N", "bits", "block_size", "accuracy_level"))

    def written(x: Any, values: Any, scale: Any, bias: Any = None) -> Any:
        rows, half = (int(n) for n in values.shape)
        groups = int(scale.shape[1])
        blocks = op.Reshape(values, constant([rows, groups, half // groups], kinds.INT64))
        size = 2 * half // groups
        y = unpack(x, blocks, scale, K=2 * half, N=rows, bits=4, block_size=size, accuracy_level=1)
        return op.Add(y, bias) if bias is not None else y

    return written


def four(opset: int) -> Callable[..., Any]:
    """``ditopt::int4_linear``."""
    op, kinds, constant = _written(opset)
    product = packed(opset)

    def written(
        values: Any,
        scale: Any,
        weight: Any,
        weight_scale: Any,
        bias: Any = None,
        thin: Any = None,
        up: Any = None,
        dtype: int = 1,
        activation: str = "none",
        gate: Any = None,
        residual: Any = None,
    ) -> Any:
        # not at accuracy level 4, which would round the 15 levels of a group again, to 8 bits
        *rows, width = (int(n) for n in values.shape)
        groups = int(scale.shape[-1])
        x = op.Reshape(op.Cast(values, to=kinds.FLOAT), constant([*rows, groups, width // groups], kinds.INT64))
        x = op.Reshape(
            op.Mul(x, op.Unsqueeze(scale, constant([-1], kinds.INT64))), constant([*rows, width], kinds.INT64)
        )
        y = product(x, weight, weight_scale, bias)
        y = op.Add(y, op.MatMul(thin, op.Transpose(up, perm=[1, 0]))) if thin is not None else y
        return _finished(op, y, activation, gate, residual)

    return written


def unsigned(opset: int) -> Callable[..., Any]:
    """``ditopt::quantize_unsigned``."""
    op, kinds, constant = _written(opset)

    def written(x: Any) -> Any:
        last = constant([-1], kinds.INT64)
        most = op.Max(op.ReduceMax(x, last), op.Neg(op.ReduceMin(x, last)), constant(EPS, kinds.FLOAT))
        scale = op.Div(most, constant(127.0, kinds.FLOAT))
        shape = [int(n) for n in x.shape]
        rows = math.prod(shape[:-1])
        # a scale for each row, in one pass over x
        flat, scales = op.Reshape(x, constant([rows, shape[-1]], kinds.INT64)), op.Reshape(scale, last)
        values = op.QuantizeLinear(flat, scales, constant([OFFSET] * rows, kinds.UINT8), axis=0)
        return op.Reshape(values, constant(shape, kinds.INT64)), scale

    return written


def fused_attention(model: Any) -> int:
    """Rewrite, in place, each Attention whose heads are a transposition of (*batch, tokens, channels) to
    MultiHeadAttention of onnxruntime, which reads that layout as it is and is a tenth faster. How many were rewritten.
    Only in models that are onnxruntime's anyway: Attention is everybody's."""
    ir = require("onnx_ir", None)
    if not any(node.domain == DOMAIN for node in model.graph):
        return 0
    count = 0
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain or len([i for i in node.inputs if i is not None]) != 3:
            continue
        if set(node.attributes) - {"scale"} and any(node.attributes[k].value for k in set(node.attributes) - {"scale"}):
            continue  # causal, capped, or with fewer heads of keys
        before = [i.producer() for i in node.inputs]
        after = [u.node for u in node.outputs[0].uses()]
        if len(node.outputs) > 1 or len(after) != 1 or not all(map(_swaps_heads, [*before, *after])):
            continue
        sources = [b.inputs[0] for b in before]
        if any(s.shape is None or len(s.shape) != 4 or s.dtype != ir.DataType.FLOAT for s in sources):
            continue
        heads = int(sources[0].shape[2])

        def put(op: str, inputs: Any, domain: str = "", at: Any = node, **more: Any) -> Any:
            made = ir.node(op, inputs, more or None, domain=domain)
            model.graph.insert_before(at, made)
            return made.outputs[0]

        def flat(value: Any, put: Any = put) -> Any:
            rows, tokens, parts, width = (int(n) for n in value.shape)
            return put("Reshape", [value, constant([rows, tokens, parts * width], put)])

        def constant(value: Any, put: Any = put) -> Any:
            return put("Constant", [], value=ir.tensor(value, dtype=ir.DataType.INT64))

        scale = {"scale": node.attributes["scale"].value} if "scale" in node.attributes else {}
        biased = [_biased(source) for source in sources]
        given = [flat(source) for source in sources]
        if all(biased):  # it copies its operands into its own layout anyway, and adds the bias of each meanwhile
            given = [x for x, _ in biased]  # type: ignore[misc]
            given.append(put("Concat", [bias for _, bias in biased], axis=0))  # type: ignore[misc]
        made = put("MultiHeadAttention", given, DOMAIN, num_heads=heads, **scale)
        old = after[0].outputs[0]
        back = put("Reshape", [made, constant([int(n) for n in old.shape])])
        back.type, back.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, back, replace_graph_outputs=True)
        for gone in (after[0], node):
            model.graph.remove(gone, safe=True)
        count += 1
    return count


def _biased(source: Any) -> tuple[Any, Any] | None:
    """The two summands of a sum (rows, tokens, channels) + (channels,) that ``source`` is a view of and alone reads."""
    view = source.producer()
    if view is None or view.op_type != "Reshape":
        return None
    add = view.inputs[0].producer()
    if add is None or add.op_type != "Add" or len(view.inputs[0].uses()) != 1 or len(source.uses()) != 1:
        return None
    x, bias = add.inputs
    wanted = int(source.shape[2]) * int(source.shape[3])
    if any(v.shape is None for v in (x, bias)) or list(bias.shape) != [wanted] or len(x.shape) != 3:
        return None
    return (x, bias) if x.shape[-1] == wanted else None


def _swaps_heads(node: Any) -> bool:
    return node is not None and node.op_type == "Transpose" and list(node.attributes["perm"].value) == [0, 2, 1, 3]


def _contrib(name: str, inputs: Sequence[str], attributes: Sequence[str] = ()) -> Any:
    """An operator of onnxruntime, of which onnxscript knows nothing: its inputs as ``name:type`` and its attributes,
    all whole numbers, are told here."""
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


def _finished(op: Any, y: Any, activation: str, gate: Any, residual: Any) -> Any:
    """What follows a product in its epilogue."""
    y = _activation(op, activation, y)
    y = op.Mul(gate, y) if gate is not None else y
    return op.Add(residual, y) if residual is not None else y


def _activation(op: Any, name: str, y: Any) -> Any:
    if name in ("gelu", "gelu_tanh"):
        return op.Gelu(y, approximate="tanh" if name == "gelu_tanh" else "none")
    if name == "silu":
        return op.Mul(y, op.Sigmoid(y))
    return op.Relu(y) if name == "relu" else y
