"""Memo functions over weights that are kept elsewhere: a weight comes in for as long as it is used, once for all rows.

A table of hoisted values has a row for each timestep. Filling it row by row would bring the weights in once a step, and
all of them at once; here all rows go through the graph together, operator by operator. Each operator runs once a row on
the step's own batch, so the values are those that a step would have computed, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ditopt.artifact import StepGraph
from ditopt.codegen.lower import Lowered
from ditopt.ir.edit import inline


class Shelf(Protocol):
    """Where weights are kept while nobody uses them."""

    def take(self, name: str, weight: Tensor, device: torch.device) -> Tensor:
        """``weight`` on ``device``, for use now."""

    def drop(self, name: str) -> None:
        """The weight taken last under this name is not used any more."""


class Streamed:
    """An Executable of one memo function, and ``table`` for several rows of it."""

    def __init__(self, step: Lowered, shelf: Shelf) -> None:
        self.graph: StepGraph = step.graph
        self._shelf = shelf
        graph = inline(step.program).graph
        self._nodes = [n for n in graph.nodes if n.op == "call_function"]
        self._inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self._output = next(n for n in graph.nodes if n.op == "output")
        self._last: dict[fx.Node, list[fx.Node]] = {}
        kept = set(self._output.all_input_nodes)
        last: dict[fx.Node, fx.Node] = {}
        for node in self._nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        for used, user in last.items():
            if used not in kept:
                self._last.setdefault(user, []).append(used)

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.table([inputs])[0]

    def table(self, rows: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The results for each of ``rows`` (inputs in the graph's order; weights are those of the first row)."""
        names = {n: f.ref for n, f in zip(self._inputs, self.graph.inputs, strict=True) if f.kind == "param"}
        device = next(
            (t.device for n, t in zip(self._inputs, rows[0], strict=True) if n not in names), torch.device("cpu")
        )
        away = dict(zip(self._inputs, rows[0], strict=True))
        taken: dict[fx.Node, Tensor] = {}
        values: list[dict[fx.Node, Any]] = [
            {n: t for n, t in zip(self._inputs, row, strict=True) if n not in names} for row in rows
        ]

        def value(row: dict[fx.Node, Any], node: fx.Node) -> Any:
            if node not in names:
                return row[node]
            if node not in taken:
                taken[node] = self._shelf.take(names[node], away[node], device)
            return taken[node]

        for node in self._nodes:
            for row in values:
                args, kwargs = fx.map_arg((node.args, node.kwargs), partial(value, row))
                row[node] = node.target(*args, **kwargs)
            for used in self._last.get(node, ()):
                if used in taken:
                    del taken[used]
                    self._shelf.drop(names[used])
                for row in values:
                    row.pop(used, None)
        return [list(fx.map_arg(self._output.args[0], partial(value, row))) for row in values]
