"""Quantize, product and dequantize of one function as one operator, with what stands around them point by point."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from ditopt.ir.edit import Editor
from ditopt.ir.program import Function, TensorType
from ditopt.ops import dequantize, int4_linear, int8_linear, norm_quantize, packed_linear, quantize

aten = torch.ops.aten


class Fusing:
    """``function`` with its quantized layers fused: how many operators were made, and a sentence on each kind of layer
    that stays. ``around``: also the epilogue of each layer, and the norm before it."""

    def __init__(self, function: Function, origin: str, around: bool) -> None:
        self.count = 0
        self._why: Counter[str] = Counter()
        with Editor(function, origin) as e:
            self.e = e
            for node in list(e.graph.nodes):
                if node.target is aten.linear.default and node.args[1].target is dequantize:
                    self._layer(node, around)
            if around:
                for node in list(e.graph.nodes):
                    if node.target is quantize and node.args[1] == 8:
                        self._norm(node)
            e.drop_dead(formals=False)
        self.function = e.function() if self.count else function
        self.refused = [f"{n} quantized layers of {function.name} stay: {why}" for why, n in self._why.items()]

    # -- layers --------------------------------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, around: bool) -> None:
        args: Any = node.args
        x, weight = args[:2]
        bias = args[2] if len(args) > 2 else None
        where: dict[str, Any] = {"region": str(node.meta["region"])}
        if x.target is not dequantize:
            if weight.args[0].meta["val"].dtype is torch.uint8 or weight.args[1].meta["val"].shape[-1] == 1:
                given = [x, *weight.args[:2], *([bias] if bias is not None else [])]
                self._put(node, self.e.op(packed_linear, *given, at=node, **where))
            else:
                self._why["their weight is in groups that are not packed"] += 1
            return
        operands = (*x.args[:2], *weight.args[:2])
        if weight.args[0].meta["val"].dtype is torch.uint8:
            self._packed(node, operands, bias, around)
            return
        if any(o.meta["val"].dtype is not torch.int8 for o in operands[::2]) or any(
            o.meta["val"].shape[-1] != 1 for o in operands[1::2]
        ):
            self._why[
                "integers in groups have a product where their weight is packed; they are computed dequantized"
            ] += 1
            return
        last, activation, gate, residual = self._after(node) if around else (node, "none", None, None)
        dtype = node.meta["val"].dtype
        new = self.e.op(int8_linear, *operands, bias, dtype, activation, gate, residual, at=last, **where)
        self._put(last, new)

    def _packed(self, node: fx.Node, operands: tuple[fx.Node, ...], bias: fx.Node | None, around: bool) -> None:
        """A layer of 4 bit integers in groups, with the branch of low rank that is added to it."""
        values, scale, _, weight_scale = operands
        where: dict[str, Any] = {"region": str(node.meta["region"])}
        if (
            values.meta["val"].dtype is not torch.int8
            or scale.meta["val"].shape[-1] != weight_scale.meta["val"].shape[-1]
        ):
            self._why["the groups of their weight and their input differ"] += 1
            return
        last, thin, up = node, None, None
        if (branch := _branch(node)) is not None:
            last, thin, up = branch
        dtype = node.meta["val"].dtype
        last, *after = self._after(last) if around else (last, "none", None, None)
        new = self.e.op(int4_linear, *operands, bias, thin, up, dtype, *after, at=last, **where)
        self._put(last, new)

    def _put(self, old: fx.Node, new: fx.Node) -> None:
        if TensorType.of(old.meta["val"]) != TensorType.of(new.meta["val"]):
            self.e.graph.erase_node(new)
            self._why["the layout of their result is not the one of the operator"] += 1
            return
        self.e.replace(old, new)
        self.count += 1

    def _after(self, node: fx.Node) -> tuple[fx.Node, str, fx.Node | None, fx.Node | None]:
        """What follows ``node`` alone: the last operator of it, the activation, the gate and the residual."""
        activation, gate, residual = "none", None, None
        user = _only_user(node)
        if user is not None and (found := _activation(user)):
            node, activation = user, found
            user = _only_user(node)
        if user is not None and (other := _other(user, node, aten.mul.Tensor)) is not None:
            node, gate = user, other
            user = _only_user(node)
        if user is not None and (other := _other(user, node, aten.add.Tensor)) is not None:
            node, residual = user, other
        return node, activation, gate, residual

    # -- norms ---------------------------------------------------------------------------------------------------------

    def _norm(self, node: fx.Node) -> None:
        """``node``, which quantizes, with the norm and modulation that it alone reads."""
        args: Any = node.args
        if len(args) > 2 and any(args[2:]):
            return
        value, scale, shift = args[0], None, None
        if _only_user(value) is None:
            return
        if value.target is aten.addcmul.default and not value.kwargs:
            shift, *factors = value.args
            normed = [f for f in factors if f.target is aten.layer_norm.default]
            if len(normed) != 1:
                return
            value, scale = normed[0], next(f for f in factors if f is not normed[0])
        else:
            if value.target is aten.add.Tensor and not value.kwargs:
                value, shift = _parts(value, (aten.mul.Tensor, aten.layer_norm.default))
            if value is not None and value.target is aten.mul.Tensor:
                value, scale = _parts(value, (aten.layer_norm.default,))
        if value is None or value.target is not aten.layer_norm.default:
            return
        x, dims, *more = value.args
        width = int(x.meta["val"].shape[-1])
        extras = [n for n in (scale, shift) if n is not None]
        if list(dims) != [width] or (_only_user(value) is None and extras):
            return
        shape = x.meta["val"].shape
        if any(torch.broadcast_shapes(n.meta["val"].shape, shape) != shape for n in extras):
            return
        if any(n.meta["val"].dtype is not x.meta["val"].dtype for n in extras):
            return
        given = [*more, *(None, None, 1e-5)[len(more) :]][:3]
        made = self.e.op(norm_quantize, x, args[1], *given, scale, shift, at=node, region=str(node.meta["region"]))
        self.e.replace(node, made)
        self.count += 1


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _branch(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The sum of ``node`` and a product with a thin weight, where that is all that reads both; what the thin weight is
    multiplied with, and the weight."""
    user = _only_user(node)
    other = _other(user, node, aten.add.Tensor) if user is not None else None
    if user is None or other is None or other.target is not aten.linear.default or _only_user(other) is not user:
        return None
    args: Any = other.args
    same = args[0].meta["val"].ndim == node.meta["val"].ndim
    return (user, args[0], args[1]) if len(args) == 2 and same and args[0].target is aten.linear.default else None


def _activation(node: fx.Node) -> str:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    target: Any = node.target
    return {aten.silu.default: "silu", aten.relu.default: "relu"}.get(target, "")


def _other(user: fx.Node, node: fx.Node, target: Any) -> fx.Node | None:
    """The other operand of ``user``, a sum or product of two tensors of which ``node`` has the shape of the result."""
    args: Any = user.args
    if user.target is not target or user.kwargs or len(args) != 2 or not all(isinstance(a, fx.Node) for a in args):
        return None
    other: fx.Node = args[1] if args[0] is node else args[0]
    same = TensorType.of(user.meta["val"]) == TensorType.of(node.meta["val"])
    return other if same and other is not node and other.meta["val"].dtype is node.meta["val"].dtype else None


def _parts(node: fx.Node, targets: tuple[Any, ...]) -> tuple[Any, Any]:
    """The operand of ``node`` that one of ``targets`` made and that nothing else reads, and the other one."""
    args: Any = node.args
    for mine, other in (args, args[::-1]):
        both = isinstance(mine, fx.Node) and isinstance(other, fx.Node)
        if both and mine.target in targets and _only_user(mine) is not None:
            return mine, other
    return None, None
