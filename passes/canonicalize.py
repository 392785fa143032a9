"""Canonical form: operators that change nothing are removed, and so is dead code.

A trace is full of them: casts to the dtype a value has, views to the shape it has, slices of everything, dropout at
inference, detach. They hide that two blocks are the same block and that a residual add adds what it adds. Exact: each
rule removes an operator only where its result has the operand's values, type and strides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ditopt.ir import example
from ditopt.ir.edit import Editor, prune, replace_functions
from ditopt.ir.program import Program, TensorType
from ditopt.pipeline import Context, Outcome, Pass

aten = torch.ops.aten

_IDENTITY = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.type_as.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.permute.default,
}
"""Operators that are the identity whenever their result has the type and strides of their first operand."""


def removable(node: fx.Node) -> bool:
    """Whether ``node`` computes its first operand."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is aten.dropout.default:
        return node.args[1] == 0 or node.args[2] is False
    if node.target not in _IDENTITY:
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    if before.device != after.device or TensorType.of(before) != TensorType.of(after):
        return False
    # a permutation can keep the type of a square or of unit dimensions without being the identity
    return node.target is not aten.permute.default or list(node.args[1]) == sorted(node.args[1])  # type: ignore[arg-type, type-var]


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Remove operators that change nothing, and dead code."""

    contract = "exact"

    def run(self, program: Program, context: Context) -> Outcome:
        changed, count = {}, 0
        for name, function in program.functions.items():
            with Editor(function, self.name) as e:
                for node in list(e.graph.nodes):
                    if removable(node):
                        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                gone = e.drop_dead(formals=name == program.entry)
            if gone:
                changed[name] = e.function()
                count += gone
        if not count:
            return Outcome(program, 0, ("every operator changes something and has a reader: nothing to remove",))
        return Outcome(prune(replace_functions(program, changed)), count)

    @classmethod
    def example_applies(cls) -> Program:
        return example.tiny_dit(noise=True)

    @classmethod
    def example_refuses(cls) -> Program:
        return example.tiny_dit()
