"""The part of a step that runs before the host decides: it measures the signals, and nothing of it is computed twice.

A signal that is not left by an earlier step (``Rule.lag``) is measured by the step itself. ``split`` cuts the entry in
two: the *probe* is what the signals are computed from; the *rest* is everything else, and reads what both need as
``carry`` formals. Variants are made of the rest alone, so where a step reuses, the blocks in front of the region have
run once, in the probe.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from ditopt.ir.edit import Editor
from ditopt.ir.program import Formal, Program, is_call

NAME = "probe"
"""Name of the probe's graph."""


@dataclass(frozen=True)
class Split:
    """``rest``: the Program without what the probe computes. ``signals``: state slots of what the probe measures, in
    order. ``carried``: the values of the original entry that the rest reads, by the name of their carry."""

    program: Program
    rest: Program
    signals: tuple[str, ...]
    carried: dict[str, fx.Node]

    def probe(self, used: Collection[str]) -> tuple[Program, tuple[str, ...]]:
        """The probe as a Program whose results are the signals, then the carried values among ``used``; their names."""
        step = self.program.step
        new = dict(zip(step.state_out, step.results[step.n_results :], strict=True))
        names = tuple(c for c in self.carried if c in used)
        with Editor(step, "lower") as e:
            e.set_results([*(e[new[s]] for s in self.signals), *(e[self.carried[c]] for c in names)], [])
            e.drop_dead()
        made = self.program.replace(functions={**self.program.functions, self.program.entry: e.function()})
        return made.replace(outputs=(*self.signals, *names)), names


def split(program: Program) -> Split | None:
    """The two parts of a step; None where no decision needs a number that the step measures."""
    step = program.step
    asked = tuple(dict.fromkeys(d.rule.signal for d in program.decisions if d.rule is not None and not d.rule.lag))
    if not asked:
        return None
    new = dict(zip(step.state_out, step.results[step.n_results :], strict=True))
    inside = _above([new[s] for s in asked])
    kept = [(r, s) for s, r in new.items() if s not in asked]
    carried: dict[str, fx.Node] = {}
    with Editor(step, "lower") as e:
        e.set_results([*(e[r] for r in step.results[: step.n_results]), *(e[r] for r, _ in kept)], [s for _, s in kept])
        for node in [n for n in step.graph.nodes if n in inside and isinstance(n.meta["val"], torch.Tensor)]:
            readers = [u for u in e[node].users if u.op == "output" or not any(e[i] is u for i in inside)]
            if readers:
                name = f"carry.{len(carried)}"
                p = e.placeholder(name.replace(".", "_"), Formal("carry", name), node.meta["val"])
                for reader in readers:
                    reader.replace_input_with(e[node], p)
                carried[name] = node
        e.drop_dead()
    state = tuple(s for s in program.state if s.name not in asked)
    rest = program.replace(functions={**program.functions, program.entry: e.function()}, state=state)
    return Split(program, rest, asked, carried)


def _above(roots: list[fx.Node]) -> set[fx.Node]:
    """The operators that ``roots`` are computed from, with all results of the calls among them."""
    found: set[fx.Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node in found or node.op != "call_function":
            continue
        found.add(node)
        todo += node.all_input_nodes
        if is_call(node):
            todo += [u for u in node.users if u.target is operator.getitem]
    return found
