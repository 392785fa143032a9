"""Which operators mix tokens: attention in all its spellings, and no routing to experts.

All products of a network are with weights, except two kinds. Attention multiplies activations so that a token reads
others: its rows are queries and its columns keys, or it sums over tokens. A mixture of experts multiplies activations
too (the weights of the chosen experts with what they computed), and mixes no tokens: either every token is a batch of
its own, or one factor is a choice, ones and zeros made from the largest of some scores, that only says where a token is
put.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from ditopt.ir.binding import Binding, data_operands
from ditopt.ir.cost import is_attention, is_matmul
from ditopt.ir.dims import Dim, Known, equation, factors, through
from ditopt.ir.reach import Reach, places

aten = torch.ops.aten

VARIES = Binding.LATENT | Binding.PROMPT
"""What a stream depends on: the latent, or the prompt (text before it first meets the latent)."""


def mixes(node: fx.Node, binding: Mapping[fx.Node, Binding]) -> bool:
    """Whether ``node`` multiplies activations with each other: attention, or one of the products it is written as, or
    the products of routing."""
    if is_attention(node):
        return True
    return is_matmul(node) and len(_activations(node, binding)) > 1


def among_tokens(stream: fx.Node, inside: int, mixing: int, binding: Mapping[fx.Node, Binding], reach: Reach) -> int:
    """Those of ``mixing``, products of activations among the operators ``inside`` a branch, that are no routing.

    ``stream``: what the branch reads. Where the axes of an operand are not known the product counts as attention.
    """
    plain = [i for i in places(mixing) if not is_attention(reach.nodes[i])]
    if not plain:
        return mixing
    chosen = 0
    for i in places(inside):
        if _is_choice(reach.nodes[i], binding):
            chosen |= reach.below[i]
    known: Known | None = None
    for i in plain:
        node = reach.nodes[i]
        routed = any(chosen >> reach.place[a] & 1 for a in _activations(node, binding))
        if not routed:
            known = _follow(stream, inside, reach) if known is None else known
            routed = _by_token(node, stream, inside, known, binding, reach)
        if routed:
            mixing &= ~(1 << i)
    return mixing


def _activations(node: fx.Node, binding: Mapping[fx.Node, Binding]) -> list[fx.Node]:
    return [a for a in data_operands(node) if binding[a] & VARIES]


def _is_choice(node: fx.Node, binding: Mapping[fx.Node, Binding]) -> bool:
    """Whether the latent decides ``node`` and it is no number of real size: an index or a yes and no."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or not binding[node] & Binding.LATENT:
        return False
    return not (value.is_floating_point() or value.is_complex())


def _follow(stream: fx.Node, inside: int, reach: Reach) -> Known:
    """Where the axes of ``stream`` are in the values of its branch."""
    shape = [int(n) for n in stream.meta["val"].shape]
    known: Known = {stream: tuple(Dim.of(n, i) for i, n in enumerate(shape))}
    for i in places(inside):
        if dims := through(reach.nodes[i], known):
            known[reach.nodes[i]] = dims
    return known


def _by_token(
    node: fx.Node, stream: fx.Node, inside: int, known: Known, binding: Mapping[fx.Node, Binding], reach: Reach
) -> bool:
    """Whether each token is a batch of its own in this product: all axes of the stream but its channels, those that
    layers sum over, are batches of every activation."""
    channels = frozenset[int]()
    for i in places(inside):
        layer = reach.nodes[i]
        if layer.target is aten.linear.default and known.get(layer.args[0]):
            channels |= known[layer.args[0]][-1].axes
    tokens = frozenset(range(stream.meta["val"].ndim)) - channels
    if not channels or not tokens:
        return False
    return all(tokens <= axes for axes in (_batches(node, a, known) for a in _activations(node, binding)))


def _batches(node: fx.Node, operand: fx.Node, known: Known) -> frozenset[int]:
    """The axes of the source that are batches of this product in its ``operand``, and nothing else there: of an axis
    that is cut into windows the windows are batches, and what lies in one is no batch."""
    dims: Any = known.get(operand)
    if not dims:
        return frozenset()
    if node.target is aten.einsum.default:
        terms, result = equation(node)
        if any("." in t for t in (*terms, result)):
            return frozenset()
        term = next(t for t, a in zip(terms, node.args[1], strict=True) if a is operand)  # type: ignore[arg-type]
        active = [t for t, a in zip(terms, node.args[1], strict=True) if known.get(a)]  # type: ignore[arg-type]
        shared = {c for c in term if c in result and all(c in t for t in active)}
        return _axes(d for d, c in zip(dims, term, strict=True) if c in shared) - _axes(
            d for d, c in zip(dims, term, strict=True) if c not in shared
        )
    if operand not in factors(node) or len(dims) < 3:
        return frozenset()
    return _axes(dims[:-2]) - _axes(dims[-2:])


def _axes(dims: Iterable[Dim]) -> frozenset[int]:
    return frozenset().union(*(d.axes for d in dims))
