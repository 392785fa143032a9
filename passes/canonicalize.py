"""Canonical form: operators that change nothing are removed, and so is dead code.

A trace is full of them: casts to the dtype a value has, views to the shape it has, slices of everything, dropout at
inference, detach. They hide that two blocks are the same block and that a residual add adds what it adds. Exact: each
rule removes an operator only where its result has the operand's values, type and strides.

Operators that read only the type of an operand (``type_as``, ``zeros_like``, ``expand_as``) get the type instead, which
is static: else a table of timesteps would seem to need the latent.
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
        return bool(node.args[1] == 0) or node.args[2] is False
    if node.target not in _IDENTITY:
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    if before.device != after.device or TensorType.of(before) != TensorType.of(after):
        return False
    # a permutation can keep the type of a square or of unit dimensions without being the identity
    return node.target is not aten.permute.default or list(node.args[1]) == sorted(node.args[1])  # type: ignore[arg-type]


_AS = {
    aten.type_as.default: lambda a, b: (aten._to_copy.default, (a,), {"dtype": b.dtype}),
    aten.expand_as.default: lambda a, b: (aten.expand.default, (a, list(b.shape)), {}),
    aten.view_as.default: lambda a, b: (aten.view.default, (a, list(b.shape)), {}),
    aten.reshape_as.default: lambda a, b: (aten.reshape.default, (a, list(b.shape)), {}),
}
"""Operator of (a, b) that reads b's type only -> the operator that has the type as constants."""

_FILL = {
    aten.zeros_like.default: lambda node: 0,
    aten.ones_like.default: lambda node: 1,
    aten.full_like.default: lambda node: node.args[1],
    aten.empty_like.default: lambda node: 0,  # its content is unspecified, so zero is as good
    aten.new_zeros.default: lambda node: 0,
    aten.new_ones.default: lambda node: 1,
    aten.new_full.default: lambda node: node.args[2],
    aten.new_empty.default: lambda node: 0,
}
"""Operator that makes a constant tensor in the likeness of another -> the constant."""


def without_likeness(e: Editor, node: fx.Node) -> fx.Node | None:
    """What computes ``node`` without the operand that it reads only the type of; None for other operators."""
    if node.target in _AS:
        target, args, kwargs = _AS[node.target](node.args[0], node.args[1].meta["val"])  # type: ignore[union-attr]
        return e.op(target, *args, at=node, region=node.meta["region"], **kwargs)
    if node.target not in _FILL:
        return None
    value = node.meta["val"]
    order = sorted(range(value.ndim), key=lambda d: -value.stride(d))  # the layout is part of the type
    shape = [value.shape[d] for d in order]
    made = {"dtype": value.dtype, "device": value.device}
    new = e.op(aten.full.default, shape, _FILL[node.target](node), at=node, region=node.meta["region"], **made)
    if order == sorted(order):
        return new
    back = [order.index(d) for d in range(value.ndim)]
    return e.op(aten.permute.default, new, back, at=node, region=node.meta["region"])


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Remove operators that change nothing, and dead code."""

    contract = "exact"

    def run(self, program: Program, context: Context) -> Outcome:
        changed, count = {}, 0
        for name, function in program.functions.items():
            with Editor(function, self.name) as e:
                for node in list(e.graph.nodes):
                    new = node.args[0] if removable(node) else without_likeness(e, node)
                    if new is not None:
                        node.replace_all_uses_with(new)
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
