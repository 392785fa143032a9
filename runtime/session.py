"""Session: runs the step graphs of a Plan over requests, keeping the state of each guidance branch.

What a call does: the clock places it (request, step, branch), the probe measures where something is decided by what
it measures, the policy decides per decision, the variant that fits runs, and the slots take their new values. Nothing
of it stays if the call fails.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ditopt.artifact import Plan, StepGraph
from ditopt.errors import StaleWeights
from ditopt.ir.program import Formal, Rows
from ditopt.runtime.account import Ledger, Patience, Row, Stats
from ditopt.runtime.ahead import clock_bits
from ditopt.runtime.choice import Choice, Memory, choose_step, forecasts, still_used
from ditopt.runtime.clock import BRANCHES, Clock, Kind, Tick
from ditopt.runtime.guidance import NOT_DOUBLED, Lead, doubled, unguided
from ditopt.runtime.hoisted import hoisted
from ditopt.runtime.plan import Ready
from ditopt.runtime.policy import REUSE, Anchor
from ditopt.runtime.same import Held, own, storages

Event = Callable[[str, Mapping[str, Any]], None]
"""Called with a name and fields: "request" (request, reason), "step" (request, step, branch, graph, choices, time),
"memo" (name) when one is filled, "weights" (plan) when changed weights dropped the memos."""


@dataclass(frozen=True)
class Branch:
    """One guidance branch of one plan in the running request: slots by name (absent: still zeros), and what its
    decisions remember."""

    number: int
    last: int = -1
    slots: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    doubled: bool | None = None  # whether its batch holds each latent twice, where that was asked


@dataclass(frozen=True)
class _Done:
    """A call that succeeded and is not yet part of the session. ``branch`` is None where nothing is kept of it."""

    results: list[Tensor]
    branch: Branch | None
    lasting: dict[str, Tensor]
    lead: Lead | None
    row: Row
    choice: Choice
    denied: Mapping[str, str]
    ran: Sequence[StepGraph]


class Session:
    """State and policy for the calls of one model. Not safe for concurrent use.

    ``stats``: totals since the session was made. ``schedule_rows``: what ran in the running, else in the last request.
    """

    def __init__(self, on_event: Event | None = None) -> None:
        self.clock = Clock()
        self.stats = Stats()
        self._on_event = on_event
        self._plans: OrderedDict[int, Ready] = OrderedDict()
        self._branches: dict[tuple[int, Hashable], Branch] = {}
        self._leads: dict[int, Lead] = {}  # by plan, of its running step
        self._checked: set[int] = set()  # plans whose weights were compared in this request
        self._ledger = Ledger()
        self._patience = Patience()
        self._announced: Sequence[float] | Tensor | None = None
        self._masks: dict[str, str] = {}
        self._fitted: dict[str, Rows] = {}
        self._pending: list[tuple[Ready, Tick, _Done]] | None = None

    @property
    def schedule_rows(self) -> list[Row]:
        """The executed calls of the running or last request, in order."""
        return list(self._ledger.rows)

    @property
    def state_bytes(self) -> int:
        """Bytes of the memory in which slots live now, those of all guidance branches."""
        kept = [t for b in self._branches.values() for t in b.slots.values()]
        kept += [t for lead in self._leads.values() for t in lead.slots.values()]
        kept += [t for ready in self._plans.values() for t in ready.lasting.values()]
        memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        return sum(memory.values())

    # -- requests ------------------------------------------------------------------------------------------------

    def begin(self, steps: int | None = None, timesteps: Sequence[float] | Tensor | None = None) -> None:
        """The scheduler announces a request of ``steps`` steps, or of ``len(timesteps)`` model evaluations."""
        self._begin(steps, timesteps, "hook")

    def advance(self, index: int | None = None) -> None:
        """The scheduler finished its step ``index``."""
        self.clock.advance(index)

    @contextmanager
    def open(self, steps: int | None = None, timesteps: Sequence[float] | Tensor | None = None) -> Iterator[Session]:
        """The calls inside the block are one request; its end frees the state. An exception is a cancelled request."""
        self._begin(steps, timesteps, "caller")
        try:
            yield self
        except BaseException:
            self._end(ended=False)
            raise
        self.close_request()

    def close_request(self) -> None:
        """The running request ended: warn if a cache never hit, free its state."""
        self._end(ended=True)

    def reset(self) -> None:
        """What follows is a new request."""
        self.close_request()

    @property
    def measured(self) -> dict[str, list[float]]:
        """The signals that rules read in the running, else in the last request, by decision."""
        return {name: list(values) for name, values in self._ledger.measured.items()}

    @contextmanager
    def context(self, name: str | None) -> Iterator[None]:
        """Calls inside the block belong to the guidance branch ``name``."""
        before, self.clock.context = self.clock.context, name
        try:
            yield
        finally:
            self.clock.context = before

    def forget(self, plan: Plan | None = None) -> None:
        """Drop what is kept for a plan (None: for all): state, memos, control tensors."""
        for key in [k for k, r in self._plans.items() if plan is None or r.plan is plan]:
            del self._plans[key]
            self._branches = {k: b for k, b in self._branches.items() if k[0] != key}
            self._leads.pop(key, None)
            self._checked.discard(key)

    def reschedule(self, masks: Mapping[str, str], fitted: Mapping[str, Rows] = MappingProxyType({})) -> None:
        """From the next request on, follow these masks (decision name -> one digit a step) in place of the schedules
        that the model was compiled with; {} goes back to them. ``fitted``: coefficients to go with them, by decision
        (``Predictor.fitted``). For searches: nothing is compiled again. A step for which the model was not compiled
        computes more than its mask says (``Engine.rescheduled`` has all compiled).

        SessionError, and nothing changes, where there is no such decision or a mask is no text of 1 and 0."""
        for ready in self._plans.values():
            ready.check_masks(masks)
        self.close_request()
        self._masks, self._fitted = dict(masks), dict(fitted)
        for ready in self._plans.values():
            ready.reschedule(self._masks, self._fitted)

    def unwatch(self, names: Collection[str]) -> None:
        """These weights are gone for good; what was computed from them stays."""
        for ready in self._plans.values():
            ready.memos.unwatch(names)

    def _begin(self, steps: int | None, timesteps: Sequence[float] | Tensor | None, kind: Kind) -> None:
        # A request that the next one interrupts was cancelled; of a guessed one nobody knows.
        before = self.clock.steps
        self._end(ended=self.clock.kind == "hook" and (before is None or self._ledger.top + 1 >= before))
        self.clock.begin(steps, timesteps, kind)
        self._announced = timesteps

    def _end(self, ended: bool) -> None:
        called = self.clock.running == self._ledger.request
        self.clock.close()
        self._announced = None
        self._free()
        if ended and called:
            self._ledger.warn()

    def _free(self) -> None:
        self._branches.clear()
        self._leads.clear()
        self._checked.clear()

    # -- calls ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def call(self, plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One step of the model: tensors in the order of ``plan.manifest.inputs`` -> its outputs.

        SessionError where inputs do not fit the plan, the step does not fit a mask, or a decision is not finite. After
        any exception the session is as before the call (a request that the call opened is closed).
        """
        ready = self._ready(plan)
        given = ready.check(inputs)
        bits, time = self._times(ready, given)
        latent = next((t for t in ready.by_role(given, "latent")), None)
        reads = self.clock.reads
        tick = self.clock.tick(time, latent, ready.by_role(given, "prompt"))
        try:
            self.stats.reads += self.clock.reads - reads
            if tick.opened:
                self._free()
            done = self._step(ready, given, bits, tick)
        except BaseException:
            self.clock.rollback()
            raise
        if self._pending is not None:
            self._pending.append((ready, tick, done))
        else:
            self._commit(ready, tick, done)
        return done.results

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A call inside the block is a part of what it stands for: it counts when the block ends, and after an
        exception the session is as before it."""
        pending: list[tuple[Ready, Tick, _Done]] = []
        self._pending = pending
        try:
            yield
        except BaseException:
            if pending:
                self.clock.rollback()
            raise
        finally:
            self._pending = None
        for ready, tick, done in pending:
            self._commit(ready, tick, done)

    def _ready(self, plan: Plan) -> Ready:
        found = self._plans.get(id(plan))  # the entry holds the plan, so its id is not another's
        if found is None:
            found = Ready(plan)
            found.reschedule(self._masks, self._fitted)
            self._plans[id(plan)] = found
        self._plans.move_to_end(id(plan))
        if len(self._plans) > 8:
            self.forget(next(iter(self._plans.values())).plan)
        return found

    def _times(self, ready: Ready, given: Mapping[str, Tensor]) -> tuple[dict[str, bytes], float | None]:
        """The bits of each timestep input and the model's time, read together; nothing where nobody needs them and
        reading would wait for a device."""
        needed = self.clock.needs_time or ready.reads_time
        bits: dict[str, bytes] = {}
        time: float | None = None
        for name in ready.names["timestep"]:
            if not needed and given[name].device.type != "cpu":
                continue
            self.stats.reads += needed
            host = given[name].detach().cpu()
            bits[name] = clock_bits(host)
            if time is None and host.numel():
                time = float(host.double().max())
        return bits, time

    def _step(self, ready: Ready, given: Mapping[str, Tensor], bits: Mapping[str, bytes], tick: Tick) -> _Done:
        params = ready.plan.params()
        device = ready.device(given)
        values, filled = self._memo_values(ready, given, bits, params)

        branch, kept = self._branch(ready, tick)
        now = Anchor(tick.step, tick.time)
        lead = self._leads.get(id(ready.plan))
        lead = lead if lead is not None and lead.step == tick.step else None
        branch, denied = self._guided(ready, given, tick, branch, lead)
        ran = [*filled]
        carried: dict[str, Tensor] = {}
        controls: Mapping[str, Sequence[float]] = {}
        probe = ready.manifest.probe

        def argument(formal: Formal) -> Tensor:
            if formal.kind == "carry":
                return carried[formal.ref]
            if formal.kind == "input":
                return given[formal.ref]
            if formal.kind == "param":
                return ready.param(params, formal.ref)
            if formal.kind == "memo":
                return values[formal.ref]
            if formal.kind == "control":
                return ready.control(formal.ref, controls[formal.ref], device)
            shared = lead.slots if lead is not None else {}
            return ready.slot(shared if formal.ref in ready.shared else branch.slots, formal.ref, device)

        def measured() -> None:
            """Run the probe, where it did not run yet: a skipped branch of guidance needs nothing of it."""
            nonlocal controls
            if probe is None or probe in ran:
                return
            controls = forecasts(ready, branch.memory, now)
            outputs = ready.plan.run[probe.name]([argument(f) for f in probe.inputs])
            carried.update(zip(ready.manifest.measured, outputs, strict=False))
            carried.update({u.slot: outputs[u.output] for u in probe.updates})
            ran.append(probe)

        rules = ready.rules(self.clock.steps)
        ready.warn_late(tick.step)

        def read(names: Sequence[str]) -> list[list[float]]:
            self.stats.reads += 1
            if set(names) & set(ready.manifest.measured):
                measured()
            found = [carried[n] if n in carried else ready.slot(branch.slots, n, device) for n in names]
            host = torch.cat([t.detach().double().flatten() for t in found]).cpu().tolist()
            return [[host.pop(0) for _ in range(t.numel())] for t in found]

        choice = choose_step(ready, rules, branch.memory, now, read, denied)
        graph = choice.graph
        if any(f.kind == "carry" for f in graph.inputs):
            measured()
        controls = choice.controls
        outputs = list(ready.plan.run[graph.name]([argument(f) for f in graph.inputs]))
        results = outputs[: graph.results]
        slots, lasting, shared = self._updated(ready, graph, branch, outputs, given)
        # The caller may write into what it is given: a result that lives in a slot or a memo is copied.
        results = own(results, storages([*slots.values(), *lasting.values(), *shared.values(), *values.values()]))
        new_lead = None
        if lead is None and any(d.guidance == "calls" for d in ready.guides):
            latents = [Held(t) for t in ready.by_role(given, "latent")]
            new_lead = Lead(tick.step, tick.branch, self.clock.context, latents, shared)

        memory, gone = still_used(ready, rules, choice.memory, tick.step)
        kept_slots = {k: v for k, v in slots.items() if k not in gone}
        new = replace(branch, last=tick.step, slots=kept_slots, memory=memory)
        row = Row(tick.step, new.number, graph.name, {**dict.fromkeys(choice.wanted, "compute"), **graph.choices})
        ran.append(graph)
        return _Done(results, new if kept else None, lasting, new_lead, row, choice, denied, ran)

    def _commit(self, ready: Ready, tick: Tick, done: _Done) -> None:
        """The call succeeded: keep its state, then count and tell."""
        ready.lasting = done.lasting
        if done.lead is not None:
            self._leads[id(ready.plan)] = done.lead
        if done.branch is not None:
            self._branches[id(ready.plan), tick.branch] = done.branch
        stats, row = self.stats, done.row
        if self._ledger.request != tick.request:
            self._ledger = Ledger(request=tick.request)
            stats.requests += 1
            self._event("request", request=tick.request, reason=tick.opened or "it was announced")
        stats.calls += 1
        stats.steps += row.step > self._ledger.top
        stats.graphs[row.graph] += 1
        stats.hits.update(n for n, c in row.choices.items() if c == REUSE)
        stats.measured.update(done.choice.measured.keys())
        stats.flops += sum(g.flops for g in done.ran)
        stats.block_flops += sum(g.block_flops for g in done.ran)
        stats.full_flops += ready.manifest.full_flops
        stats.full_block_flops += ready.manifest.full_block_flops
        rules, choice = ready.rules(self.clock.steps), done.choice
        self._ledger.note(row, choice.wanted, rules, choice.measured, done.denied, choice.crowded)
        self._event("step", request=tick.request, time=tick.time, **vars(row))
        if self.clock.kind == "guess":
            self._patience.note(tick.opened, REUSE in row.choices.values(), self._ledger)

    def _memo_values(
        self, ready: Ready, given: Mapping[str, Tensor], bits: Mapping[str, bytes], params: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[StepGraph]]:
        memos = ready.memos
        before = memos.hits, memos.reads
        if id(ready.plan) not in self._checked:
            if memos.begin(params):
                self._event("weights", plan=ready.plan)
            if ready.plan.stale():
                raise StaleWeights("weights changed after the model was compiled; optimize it again")
            self._checked.add(id(ready.plan))

        values, ran = hoisted(ready, given, bits, params, self._announced)
        filled = [graph for _, graph in ran]
        for name in dict.fromkeys(memo.name for memo, _ in ran):
            self._event("memo", name=name)
        self.stats.memo_hits += memos.hits - before[0]
        self.stats.reads += memos.reads - before[1]
        self.stats.memo_fills += len(filled)
        self.stats.memo_drops += memos.drops
        memos.drops = 0
        return values, filled

    def _branch(self, ready: Ready, tick: Tick) -> tuple[Branch, bool]:
        """The branch of a call, and whether it is kept: beyond BRANCHES of them, one that was not called lately gives
        way, else the new one computes everything and keeps nothing."""
        key = id(ready.plan), tick.branch
        if key in self._branches:
            return self._branches[key], True
        own_ = [(b.last, k) for k, b in self._branches.items() if k[0] == key[0]]
        number = 1 + max((b.number for b in self._branches.values()), default=-1)
        if len(own_) >= BRANCHES:
            last, oldest = min(own_, key=lambda pair: pair[0])
            if last >= tick.step - 1:
                return Branch(number), False
            del self._branches[oldest]
        return Branch(number), True

    def _guided(
        self, ready: Ready, given: Mapping[str, Tensor], tick: Tick, branch: Branch, lead: Lead | None
    ) -> tuple[Branch, dict[str, str]]:
        """The branch, knowing whether its batch is doubled where a decision asks that; why decisions about guidance
        find none to skip in this call, by name."""
        latents, denied = ready.by_role(given, "latent"), dict[str, str]()
        for d in ready.guides:
            if d.guidance == "batch" and branch.doubled is None:
                self.stats.reads += 1
                branch = replace(branch, doubled=doubled(latents))
            if d.guidance == "calls":
                why, reads = unguided(lead, tick.branch, latents)
                self.stats.reads += reads
            else:
                why = "" if branch.doubled else NOT_DOUBLED
            if why:
                denied[d.name] = why
        return branch, denied

    def _updated(
        self, ready: Ready, graph: StepGraph, branch: Branch, outputs: list[Tensor], given: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """The slots of the branch, those that outlive requests, and those for the other calls of the step, after
        ``graph`` ran."""
        slots, lasting, shared = dict(branch.slots), dict(ready.lasting), dict[str, Tensor]()
        old: Mapping[str, Tensor]
        foreign = storages(given.values())  # the sampler may write into its latent: a slot never lives there
        for update in graph.updates:
            old, new = (ready.lasting, lasting) if update.slot in ready.models else (branch.slots, slots)
            new = shared if update.slot in ready.shared else new
            if update.output >= 0:
                new[update.slot] = own([outputs[update.output]], foreign)[0]
            elif update.source in old:
                new[update.slot] = old[update.source]
            else:
                new.pop(update.slot, None)  # the source still is zeros
        return slots, lasting, shared

    def _event(self, kind: str, **fields: Any) -> None:
        if self._on_event is not None:
            self._on_event(kind, fields)
