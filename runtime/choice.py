"""What one step does: which decisions reuse, which variant runs, and what the host hands to it.

Static schedules answer first. The steps that they leave open are decided by rules, from numbers that ``read`` fetches
from the device all at once: at most one wait a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ditopt.artifact import StepGraph
from ditopt.ir.program import Decision
from ditopt.runtime.plan import Ready
from ditopt.runtime.policy import (
    COMPUTE,
    REUSE,
    Anchor,
    Schedule,
    after,
    choose,
    coefficients,
    filled,
    in_window,
    missed,
    needed,
    settle,
    table_row,
    whole,
)
from ditopt.runtime.rules import Course, asks, course_of, decide

Read = Callable[[Sequence[str]], Sequence[Sequence[float]]]
"""State slots or signals by name -> their content as flat lists of numbers."""


@dataclass(frozen=True)
class Memory:
    """What one guidance branch remembers by decision: when the values in its slots were computed, newest first; the
    course of its rule; inner products, with the step that they are of; of how many consecutive steps up to ``last`` a
    window holds the values (``policy.in_window``); and the decisions whose newest values one half of a batch does not
    have (``policy.missed``)."""

    anchors: Mapping[str, tuple[Anchor, ...]] = field(default_factory=dict)
    courses: Mapping[str, Course] = field(default_factory=dict)
    grams: Mapping[str, tuple[int, Sequence[Sequence[float]]]] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    last: int = -1
    stale: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    """``wanted``: what the decisions asked for; ``graph``: the variant that runs; ``controls``: numbers by control
    input; ``memory``: after the step; ``measured``: the signals that were read, by decision; ``crowded``: of decisions
    that had no room, what they needed and what they have."""

    wanted: Mapping[str, str]
    graph: StepGraph
    controls: Mapping[str, Sequence[float]]
    memory: Memory
    measured: Mapping[str, float]
    crowded: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def forecasts(ready: Ready, memory: Memory, now: Anchor) -> dict[str, Sequence[float]]:
    """The control inputs that a probe reads: the coefficients of the forecasts whose error it measures."""
    found: dict[str, Sequence[float]] = {}
    for d in ready.decisions:
        if d.rule is not None and d.rule.weights:
            before = memory.anchors.get(d.name, ())
            told = coefficients(d, d.rule.predictor, before, now, ready.steps) if before else None
            found[d.rule.weights] = told or [0.0] * d.rule.predictor.size
    return found


def choose_step(
    ready: Ready,
    rules: Mapping[str, Schedule],
    memory: Memory,
    now: Anchor,
    read: Read,
    denied: Collection[str] = (),
) -> Choice:
    """Decide step ``now`` of a branch with ``memory``, by the schedules ``rules`` of the decisions. ``denied``: those
    about guidance that find none to skip."""
    decisions = ready.decisions
    wanted = {d.name: choose(rules[d.name], memory.anchors.get(d.name, ()), now.step, now.time) for d in decisions}
    held = memory.held if memory.last == now.step - 1 else {}
    wanted = filled(decisions, wanted, held, now.step)
    wanted |= {name: COMPUTE for name in denied if wanted[name] == REUSE}
    wanted = whole(decisions, settle(decisions, wanted, memory.stale), memory.anchors, rules, now.step)
    wanted, courses, measured, crowded = _by_rules(decisions, wanted, memory.courses, read)
    graph = ready.variant(wanted)

    stale = missed(decisions, graph.choices, memory.stale)
    controls: dict[str, Sequence[float]] = {}
    anchors, grams = dict(memory.anchors), dict(memory.grams)
    for d in decisions:
        before = anchors.get(d.name, ())
        controls[d.weights] = [0.0] * d.predictor.size
        if graph.choices.get(d.name) == REUSE and d.slots:
            if d.gram and grams.get(d.name, (-1, ()))[0] != before[0].step:
                grams[d.name] = (before[0].step, _square(read([d.gram])[0]))
            if d.row:
                controls[d.row] = [table_row(d, now.step)]
            gram = grams[d.name][1] if d.gram else ()
            controls[d.weights] = coefficients(d, d.predictor, before, now, ready.steps, gram)
        elif graph.choices.get(d.name, COMPUTE) == COMPUTE:
            anchors[d.name] = after(d, now, before, memory.stale - stale)
            courses[d.name] = memory.courses.get(d.name, Course()).computed() if d.rule else Course()
    held = in_window(decisions, graph.choices, held, memory.stale, stale)
    return Choice(wanted, graph, controls, Memory(anchors, courses, grams, held, now.step, stale), measured, crowded)


def _by_rules(
    decisions: Sequence[Decision], wanted: Mapping[str, str], courses: Mapping[str, Course], read: Read
) -> tuple[dict[str, str], dict[str, Course], dict[str, float], dict[str, tuple[float, float]]]:
    """``wanted`` with the reuses that a rule denies, the courses of rules that granted one, what was measured, and what
    was denied for want of room."""
    open_ = [(d, d.rule) for d in decisions if d.rule is not None and wanted[d.name] == REUSE]
    asked = [(d, r) for d, r in open_ if asks(r, courses.get(d.name, Course()))]
    names = list(dict.fromkeys([r.signal for _, r in asked] + [r.need for _, r in open_ if r.need]))
    numbers = {name: float(n[0]) for name, n in zip(names, read(names) if names else [], strict=True)}
    measured = {d.name: numbers[r.signal] for d, r in asked}
    out, after = dict(wanted), dict(courses)
    for d, rule in open_:
        reuse, after[d.name] = decide(rule, course_of(d.name, rule, courses), measured.get(d.name), d.name)
        out[d.name] = REUSE if reuse else COMPUTE
    crowded = {}
    if not any(out[d.name] == REUSE and "model" in d.regions for d in decisions):
        for d, rule in open_:
            if rule.need and out[d.name] == REUSE and numbers[rule.need] > rule.room:
                crowded[d.name] = numbers[rule.need], rule.room
                out[d.name], after[d.name] = COMPUTE, after[d.name].computed()
    return out, after, measured, crowded


def _square(flat: Sequence[float]) -> list[list[float]]:
    n = round(len(flat) ** 0.5)
    return [list(flat[i * n : (i + 1) * n]) for i in range(n)]


def still_used(ready: Ready, rules: Mapping[str, Schedule], memory: Memory, step: int) -> tuple[Memory, set[str]]:
    """``memory`` after ``step`` without values that no later step of a static schedule reads, and the slots that held
    them."""
    anchors, gone = dict(memory.anchors), set[str]()
    for d in ready.decisions:
        kept = needed(d, rules[d.name], step)
        if kept is None or d.name not in anchors:
            continue
        gone |= {slot for group in d.slots for slot in group[kept * d.predictor.bands :]}
        anchors[d.name] = anchors[d.name][:kept]
    return replace(memory, anchors=anchors), gone
