"""Who runs the operators of quantization: on each target either the operator itself, by a kernel, or the operators that
it stands for, written out. Each claim has its reason, which reports show."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ditopt.codegen import sparse
from ditopt.errors import require
from ditopt.ir.cost import flops
from ditopt.ir.edit import Editor, replace_functions
from ditopt.ir.program import Function, Program, callee, is_call
from ditopt.ir.quantizing import quantized_nodes
from ditopt.ops import dequantize, int4_linear, int8_linear, norm_quantize, packed_linear, quantize
from ditopt.ops.int4_linear import decompose as open_int4_linear
from ditopt.ops.int8_linear import decompose as open_int8_linear
from ditopt.ops.norm_quantize import decompose as open_norm_quantize
from ditopt.ops.norm_quantize import modulated
from ditopt.ops.packed_linear import decompose as open_packed_linear
from ditopt.ops.quantize import decompose_dequantize, decompose_quantize, quantize_unsigned

ORIGIN = "claims"

Form = Literal["kernel", "written out"]


@dataclass(frozen=True)
class Claim:
    """``count`` operators called ``op`` run as ``form`` on a target, because of ``reason``."""

    op: str
    form: Form
    reason: str
    count: int = 1


def claim(node: fx.Node, target: str) -> Claim | None:
    """Who runs ``node`` on ``target``; None for operators that nobody competes for."""
    if node.target in sparse.OPERATORS:
        form, reason = sparse.claim(node, target)
    elif node.target in _OPEN:
        form, reason = _claim(node, target)
    else:
        return None
    return Claim(str(node.target).split(".")[1], form, reason)


def _claim(node: fx.Node, target: str) -> tuple[Form, str]:
    op, on_gpu = node.target, _first(node.meta["val"]).device.type == "cuda"
    if op is int8_linear and on_gpu and target != "onnxruntime":
        return "kernel", "the Triton kernel multiplies in int8 and has the epilogue in registers (codegen/triton)"
    if op is int4_linear:
        return _claim_int4(node, target, on_gpu and target != "onnxruntime")
    if target == "eager":
        return "kernel", "torch's int8 product" if op is int8_linear else "one call of torch operators"
    if target == "onnxruntime":
        if op is int8_linear:
            return "kernel", "MatMulIntegerToFloat, of unsigned activations: several times faster than signed ones"
        if op is packed_linear and (why := _why_not_nbits(node)) == "":
            return "kernel", "MatMulNBits reads packed weights"
        if _wants_unsigned(node, target):
            return "written out", "a norm, two reductions over a row and QuantizeLinear, which is vectorized"
        return "written out", why if op is packed_linear else "onnxruntime has no such operator for a scale of each row"
    if op is int8_linear:
        return "written out", "torch's int8 product, around which Inductor fuses scales, bias, activation, gate and sum"
    return "written out", "Inductor fuses it with what stands around"


def _claim_int4(node: fx.Node, target: str, on_gpu: bool) -> tuple[Form, str]:
    if target == "onnxruntime":
        why = _why_not_nbits(node)
        if why:
            return "written out", why
        return "kernel", "MatMulNBits reads packed weights; its 8 bit products would round the 4 bit levels again"
    if on_gpu:
        group = _shape(node.args[0])[-1] // _shape(node.args[1])[-1]
        if group % 32 and _shape(node.args[1])[-1] > 1:
            return "written out", f"the Triton kernel takes groups of a multiple of 32, not of {group}"
        return "kernel", "the Triton kernel multiplies what it unpacks in int8 and adds the branch in registers"
    if target == "eager":
        return "kernel", "one call of torch operators, of dequantized numbers: no CPU multiplies 4 bits"
    return "written out", "no CPU multiplies 4 bits; Inductor fuses what dequantizes"


def _why_not_nbits(node: fx.Node) -> str:
    """Why MatMulNBits cannot run a packed_linear or int4_linear; "" where it can."""
    at = 1 if node.target is packed_linear else 2
    values, scale = (a.meta["val"] for a in node.args[at : at + 2])  # type: ignore[union-attr]
    if values.dtype is not torch.uint8:
        return "MatMulNBits is for 4 bits here"
    group = 2 * values.shape[-1] // scale.shape[-1]
    if group < 16 or group & (group - 1):
        return f"MatMulNBits takes groups of 16 or a larger power of two, not of {group}"
    return ""


def claims(program: Program, target: str) -> tuple[Claim, ...]:
    """What runs the operators of quantization in one step of ``program``, each kind once, with its count."""
    found: Counter[Claim] = Counter()
    for node in program.step.graph.nodes:
        inside = program.functions[callee(node)].graph.nodes if is_call(node) else [node]
        found.update(c for n in inside if (c := claim(n, target)) is not None)
    return tuple(dataclasses.replace(c, count=n) for c, n in found.items())


@dataclass(frozen=True)
class Product:
    """``flops`` a step of products with quantized weights that a target computes in ``integer`` kernels, or does not,
    because of ``reason``."""

    integer: bool
    reason: str
    flops: int


def products(program: Program, target: str) -> tuple[Product, ...]:
    """The layers of a step whose weights are quantized, by how ``target`` multiplies them: what is planned. What ran is
    the engine's to say (ditopt/kernels.py)."""
    found: Counter[tuple[bool, str]] = Counter()
    for node in quantized_nodes(program):
        found[_integer(node, target)] += flops(node)
    return tuple(Product(integer, reason, n) for (integer, reason), n in found.items())


def _integer(node: fx.Node, target: str) -> tuple[bool, str]:
    if node.target is int8_linear:
        return True, _claim(node, target)[1]
    if node.target is int4_linear:
        form, reason = _claim(node, target)
        on_gpu = node.meta["val"].device.type == "cuda" and target != "onnxruntime"
        return form == "kernel" and on_gpu, reason
    if node.target is packed_linear:
        return False, "only their weight is integers, so they are multiplied in floating point"
    return False, "no integer product takes their formats; they are multiplied dequantized"


def claimed(program: Program, target: str) -> Program:
    """``program`` with what no kernel of ``target`` runs written out; memo functions, which run eagerly, stay."""
    memos = {m.function for m in program.memos}
    changed = {
        name: _open(f, target, formals=name == program.entry)
        for name, f in program.functions.items()
        if name not in memos and any(n.target in _OPEN for n in f.graph.nodes)
    }
    return replace_functions(program, changed) if changed else program


def with_kernels(program: Program) -> Program:
    """``program``; where it computes on a GPU, with the Triton kernels in place. MissingExtra without Triton."""
    nodes = [n for f in program.functions.values() for n in f.graph.nodes if n.target in (int4_linear, int8_linear)]
    if any(n.meta["val"].device.type == "cuda" for n in nodes):
        require("triton", None)
        from ditopt.codegen.triton import int4_linear as four  # imports triton
        from ditopt.codegen.triton import int8_linear as eight

        four.register()
        eight.register()
    sparse.install(program)
    return program


def _open(function: Function, target: str, formals: bool) -> Function:
    with Editor(function, ORIGIN) as e:
        for node in list(e.graph.nodes):
            found = claim(node, target)
            if found is None or found.form == "kernel":
                continue

            def emit(op: Any, *args: Any, at: fx.Node = node, **kwargs: Any) -> fx.Node:
                return e.op(op, *args, at=at, region=str(at.meta["region"]), **kwargs)

            made = (_unsigned if _wants_unsigned(node, target) else _OPEN[node.target])(emit, node)
            if isinstance(made, tuple):
                for user in list(node.users):
                    user.replace_all_uses_with(made[user.args[1]])
            else:
                node.replace_all_uses_with(made)
        e.drop_dead(formals)
    return e.function()


def _wants_unsigned(node: fx.Node, target: str) -> bool:
    """Whether ``target`` multiplies unsigned values, and those that ``node`` makes are multiplied and read by nothing
    else."""
    values = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
    readers = [r for v in values for r in v.users]
    multiplied = bool(readers) and all(r.target is int8_linear and r.args[0] in values for r in readers)
    return target == "onnxruntime" and node.target in (quantize, norm_quantize) and multiplied


def _unsigned(emit: Any, node: fx.Node) -> Any:
    args: Any = node.args
    x = args[0]
    if node.target is norm_quantize:
        x = modulated(emit, x, *args[2:], width=_shape(x)[-1])
    made = emit(quantize_unsigned, x)
    return emit(operator.getitem, made, 0), emit(operator.getitem, made, 1)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) else value


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(s) for s in node.meta["val"].shape)


def _quantize(emit: Any, node: fx.Node) -> Any:
    args: Any = node.args
    return decompose_quantize(emit, *args, shape=_shape(args[0]))


def _norm_quantize(emit: Any, node: fx.Node) -> Any:
    args: Any = node.args
    return open_norm_quantize(emit, *args, shape=_shape(args[0]))


def _dequantize(emit: Any, node: fx.Node) -> Any:
    args: Any = node.args
    groups = _shape(args[1])[-1]
    return decompose_dequantize(emit, *args, shape=_shape(node), groups=groups)


def _int8_linear(emit: Any, node: fx.Node) -> Any:
    args: Any = node.args
    return open_int8_linear(emit, *args, shape=_shape(args[0]))


def _int4_linear(emit: Any, node: fx.Node) -> Any:
    args: Any = node.args
    thin = args[5] if len(args) > 5 else None
    dtype = thin.meta["val"].dtype if thin is not None else None
    shape, columns, groups = _shape(args[0]), _shape(args[2])[0], _shape(args[1])[-1]
    return open_int4_linear(emit, *args, shape=shape, columns=columns, groups=groups, rank_dtype=dtype)


def _packed_linear(emit: Any, node: fx.Node) -> Any:
    args: Any = node.args
    x, values, scale, *bias = args
    shape = (_shape(values)[0], _shape(x)[-1])
    dtype = x.meta["val"].dtype
    return open_packed_linear(emit, x, values, scale, *bias, dtype=dtype, shape=shape, groups=_shape(scale)[-1])


_OPEN: dict[Any, Callable[[Any, fx.Node], Any]] = {
    quantize: _quantize,
    dequantize: _dequantize,
    norm_quantize: _norm_quantize,
    int4_linear: _int4_linear,
    int8_linear: _int8_linear,
    packed_linear: _packed_linear,
}
"""How each operator is written out."""
