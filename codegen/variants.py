"""Which combinations of choices become step graphs, where not every one can.

A step that wants a combination without a graph runs one that computes more, so a set of graphs is worth the FLOPs that
it lets the steps skip.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from ditopt.ir.cost import step_flops
from ditopt.ir.program import Decision, Program

Choices = Mapping[str, str]

MOST = 8
"""Step graphs of one program."""

_GROUPS = 8  # neighbouring decisions are taken together where there are more
_CROSSED = 64  # combinations up to which what two of them share is a candidate too


def combinations(program: Program, most: int = MOST) -> list[Choices]:
    """The combinations worth a graph where no schedule says what will be asked for: everything computed first, then
    most reuse first.

    All of them where they are at most ``most``; else those that let the most be skipped if neighbouring decisions,
    whose signals are alike, reuse together.
    """
    names = [d.name for d in program.decisions]
    if 2 ** len(names) <= most:
        sets = [frozenset(itertools.compress(names, row)) for row in itertools.product((0, 1), repeat=len(names))]
        sets.sort(key=len, reverse=True)
        return without_skipped(program.decisions, choices_of(names, [frozenset(), *sets[:-1]]))
    size = -(-len(names) // _GROUPS)
    groups = [frozenset(names[i : i + size]) for i in range(0, len(names), size)]
    runs = [frozenset[str]().union(*groups[i:j]) for i, j in itertools.combinations(range(len(groups) + 1), 2)]
    chosen = pick({**dict.fromkeys(runs, 1), frozenset(names): len(names)}, worth(program), most)
    made = choices_of(names, [frozenset(), *sorted(chosen[1:], key=len, reverse=True)])
    return without_skipped(program.decisions, made)


def without_skipped(decisions: Sequence[Decision], rows: Sequence[Choices]) -> list[Choices]:
    """``rows``, where a call that is skipped as a branch of guidance neither computes nor keeps anything else."""
    calls = {d.name for d in decisions if d.guidance == "calls"}
    out: list[Choices] = []
    for row in rows:
        if any(row[n] == "reuse" for n in calls):
            row = {n: c if n in calls else "bypass" for n, c in row.items()}
        if row not in out:
            out.append(row)
    return out


def choices_of(names: Sequence[str], reused: Sequence[frozenset[str]]) -> list[Choices]:
    """Sets of decisions that reuse, as choices."""
    return [{n: "reuse" if n in one else "compute" for n in names} for one in reused]


def worth(program: Program) -> dict[str, int]:
    """The FLOPs that a step skips by each decision."""
    return {d.name: max(_skipped(program, d), 1) for d in program.decisions}


def _skipped(program: Program, decision: Decision) -> int:
    if "model" in decision.regions:
        return step_flops(program)[0]
    flops = {r.id: r.flops for r in program.regions}
    return sum(flops.get(r, 0) for r in decision.regions)


def pick(wanted: Mapping[frozenset[str], int], worth: Mapping[str, int], most: int = MOST) -> list[frozenset[str]]:
    """At most ``most`` sets of decisions to reuse, of which steps skip the most, the empty one first.

    ``wanted``: the sets that steps ask for, with how often; ``worth``: of each decision. Greedy: each set is the one
    that adds most to those before it. A step uses the best set inside its own.
    """
    candidates = set(wanted)
    if len(candidates) <= _CROSSED:
        candidates |= {a & b for a, b in itertools.combinations(wanted, 2)}
    order = sorted(candidates - {frozenset()}, key=lambda s: (-len(s), sorted(s)))
    gain = {s: sum(worth[n] for n in s) for s in order}
    inside = {s: [w for w in wanted if s <= w] for s in order}
    best = dict.fromkeys(wanted, 0)
    chosen: list[frozenset[str]] = [frozenset()]
    while order and len(chosen) < most:
        added = [sum(wanted[w] * max(gain[s] - best[w], 0) for w in inside[s]) for s in order]
        if not max(added):
            break
        taken = order.pop(added.index(max(added)))
        chosen.append(taken)
        best |= {w: max(best[w], gain[taken]) for w in inside[taken]}
    return chosen
