"""A run of blocks in the entry: what lies inside it, and which value from before it each of its results continues."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import fx

from ditopt.ir.binding import Binding
from ditopt.ir.cost import is_convolution, is_matmul
from ditopt.ir.edit import Editor
from ditopt.ir.modules import rejoined, saturates, stream_origins
from ditopt.ir.program import Program, TensorType, call_args, callee, is_call
from ditopt.ir.residual import LAYOUTS
from ditopt.ops import select

aten = torch.ops.aten


class Span:
    """The blocks ``ids`` of ``program``. ``inside``: their calls, the results of these, what lies between two of them
    on a path, and clips of their results to the range of the dtype, in order."""

    def __init__(self, program: Program, binding: Mapping[fx.Node, Binding], ids: Set[str]) -> None:
        self._program, self._binding = program, binding
        nodes = [n for n in program.step.graph.nodes if n.op == "call_function"]
        self.calls = [n for n in nodes if is_call(n) and n.meta["region"] in ids]
        after: set[fx.Node] = set()
        for n in nodes:
            if n in self.calls or any(a in after for a in n.all_input_nodes):
                after.add(n)
        before: set[fx.Node] = set()
        for n in reversed(nodes):
            if n in self.calls or any(u in before for u in n.users):
                before.add(n)
        self._inside: set[fx.Node] = set()
        for n in nodes:
            ends = bool(n.args) and (n.args[0] in self.calls or (saturates(n) and n.args[0] in self._inside))
            if n in self.calls or (n in after and n in before) or ends:
                self._inside.add(n)
        self.inside = [n for n in nodes if n in self._inside]

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._inside

    def results(self) -> list[fx.Node]:
        """The values that depend on the latent and that something after the run reads."""
        return [
            n
            for n in self.inside
            if isinstance(n.meta["val"], torch.Tensor)
            and self._binding[n] & Binding.LATENT
            and any(u not in self for u in n.users)
        ]

    def entry(self, value: fx.Node, e: Editor) -> fx.Node | None:
        """The (editable) value from before the run that the difference to ``value`` is taken from: what it continues,
        else what the first block reads that has its type; None where there is none."""
        base = self.origin(value, e)
        want = TensorType.of(value.meta["val"])
        if base is not None and TensorType.of(base.meta["val"]).shape == want.shape:
            return base
        for arg in call_args(self.calls[0]):
            if self._binding[arg] & Binding.LATENT and (arg.meta["val"].dtype, tuple(arg.meta["val"].shape)) == (
                want.dtype,
                want.shape,
            ):
                return e[arg]
        return None

    def origin(self, value: fx.Node, e: Editor) -> fx.Node | None:
        """The value outside the run that ``value`` continues along residual adds, splits and joins of streams, and
        other layouts of them."""
        if value not in self:
            return e[value]
        if self._moves(value):
            return self._moved(value, e)
        if value.target in (select, aten.clone.default):  # what an earlier decision may predict
            return self.origin(value.args[0], e)  # type: ignore[arg-type]
        whole = rejoined(value)
        if whole is not None:
            return self.origin(whole, e)
        source, *rest = value.args
        if saturates(value):
            return self.origin(source, e)  # type: ignore[arg-type]
        if isinstance(source, fx.Node) and is_call(source):
            body = self._program.functions[callee(source)]
            origin = stream_origins(body, self._binding)[rest[0]]  # type: ignore[index]
            return None if origin is None else self.origin(call_args(source)[origin], e)
        if value.target not in (aten.cat.default, aten.slice.Tensor):
            return None
        found = [self.origin(n, e) for n in value.all_input_nodes]
        known = {n: o for n, o in zip(value.all_input_nodes, found, strict=True) if o is not None}
        if len(known) < len(found):
            return None
        return e.op(value.target, *fx.map_arg(value.args, known.__getitem__), at=e[value])

    def given(self, node: fx.Node) -> fx.Node:
        """What the run gave, where ``node`` is that in another layout or with positions added; else ``node``."""
        found = node
        while found not in self:
            if not self._moves(found):
                return node
            (found,) = self._streams(found)
        return found

    def _streams(self, node: fx.Node) -> list[fx.Node]:
        return [a for a in node.all_input_nodes if self._binding[a] & Binding.LATENT]

    def _moves(self, node: fx.Node) -> bool:
        """Whether a node changes the layout of one stream, or adds to it what never sees the latent (positions)."""
        streams = self._streams(node) if node.op == "call_function" else []
        if len(streams) != 1:
            return False
        if node.target is aten.add.Tensor:
            return bool(streams[0].meta["val"].shape == node.meta["val"].shape)
        return node.target in LAYOUTS or (node.target is aten.clone.default and streams[0].target in LAYOUTS)

    def _moved(self, value: fx.Node, e: Editor) -> fx.Node | None:
        """The origin of the stream that ``value`` moves, moved in the same way."""
        (stream,) = self._streams(value)
        base = self.origin(stream, e)
        if base is None or base.meta["val"].shape != stream.meta["val"].shape:
            return None
        args, kwargs = fx.map_arg((value.args, value.kwargs), lambda n: base if n is stream else e[n])
        named: Any = kwargs
        return e.op(value.target, *args, at=e[value], **named)


def latent_like(program: Program, binding: Mapping[fx.Node, Binding], value: fx.Node) -> fx.Node | None:
    """The latent input that has the shape of ``value``."""
    for p in program.step.placeholders:
        if (
            p.meta["formal"].kind == "input"
            and binding[p] & Binding.LATENT
            and TensorType.of(p.meta["val"]).shape == TensorType.of(value.meta["val"]).shape
        ):
            return p
    return None


def modulated_input(program: Program, e: Editor, call: fx.Node, binding: Mapping[fx.Node, Binding]) -> fx.Node | None:
    """The normed and modulated latent that the first layer of a block reads, computed again in the entry; of layers
    only those of the timestep and the prompt, where they were not hoisted.

    ``call``: the block's call in ``program``'s entry, of which ``e`` edits a copy.
    """
    body = program.functions[callee(call)]
    held = dict(zip(body.placeholders, call_args(call), strict=True))
    latent = {p for p, arg in held.items() if binding[arg] & Binding.LATENT}
    found: fx.Node | None = None
    for node in body.graph.nodes:
        if node.op != "call_function" or not any(a in latent for a in node.all_input_nodes):
            continue
        if is_matmul(node) or is_convolution(node):
            found = next(a for a in node.all_input_nodes if a in latent)
            break
        latent.add(node)
    if found is None or found in held:
        return None
    made: dict[fx.Node, fx.Node] = {p: e[arg] for p, arg in held.items()}
    return _again(found, made, e, e[call])


def _again(node: fx.Node, made: dict[fx.Node, fx.Node], e: Editor, at: fx.Node) -> fx.Node:
    """``node`` of a body and what it is computed from, as nodes of the entry before ``at``."""
    if node not in made:
        for a in node.all_input_nodes:
            _again(a, made, e, at)
        args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
        named: Any = kwargs
        made[node] = e.op(node.target, *args, at=at, **named)
    return made[node]
