"""Who runs which semantic operator, and why not somebody faster.

Backends are asked in order: Triton where the tensors are on a GPU, ONNX where the target is, torch last, which takes
everything. On a GPU ``install`` makes the Triton kernels the operators' own implementations there.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ditopt.ir.program import Program
from ditopt.ops import block_sparse_attention, select_blocks
from ditopt.ops.block_sparse_attention import reference


@dataclass(frozen=True)
class Claim:
    """``backend`` runs an operator by ``how``; ``refused``: what backends before it said."""

    backend: str
    how: str
    refused: tuple[str, ...] = ()


def claim(node: fx.Node, target: str) -> Claim | None:
    """Who runs ``node`` on ``target``; None where it is no operator that backends compete for."""
    if node.target is select_blocks:
        how = "as plain operators" if target == "onnxruntime" else "by torch, as one call"
        return Claim("onnx" if target == "onnxruntime" else "torch", how)
    if node.target is not block_sparse_attention:
        return None
    why = _triton(node, target)
    if not why:
        return Claim("triton", "one flash kernel over the lists")
    if target == "onnxruntime":
        how = "gathered key blocks, a part of the queries at a time: Gather, MatMul, Softmax, MatMul"
        return Claim("onnx", how, (f"triton: {why}",))
    products = "two products around a softmax" if node.meta["val"].dtype is torch.bfloat16 else "fused attention"
    return Claim("torch", f"gathered key blocks, then {products}", (f"triton: {why}",))


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


def claims(program: Program, target: str) -> list[str]:
    """A line for each kind of operator and claim."""
    found: Counter[tuple[str, Claim]] = Counter()
    for function in program.functions.values():
        for node in function.graph.nodes:
            made = claim(node, target) if node.op == "call_function" else None
            if made is not None:
                found[str(node.target).removesuffix(".default"), made] += 1
    return [
        f"{n} x {name}: {c.backend}, {c.how}" + (f" ({'; '.join(c.refused)})" if c.refused else "")
        for (name, c), n in found.items()
    ]


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
