"""Who runs block-sparse attention, and why.

Triton where the tensors are on a GPU; else the listed blocks of keys are gathered, by torch operators or, for ONNX,
written out. On a GPU ``install`` makes the Triton kernel the operator's own implementation.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Literal

import torch
from torch import fx

from ditopt.ir.program import Program
from ditopt.ops import block_sparse_attention, select_blocks
from ditopt.ops.block_sparse_attention import reference

OPERATORS = (block_sparse_attention, select_blocks)


def claim(node: fx.Node, target: str) -> tuple[Literal["kernel", "written out"], str]:
    """How ``target`` runs one of OPERATORS, and the reason."""
    onnx = target == "onnxruntime"
    if node.target is select_blocks:
        return ("written out", "onnxruntime has TopK") if onnx else ("kernel", "one call of torch operators")
    why = _triton(node, target)
    if not why:
        return "kernel", "the Triton kernel walks over the lists (codegen/triton)"
    if onnx:
        return "written out", "Gather of key blocks, MatMul, Softmax, MatMul for a part of the queries at a time"
    return "kernel", f"torch operators on gathered key blocks, for {why}"


def _triton(node: fx.Node, target: str) -> str:
    """Why Triton does not run it, or ""."""
    args: Any = node.args
    device = node.meta["val"].device
    if target == "onnxruntime":
        return "the target runs ONNX operators only"
    if device.type != "cuda":
        return f"there is no Triton for {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from ditopt.codegen.triton.block_sparse_attention import refusal

    return refusal(args[0].meta["val"].shape[-1], args[2].meta["val"].shape[-1], args[7], args[8])


def install(program: Program) -> None:
    """Register the Triton kernels for GPUs where the program runs on one."""
    for function in program.functions.values():
        for node in function.graph.find_nodes(op="call_function", target=block_sparse_attention):
            if not _triton(node, "inductor"):
                _register()
                return


@functools.cache
def _register() -> torch.library.Library:
    from ditopt.codegen.triton.block_sparse_attention import block_sparse_attention as kernel
    from ditopt.codegen.triton.block_sparse_attention import refusal

    def run(query: Any, key: Any, value: Any, index: Any, *args: Any) -> Any:
        block_q, block_k = [*args, *(None, None, None, 64, 64)[len(args) :]][3:5]
        if refusal(query.shape[-1], value.shape[-1], block_q, block_k):
            return reference(query, key, value, index, *args)
        return kernel(query, key, value, index, *args)[0]

    library = torch.library.Library("ditopt", "FRAGMENT")
    library.impl("block_sparse_attention", run, "CUDA")
    return library
