"""What must hold of a call's inputs for a graph to be valid, where values that Python read are constants in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.capture.graph import Untraceable
from ditopt.capture.replay import Read
from ditopt.ir.binding import Binding, bind
from ditopt.ir.edit import Editor, prune
from ditopt.ir.program import Formal, Function, Program, formal


@dataclass(frozen=True)
class Guard:
    """A graph that computes the values again, and what they were.

    ``formals`` say what its arguments are: inputs of the model, or weights (of ``params``).
    """

    graph: fx.GraphModule
    formals: tuple[Formal, ...]
    params: Mapping[str, Tensor]
    reads: tuple[Read, ...]

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes of the values, in the order of ``reads``."""
        return tuple(self.graph.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs of the model that the values depend on."""
        return tuple(f.ref for f in self.formals if f.kind == "input")

    def arguments(self, given: Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """What the graph reads. ``given``: inputs by name; ``params``: weights as they are now, else those captured."""
        weights = self.params if params is None else params
        return [given[f.ref] if f.kind == "input" else weights[f.ref] for f in self.formals]

    def broken(self, args: Sequence[Tensor]) -> str:
        """What is another for these ``arguments``, in words, or ""."""
        try:
            with torch.no_grad():
                _Comparison(self).run(*(a.contiguous() for a in args))  # a view in the graph may need it
        except _Differs as found:
            return str(found)
        return ""

    def beside(self, other: Guard) -> Guard:
        """This guard, and the values of another one after its own."""
        graph, values, formals = fx.Graph(), dict[fx.Node, fx.Node](), dict[Formal, fx.Node]()
        both = [n for g in (self, other) for n in g.graph.graph.nodes]
        for node in [n for n in both if n.op == "placeholder"]:
            what = formal(node)
            values[node] = formals[what] = formals.get(what) or graph.node_copy(node)
        for node in [n for n in both if n.op == "call_function"]:
            values[node] = graph.node_copy(node, values.__getitem__)
        graph.output(tuple(values[n] for n in (*self.results, *other.results)))
        module = fx.GraphModule(torch.nn.Module(), graph, "guard")
        return Guard(module, tuple(formals), {**self.params, **other.params}, (*self.reads, *other.reads))


class _Differs(Exception):
    """Stops a comparison; the message says what differs."""


class _Comparison(fx.Interpreter):
    """Runs the graph of a guard and compares each value as soon as it is there: what comes after it is computed with
    sizes that are constants of the graph, and may be impossible for another value."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(guard.graph)
        self._reads: dict[fx.Node, list[Read]] = {}
        for node, read in zip(guard.results, guard.reads, strict=True):
            self._reads.setdefault(node, []).append(read)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for read in self._reads.get(n, ()):
            if not torch.equal(value.to(read.value.device), read.value):
                raise _Differs(read.differs)
        return value


class Decided(Untraceable):
    """Python looks at values that change from step to step: those ``reads``."""

    def __init__(self, message: str, reads: Sequence[Read]) -> None:
        super().__init__(message)
        self.reads = tuple(reads)


_MOVES = Binding.LATENT | Binding.TIMESTEP


def split(name: str, program: Program, reads: Sequence[Read]) -> tuple[Program, Guard | None]:
    """``program`` without its last results, which are the tensors of ``reads``, and the Guard over those.

    No Guard where all of them are the same in every call. Decided, with the line of the model (a ``name``), where a
    value depends on what changes from step to step.
    """
    function = program.step
    n = len(function.results) - len(reads)
    binding = bind(program)
    kept = []
    moving = [(r, b) for r, node in zip(reads, function.results[n:], strict=True) if (b := binding[node] & _MOVES)]
    if moving:
        role = "latent" if moving[0][1] & Binding.LATENT else "timestep"
        raise Decided(
            f"{name} cannot be traced{moving[0][0].line}: Python looks at the value of a tensor there that depends on "
            f"the {role}, so each step would need a graph of its own. Compute it outside forward and pass it "
            "in, or use torch.where; where the role of an input is wrong, pass roles={'<name>': 'prompt'}.",
            [read for read, _ in moving],
        )
    for read, node in zip(reads, function.results[n:], strict=True):
        if any(_varies(p) for p in _sources(node)):
            kept.append((read, node))
    rest = program.replace(
        functions={**program.functions, program.entry: _only(function, function.results[:n])},
        outputs=program.outputs[:n],
    )
    if not kept:
        return prune(rest), None
    checks = _only(function, [node for _, node in kept])
    formals = tuple(formal(p) for p in checks.placeholders)
    params = {f.ref: program.params[f.ref] for f in formals if f.kind == "param"}
    graph = fx.GraphModule(torch.nn.Module(), checks.graph, "guard")
    return prune(rest), Guard(graph, formals, params, tuple(read for read, _ in kept))


def _only(function: Function, results: Sequence[fx.Node]) -> Function:
    with Editor(function, "capture") as e:
        e.set_results([e[r] for r in results])
        e.drop_dead()
    return e.function()


def _sources(node: fx.Node) -> set[fx.Node]:
    """The placeholders that a node is computed from."""
    seen, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - seen
        seen |= new
        waiting.extend(new)
    return {n for n in seen if n.op == "placeholder"}


def _varies(placeholder: fx.Node) -> bool:
    what = formal(placeholder)
    return what.kind == "input" or not what.ref.startswith("const.")
