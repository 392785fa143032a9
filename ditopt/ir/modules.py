"""Inside a block body: its attention and MLP modules, and which result continues which stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ditopt.ir.binding import Binding
from ditopt.ir.mixing import VARIES
from ditopt.ir.program import Function
from ditopt.ir.reach import Reach
from ditopt.ir.residual import CASTS, find_branches

aten = torch.ops.aten


@dataclass(frozen=True)
class Module:
    """A residual branch of a block: ``role`` and the value that leaves it, before the gate. ``attention``: the products
    in it that mix tokens, which another branch may share."""

    role: str
    output: fx.Node
    nodes: frozenset[fx.Node]
    attention: frozenset[fx.Node] = frozenset()


def find_modules(body: Function, binding: Mapping[fx.Node, Binding]) -> list[Module]:
    """The attention and MLP branches of a block body, by its residual adds (ir/residual.py).

    ``x + gate * m(norm(x))``: the branch leaves at ``m``, before a gate that does not depend on the latent. A branch
    that attends is attention (with an MLP beside it in parallel blocks), another that multiplies matrices is an MLP.
    """
    reach = Reach(body)
    modules: list[Module] = []
    assigned: set[fx.Node] = set()
    for branch in find_branches(body, binding, reach):
        output = before_gate(branch.value, binding)
        if all(output is not m.output for m in modules):
            # with what only the branch needs of prompt and timestep (keys of the text, shift and scale)
            nodes = set(reach.members(reach.above[reach.place[output]] & _own(branch.inside, reach)))
            role, attention = "attn" if branch.attends else "mlp", frozenset(reach.members(branch.attention))
            modules.append(Module(role, output, frozenset(nodes - assigned), attention))
            assigned |= nodes
    return modules


def _own(inside: int, reach: Reach) -> int:
    """``inside`` and the operators that are read by nothing else."""
    for i in reversed(range(inside.bit_length())):
        node = reach.nodes[i]
        private = all(u in reach.place and inside >> reach.place[u] & 1 for u in node.users)
        if node.op == "call_function" and node.users and private:
            inside |= 1 << i
    return inside


def name_of(output: fx.Node) -> str:
    """What the region of the module with this output is called inside its block, with the kind of attention:
    ``attn.cross``."""
    return str(output.meta.get("region", "")).removeprefix(".")


def before_gate(value: fx.Node, binding: Mapping[fx.Node, Binding]) -> fx.Node:
    """What a branch computes before a gate that does not depend on the latent."""
    while value.target in CASTS:
        value = value.args[0]  # type: ignore[assignment]
    if value.target is aten.mul.Tensor:
        pair = [a for a in value.args if isinstance(a, fx.Node)]
        latent = [a for a in pair if binding[a] & Binding.LATENT]
        if len(pair) == 2 and len(latent) == 1 and _same_shape(latent[0], value):
            return latent[0]
    return value


def stream_origins(body: Function, binding: Mapping[fx.Node, Binding]) -> list[int | None]:
    """For each result of a body: the formal whose stream it continues by residual adds, casts and clips to what its
    dtype can hold (as models do in float16), or None."""
    origin: dict[fx.Node, int] = {p: i for i, p in enumerate(body.placeholders) if binding[p] & VARIES}
    for node in body.graph.nodes:
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if node.target is aten.add.Tensor and len(operands) == 2:
            for old, other in (operands, operands[::-1]):
                if old in origin and other not in origin and _same_shape(old, node):
                    origin[node] = origin[old]
                    break
        elif (node.target in CASTS or saturates(node)) and operands and operands[0] in origin:
            origin[node] = origin[operands[0]]
    return [origin.get(r) for r in body.results]


def saturates(node: fx.Node) -> bool:
    """Whether a node clips its operand to the range of its dtype, which leaves finite numbers alone."""
    if node.target not in (aten.clamp.default, aten.clip.default) or len(node.args) < 3:
        return False
    dtype = node.meta["val"].dtype
    low, high = node.args[1:3]
    if not dtype.is_floating_point or not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return False
    return low <= torch.finfo(dtype).min and high >= torch.finfo(dtype).max


def rejoined(node: fx.Node) -> fx.Node | None:
    """The value that ``node`` joins again from all its slices in order; None where it does anything else."""
    if node.target is not aten.cat.default:
        return None
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    dim, position = node.args[1] if len(node.args) > 1 else 0, 0
    if any(p.target is not aten.slice.Tensor or p.args[0] is not parts[0].args[0] for p in parts):
        return None
    for part in parts:
        at, start = part.args[1:3] if len(part.args) > 2 else (*part.args[1:], 0)
        if at != dim or (start or 0) != position:
            return None
        position += part.meta["val"].shape[dim]
    whole: fx.Node = parts[0].args[0]  # type: ignore[assignment]
    return whole if _same_shape(whole, node) else None


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return bool(a.meta["val"].shape == b.meta["val"].shape)
