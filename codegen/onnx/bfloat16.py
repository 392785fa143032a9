"""bfloat16 inside a float32 model, for onnxruntime: on CPU it casts to and from bfloat16 and computes nothing in it.

Models round a value on purpose (a rotary embedding that is cast to bfloat16 and back), or run a part under autocast.
torch's kernels read bfloat16, compute in float32 and round what they write; here the same is spelled out, one operator
at a time, so what differs is what differs between two float32 kernels, now and then carried over a rounding boundary.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ditopt._torch import OpOverload
from ditopt.errors import BadInput

_aten = torch.ops.aten


def widen(module: fx.GraphModule, where: str) -> fx.GraphModule:
    """``module`` with each bfloat16 value as the float32 value that equals it; ``module`` itself where there is none.

    ``module`` is flat ATen whose nodes carry their ``val``. Its inputs and results keep their types: a bfloat16 one is
    the caller's to refuse. BadInput, naming the graph (``where``), for an operator that reads the bits of bfloat16.
    """
    if not any(_narrow(node.meta.get("val")) for node in module.graph.nodes if node.op == "call_function"):
        return module
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        new = graph.node_copy(node, made.__getitem__)
        made[node] = new
        concerned = [node, *node.all_input_nodes]
        if node.op != "call_function" or not any(_narrow(n.meta.get("val")) for n in concerned):
            continue
        if node.target is _aten.view.dtype:
            raise BadInput(
                f"{where} reinterprets the bits of a bfloat16 value, which the ONNX target cannot; use target='eager'"
            )
        new.args, new.kwargs = fx.node.map_aggregate((new.args, new.kwargs), _wide_type)
        value = node.meta.get("val")  # none on an assertion
        if isinstance(value, torch.Tensor) and _narrow(value) and not _moves(node):
            rounded = graph.call_function(_aten._to_copy.default, (new,), {"dtype": torch.bfloat16})
            made[node] = graph.call_function(_aten._to_copy.default, (rounded,), {"dtype": torch.float32})
    return fx.GraphModule(module, graph, module._get_name())


def between_casts(value: Any) -> bool:
    """Whether a value of an onnx_ir.Model is no more than the rounding that ``widen`` wrote: made and read by casts."""
    producer = value.producer()
    return producer is not None and all(node.op_type == "Cast" for node in (producer, *(u.node for u in value.uses())))


def _narrow(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_narrow(v) for v in value)
    return isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16


def _wide_type(argument: Any) -> Any:
    return torch.float32 if argument is torch.bfloat16 else argument


def _moves(node: fx.Node) -> bool:
    """Whether a result holds numbers of an operand, which are rounded already."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, fx.Node) and isinstance(source.target, OpOverload) and bool(source.target.is_view)
