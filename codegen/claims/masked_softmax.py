"""Softmax with a mask of what is hidden, as fused attention of PyTorch has it: PyTorch's kernel, or ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ditopt._torch import masked_softmax
from ditopt.codegen.claims._entry import Entry, Form
from ditopt.errors import require


def _claim(node: fx.Node, target: str) -> tuple[Form, str]:
    if target == "onnxruntime":
        return "written out", "hidden scores become minus infinity"
    return "kernel", "PyTorch's own, whose rounding nn.MultiheadAttention has"


def _onnx(opset: int) -> Callable[..., Any]:
    """For a mask of the shape of the scores, and the last dimension."""
    op: Any = getattr(require("onnxscript", None), f"opset{opset}")

    def written(scores: Any, hidden: Any, dim: int = -1, mask_type: int = 2) -> Any:
        least = op.CastLike(op.Constant(value_float=float("-inf")), scores)
        return op.Softmax(op.Where(hidden, least, scores), axis=dim)

    return written


ENTRIES = (Entry(masked_softmax, _claim, onnx={masked_softmax: _onnx}),)
