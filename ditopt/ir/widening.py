"""Three ways to run a step by one number: reuse all of it, compute part of it, compute all of it.

A decision about the model's output reuses while the sum of what was measured is below its limit. An earlier decision,
which runs blocks on part of their tokens, shares that sum and has a limit further out: below it a step that is not
reused is partial, beyond it full. So the host reads one number a step, and each decision still has two answers.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from ditopt.errors import RecipeError
from ditopt.ir.program import Decision, Program

Restart = Literal["full", "any"]
"""Which steps set the sum to 0: full ones, or partial ones too."""


def partial_decision(program: Program) -> Decision | None:
    """The decision by which a step runs on part of its tokens, where there is one."""
    parts = {r.id for r in program.regions if r.role == "part"}
    return next((d for d in program.decisions if d.slots and {f"{r}.{d.name}" for r in d.regions} & parts), None)


def widened(program: Program, partial: Decision, factor: float, restart: Restart) -> Program:
    """``program``, whose newest decision has a rule that adds up: below ``factor`` times its limit the steps that it
    does not reuse are those of ``partial``. RecipeError where the two have different schedules: a step that one of them
    computes by schedule sets the sum of both to 0."""
    newest = program.decisions[-1]
    assert newest.rule is not None
    if newest.schedule != partial.schedule:
        raise RecipeError(
            f"cache{{partial={factor:g}}} and {partial.name} share a sum, so the same steps must begin it anew: give "
            f"both the same first, every, last, mask and resets (here {newest.schedule}, there {partial.schedule})"
        )
    inner = newest.rule
    outer = dataclasses.replace(inner, limit=inner.limit * factor, longest=0, most=0, budget=0.0)
    if partial.rule is not None:
        outer = dataclasses.replace(outer, need=partial.rule.need, room=partial.rule.room)
    if restart == "full":
        inner = dataclasses.replace(inner, since=partial.name)
    else:
        outer = dataclasses.replace(outer, since=newest.name)
    rules = {newest.name: inner, partial.name: outer}
    return program.replace(
        decisions=tuple(dataclasses.replace(d, rule=rules.get(d.name, d.rule)) for d in program.decisions)
    )
