"""Keys that no step changes: those of a text or a condition whose tokens never see the latent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from ditopt.ir.binding import Binding, data_operands
from ditopt.ir.cost import is_attention, is_matmul
from ditopt.ir.program import Function
from ditopt.ir.sites import key_operands

aten = torch.ops.aten


def free_keys(function: Function, binding: Mapping[fx.Node, Binding]) -> tuple[int, int]:
    """How many attentions of a flat function see the latent, in their queries at least, and how many of these read keys
    that depend on the prompt alone: all of their keys, or some of them beside the latent's."""
    seen = free = 0
    for query, key in key_operands(function, binding):
        if binding[query] & Binding.LATENT:
            seen += 1
            free += _free(key, binding)
    return seen, free


def _free(key: fx.Node, binding: Mapping[fx.Node, Binding]) -> bool:
    """Whether ``key``, or a part that it is joined from, was projected from nothing that changes within a request."""
    todo, looked = [(key, False)], set[fx.Node]()
    while todo:
        node, joined = todo.pop()
        if not binding[node] & (Binding.LATENT | Binding.TIMESTEP):
            if (joined or node is key) and binding[node] & Binding.PROMPT and _projected(node):
                return True
        elif node not in looked and not is_matmul(node) and not is_attention(node):
            looked.add(node)
            join = node.target is aten.cat.default
            todo += [(a, join) for a in data_operands(node)]
    return False


def _projected(node: fx.Node) -> bool:
    """Whether a product of matrices is on the way to ``node``."""
    todo, looked = [node], {node}
    while todo:
        n = todo.pop()
        if is_matmul(n):
            return True
        fresh = [a for a in data_operands(n) if a not in looked]
        looked.update(fresh)
        todo += fresh
    return False
