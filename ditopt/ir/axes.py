"""Where the axes of a value are in the values computed from it, across a whole function and the blocks that it calls.

Patchified latents (B, C, H, W) become tokens whose one dimension is two atoms, rows of H and columns of W, whichever
way the model wrote it: so the grid of a stream is read off the graph, and so are the axes over which attention mixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ditopt.ir.binding import data_operands
from ditopt.ir.cost import is_attention
from ditopt.ir.dims import Dim, Dims, Known, equation, factors, through
from ditopt.ir.program import Function, Program, call_args, callee, is_call

aten = torch.ops.aten


def source(shape: Sequence[int]) -> Dims:
    """The dimensions of the source itself."""
    return tuple(Dim.of(int(n), i) for i, n in enumerate(shape))


def contracted(node: fx.Node, known: Known) -> frozenset[int]:
    """The axes of the source over which a product of two activations sums."""
    out: frozenset[int] = frozenset()
    for operand, at in _summed(node):
        if known.get(operand):
            out |= known[operand][at].axes
    return out


def rows(node: fx.Node, known: Known) -> frozenset[int]:
    """The axes of the source along which a product of activations has rows: the queries of an attention."""
    first = data_operands(node)[0]
    dims = known.get(first)
    return dims[-2].axes if dims and len(dims) > 1 else frozenset()


def follow(program: Program, function: Function, start: Mapping[fx.Node, Dims]) -> Known:
    """The dimensions of every node of ``function`` that a source, the placeholders in ``start``, reaches."""
    return _Follow(program).run(function, start)


class _Follow:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.called: dict[Any, tuple[Dims, ...]] = {}

    def run(self, function: Function, start: Mapping[fx.Node, Dims]) -> Known:
        known: Known = {n: d for n, d in start.items() if d}
        for node in function.graph.nodes:
            if node.op != "call_function":
                continue
            dims = self._call(node, known) if is_call(node) else through(node, known)
            if dims:
                known[node] = dims
        return known

    def _call(self, node: fx.Node, known: Known) -> tuple[Dims, ...]:
        given: Any = tuple(known.get(a, ()) for a in call_args(node))
        if not any(given):
            return ()
        key = (callee(node), given)
        if key not in self.called:
            body = self.program.functions[callee(node)]
            inside = self.run(body, dict(zip(body.placeholders, given, strict=True)))
            self.called[key] = tuple(inside.get(r, ()) for r in body.results)
        return self.called[key]


def _summed(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The operands of a product of activations and the dimensions of them that it sums over."""
    args: Any = node.args
    if is_attention(node):
        return [(args[1], -2), (args[2], -2)]
    if node.target is aten.einsum.default:
        terms, result = equation(node)
        pairs = zip(terms, args[1], strict=True)
        return [(a, i) for term, a in pairs for i, c in enumerate(term) if c not in result and "." not in term]
    left, right = factors(node)
    return [(left, -1), (right, -2 if right.meta["val"].ndim > 1 else -1)]
