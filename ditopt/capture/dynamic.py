"""One graph for many shapes: exported once with sizes as symbols, and specialised by putting numbers in their place.

A ``Template`` holds the exported graph; ``Template.at`` gives the graph of one signature, in which every size is a
number and nothing computes sizes any more, as if it had been exported for that signature alone. Symbols never leave
this file. Where the model's code looks at a size (``if height == self.size: ...``), torch.export takes the branch of
the example and records a guard: a signature that breaks it is refused here, with the guard in words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from ditopt._torch import FakeTensorMode, fixed_size, flex_attention, guards_of
from ditopt.capture.functional import Functional, append
from ditopt.capture.graph import Untraceable, formals, line_of
from ditopt.capture.spec import CallSpec

Axes = Mapping[int, tuple[int, ...]]
"""Index of a tensor of a call -> its axes whose sizes are symbols."""


class Mismatch(Exception):
    """A signature that a graph with dynamic sizes does not serve; the message says why, in words for the user."""


def all_axes(spec: CallSpec, weights: Collection[str] = ()) -> Axes:
    """Every axis of every tensor that is no weight."""
    return {
        i: tuple(range(len(size)))
        for i, (name, size) in enumerate(zip(spec.names, spec.sizes, strict=True))
        if size and name not in weights
    }


def for_export(spec: CallSpec, axes: Axes) -> Any:
    """The ``dynamic_shapes`` of torch.export for ``Flat``: torch finds out how sizes hang together."""
    auto = torch.export.Dim.AUTO
    return (tuple(dict.fromkeys(axes[i], auto) if i in axes else None for i in range(len(spec.names))),)


@dataclass(frozen=True)
class Template:
    """A functional graph with symbols for sizes. It holds no weights: these are looked up in the model by name.

    ``constants``: the tensors that tracing made; ``guards``: Python over ``L['tensors'][i].size()[d]``.
    """

    names: tuple[str, ...]
    graph: fx.Graph
    graph_signature: Any
    constants: Mapping[str, Tensor]
    guards: tuple[str, ...]
    axes: Axes

    @staticmethod
    def of(model: nn.Module, exported: Any, spec: CallSpec, axes: Axes) -> Template:
        """The Template of ``exported`` (functionalised). Untraceable where its graph cannot be specialised."""
        if any(n.op == "get_attr" or n.target is flex_attention for n in exported.graph.nodes):
            raise Untraceable("higher-order operators (flex_attention) are written out for one shape at a time")
        tables = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        live = {n for table in tables for n, _ in table}
        held = [
            str(i.target)
            for i in exported.graph_signature.input_specs
            if i.kind is not InputKind.USER_INPUT and str(i.target).removeprefix("model.") not in live
        ]
        constants = {n: exported.constants[n] if n in exported.constants else exported.state_dict[n] for n in held}
        graph = fx.Graph()
        graph.output(graph.graph_copy(exported.graph, {}))
        return Template(spec.names, graph, exported.graph_signature, constants, guards_of(exported), axes)

    def at(
        self, model: nn.Module, spec: CallSpec, tensors: Sequence[Tensor], weights: Collection[str] = ()
    ) -> Functional:
        """The graph for the signature of ``spec``. Mismatch where it would not be the model's."""
        static = Functional(fx.Graph(), self.graph_signature, self.constants, {})
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        given, params = formals(model, self, spec, tensors, weights)
        by_name = dict(zip(spec.names, tensors, strict=True))
        mode = FakeTensorMode()
        values: dict[fx.Node, Any] = {}
        what = dict(given)
        for node in placeholders:
            tensor = params[what[node].ref] if what[node].kind == "param" else by_name[what[node].ref]
            _agree(node, what[node].ref, tensor)
            new = static.graph.placeholder(node.name)
            new.meta = {**node.meta, "val": mode.from_tensor(tensor)}
            values[node] = new
        for guard in self.guards:
            if not _holds(guard, self._sizes(spec, 1)) and not _holds(guard, self._sizes(spec, 2)):
                raise Mismatch(
                    f"the model's code takes another way for this shape: {in_words(guard, self.names)} held where the "
                    "graph was made"
                )
        with mode, torch.no_grad():
            for node in self.graph.nodes:
                if node.op == "call_function":
                    _specialise(node, static.graph, values)
        (results,) = self.graph.output_node().args
        static.graph.output(fx.map_arg(results, values.__getitem__))
        return static

    @property
    def state_dict(self) -> Mapping[str, Tensor]:
        """As an ExportedProgram has it."""
        return {}

    def _sizes(self, spec: CallSpec, least: int) -> list[_Sized]:
        """The sizes of a call, dynamic ones at ``least`` so large. A symbol stands for two or more in torch.export, and
        what it assumes of memory layouts is often untrue of one: there the check against the model decides."""
        return [
            _Sized(tuple(max(least, s) if d in self.axes.get(i, ()) else s for d, s in enumerate(size)))
            for i, size in enumerate(spec.sizes)
        ]

    def words(self) -> str:
        """Which sizes are dynamic, and which were meant to be and are fixed by the model's code."""
        open_: list[str] = []
        fixed: list[str] = []
        places = {n.name: n for n in self.graph.find_nodes(op="placeholder")}
        user = [s for s in self.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        for i, item in enumerate(user):
            shape = places[item.arg.name].meta["val"].shape
            free = [d for d in self.axes.get(i, ()) if fixed_size(shape[d]) is None]
            if free:
                open_.append(f"{self.names[i]} {_axes_text(free)}")
            fixed += [f"{self.names[i]}.shape[{d}] = {shape[d]}" for d in self.axes.get(i, ()) if d not in free]
        said = "; ".join(open_) or "none"
        return f"{said} (fixed by the model's code: {', '.join(fixed)})" if fixed else said


def in_words(guard: str, names: Sequence[str]) -> str:
    """A guard with the names of the model's arguments."""
    return re.sub(r"L\['tensors'\]\[(\d+)\]\.size\(\)", lambda m: f"{names[int(m[1])]}.shape", guard)


@dataclass(frozen=True)
class _Sized:
    """What a guard asks of a tensor."""

    shape: tuple[int, ...]

    def size(self) -> tuple[int, ...]:
        return self.shape


def _holds(guard: str, tensors: Sequence[_Sized]) -> bool:
    """Whether a guard, which torch.export wrote in this process, holds for tensors of these sizes."""
    return bool(eval(guard, {"L": {"tensors": tensors}, "torch": torch, "math": math}))


def _agree(node: fx.Node, name: str, tensor: Tensor) -> None:
    """Mismatch where a size that the graph has as a number is another one."""
    for d, (size, now) in enumerate(zip(node.meta["val"].shape, tensor.shape, strict=True)):
        if fixed_size(size) not in (None, now):
            raise Mismatch(f"{name}.shape[{d}] is {now}, and {size} is fixed in the graph")


def _specialise(node: fx.Node, graph: fx.Graph, values: dict[fx.Node, Any]) -> None:
    try:
        append(node, graph, values)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise Mismatch(f"the graph does not fit this shape{line_of(node)}: {said}") from error


def _axes_text(axes: Sequence[int]) -> str:
    return f"{'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))}"
