"""Who multiplies integers of 4 bits."""

from __future__ import annotations

from typing import Any

from torch import fx

from ditopt.codegen.claims._entry import Entry, Form, on_gpu, shape_of
from ditopt.codegen.claims._nbits import why_not_nbits
from ditopt.codegen.onnx.quantized import four
from ditopt.errors import require
from ditopt.ops import int4_linear
from ditopt.ops.int4_linear import decompose


def _claim(node: fx.Node, target: str) -> tuple[Form, str]:
    if target == "onnxruntime":
        why = why_not_nbits(*node.args[2:4])
        if why:
            return "written out", why
        return "kernel", "MatMulNBits reads packed weights; its 8 bit products would round the 4 bit levels again"
    if on_gpu(node):
        groups = shape_of(node.args[1])[-1]
        group = shape_of(node.args[0])[-1] // groups
        if group % 32 and groups > 1:
            return "written out", f"the Triton kernel takes groups of a multiple of 32, not of {group}"
        return "kernel", "the Triton kernel multiplies what it unpacks in int8 and adds the branch in registers"
    if target == "eager":
        return "kernel", "one call of torch operators, of dequantized numbers: no CPU multiplies 4 bits"
    return "written out", "no CPU multiplies 4 bits; Inductor fuses what dequantizes"


def _write(emit: Any, node: fx.Node, target: str) -> Any:
    args: Any = node.args
    thin = args[5] if len(args) > 5 else None
    dtype = thin.meta["val"].dtype if thin is not None else None
    shape, columns, groups = shape_of(args[0]), shape_of(args[2])[0], shape_of(args[1])[-1]
    return decompose(emit, *args, shape=shape, columns=columns, groups=groups, rank_dtype=dtype)


def _install(node: fx.Node) -> None:
    require("triton", None)
    from ditopt.codegen.triton.int4_linear import register  # imports triton

    register()


def _integer(node: fx.Node, target: str) -> tuple[bool, str]:
    form, reason = _claim(node, target)
    return form == "kernel" and on_gpu(node) and target != "onnxruntime", reason


ENTRIES = (Entry(int4_linear, _claim, _write, _install, {int4_linear: four}, _integer),)
