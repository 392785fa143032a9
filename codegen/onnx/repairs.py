"""What has to be put right before and after torch's ONNX exporter. Each repair says what went wrong without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ditopt.errors import require

_aten = torch.ops.aten
_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten._unsafe_index.Tensor,
    _aten._unsafe_index_put.default,
}
_WIDE = {_aten.sum.default, _aten.sum.dim_IntList, _aten.cumsum.default, _aten.prod.default, _aten.prod.dim_int}


def widen_half_sums(program: torch.export.ExportedProgram) -> int:
    """Spell out, in place, that float16 is summed in float32 and rounded back. The exporter inserts the first cast and
    forgets the second, so that a float16 sum becomes float32 for whatever reads it. How many were rewritten."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target in _WIDE and node.meta["val"].dtype is torch.float16:
            with program.graph.inserting_before(node):
                wide = program.graph.call_function(node.target, node.args, {**node.kwargs, "dtype": torch.float32})
            wide.meta = {**node.meta, "val": node.meta["val"].to(torch.float32)}
            # The node keeps its name, which the program's signature may know as an output.
            node.target, node.args, node.kwargs = _aten._to_copy.default, (wide,), {"dtype": torch.float16}
            count += 1
    return count


def full_masks(program: torch.export.ExportedProgram) -> int:
    """Repeat, in place, attention masks that hold one row for all queries. torch broadcasts them, and Attention in ONNX
    Runtime takes no mask with fewer rows than queries. How many were rewritten."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target is not _aten.scaled_dot_product_attention.default:
            continue
        given = dict(zip(("query", "key", "value", "attn_mask"), node.args, strict=False)) | node.kwargs
        mask, rows = given.get("attn_mask"), given["query"].meta["val"].shape[-2]
        if mask is None or mask.meta["val"].ndim < 2 or mask.meta["val"].shape[-2] == rows:
            continue
        shape = [*mask.meta["val"].shape[:-2], rows, mask.meta["val"].shape[-1]]
        with program.graph.inserting_before(node):
            full = program.graph.call_function(_aten.expand.default, (mask, shape))
        full.meta = {**mask.meta, "val": mask.meta["val"].expand(shape)}
        node.replace_input_with(mask, full)
        count += 1
    return count


def four_axes(program: torch.export.ExportedProgram) -> int:
    """Give attention, in place, a batch and heads in front of its tokens and channels. torch takes any number of axes
    there (windows, frames); the exporter takes four in all. How many were rewritten."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target is not _aten.scaled_dot_product_attention.default or node.kwargs.get("enable_gqa"):
            continue
        operands = node.args[:3]
        if all(o.meta["val"].ndim == 4 for o in operands):
            continue
        lead = torch.broadcast_shapes(*(o.meta["val"].shape[:-2] for o in operands))
        two = [math.prod(lead[:-1]), lead[-1]] if len(lead) > 1 else [*lead, 1, 1][:2]
        graph = program.graph
        with graph.inserting_before(node):
            given = [_led(graph, o, lead, two) for o in operands]
            masks = [
                m if not isinstance(m, torch.fx.Node) or m.meta["val"].ndim < 3 else _led(graph, m, lead, two)
                for m in node.args[3:4]
            ]
            kwargs = dict(node.kwargs)
            if isinstance(mask := kwargs.get("attn_mask"), torch.fx.Node) and mask.meta["val"].ndim > 2:
                kwargs["attn_mask"] = _led(graph, mask, lead, two)
            inner = graph.call_function(node.target, (*given, *masks, *node.args[4:]), kwargs)
        shape = list(node.meta["val"].shape)
        inner.meta = {**node.meta, "val": node.meta["val"].reshape([*two, *shape[-2:]])}
        # The node keeps its name, which the program's signature may know as an output.
        node.target, node.args, node.kwargs = _aten.reshape.default, (inner, shape), {}
        count += 1
    return count


def _led(graph: torch.fx.Graph, node: torch.fx.Node, lead: Sequence[int], two: Sequence[int]) -> torch.fx.Node:
    """``node``, of (..., rows, columns), with the axes ``lead`` in front, as ``two``."""
    last = list(node.meta["val"].shape[-2:])
    if list(node.meta["val"].shape[:-2]) != list(lead):
        node = _computed(graph, _aten.expand.default, node, [*lead, *last])
    return _computed(graph, _aten.reshape.default, node, [*two, *last])


def true_squeezes(program: torch.export.ExportedProgram) -> int:
    """Drop, in place, squeezes of a dimension that is longer than one. torch leaves it alone; ONNX refuses the graph.
    How many were dropped."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target is _aten.squeeze.dim and node.args[0].meta["val"].shape == node.meta["val"].shape:
            # The node keeps its name, which the program's signature may know as an output.
            node.target, node.args = _aten.alias.default, node.args[:1]
            count += 1
    return count


def wide_indices(program: torch.export.ExportedProgram) -> int:
    """Widen, in place, int32 indices to int64. torch takes either; the exporter hands them on to GatherND and
    ScatterND, which take int64 alone. How many were widened."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target not in _INDEXED:
            continue
        narrow = {i for i in node.args[1] if i is not None and i.meta["val"].dtype is torch.int32}
        for index in narrow:
            with program.graph.inserting_before(node):
                wide = program.graph.call_function(_aten._to_copy.default, (index,), {"dtype": torch.int64})
            wide.meta = {**index.meta, "val": index.meta["val"].to(torch.int64)}
            indices = [wide if i is index else i for i in node.args[1]]
            node.args = (node.args[0], indices, *node.args[2:])
            count += 1
    return count


def counted_repeats(program: torch.export.ExportedProgram) -> int:
    """Write out, in place, rows repeated as often as a tensor says: row i of the result is the one before whose end,
    the sum of the counts up to it, i lies. The exporter has no way to tell ONNX the size. How many were rewritten."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target is _aten.repeat_interleave.Tensor:
            _become_repeats(program.graph, node, node.args[0], node.meta["val"].shape[0])
        elif node.target is _aten.repeat_interleave.self_Tensor:
            source, repeats, *rest = node.args
            dim = (rest or [node.kwargs.get("dim")])[0]
            with program.graph.inserting_before(node):
                if dim is None:
                    source, dim = _computed(program.graph, _aten.reshape.default, source, [-1]), 0
                rows = program.graph.call_function(_aten.repeat_interleave.Tensor)
            size = node.meta["val"].shape[dim]
            rows.meta = {**node.meta, "val": repeats.meta["val"].new_empty(size, dtype=torch.int64)}
            _become_repeats(program.graph, rows, repeats, size)
            # The node keeps its name, which the program's signature may know as an output.
            node.target, node.args, node.kwargs = _aten.index_select.default, (source, dim, rows), {}
        else:
            continue
        count += 1
    return count


def _become_repeats(graph: torch.fx.Graph, node: torch.fx.Node, repeats: torch.fx.Node, size: int) -> None:
    """Turn ``node`` into the row of each result."""
    with graph.inserting_before(node):
        ends = _computed(graph, _aten.unsqueeze.default, _computed(graph, _aten.cumsum.default, repeats, 0), 1)
        place = graph.call_function(_aten.arange.default, (size,))
        place.meta = {**node.meta, "val": node.meta["val"].new_empty(size, dtype=torch.int64)}
        passed = _computed(
            graph, _aten._to_copy.default, _computed(graph, _aten.ge.Tensor, place, ends), dtype=torch.int64
        )
    node.target, node.args, node.kwargs = _aten.sum.dim_IntList, (passed, [0]), {}


def _computed(graph: torch.fx.Graph, target: Any, first: torch.fx.Node, *args: Any, **kwargs: Any) -> torch.fx.Node:
    """A new node with its type."""
    made = graph.call_function(target, (first, *args), kwargs)
    types = torch.fx.map_arg((made.args, made.kwargs), lambda n: n.meta["val"])
    made.meta = {**first.meta, "val": target(*types[0], **types[1])}
    return made


def alike_factors(program: torch.export.ExportedProgram) -> int:
    """Cast, in place, the operands of an einsum to the type of its result. torch promotes those of an outer product
    (positions times float64 rates); Einsum in ONNX takes one type. How many were cast."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target is not _aten.einsum.default:
            continue
        dtype = node.meta["val"].dtype
        for operand in {a for a in node.args[1] if a.meta["val"].dtype is not dtype}:
            with program.graph.inserting_before(node):
                cast = program.graph.call_function(_aten._to_copy.default, (operand,), {"dtype": dtype})
            cast.meta = {**operand.meta, "val": operand.meta["val"].to(dtype)}
            node.replace_input_with(operand, cast)
            count += 1
    return count


def runnable_wheres(model: Any) -> int:
    """Choose, in place, between numbers of another type where onnxruntime has no Where for the type at hand: booleans
    (masks that are combined) and int16. The detour by a wider type changes no value. How many were rewritten."""
    ir = require("onnx_ir", None)
    detours = {ir.DataType.BOOL: ir.DataType.UINT8, ir.DataType.INT16: ir.DataType.INT32}
    count = 0
    for node in list(model.graph):
        if node.op_type != "Where":
            continue
        value = node.outputs[0]
        types = [v.dtype for v in (value, *node.inputs[1:]) if v.dtype is not None]
        if not types or types[0] not in detours:
            continue

        def cast(source: Any, to: Any, before: Any = node) -> Any:
            made = ir.node("Cast", [source], {"to": ir.AttrInt64("to", int(to))})
            model.graph.insert_before(before, made)
            made.outputs[0].type, made.outputs[0].shape = ir.TensorType(to), source.shape
            return made.outputs[0]

        condition, *sides = node.inputs
        made = ir.node("Where", [condition, *(cast(side, detours[types[0]]) for side in sides)])
        model.graph.insert_before(node, made)
        made.outputs[0].type, made.outputs[0].shape = ir.TensorType(detours[types[0]]), value.shape
        back = cast(made.outputs[0], types[0])
        ir.convenience.replace_all_uses_with(value, back, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        count += 1
    return count


def plain_splits(model: Any) -> int:
    """Rewrite, in place, each SplitToSequence of a static shape that is only read at constant indices: to one Split, or
    for unbind to one Gather a part. The exporter spells split, chunk and unbind as sequences; onnxruntime copies every
    part in and out of one, and no optimization of its own looks through it. How many were rewritten."""
    ir = require("onnx_ir", None)
    count = 0
    for node in list(model.graph):
        if node.op_type != "SplitToSequence":
            continue
        source, axis = node.inputs[0], node.attributes["axis"].as_int()
        parts = [use.node for use in node.outputs[0].uses()]
        at = [ir.convenience.get_const_tensor(p.inputs[1]) if p.op_type == "SequenceAt" else None for p in parts]
        index = [int(k.numpy()) for k in at if k is not None]
        if len(index) < len(parts) or source.shape is None or not isinstance(source.shape[axis], int):
            continue
        total = int(source.shape[axis])
        lengths = [1] * total
        if len(node.inputs) > 1:
            sizes = ir.convenience.get_const_tensor(node.inputs[1])
            if sizes is None:
                continue
            given = sizes.numpy().tolist()
            lengths = given if isinstance(given, list) else [min(given, total - k) for k in range(0, total, given)]
        unbind = len(node.inputs) == 1 and node.attributes["keepdims"].as_int() == 0

        def constant(value: Any, before: Any = node) -> Any:
            made = ir.node("Constant", [], {"value": ir.tensor(value, dtype=ir.DataType.INT64)})
            model.graph.insert_before(before, made)
            return made.outputs[0]

        split: list[Any] = []
        if not unbind:
            made = ir.node("Split", [source, constant(lengths)], {"axis": axis}, num_outputs=len(lengths))
            model.graph.insert_before(node, made)
            split = list(made.outputs)
        for part, i in zip(parts, index, strict=True):
            old, k = part.outputs[0], i % len(lengths)
            if unbind:
                made = ir.node("Gather", [source, constant(k)], {"axis": axis})
                model.graph.insert_before(node, made)
                new = made.outputs[0]
            else:
                new = split[k]
            new.type, new.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            model.graph.remove(part, safe=True)
        model.graph.remove(node, safe=True)
        count += 1
    return count
