"""From a Program with undecided selects to step graphs: one for each combination of choices.

Fixing a decision puts one operand in the place of each of its selects. What only the other operand needed is then
dead, also across calls: results that no call site reads leave the body, and so do formals that the body no longer
reads, so that the reuse graph does not even mention the weights of what it skips. State whose new value is a slot's old
value becomes a rename (no output, no copy).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ditopt.artifact import StepGraph, Update
from ditopt.codegen.probe import NAME as PROBE
from ditopt.codegen.probe import Split, split
from ditopt.codegen.variants import Choices, combinations
from ditopt.ir.cost import function_flops, step_flops
from ditopt.ir.edit import Editor, prune
from ditopt.ir.opening import opened
from ditopt.ir.program import Formal, Function, Program, call_args, callee, formal, is_call, owner
from ditopt.ops import select


@dataclass(frozen=True)
class Lowered:
    """A step graph and the decided Program that it runs (no selects, decisions or attention operators; no memos)."""

    graph: StepGraph
    program: Program


class Lowering:
    """The step graphs of a Program. State that none of ``rows`` (choices) reads is not kept: where a stream matters
    only through what is skipped (the text stream of joint attention), nothing of it has to be remembered. With ``rows``
    None any choices may come."""

    def __init__(self, program: Program, rows: Sequence[Choices] | None) -> None:
        self.free = rows is None
        program = opened(program)  # no backend claims attention
        self._parts = split(program)
        rest = program if self._parts is None else self._parts.rest
        rules = [d.rule for d in program.decisions if d.rule is not None]
        host = {d.gram for d in program.decisions if d.gram} | {r.signal for r in rules if r.lag}
        host |= {r.need for r in rules if r.need}
        if self._parts is not None:
            reads = _probe(self._parts, self._parts.carried).graph.inputs
            host |= {f.ref for f in reads if f.kind == "state"}
        self._rest = _with_state(rest, live_state(rest, rows, host))

    def variant(self, choices: Choices) -> Lowered:
        """The step graph of these choices."""
        return _variant(self._rest, choices)

    def probe(self, used: Collection[str] | None = None) -> Lowered | None:
        """What measures the numbers that rules read, where the step itself does (codegen/probe.py); it gives the values
        named ``used`` (None: all that a step graph could read) besides."""
        return _probe(self._parts, self._parts.carried if used is None else used) if self._parts is not None else None


def lower(program: Program, rows: Iterable[Choices] | None = None, lowering: Lowering | None = None) -> list[Lowered]:
    """One step graph for each row of choices (default: ``combinations``), then the probe where there is one. The first
    row computes everything. ``lowering``: where graphs of further rows will be made by it."""
    wanted = combinations(program) if rows is None else list(rows)
    made = Lowering(program, wanted) if lowering is None else lowering
    variants = [made.variant(row) for row in wanted]
    used = {f.ref for v in variants for f in v.graph.inputs if f.kind == "carry"}
    probe = made.probe(None if made.free else used)
    return [*variants, *([probe] if probe is not None else [])]


def _probe(parts: Split, used: Collection[str]) -> Lowered:
    """The probe, giving the carried values among ``used``."""
    program, names = parts.probe(used)
    decided = _decided(program, {})
    total, blocks = step_flops(decided)
    inputs = tuple(formal(p) for p in decided.step.placeholders)
    carries = tuple(Update(name, len(parts.signals) + i) for i, name in enumerate(names))
    graph = StepGraph(PROBE, {}, inputs, len(parts.signals), carries, total, blocks)
    return Lowered(graph, decided)


def live_state(program: Program, rows: Sequence[Choices] | None, host: Collection[str] = ()) -> set[str]:
    """The slots that some row (None: any) reads, to compute an output or another slot that is read, and those that the
    host, or the probe for it, reads."""
    live: set[str] = set(host)
    while True:
        kept = _with_state(program, live)
        made = [_trim_calls(kept)] if rows is None else [_decided(kept, row) for row in rows]
        found = set().union(*(_reads(p.step) for p in made))
        if found <= live:
            return live
        live |= found


def _reads(step: Function) -> set[str]:
    """The slots that a step reads, other than to leave them as they are."""
    new = dict(zip(step.state_out, step.results[step.n_results :], strict=True))
    found = set()
    for p in (p for p in step.placeholders if formal(p).kind == "state"):
        slot = formal(p).ref
        idle = {step.output}
        own = new.get(slot)
        if own is not None and own.target is select and own.args[1] is p and own.args[0] is not p:
            idle.add(own)  # undecided: where the step reuses it stays
        moved = p in step.results[: step.n_results] or any(r is p for s, r in new.items() if s != slot)
        if moved or set(p.users) - idle:
            found.add(slot)
    return found


def _holds(node: fx.Node, slot: str) -> bool:
    """Whether ``node`` is what ``slot`` held before: an update that changes nothing."""
    return node.op == "placeholder" and formal(node) == Formal("state", slot)


def _with_state(program: Program, slots: set[str]) -> Program:
    """``program`` with only these slots among its results and its state."""
    step = program.step
    if set(step.state_out) <= slots:
        return program
    kept = [(r, s) for r, s in zip(step.results[step.n_results :], step.state_out, strict=True) if s in slots]
    with Editor(step, "lower") as e:
        e.set_results([e[r] for r in step.results[: step.n_results]] + [e[r] for r, _ in kept], [s for _, s in kept])
        e.drop_dead()
    state = tuple(s for s in program.state if s.name in slots)
    return program.replace(functions={**program.functions, program.entry: e.function()}, state=state)


def lower_memos(program: Program) -> list[Lowered]:
    """Each memo function as a graph of its own, named like the function."""
    program = opened(program)
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
    """``full``; ``reuse`` where everything is reused; else the names of what is, and of what is not kept."""
    reused, idle = ([k for k, v in choices.items() if v == word] for word in ("reuse", "bypass"))
    name = "full" if not reused else "reuse" if len(reused) == len(choices) else "reuse_" + "_".join(reused)
    return name + ("_idle_" + "_".join(idle) if idle else "")


def _variant(program: Program, choices: Choices) -> Lowered:
    decided = _decided(program, choices)
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


def _decided(program: Program, choices: Choices) -> Program:
    """``program`` with every decision fixed, and without what only the other choices need."""
    functions = {name: _decide(f, choices) for name, f in program.functions.items()}
    return _trim_calls(program.replace(functions=functions, decisions=(), memos=()))


def _decide(function: Function, choices: Choices) -> Function:
    """``function`` with every select replaced by the operand that ``choices`` takes: of a decision's own new state the
    old one where nothing of it is kept ("bypass")."""
    with Editor(function, "lower") as e:
        new = zip(e.results[len(e.results) - len(function.state_out) :], function.state_out, strict=True)
        own = {(node, owner(slot)) for node, slot in new}
        for node in list(e.graph.nodes):
            if node.target is select:
                computed, predicted, decision = node.args
                choice = choices.get(str(decision), "compute")
                kept = choice == "compute" or (choice == "bypass" and (node, decision) not in own)
                chosen = computed if kept else predicted
                node.replace_all_uses_with(chosen)
        e.drop_dead(formals=False)
    return e.function()


def _trim_calls(program: Program) -> Program:
    """Bodies without results that nobody needs and without formals they do not read; calls to match."""
    live = _live_results(program)
    bodies = {name: _with_results(program.functions[name], sorted(keep)) for name, keep in live.items() if keep}
    with Editor(program.step, "lower") as e:
        for call in [n for n in e.graph.nodes if is_call(n)]:
            name = callee(call)
            if name in bodies:
                _recall(e, call, program.functions[name], bodies[name], sorted(live[name]))
        e.drop_dead(formals=False)
    return prune(program.replace(functions={**program.functions, **bodies, program.entry: e.function()}))


def _live_results(program: Program) -> dict[str, set[int]]:
    """For each body the results that some call needs, as few as possible.

    Counting readers would not do: where equal blocks follow one another, a stream that nobody needs in the end is still
    read by the next call of the same body, to compute that same stream. So liveness starts empty and grows.
    """
    reads = {callee(c): _formals_of_results(program.functions[callee(c)]) for c in program.calls()}
    live: dict[str, set[int]] = {name: set() for name in reads}
    while True:
        before = {name: set(found) for name, found in live.items()}
        seen: set[fx.Node] = set()
        todo = list(program.step.results)
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            source = node.args[0] if node.args else None
            if isinstance(source, fx.Node) and is_call(source):
                live[callee(source)].add(int(node.args[1]))  # type: ignore[arg-type]
                needed = set().union(*(reads[callee(source)][k] for k in live[callee(source)]))
                todo += [call_args(source)[i] for i in needed]
            else:
                todo += node.all_input_nodes
        if live == before:
            return live


def _formals_of_results(body: Function) -> list[set[int]]:
    """For each result of a body, the formals that it is computed from."""
    found: dict[fx.Node, set[int]] = {p: {i} for i, p in enumerate(body.placeholders)}
    for node in body.graph.nodes:
        if node.op == "call_function":
            found[node] = set().union(*(found[a] for a in node.all_input_nodes))
    return [found[r] for r in body.results]


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
        if int(user.args[1]) in keep:  # type: ignore[arg-type]
            user.replace_all_uses_with(results[keep.index(int(user.args[1]))])  # type: ignore[arg-type]
