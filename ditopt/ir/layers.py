"""Linear layers in every spelling: an input times a weight of two dimensions, plus a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ditopt.ir.binding import Binding
from ditopt.ir.dims import equation

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """``node`` is ``x @ weight^T + bias``, x (*B, K). ``weight`` is (N, K), or (K, N) where it is ``turned``."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    turned: bool = False

    @property
    def width(self) -> int:
        """K, the number of inputs."""
        return int(self.x.meta["val"].shape[-1])


def layer(node: fx.Node) -> Layer | None:
    """``node`` as a linear layer; None for other operators, and where both sides have more than two dimensions."""
    args: Any = node.args
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
        found = Layer(node, args[0], args[1], bias)  # type: ignore[arg-type]
    elif node.target is aten.addmm.default and not node.kwargs and args[0].meta["val"].ndim == 1:
        found = Layer(node, args[1], args[2], args[0], True)
    elif node.target in (aten.mm.default, aten.matmul.default):
        found = Layer(node, args[0], args[1], None, True)
    elif node.target is aten.einsum.default:
        return _einsum(node, args)
    else:
        return None
    fits = found.weight.meta["val"].ndim == 2 and found.x.meta["val"].ndim >= 2
    return found if fits else None


def latent_layer(node: fx.Node, binding: Mapping[fx.Node, Binding]) -> Layer | None:
    """``node`` as a linear layer of a weight that no input changes, whose input sees the latent."""
    found = layer(node)
    if found is None or binding[found.weight] != Binding.CONSTANT or not binding[found.x] & Binding.LATENT:
        return None
    return found


def _einsum(node: fx.Node, args: Any) -> Layer | None:
    terms, result = equation(node)
    if len(terms) != 2 or any("." in t or len(set(t)) < len(t) for t in (*terms, result)):
        return None
    left, right = terms
    if len(right) != 2 or not result or left[:-1] != result[:-1] or {*right} != {left[-1], result[-1]}:
        return None
    return Layer(node, args[1][0], args[1][1], None, right[0] == left[-1])
