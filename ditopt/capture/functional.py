"""From the graph that torch.export traces to functional operators on numbers, in one pass over fake tensors.

``ExportedProgram.run_decompositions({})`` does the same for any graph, and takes longer than the export: it traces the
graph twice. A graph that writes nothing in place needs only this: an operator that *may* return a view of its operand
(``reshape``, ``to``, ``chunk``) is replaced by what it does for operands of these very types, and everything else stays
whole. Sizes that are symbols become numbers on the way (see ``dynamic``).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ditopt._torch import HigherOrder, OpOverload, TorchDispatchMode, fake_mode_of, may_alias, pytree


@dataclass(frozen=True)
class Functional:
    """What a functional graph without symbols has of an ExportedProgram."""

    graph: fx.Graph
    graph_signature: Any
    constants: Mapping[str, Tensor]
    state_dict: Mapping[str, Tensor]


def is_functional(graph: fx.Graph) -> bool:
    """Whether nothing in a traced graph writes in place, and no operator has a graph of its own."""
    return all(
        not (node.target._schema.is_mutable if isinstance(node.target, OpOverload) else _has_graph(node))
        for node in graph.nodes
        if node.op not in ("placeholder", "output")
    )


def _has_graph(node: fx.Node) -> bool:
    return node.op == "get_attr" or isinstance(node.target, HigherOrder)


def functionalised(exported: Any) -> Functional:
    """``exported``, whose graph ``is_functional`` and has no symbols, in functional operators."""
    new = Functional(fx.Graph(), exported.graph_signature, exported.constants, exported.state_dict)
    values: dict[fx.Node, Any] = {}
    for node in exported.graph.find_nodes(op="placeholder"):
        values[node] = new.graph.placeholder(node.name)
        values[node].meta = dict(node.meta)
    with fake_mode_of([n.meta["val"] for n in values]), torch.no_grad():
        for node in exported.graph.nodes:
            if node.op == "call_function":
                append(node, new.graph, values)
    (results,) = exported.graph.output_node().args
    new.graph.output(fx.map_arg(results, values.__getitem__))
    return new


def append(node: fx.Node, graph: fx.Graph, values: dict[fx.Node, Any]) -> None:
    """Append what ``node`` of a traced graph computes to ``graph``. ``values``: nodes of the former -> a node of the
    latter, or a number, which leaves no node."""
    if str(node.target).startswith("aten._assert_tensor_metadata"):
        return
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    whole = isinstance(node.target, OpOverload)
    if not whole and args and isinstance(args[0], tuple):  # a part of what came apart below
        values[node] = node.target(*args)  # type: ignore[operator]
        return
    given, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    if whole and may_alias(node.target):  # type: ignore[arg-type]
        sources = [n for n in pytree.tree_leaves((args, kwargs)) if isinstance(n, fx.Node)]
        with _Inside(graph, node.meta, sources) as inside:
            value = node.target(*given, **named)  # type: ignore[operator]
        values[node] = inside.node(value) if isinstance(value, Tensor) else tuple(map(inside.node, value))
        return
    value = node.target(*given, **named)  # type: ignore[operator]
    if not isinstance(value, (Tensor, tuple, list)):
        values[node] = value
        return
    values[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    values[node].meta = {**node.meta, "val": value}


class _Inside(TorchDispatchMode):
    """Writes the operators of which another one consists into ``graph``; ``sources`` are its operands."""

    def __init__(self, graph: fx.Graph, meta: Mapping[str, Any], sources: Sequence[fx.Node]) -> None:
        super().__init__()
        self._graph, self._meta = graph, meta
        self._nodes: dict[int, fx.Node] = {}
        self._kept: list[Any] = []
        for source in sources:
            self._place(source.meta["val"], source)

    def node(self, value: Tensor) -> fx.Node:
        """What computes ``value``."""
        return self._nodes[id(value)]

    def _place(self, value: Any, node: fx.Node) -> None:
        self._kept.append(value)  # so that no other value gets its identity
        self._nodes[id(value)] = node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        out = func(*args, **named)
        given, kept = pytree.tree_map_only(Tensor, self.node, (tuple(args), named))
        node = self._graph.call_function(func, given, kept)
        node.meta = {**self._meta, "val": out}
        self._place(out, node)
        if isinstance(out, (tuple, list)):
            for i, part in enumerate(out):
                got = self._graph.call_function(operator.getitem, (node, i))
                got.meta = {**self._meta, "val": part}
                self._place(part, got)
        return out
