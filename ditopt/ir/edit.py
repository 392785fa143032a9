"""The only way to change a Function: an Editor works on a copy and commits whole.

    with Editor(program.step, origin="my_pass") as e:
        new = e.op(aten.mul.Tensor, e[x], e[y], at=e[node])
        e.replace(e[node], new)
    changed = e.function()

Every node that an Editor makes carries its type (by running the operator on fake tensors), its region and the name of
the pass that made it. Nothing is retraced, so no node loses its metadata.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import fx

from ditopt._torch import fake_mode_of, invoke_subgraph
from ditopt.ir.program import Formal, Function, Memo, Program, TensorType, call_args, callee, formal, is_call

__all__ = ["Editor", "drop_dead", "fake_of", "inline", "moved", "prune"]


class Editor:
    """An editable copy of ``function``; ``self[node]`` is the copy of an original node."""

    def __init__(self, function: Function, origin: str) -> None:
        self._name = function.name
        self._state_out = function.state_out
        self._origin = origin
        self.graph = fx.Graph()
        self._map: dict[fx.Node, fx.Node] = {}
        results = self.graph.graph_copy(function.graph, self._map)
        self._output = self.graph.output(results)
        self.mode = fake_mode_of([n.meta["val"] for n in self.graph.nodes if n.op == "placeholder"])

    def __enter__(self) -> Editor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __getitem__(self, node: fx.Node) -> fx.Node:
        return self._map[node]

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The current output nodes: results, then the new state."""
        return tuple(self._output.args[0])

    def set_results(self, results: Iterable[fx.Node], state_out: Sequence[str] | None = None) -> None:
        """New output nodes; ``state_out`` names the slots that the last of them are for."""
        self._output.args = (tuple(results),)
        if state_out is not None:
            self._state_out = tuple(state_out)

    def placeholder(self, name: str, what: Formal, value: Any) -> fx.Node:
        """A new formal after the existing ones."""
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_after(placeholders[-1]) if placeholders else self.graph.inserting_before(first):
            node = self.graph.placeholder(name)
        node.meta = {"val": value, "formal": what, "region": "", "origin": self._origin}
        return node

    def op(
        self,
        target: Any,
        *args: Any,
        at: fx.Node | None = None,
        after: fx.Node | None = None,
        region: str = "",
        **kwargs: Any,
    ) -> fx.Node:
        """A new operator node before ``at``, after ``after``, or at the end."""
        where = (
            self.graph.inserting_after(after) if after is not None else self.graph.inserting_before(at or self._output)
        )
        with where:
            node = self.graph.call_function(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*values, **named)
        node.meta.update(region=region, origin=self._origin)
        return node

    def call(
        self, name: str, args: Sequence[fx.Node], values: Sequence[Any], at: fx.Node, region: str
    ) -> list[fx.Node]:
        """A call of the shared body ``name`` before ``at``; its results as nodes of the given types."""
        with self.graph.inserting_before(at):
            body = self.graph.get_attr(name)
            body.meta.update(val=None, region=region, origin=self._origin)
            node = self.graph.call_function(invoke_subgraph, (body, name, *args))
            node.meta.update(val=tuple(values), region=region, origin=self._origin)
            outs = []
            for i, value in enumerate(values):
                out = self.graph.call_function(operator.getitem, (node, i))
                out.meta.update(val=value, region=region, origin=self._origin)
                outs.append(out)
        return outs

    def replace(self, old: fx.Node, new: fx.Node, keep: Iterable[fx.Node] = ()) -> None:
        """Uses of ``old`` read ``new`` instead, except in ``new`` itself and in ``keep``."""
        spared = {new, *keep}
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in spared)

    def drop_dead(self, formals: bool = True) -> int:
        """Remove nodes whose value nobody reads; placeholders too, where ``formals``. Returns how many."""
        gone = 0
        for node in reversed(list(self.graph.nodes)):
            if node.op == "output" or node.users or (node.op == "placeholder" and not formals):
                continue
            self.graph.erase_node(node)
            gone += 1
        return gone

    def function(self, name: str | None = None) -> Function:
        """The edited Function; the Editor must not be used after."""
        self.graph.lint()
        return Function(name or self._name, self.graph, self._state_out)


def moved(e: Editor, target: Any, node: fx.Node, *args: Any, at: fx.Node | None = None, **named: Any) -> fx.Node:
    """A slice, reshape, expand or conversion of ``node``, or ``node`` itself where that changes nothing."""
    new = e.op(target, node, *args, at=at, **named)
    if TensorType.of(new.meta["val"]) != TensorType.of(node.meta["val"]):
        return new
    e.graph.erase_node(new)
    return node


def fake_of(type: TensorType, like: Sequence[Any], device: torch.device | str = "cpu") -> Any:
    """A fake tensor of ``type`` in the fake mode that ``like`` belongs to."""
    with fake_mode_of(like):
        if type.stride is not None:
            return torch.empty_strided(type.shape, type.stride, dtype=type.dtype, device=device)
        return torch.empty(type.shape, dtype=type.dtype, device=device)


def drop_dead(function: Function, origin: str, formals: bool = True) -> Function:
    """``function`` without nodes (and, where ``formals``, placeholders) that nobody reads."""
    with Editor(function, origin) as e:
        e.drop_dead(formals)
    return e.function()


def prune(program: Program) -> Program:
    """``program`` without functions, params, memo values, state and decisions that nothing refers to any more.

    Inputs stay: they are the signature of the model.
    """
    used = {program.entry} | {callee(n) for n in program.calls()}
    read = {formal(p).ref for p in program.step.placeholders if formal(p).kind == "memo"}
    memos, known = [], dict(program.functions)
    for memo in reversed(program.memos):
        if read & set(memo.values):
            memo, known[memo.function] = _wanted(memo, known[memo.function], read)
            memos.append(memo)
            used.add(memo.function)
            used |= {callee(n) for n in known[memo.function].graph.nodes if is_call(n)}
            read |= {formal(p).ref for p in known[memo.function].placeholders if formal(p).kind == "memo"}
    functions = {k: f for k, f in known.items() if k in used}
    params = {formal(p).ref for f in functions.values() for p in f.placeholders if formal(p).kind == "param"}
    return program.replace(
        functions=functions,
        params={k: v for k, v in program.params.items() if k in params},
        memos=tuple(reversed(memos)),
    )


def _wanted(memo: Memo, function: Function, read: Collection[str]) -> tuple[Memo, Function]:
    """``memo`` and its function with those of its values that are among ``read``."""
    keep = [i for i, v in enumerate(memo.values) if v in read]
    if len(keep) == len(memo.values):
        return memo, function
    with Editor(function, "prune") as e:
        e.set_results([e.results[i] for i in keep])
        e.drop_dead()
    return dataclasses.replace(memo, values=tuple(memo.values[i] for i in keep)), e.function()


def inline(program: Program, function: str | None = None) -> Function:
    """A function with every call replaced by the ops of its body: one flat graph."""
    source = program.functions[function or program.entry]
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in source.graph.nodes:
        if node.op == "get_attr":
            continue
        if is_call(node):
            body = program.functions[callee(node)]
            local: dict[fx.Node, Any] = dict(zip(body.placeholders, [values[a] for a in call_args(node)], strict=True))
            _inline_body(graph, body, local, str(node.meta.get("region", "")))
            values[node] = tuple(local[r] for r in body.results)
        elif node.op == "call_function" and node.target is operator.getitem and isinstance(values[node.args[0]], tuple):
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op == "output":
            graph.output(tuple(values[r] for r in source.results))
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    return Function(source.name, graph, source.state_out)


def _inline_body(graph: fx.Graph, body: Function, local: dict[fx.Node, Any], region: str) -> None:
    for inner in body.graph.nodes:
        if inner.op in ("placeholder", "output"):
            continue
        copy = graph.node_copy(inner, local.__getitem__)
        relative = str(inner.meta.get("region", ""))
        copy.meta["region"] = region + relative if relative.startswith(".") else region
        local[inner] = copy


def replace_functions(program: Program, changed: Mapping[str, Function]) -> Program:
    """``program`` with some functions exchanged."""
    return program.replace(functions={**program.functions, **changed})
