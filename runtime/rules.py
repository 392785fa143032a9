"""Host decisions: from a number that the loop measured to compute or reuse.

A Course is what a rule remembers of one guidance branch. ``decide`` is pure: the new Course becomes part of the session
only when the step succeeded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ditopt.errors import SessionError
from ditopt.ir.program import Rule


@dataclass(frozen=True)
class Course:
    """``sum``: of what was measured since the last computed step; ``spent``: the part of it that reused steps measured;
    ``run``, ``total``: reused steps in a row, and in the request; ``hold``: reused steps that the book still grants,
    None where it has to be asked; ``held``: distance between the two newest computed steps."""

    sum: float = 0.0
    spent: float = 0.0
    run: int = 0
    total: int = 0
    hold: int | None = None
    held: int = 1

    def computed(self) -> Course:
        """After a step that computed, for whatever reason."""
        return replace(self, sum=0.0, spent=0.0, run=0, hold=None, held=self.run + 1)


def course_of(name: str, rule: Rule, courses: Mapping[str, Course]) -> Course:
    """What the rule of decision ``name`` goes by: its own course, with the sum of the one that it shares."""
    own = courses.get(name, Course())
    return replace(own, sum=courses.get(rule.since, Course()).sum) if rule.since else own


def asks(rule: Rule, course: Course) -> bool:
    """Whether the rule has to read its signal to decide the next step that no schedule decides."""
    if (rule.longest and course.run >= rule.longest) or (rule.most and course.total >= rule.most):
        return False
    return rule.test != "book" or course.hold is None


def decide(rule: Rule, course: Course, measured: float | None, name: str = "cache") -> tuple[bool, Course]:
    """Whether to reuse, and what to remember. ``measured``: the signal, None where ``asks`` said that it need not be
    read. SessionError where it is not a number."""
    if measured is None and rule.test != "book":
        return False, course.computed()
    if measured is not None and math.isnan(measured):
        raise SessionError(f"decision {name!r}: its signal is NaN; look at the latent and at the sampler")
    if rule.test == "book":
        hold = course.hold
        if measured is not None:
            hold = looked_up(rule, measured / course.held) - 1
        capped = (rule.longest and course.run >= rule.longest) or (rule.most and course.total >= rule.most)
        if hold is None or hold <= 0 or capped:
            return False, course.computed()
        return True, replace(course, hold=hold - 1, run=course.run + 1, total=course.total + 1)
    assert measured is not None
    value = shaped(rule, measured)
    total = course.sum + value
    spent = course.spent + value
    below = (total if rule.test == "sum" else value) < rule.limit
    if not below or (rule.budget and spent > rule.budget):
        return False, course.computed()
    return True, replace(course, sum=total, spent=spent, run=course.run + 1, total=course.total + 1)


def shaped(rule: Rule, measured: float) -> float:
    """What was measured, clamped to the domain of the polynomial and put through it; never negative."""
    if rule.domain:
        measured = min(max(measured, rule.domain[0]), rule.domain[1])
    if not rule.polynomial:
        return measured
    value = 0.0
    for c in rule.polynomial:
        value = value * measured + c
    return max(value, 0.0)


def looked_up(rule: Rule, measured: float) -> int:
    """How many steps after the last computed one the next is: the book's number at the first bound above what was
    measured."""
    return next((int(steps) for bound, steps in rule.book if measured < bound), 1)
