"""Bookkeeping of a Session: what was executed, and why a cache that was asked for never hit."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ditopt.errors import DitoptWarning
from ditopt.runtime.policy import REUSE, Schedule

_PATIENCE = 8  # calls without a hit, over at least
_REQUESTS = 3  # requests, after which a bare module is told that nothing is reused


@dataclass(frozen=True)
class Row:
    """One executed call: step of the request, branch numbered by first appearance, name of the graph that ran, and
    decision name -> "compute" | "reuse"."""

    step: int
    branch: int
    graph: str
    choices: Mapping[str, str]


@dataclass
class Stats:
    """What a Session executed since it was made.

    ``calls`` of the model, in ``requests``, at ``steps`` (a step with two guidance branches is two calls). ``hits``:
    calls that reused, by decision; ``graphs``: calls by graph. ``flops`` and ``block_flops`` were executed (memo
    functions included in the first), ``full_flops`` and ``full_block_flops`` are what the plain model would have.
    ``reads``: times the host read tensor contents, a synchronisation where the tensor is not in host memory.
    ``measured``: times a rule was told its signal, by decision (all of a step are one read).
    ``memo_fills``, ``memo_hits``, ``memo_drops``: entries of hoisted values made, found, forgotten for new weights.
    """

    requests: int = 0
    steps: int = 0
    calls: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    graphs: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    block_flops: int = 0
    full_flops: int = 0
    full_block_flops: int = 0
    reads: int = 0
    measured: Counter[str] = field(default_factory=Counter)
    memo_fills: int = 0
    memo_hits: int = 0
    memo_drops: int = 0

    def count_outside(self, flops: int) -> None:
        """A call also executed ``flops`` that no step graph holds, as the plain model does."""
        self.flops += flops
        self.full_flops += flops

    @property
    def syncs(self) -> int:
        """Another name of ``reads``."""
        return self.reads

    @property
    def share_flops(self) -> float:
        """Executed / plain FLOPs; 1.0 before the first call."""
        return self.flops / self.full_flops if self.full_flops else 1.0

    @property
    def share_block_flops(self) -> float:
        """Executed / plain FLOPs inside blocks; 1.0 before the first call."""
        return self.block_flops / self.full_block_flops if self.full_block_flops else 1.0


@dataclass
class Ledger:
    """The hits and misses of one request. ``rules``: the schedules of the decisions asked so far; ``measured``: what
    rules read, by decision; ``denied``: why a decision about guidance found none to skip, at the last call where it did
    not; ``crowded``: of decisions that had no room, what they needed and what they have, of what there is."""

    request: int = 0
    calls: int = 0
    top: int = -1
    rows: list[Row] = field(default_factory=list)
    rules: dict[str, Schedule] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)
    wanted: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    denied: dict[str, str] = field(default_factory=dict)
    crowded: dict[str, tuple[float, float]] = field(default_factory=dict)

    def note(
        self,
        row: Row,
        wanted: Mapping[str, str],
        rules: Mapping[str, Schedule],
        measured: Mapping[str, float],
        denied: Mapping[str, str],
        crowded: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    ) -> None:
        """A call succeeded."""
        self.denied.update(denied)
        self.crowded.update(crowded)
        for name, value in measured.items():
            self.measured.setdefault(name, []).append(value)
        self.calls += 1
        self.top = max(self.top, row.step)
        self.rows.append(row)
        self.rules.update(rules)
        self.wanted.update(n for n, c in wanted.items() if c == REUSE)
        self.hits.update(n for n, c in row.choices.items() if c == REUSE)

    def reason(self, name: str) -> str:
        """Why decision ``name`` did not hit in this request."""
        rule = self.rules[name]
        first = rule.first_reuse()
        if first is None:
            if rule.steps is None or rule.interval.every == 1 or rule.interval.mask:
                return "its schedule computes every step"
            return f"its warm-up and last steps leave none of the {rule.steps} steps to reuse"
        if self.top < first:
            return f"the request ran {self.top + 1} steps and its schedule first reuses at step {first}"
        if name in self.denied and not self.wanted[name]:
            return self.denied[name]
        if not self.wanted[name] and self.measured.get(name):
            read = self.measured[name]
            return (
                f"its signal was between {min(read):.3g} and {max(read):.3g} at the {len(read)} steps it was read; "
                "raise the threshold above that to reuse"
            )
        if self.wanted[name]:
            return "no compiled variant reuses it together with what the other decisions chose"
        if rule.interval.timed:
            low, high = rule.interval.low, rule.interval.high
            return f"the model's time was not between {low:g} and {high:g} at the steps that its interval would reuse"
        return "each guidance branch was new, or had missed steps, whenever the schedule would have reused"

    def warn(self) -> None:
        """The request ended as meant: a DitoptWarning for the decisions that never hit.

        Not for a block that measured too much, where each block decides by itself and others hit.
        """
        hit = {repr(rule) for name, rule in self.rules.items() if self.hits[name] and self.measured.get(name)}
        for name, (need, room) in self.crowded.items():
            warnings.warn(
                f"{name!r} computed all tokens where part of them would do: this request needs {need:.0%} of them, and "
                f"a partial step computes {room:.0%}; optimize with a larger ratio, or for a smaller mask",
                DitoptWarning,
                stacklevel=4,
            )
        for name, rule in self.rules.items():
            if name in self.crowded:
                continue
            if not self.hits[name] and not (self.measured.get(name) and repr(rule) in hit):
                what = f"cache {name!r}" if name.startswith("cache") else repr(name)
                warnings.warn(
                    f"{what} was never reused in this request: {self.reason(name)}", DitoptWarning, stacklevel=4
                )


@dataclass
class Patience:
    """Watches a bare module, where nobody says that a request ended: warns once when nothing is ever reused."""

    calls: int = 0
    opened: Counter[str] = field(default_factory=Counter)
    told: bool = False

    def note(self, opened: str, hit: bool, ledger: Ledger) -> None:
        """A call of a guessed request succeeded."""
        if hit:
            self.calls = 0
            self.opened.clear()
        if hit or self.told:
            return
        self.calls += 1
        if opened:
            self.opened[opened] += 1
        if self.calls < _PATIENCE or sum(self.opened.values()) < _REQUESTS or not ledger.rules:
            return
        self.told = True
        why = "; ".join(f"{count} x {reason}" for reason, count in self.opened.most_common())
        first = "; ".join(f"{name!r}: {ledger.reason(name)}" for name in ledger.rules)
        warnings.warn(
            f"nothing was reused in {self.calls} calls, because {sum(self.opened.values())} requests were opened "
            f"meanwhile ({why}). In the last one: {first}. If these calls belong to one loop, announce it with "
            "`with model.session(steps=...)`, or optimize the pipeline instead of the model",
            DitoptWarning,
            stacklevel=4,
        )
