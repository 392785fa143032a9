"""Who runs block-sparse attention.

Triton where the tensors are on a GPU; else the listed blocks of keys are gathered, by torch operators or, for ONNX,
written out (ir/opening.py). On a GPU the Triton kernel becomes the operator's own implementation.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import fx

from ditopt.codegen.claims._entry import Entry, Form
from ditopt.ops import block_sparse_attention, select_blocks
from ditopt.ops.block_sparse_attention import reference


def _draft(node: fx.Node, target: str) -> tuple[Form, str]:
    if target == "onnxruntime":
        return "written out", "onnxruntime has TopK"
    return "kernel", "one call of torch operators"


def _claim(node: fx.Node, target: str) -> tuple[Form, str]:
    why = _triton(node, target)
    if not why:
        return "kernel", "the Triton kernel walks over the lists (codegen/triton)"
    if target == "onnxruntime":
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


def _install(node: fx.Node) -> None:
    if not _triton(node, "inductor"):
        _register()


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


ENTRIES = (Entry(block_sparse_attention, _claim, install=_install), Entry(select_blocks, _draft))
