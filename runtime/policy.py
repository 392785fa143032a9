"""When to compute, when to predict, and with which coefficients: pure arithmetic on Python numbers.

The same functions serve the Session (one step at a time, from what really ran) and ``table`` (a dry run of a whole
request, for reports and for the ONNX manifest), so that the printed schedule is the executed one.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ditopt.artifact import StepGraph
from ditopt.errors import DitoptWarning, SessionError
from ditopt.ir.program import Decision, Interval, Predictor
from ditopt.runtime.predict import weights

COMPUTE, REUSE, BYPASS = "compute", "reuse", "bypass"
"""Choices of a decision: compute and keep, predict, or compute and keep nothing, because no later step will read it."""


@dataclass(frozen=True)
class Schedule:
    """An Interval for a known (or, with None, unknown) number of steps. Call it with a step index from 0: True where
    the step computes. Steps at or beyond the number of steps compute. ``stateless``: what takes a value's place on the
    other steps is no earlier value."""

    interval: Interval
    steps: int | None
    stateless: bool = False

    def __call__(self, step: int) -> bool:
        if self.interval.mask:
            return step >= len(self.interval.mask) or self.interval.mask[step] == "1"
        if self.idle(step):
            return self.interval.outside == "compute"
        if step in self.resets:
            return True
        # nothing is cached before the first step
        warm = max(self.interval.first, int(self.window[0]) + (not self.stateless))
        if step < warm or (self.interval.every and (step - warm + 1) % self.interval.every == 0):
            return True
        return self.steps is not None and step >= self.steps - self.interval.last

    @property
    def resets(self) -> set[int]:
        """The steps that compute besides."""
        words = self.interval.resets.split()
        return {round(float(w[:-1]) / 100 * (self.steps or 0)) if w.endswith("%") else int(w) for w in words}

    def idle(self, step: int) -> bool:
        """Whether ``step`` lies outside the window, where no value is kept."""
        low, high = self.window
        return step < low or step >= high

    @property
    def window(self) -> tuple[float, float]:
        """The first step of the window, and the one behind its last."""
        if self.steps is None or (self.interval.since, self.interval.until) == (0.0, 1.0):
            return 0, math.inf
        return math.ceil(self.interval.since * self.steps), math.ceil(self.interval.until * self.steps)

    def first_reuse(self) -> int | None:
        """The first step that does not compute; None where every step computes."""
        horizon = self.steps or len(self.interval.mask) or max(self.interval.first, 1) + 1
        # a mask may begin with 0, but the first step of a request always computes
        return next((s for s in range(not self.stateless, horizon) if not self(s)), None)


def schedule_of(decision: Decision, steps: int | None) -> Schedule:
    """The schedule of a decision over ``steps`` steps; see ``schedule``."""
    made = schedule(decision.schedule, steps, decision.name)
    return replace(made, stateless=not decision.predictor.size)


def schedule(interval: Interval, steps: int | None, name: str = "cache") -> Schedule:
    """The schedule of decision ``name`` over ``steps`` steps.

    A mask fixes the number of steps; another number is a SessionError, as is an interval that cannot be followed.
    Without a number of steps ``last`` cannot be honoured: one DitoptWarning says so.
    """
    if interval.mask:
        if set(interval.mask) - {"0", "1"}:
            raise SessionError(
                f"decision {name!r}: mask {interval.mask!r} given; a mask is a text of 1 (compute) and 0 (reuse)"
            )
        if steps is not None and steps != len(interval.mask):
            raise SessionError(
                f"decision {name!r}: its mask has {len(interval.mask)} entries and this request runs {steps} steps; "
                f"run {len(interval.mask)} steps, or optimize again with a mask of {steps} entries or with an interval"
            )
        return Schedule(interval, len(interval.mask))
    if interval.every < 0 or interval.first < 0 or interval.last < 0:
        raise SessionError(f"decision {name!r}: {interval} given; every, first and last must be at least 0")
    if steps is None and (interval.since, interval.until) != (0.0, 1.0):
        raise SessionError(
            f"decision {name!r} holds within a part of the request ({interval.since:g} to {interval.until:g}), and the "
            "number of steps is unknown; pass steps= to optimize or open a session with steps="
        )
    if "%" in interval.resets and steps is None:
        raise SessionError(
            f"decision {name!r} computes at shares of the request ({interval.resets}), and the number of steps is "
            "unknown; pass steps= to optimize or open a session with steps="
        )
    if interval.last and steps is None and interval.every != 1:
        warnings.warn(
            f"decision {name!r} asks that the last {interval.last} steps compute, but the number of steps is unknown, "
            "so they follow the interval; pass steps= to optimize or open a session with steps=",
            DitoptWarning,
            stacklevel=2,
        )
    return Schedule(interval, steps)


@dataclass(frozen=True)
class Anchor:
    """When a value was computed: step index, and the model's time where it was read (else None)."""

    step: int
    time: float | None = None


def choose(rule: Schedule, anchors: Sequence[Anchor], step: int, time: float | None = None) -> str:
    """ "compute", "reuse" or "bypass" at ``step``, given the computed steps of this branch, newest first.

    ``time``: the model's, where the schedule looks at it (where it is None such a schedule computes).

    A branch without a value computes. So does one that was not called at a step when it should have computed
    (guidance intervals): its value is older than the schedule allows.
    """
    if rule.stateless:
        return COMPUTE if rule(step) else REUSE
    if rule.idle(step) and rule.interval.outside == "compute":
        return BYPASS
    if not anchors or not _within(rule.interval, time):
        return COMPUTE
    since = range(min(anchors[0].step + 1, step), step + 1)
    return COMPUTE if any(rule(s) for s in since) else REUSE


def whole(
    decisions: Sequence[Decision],
    wanted: Mapping[str, str],
    anchors: Mapping[str, Sequence[Anchor]],
    rules: Mapping[str, Schedule],
    step: int,
) -> dict[str, str]:
    """``wanted``, where what computes and holds nothing yet, and is read later, computes all that it keeps
    (``Decision.needs``)."""
    out = dict(wanted)
    while True:
        first = [d for d in decisions if d.needs and out[d.name] == COMPUTE and not anchors.get(d.name)]
        more = {n for d in first for n in d.needs if out[n] == REUSE and needed(d, rules[d.name], step) != 0}
        if not more:
            return out
        out |= dict.fromkeys(more, COMPUTE)


def settle(decisions: Sequence[Decision], wanted: Mapping[str, str], stale: Collection[str] = ()) -> dict[str, str]:
    """``wanted``, where a branch of guidance is skipped or was: of a skipped call nothing else is computed or kept, and
    what half of a batch missed (``stale``) is computed for all of it before it is reused."""
    guides = {d.name for d in decisions if d.guidance}
    wanted = {n: COMPUTE if n in guides and c == BYPASS else c for n, c in wanted.items()}
    wanted |= dict.fromkeys(idle(decisions, {n for n, c in wanted.items() if c == COMPUTE}), COMPUTE)
    skipped = {d.guidance for d in decisions if d.guidance and wanted[d.name] == REUSE}
    if "calls" in skipped:
        return {n: c if n in guides else BYPASS for n, c in wanted.items()}
    if "batch" in skipped:
        return dict(wanted)
    return {n: COMPUTE if n in stale and c == REUSE else c for n, c in wanted.items()}


def idle(decisions: Sequence[Decision], computing: Collection[str]) -> set[str]:
    """The decisions that choose among what another one, one of ``computing``, does not take: nothing is asked then."""
    paths = {d.name: {f"{region}.{d.name}" for region in d.regions} for d in decisions if d.name in computing}
    return {d.name for d in decisions if d.regions and any(paths[n].issuperset(d.regions) for n in paths)}


def missed(decisions: Sequence[Decision], choices: Mapping[str, str], stale: frozenset[str]) -> frozenset[str]:
    """The decisions whose newest values half of the batch does not have, after a step of these ``choices``."""
    computed = {d.name for d in decisions if not d.guidance and choices.get(d.name, COMPUTE) == COMPUTE}
    skips = any(d.guidance == "batch" and choices.get(d.name) == REUSE for d in decisions)
    return stale | computed if skips else stale - computed


def filled(
    decisions: Sequence[Decision], wanted: Mapping[str, str], held: Mapping[str, int], step: int
) -> dict[str, str]:
    """``wanted``, where what a learned predictor was not trained to predict, or has not the values for, is computed.
    ``held``: see ``in_window``. SessionError where its tables end before ``step``."""
    out = dict(wanted)
    for d in decisions:
        if d.reads and out[d.name] == REUSE and not 0 < d.reads[table_row(d, step)] <= held.get(d.name, 0):
            out[d.name] = COMPUTE
    return out


def table_row(decision: Decision, step: int) -> int:
    """The row of the decision's tables for ``step``; SessionError where they have none."""
    if step >= decision.rows:
        what = "predictor" if decision.reads else "correction"
        raise SessionError(
            f"decision {decision.name!r}: its {what} is for {decision.rows} steps and this is step {step}; calibrate "
            "for more"
        )
    return step


def in_window(
    decisions: Sequence[Decision],
    choices: Mapping[str, str],
    held: Mapping[str, int],
    before: Collection[str],
    after: Collection[str],
) -> dict[str, int]:
    """Of how many consecutive steps the windows of learned predictors hold the values, after a step of ``choices``;
    ``held`` before it. ``before``, ``after``: the decisions that half of a batch missed, before it and after it."""
    found = {}
    for name in (d.name for d in decisions if d.reads):
        lost = choices.get(name, COMPUTE) == BYPASS or name in after
        found[name] = 0 if lost else 1 if name in before else held.get(name, 0) + 1
    return found


def _within(interval: Interval, time: float | None) -> bool:
    return not interval.timed or (time is not None and interval.low < time < interval.high)


def coefficients(
    decision: Decision,
    predictor: Predictor,
    anchors: Sequence[Anchor],
    now: Anchor,
    steps: int | None = None,
    gram: Sequence[Sequence[float]] = (),
) -> list[float]:
    """The weights of ``predictor`` (that of ``decision``, or of its rule) at ``now``; see predict.weights."""
    if not predictor.size or predictor.basis == "learned":
        return []
    if row := fitted_row(predictor, anchors, now.step):
        return [*row, *[0.0] * (predictor.size - len(row))]
    used = list(anchors)
    if predictor.basis in ("taylor", "hermite") and not decision.schedule.mask and decision.rule is None:
        # TaylorSeer forms differences only from step first - 1 on: values older than first - 2 never enter one.
        # Where a rule decides (DBCache, CG-Taylor), every computed step counts.
        oldest = decision.schedule.first - 2
        used = [a for i, a in enumerate(anchors) if i == 0 or a.step >= oldest]
    progress = None if steps is None else min(now.step / max(steps - 1, 1), 1.0)
    if predictor.time == "step":
        return weights(predictor, [a.step for a in used], now.step, decision.name, progress, gram)
    missing = float("nan")  # weights() refuses it in the decision's name
    times = [missing if a.time is None else a.time for a in used]
    return weights(predictor, times, missing if now.time is None else now.time, decision.name, progress, gram)


def fitted_row(predictor: Predictor, anchors: Sequence[Anchor], step: int) -> tuple[float, ...]:
    """The coefficients that were fitted for ``step``; () where there are none, or where the newest computed steps are
    not those that they were fitted to."""
    row = predictor.fitted[step] if step < len(predictor.fitted) else ()
    planned = [s for s in range(step) if not predictor.fitted[s]][: -len(row) - 1 : -1] if row else []
    return row if [a.step for a in anchors[: len(row)]] == planned else ()


def fit(wanted: Mapping[str, str], graphs: Sequence[StepGraph]) -> StepGraph:
    """The graph to run for ``wanted``: the one with exactly these choices, else the cheapest one that computes more
    and never less (``graphs[0]`` computes, and keeps, everything)."""
    for graph in graphs:
        if dict(graph.choices) == dict(wanted):
            return graph
    reuse = {name for name, choice in wanted.items() if choice == REUSE}
    allowed = [(g, {n for n, c in g.choices.items() if c == REUSE}) for g in graphs]
    allowed = [(g, r) for g, r in allowed if r <= reuse]
    if not allowed:
        raise SessionError(f"no compiled variant computes what {dict(wanted)} asks for; optimize again")
    for graph, reused in allowed:
        if reused == reuse:
            return graph
    return min(allowed, key=lambda pair: (pair[0].flops, -len(pair[1])))[0]


@dataclass(frozen=True)
class TableRow:
    """One step of a dry run: decision name -> "compute" | "reuse" | "bypass", decision name -> coefficients
    (``predictor.size`` of them; zeros where the step computes)."""

    step: int
    choices: Mapping[str, str]
    weights: Mapping[str, Sequence[float]] = field(default_factory=dict)


def table(
    decisions: Sequence[Decision],
    steps: int,
    times: Sequence[float] | None = None,
    graphs: Sequence[StepGraph] | None = None,
) -> list[TableRow]:
    """What one branch that is called at every step of a request of ``steps`` steps will do.

    ``times``: the model's time at each step; needed by predictors that measure distance in timesteps, and by schedules
    that look at it, else ignored.
    ``graphs``: the compiled variants, where rows without their own variant compute more; None: every row has one.
    """
    if times is not None and len(times) != steps:
        raise SessionError(f"{len(times)} times given for {steps} steps; give one time a step")
    measured = [d.name for d in decisions if d.rule is not None or d.gram]
    if measured:
        raise SessionError(f"{', '.join(measured)}: what it does depends on what a request measures; run one")
    called = [d.name for d in decisions if d.guidance == "calls"]
    if called:
        raise SessionError(f"{', '.join(called)}: each of the calls of a step takes its own graph; run a request")
    for d in decisions:
        if times is None and d.predictor.time == "timestep" and d.predictor.basis != "hold":
            raise SessionError(
                f"decision {d.name!r} predicts in the model's time: pass the timesteps of the {steps} steps"
            )
        if times is None and d.schedule.timed:
            raise SessionError(
                f"decision {d.name!r} reuses at times between {d.schedule.low:g} and {d.schedule.high:g}: pass the "
                f"timesteps of the {steps} steps"
            )
    rows = []
    for now, choices, anchors in walk(decisions, steps, times, graphs):
        row = {
            d.name: coefficients(d, d.predictor, anchors[d.name], now, steps)
            if choices[d.name] == REUSE and d.slots
            else [0.0] * d.predictor.size
            for d in decisions
        }
        rows.append(TableRow(now.step, choices, row))
    return rows


def walk(
    decisions: Sequence[Decision],
    steps: int,
    times: Sequence[float] | None = None,
    graphs: Sequence[StepGraph] | None = None,
    leads: bool = False,
) -> Iterator[tuple[Anchor, Mapping[str, str], Mapping[str, Sequence[Anchor]]]]:
    """Each step of a branch that is called at every one: what is chosen, and the computed steps before. ``leads``:
    it is the one that is called first in each step, which no decision about guidance skips."""
    rules = {d.name: schedule_of(d, steps) for d in decisions}
    anchors: dict[str, tuple[Anchor, ...]] = {d.name: () for d in decisions}
    held: dict[str, int] = {}
    stale: frozenset[str] = frozenset()
    for step in range(steps):
        now = Anchor(step, None if times is None else float(times[step]))
        choices = {d.name: choose(rules[d.name], anchors[d.name], step, now.time) for d in decisions}
        choices = filled(decisions, choices, held, step)
        choices |= {d.name: COMPUTE for d in decisions if leads and d.guidance == "calls"}
        choices = whole(decisions, settle(decisions, choices, stale), anchors, rules, step)
        if graphs is not None:
            choices = {**dict.fromkeys(choices, COMPUTE), **fit(choices, graphs).choices}
        yield now, choices, dict(anchors)
        before, stale = stale, missed(decisions, choices, stale)
        held = in_window(decisions, choices, held, before, stale)
        for d in decisions:
            if choices[d.name] == COMPUTE:
                anchors[d.name] = after(d, now, anchors[d.name], before - stale)


def after(d: Decision, now: Anchor, anchors: Sequence[Anchor], caught_up: Collection[str]) -> tuple[Anchor, ...]:
    """The computed steps of ``d`` that count once ``now`` is one: none before it where half of a batch missed some and
    has ``caught_up`` now."""
    return (now,) if d.name in caught_up else (now, *anchors)[: d.depth]


def distinct(decisions: Sequence[Decision], steps: int) -> list[Mapping[str, str]]:
    """The combinations of choices that a request of ``steps`` steps takes, the most frequent first; where schedules
    look at the model's time, those inside of it."""
    inside = [replace(d, schedule=replace(d.schedule, low=0.0, high=0.0)) for d in decisions]
    kinds = (False, True) if any(d.guidance == "calls" for d in decisions) else (False,)
    rows = Counter(tuple(row.items()) for leads in kinds for _, row, _ in walk(inside, steps, leads=leads))
    return [dict(row) for row, _ in rows.most_common()]


def needed(decision: Decision, rule: Schedule, step: int) -> int | None:
    """How many of the newest computed values a later step may still read, after ``step``; None where that depends on
    what the request measures, or on how long it is.

    Of the values held now, each step that has to compute pushes one out before the next step that reuses, unless a part
    of it may stay (``Decision.needs``). A step that computes though it need not (a new branch, no graph for what it
    wants) only pushes out more.
    """
    if decision.rule is not None or decision.gram or decision.predictor.window or rule.steps is None:
        return None
    most = decision.predictor.anchors
    if decision.needs:
        return 0 if all(map(rule, range(step + 1, rule.steps))) else most
    for pushed, later in enumerate(range(step + 1, rule.steps)):
        if pushed >= most:
            break
        if not rule(later):
            return most - pushed
    return 0


def wanted_sets(decisions: Sequence[Decision], steps: int) -> Counter[frozenset[str]]:
    """The sets of decisions that the steps of a request of ``steps`` steps let reuse, with how many steps do.

    What a rule decides may go either way: together, not at all, or each alone; up to three of them in every way.
    """
    rules = {d.name: schedule(d.schedule, steps, d.name) for d in decisions}
    ruled = {d.name for d in decisions if d.rule is not None}
    found = Counter[frozenset[str]]()
    for step in range(steps):
        open_ = frozenset(name for name, rule in rules.items() if step and not rule(step))
        open_ -= idle(decisions, rules.keys() - open_)
        asked = sorted(open_ & ruled)
        sizes = range(len(asked) + 1) if len(asked) <= 3 else sorted({0, 1, len(asked)})
        for granted in (c for n in sizes for c in itertools.combinations(asked, n)):
            found[(open_ - ruled) | set(granted)] += 1
    return found
