"""FLOPs of what a program really executes: matmul, convolution and attention, from the types in the graph.

One multiply-add counts as two. This is the only FLOPs counter in the repository: plans, reports and benchmarks use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ditopt._torch import int_mm
from ditopt.ir.program import Function, Program, callee, is_call
from ditopt.ops import (
    attention,
    block_sparse_attention,
    int4_linear,
    int8_linear,
    linear_attention,
    packed_linear,
    select_blocks,
)
from ditopt.ops.block_sparse_attention import blocks
from ditopt.ops.call_module import BODIES, call_module

aten = torch.ops.aten


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(s) for s in value.meta["val"].shape)


def _matmul(node: fx.Node) -> int:
    left, right = _shape(node.args[0]), _shape(node.args[1])
    return 2 * math.prod(_shape(node)) * (left[-1] if left else right[0])


def _addmm(node: fx.Node) -> int:
    return 2 * math.prod(_shape(node)) * _shape(node.args[1])[-1]


def _int8_linear(node: fx.Node) -> int:
    return 2 * math.prod(_shape(node)) * _shape(node.args[2])[-1]


def _int4_linear(node: fx.Node) -> int:
    thin: Any = node.args[5] if len(node.args) > 5 else None
    inputs = _shape(node.args[0])[-1] + (_shape(thin)[-1] if thin is not None else 0)
    return 2 * math.prod(_shape(node)) * inputs


def _packed_linear(node: fx.Node) -> int:
    return 2 * math.prod(_shape(node)) * _shape(node.args[0])[-1]


def _convolution(node: fx.Node) -> int:
    if node.target is aten.convolution.default and node.args[6]:
        return _transposed(node)
    weight = _shape(node.args[1])  # (out, in / groups, *kernel)
    return 2 * math.prod(_shape(node)) * math.prod(weight[1:])


def _transposed(node: fx.Node) -> int:
    weight = _shape(node.args[1])  # (in, out / groups, *kernel)
    return 2 * math.prod(_shape(node.args[0])) * math.prod(weight[1:])


def _attention(node: fx.Node) -> int:
    query, key, value = (_shape(a) for a in node.args[:3])
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _sparse_attention(node: fx.Node) -> int:
    """Of what is gathered: full lists, whole blocks."""
    query, key, value, index = (_shape(a) for a in node.args[:4])
    sizes: Any = node.args[7:11]
    block_q, block_k, dense_q, dense_k = sizes
    rows = blocks(query[-2], dense_q, block_q) * block_q
    seen = index[-1] * block_k + sum(dense_k)
    scores = rows * seen + sum(dense_q) * key[-2]
    return 2 * math.prod(query[:-2]) * scores * (query[-1] + value[-1])


def _draft(node: fx.Node) -> int:
    query, key = _shape(node.args[0]), _shape(node.args[1])
    rows, columns = (blocks(x[-2], node.args[i + 2], node.args[i]) for i, x in ((3, query), (4, key)))  # type: ignore[arg-type]
    return 2 * math.prod(query[:-2]) * rows * columns * query[-1]


def _linear_attention(node: fx.Node) -> int:
    """The operators of its spelling, counted one by one: what a sum of keys costs depends on how it is written."""
    from ditopt.ops.linear_attention import decompose

    graph, total = fx.Graph(), 0

    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        nonlocal total
        made = graph.call_function(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        made.meta["val"] = target(*values, **named)
        total += flops(made)
        return made

    def operand(x: fx.Node) -> fx.Node:
        made = graph.placeholder("x")
        made.meta["val"] = torch.empty(_shape(x), dtype=x.meta["val"].dtype, device="meta")
        return made

    given: Any = fx.map_arg((node.args, node.kwargs), operand)
    decompose(emit, *given[0], **given[1])
    return total


def _einsum(node: fx.Node) -> int:
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    if len(operands) < 2:
        return 0  # a permutation or a sum, no product
    terms, _, result = equation.partition("->")
    if not result:
        result = "".join(c for c in terms if terms.count(c) == 1)
    sizes: dict[str, int] = {}
    for term, operand in zip(terms.split(","), operands, strict=True):
        head, _, tail = term.partition("...")  # the letters after an ellipsis count from the right
        sizes.update(zip(head, _shape(operand), strict=False))
        sizes.update(zip(reversed(tail), reversed(_shape(operand)), strict=False))
    return 2 * math.prod(_shape(node)) * math.prod(size for letter, size in sizes.items() if letter not in result)


def _module(node: fx.Node) -> int:
    return BODIES[str(node.args[2])].flops if node.args[2] in BODIES else 0


_COUNT: dict[Any, Callable[[fx.Node], int]] = {
    aten.linear.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.mv.default: _matmul,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.einsum.default: _einsum,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.padding: _convolution,
    aten.convolution.default: _convolution,
    aten.conv_transpose1d.default: _transposed,
    aten.conv_transpose2d.input: _transposed,
    aten.conv_transpose3d.input: _transposed,
    aten.scaled_dot_product_attention.default: _attention,
    int_mm: _matmul,
    int4_linear: _int4_linear,
    int8_linear: _int8_linear,
    packed_linear: _packed_linear,
    call_module: _module,
    attention: _attention,
    linear_attention: _linear_attention,
    block_sparse_attention: _sparse_attention,
    select_blocks: _draft,
}

_ATTENTION = {aten.scaled_dot_product_attention.default, attention, linear_attention, block_sparse_attention}


def flops(node: fx.Node) -> int:
    """FLOPs of one operator node; a call counts nothing by itself."""
    count = _COUNT.get(node.target)
    return count(node) if count is not None else 0


def function_flops(program: Program, function: Function) -> int:
    """FLOPs of one run of ``function``, its calls included."""
    return sum(
        function_flops(program, program.functions[callee(n)]) if is_call(n) else flops(n) for n in function.graph.nodes
    )


def step_flops(program: Program) -> tuple[int, int]:
    """FLOPs of one run of the entry: in all, and inside blocks."""
    blocks = total = 0
    for node in program.step.graph.nodes:
        cost = function_flops(program, program.functions[callee(node)]) if is_call(node) else flops(node)
        total += cost
        if str(node.meta.get("region", "")).startswith("blocks."):
            blocks += cost
    return total, blocks


def is_matmul(node: fx.Node) -> bool:
    """Whether the node multiplies matrices (attention not included)."""
    return node.target in _COUNT and node.target not in _ATTENTION | {select_blocks}


def is_attention(node: fx.Node) -> bool:
    """Whether the node is attention in one operator."""
    return node.target in _ATTENTION


def is_convolution(node: fx.Node) -> bool:
    """Whether the node slides a kernel over its input, without transposition."""
    return _COUNT.get(node.target) is _convolution and not (node.target is aten.convolution.default and node.args[6])
