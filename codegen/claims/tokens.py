"""Who gathers and scatters tokens: on a GPU the Triton kernel, all tensors at once; else torch operators."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import fx

from ditopt.codegen.claims._entry import Entry, Form
from ditopt.ops import gather_tokens, scatter_tokens
from ditopt.ops.gather_tokens import decompose as open_gather
from ditopt.ops.scatter_tokens import decompose as open_scatter


def _claim(node: fx.Node, target: str) -> tuple[Form, str]:
    gather = node.target is gather_tokens
    if target == "onnxruntime":
        return "written out", "Gather" if gather else "ScatterND, which copies whole rows"
    why = _why_not_triton(node)
    if not why:
        return "kernel", "one launch of the Triton kernel for all tensors (codegen/triton)"
    if target == "eager":
        return "kernel", f"index_select of rows, for {why}" if gather else f"a copy and its rows, for {why}"
    return "written out", f"Inductor fuses it with what stands around, for {why}"


def _why_not_triton(node: fx.Node) -> str:
    """Why Triton does not run it, or ""."""
    device = node.meta["val"][0].device
    if device.type != "cuda":
        return f"there is no Triton for {device.type}"
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _gather(emit: Any, node: fx.Node, target: str) -> Any:
    return open_gather(emit, *node.args)  # type: ignore[arg-type]


def _scatter(emit: Any, node: fx.Node, target: str) -> Any:
    return open_scatter(emit, *node.args)  # type: ignore[arg-type]


def _install(node: fx.Node) -> None:
    if not _why_not_triton(node):
        from ditopt.codegen.triton.tokens import register  # imports triton

        register()


ENTRIES = (Entry(gather_tokens, _claim, _gather, _install), Entry(scatter_tokens, _claim, _scatter, _install))
