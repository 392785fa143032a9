"""How much state a request holds, before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ditopt.codegen.lower import lower
from ditopt.ir.program import Decision, Program, StateSlot
from ditopt.runtime.policy import COMPUTE, needed, planned, schedule_of


def live_slots(program: Program, rows: Sequence[Mapping[str, str]] | None = None) -> list[StateSlot]:
    """The slots that a Session will hold: those that some step graph reads (``rows``: the choices that have graphs, as
    ``engine.variants`` gives them). Those of lifetime "request" are held once for each guidance branch."""
    read = {f.ref for v in lower(program, rows) for f in v.graph.inputs if f.kind == "state"}
    return [s for s in program.state if s.name in read]


def held_bytes(decisions: Sequence[Decision], slots: Sequence[StateSlot], steps: int | None) -> int:
    """The most bytes of ``slots`` that a guidance branch holds after a step of a request of ``steps`` steps: what no
    later step of a schedule reads is given back. All of them where the number of steps is unknown."""
    size = {s.name: s.type.nbytes for s in slots}
    if steps is None:
        return sum(size.values())
    over = [_over_time(d, size, steps) for d in decisions]
    scheduled = {slot for d in decisions for group in d.slots for slot in group}
    others = sum(n for slot, n in size.items() if slot not in scheduled)
    return others + max(map(sum, zip(*over, strict=True)), default=0)


def _over_time(d: Decision, size: Mapping[str, int], steps: int) -> list[int]:
    """The bytes of a decision's slots after each step."""
    rule, kept, out = schedule_of(d, steps), 0, []
    for step, choice in enumerate(planned(d, steps)):
        if choice == COMPUTE:
            kept = d.predictor.size
        used = needed(d, rule, step)
        kept = kept if used is None else min(kept, used)
        out.append(sum(size.get(slot, 0) for group in d.slots for slot in group[:kept]))
    return out
