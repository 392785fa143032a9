"""From a Program with undecided selects to step graphs: one for each combination of choices.

Fixing a decision puts one operand in the place of each of its selects. What only the other operand needed is then
dead, also across calls: results that no call site reads leave the body, and so do formals that the body no longer
reads, so that the reuse graph does not even mention the weights of what it skips. State whose new value is a slot's old
value becomes a rename (no output, no copy).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ditopt.artifact import StepGraph, Update
from ditopt.ir.cost import function_flops, step_flops
from ditopt.ir.edit import Editor, prune
from ditopt.ir.program import Function, Program, call_args, callee, formal, is_call
from ditopt.ops import select

Choices = Mapping[str, str]


@dataclass(frozen=True)
class Lowered:
    """A step graph and the decided Program that it runs (no selects, no decisions; memo functions left out)."""

    graph: StepGraph
    program: Program


def combinations(program: Program, most: int = 8) -> list[Choices]:
    """The combinations of choices worth a graph, everything computed first, then most reuse first.

    All of them where they are at most ``most``; else the all-compute and all-reuse rows and those that reuse all but
    one or only one. A row that has no graph of its own runs as one that computes more.
    """
    names = [d.name for d in program.decisions]
    rows = [dict(zip(names, c, strict=True)) for c in itertools.product(("compute", "reuse"), repeat=len(names))]
    rows.sort(key=lambda r: sum(v == "reuse" for v in r.values()), reverse=True)
    full = rows.pop()
    if len(rows) + 1 > most:
        rows = [r for r in rows if sum(v == "reuse" for v in r.values()) in (1, len(names) - 1, len(names))][: most - 1]
    return [full, *rows]


def lower(program: Program, rows: Iterable[Choices] | None = None) -> list[Lowered]:
    """One step graph for each row of choices (default: ``combinations``); the first computes everything."""
    return [_variant(program, row) for row in (combinations(program) if rows is None else rows)]


def lower_memos(program: Program) -> list[Lowered]:
    """Each memo function as a graph of its own, named like the function."""
    out = []
    for memo in program.memos:
        function = program.functions[memo.function]
        alone = prune(
            program.replace(functions=dict(program.functions), entry=memo.function, state=(), decisions=(), memos=())
        )
        inputs = tuple(formal(p) for p in function.placeholders)
        cost = function_flops(program, function)
        out.append(Lowered(StepGraph(memo.function, {}, inputs, len(memo.values), flops=cost), alone))
    return out


def variant_name(choices: Choices) -> str:
    """``full``; ``reuse`` where everything is reused; else the names of what is."""
    reused = [k for k, v in choices.items() if v == "reuse"]
    return "full" if not reused else "reuse" if len(reused) == len(choices) else "reuse_" + "_".join(reused)


def _variant(program: Program, choices: Choices) -> Lowered:
    functions = {name: _decide(f, choices) for name, f in program.functions.items()}
    decided = _trim_calls(program.replace(functions=functions, decisions=(), memos=()))
    step = decided.step
    results, updates, outputs = step.results, [], 0
    keep = list(results[: step.n_results])
    for slot, node in zip(step.state_out, results[step.n_results :], strict=True):
        if node.op == "placeholder" and formal(node).kind == "state":
            if formal(node).ref != slot:
                updates.append(Update(slot, source=formal(node).ref))
        else:
            updates.append(Update(slot, len(keep)))
            keep.append(node)
            outputs += 1
    with Editor(step, "lower") as e:
        e.set_results([e[n] for n in keep], [])
        e.drop_dead()
    decided = prune(decided.replace(functions={**decided.functions, decided.entry: e.function()}))
    total, blocks = step_flops(decided)
    graph = StepGraph(
        variant_name(choices),
        dict(choices),
        tuple(formal(p) for p in decided.step.placeholders),
        step.n_results,
        tuple(updates),
        total,
        blocks,
    )
    return Lowered(graph, decided)


def _decide(function: Function, choices: Choices) -> Function:
    """``function`` with every select replaced by the operand that ``choices`` takes."""
    with Editor(function, "lower") as e:
        for node in list(e.graph.nodes):
            if node.target is select:
                computed, predicted, decision = node.args
                node.replace_all_uses_with(computed if choices[str(decision)] == "compute" else predicted)
        e.drop_dead(formals=False)
    return e.function()


def _trim_calls(program: Program) -> Program:
    """Bodies without results that no call reads and without formals they do not read; calls to match."""
    live: dict[str, set[int]] = {}
    with Editor(program.step, "lower") as e:
        e.drop_dead(formals=False)
        calls = [n for n in e.graph.nodes if is_call(n)]
        for call in calls:
            live.setdefault(callee(call), set()).update(int(u.args[1]) for u in call.users)
        bodies = {name: _with_results(program.functions[name], sorted(keep)) for name, keep in live.items()}
        for call in calls:
            _recall(e, call, program.functions[callee(call)], bodies[callee(call)], sorted(live[callee(call)]))
        e.drop_dead(formals=False)
    out = prune(program.replace(functions={**program.functions, **bodies, program.entry: e.function()}))
    # a body that reads less may leave results of earlier calls unread: again, until nothing shrinks
    shrunk = any(len(f.placeholders) < len(program.functions[name].placeholders) for name, f in bodies.items())
    return _trim_calls(out) if shrunk else out


def _with_results(body: Function, keep: Sequence[int]) -> Function:
    with Editor(body, "lower") as e:
        e.set_results([e.results[i] for i in keep])
        e.drop_dead()
    return e.function()


def _recall(e: Editor, node: fx.Node, old: Function, new: Function, keep: Sequence[int]) -> None:
    """Give a call the arguments and results that its trimmed body has."""
    if len(keep) == len(old.results) and len(new.placeholders) == len(old.placeholders):
        return
    stay = {formal(p).ref for p in new.placeholders}
    args = [a for a, p in zip(call_args(node), old.placeholders, strict=True) if formal(p).ref in stay]
    values: list[Any] = [node.meta["val"][i] for i in keep]
    results = e.call(callee(node), args, values, node, str(node.meta["region"]))
    for user in list(node.users):
        user.replace_all_uses_with(results[keep.index(int(user.args[1]))])  # type: ignore[arg-type]
