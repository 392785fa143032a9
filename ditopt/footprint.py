"""How much state a request holds, before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ditopt.codegen.lower import lower
from ditopt.ir.program import Decision, Program, StateSlot
from ditopt.runtime.policy import COMPUTE, needed, schedule_of, walk


def live_slots(program: Program, rows: Sequence[Mapping[str, str]] | None = None) -> list[StateSlot]:
    """The slots that a Session will hold: those that some step graph reads (``rows``: the choices that have graphs, as
    ``rewriting.variants`` gives them). Those of lifetime "request" are held once for each guidance branch."""
    read = {f.ref for v in lower(program, rows) for f in v.graph.inputs if f.kind == "state"}
    return [s for s in program.state if s.name in read]


def held_bytes(decisions: Sequence[Decision], slots: Sequence[StateSlot], steps: int | None) -> int:
    """The most bytes of ``slots`` that a guidance branch holds after a step of a request of ``steps`` steps: what no
    later step of a schedule reads is given back. All of them where the number of steps is unknown."""
    size = {s.name: s.type.nbytes for s in slots}
    if steps is None:
        return sum(size.values())
    inside = [replace(d, schedule=replace(d.schedule, low=0.0, high=0.0)) for d in decisions]
    rules = {d.name: schedule_of(d, steps) for d in inside}
    scheduled = {slot for d in decisions for group in d.slots for slot in group}
    kept, most = dict.fromkeys(rules, 0), 0
    for now, choices, _ in walk(inside, steps):
        for d in inside:
            used = needed(d, rules[d.name], now.step)
            full = d.predictor.size if choices[d.name] == COMPUTE else kept[d.name]
            kept[d.name] = full if used is None else min(full, used)
        slots_now = (slot for d in inside for group in d.slots for slot in group[: kept[d.name]])
        most = max(most, sum(size.get(slot, 0) for slot in slots_now))
    return most + sum(n for slot, n in size.items() if slot not in scheduled)
