"""Host decisions by rules: thresholds, sums, books, guards, and liveness of what static schedules keep."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from ditopt.errors import SessionError
from ditopt.ir.program import Decision, Interval, Predictor, Rule
from ditopt.runtime.policy import (
    BYPASS,
    COMPUTE,
    REUSE,
    Anchor,
    choose,
    distinct,
    needed,
    schedule,
    table,
    walk,
    wanted_sets,
)
from ditopt.runtime.rules import Course, asks, course_of, decide, shaped


def run(rule: Rule, signals) -> str:
    """The mask that a rule makes of a series of signals: 1 computes."""
    course, out = Course(), ""
    for signal in signals:
        reuse, course = decide(rule, course, signal if asks(rule, course) else None)
        out += "0" if reuse else "1"
    return out


def test_below_reuses_while_the_signal_is_small():
    assert run(Rule("s", "below", 0.1), [0.05, 0.1, 0.09, 0.2, 0.0]) == "01010"


def test_a_threshold_of_zero_never_reuses():
    assert run(Rule("s", "below", 0.0), [0.0, 0.1, 0.0]) == "111"
    assert run(Rule("s", "sum", 0.0), [0.0, 0.1, 0.0]) == "111"


def test_sum_adds_up_and_starts_anew_when_a_step_computes():
    assert run(Rule("s", "sum", 0.5), [0.2, 0.2, 0.2, 0.2, 0.2, 0.2]) == "001001"


def three_ways(inner: Rule, outer: Rule, signals) -> str:
    """Of two decisions that share a sum: h where both reuse, p where the outer one does alone, f where none does."""
    courses: dict[str, Course] = {}
    out = ""
    for signal in signals:
        made = {n: decide(r, course_of(n, r, courses), signal) for n, r in (("inner", inner), ("outer", outer))}
        courses = {name: course for name, (_, course) in made.items()}
        out += "h" if made["inner"][0] else "p" if made["outer"][0] else "f"
    return out


def test_two_limits_of_one_sum_are_three_ways():
    signals = [0.3, 0.3, 0.3, 0.1, 0.3, 0.3, 0.3, 0.9]
    full = three_ways(Rule("s", "sum", 0.5, since="outer"), Rule("s", "sum", 0.8), signals)
    assert full == "hpfhhpff", "a partial step leaves the sum as it is"
    assert three_ways(Rule("s", "sum", 0.5), Rule("s", "sum", 0.8, since="inner"), signals) == "hphhphpf"
    assert full != three_ways(Rule("s", "sum", 0.5), Rule("s", "sum", 0.8), signals), "each with a sum of its own"


def test_a_polynomial_is_applied_to_the_clamped_signal_and_never_negative():
    rule = Rule("s", "sum", 1.0, polynomial=(2.0, -1.0, 0.5), domain=(0.1, 0.3))
    assert shaped(rule, 0.2) == pytest.approx(2 * 0.04 - 0.2 + 0.5)
    assert shaped(rule, 9.0) == pytest.approx(2 * 0.09 - 0.3 + 0.5)
    assert shaped(Rule("s", polynomial=(1.0, -5.0)), 1.0) == 0.0


def test_guards_bound_runs_totals_and_budgets():
    signals = [0.05] * 8
    assert run(Rule("s", "below", 0.1, longest=2), signals) == "00100100"
    assert run(Rule("s", "below", 0.1, most=3), signals) == "00011111"
    assert run(Rule("s", "below", 0.1, budget=0.12), signals) == "00100100"


def test_a_guard_that_forbids_reuse_reads_nothing():
    rule = Rule("s", "below", 0.1, longest=1)
    assert asks(rule, Course())
    assert not asks(rule, Course(run=1))


def test_a_book_says_how_far_the_next_computed_step_is_by_the_change_per_step():
    rule = Rule("s", "book", lag=True, book=((0.1, 3.0), (0.2, 2.0), (math.inf, 1.0)))
    course, read = Course(), []
    out = ""
    for signal in (0.05, None, None, 0.45, None, 0.9):
        if asks(rule, course):
            read.append(signal)
        reuse, course = decide(rule, course, signal if asks(rule, course) else None)
        out += "0" if reuse else "1"
    # the next computed step is 3 after this one; 0.45 / 3 = 0.15: 2 after; 0.9 / 2 = 0.45: the very next
    assert out == "001011"
    assert read == [0.05, 0.45, 0.9]


def test_a_signal_that_is_no_number_is_an_error_that_names_the_decision():
    with pytest.raises(SessionError, match=r"'early'.*NaN"):
        decide(Rule("s", "below", 0.1), Course(), math.nan, "early")


# -- static schedules --------------------------------------------------------------------------------------------------


def decision(mask: str, predictor: Predictor = Predictor(), name: str = "c") -> Decision:  # noqa: B008
    return Decision(name, ("blocks.0",), Interval(mask=mask), predictor, (), "")


def test_needed_values_against_a_count_of_what_later_steps_read():
    rng = random.Random(0)
    for _ in range(60):
        mask = "1" + "".join(rng.choice("01") for _ in range(11))
        d = decision(mask, rng.choice([Predictor(), Predictor("taylor", 2), Predictor("ab2")]))
        held = {s: [a for a in range(s + 1) if mask[a] == "1"][::-1] for s in range(12)}  # newest first
        for step in range(12):
            read = {a for s in range(step + 1, 12) if mask[s] == "0" for a in held[s][: d.predictor.anchors]}
            want = [a for a in held[step] if a in read]
            found = needed(d, schedule(d.schedule, 12), step)
            assert want == held[step][:found] or (found > len(held[step]) and want == held[step])  # type: ignore[operator]


def test_what_is_measured_or_of_unknown_length_says_nothing_of_later_readers():
    ruled = Decision("c", (), Interval(0), Predictor(), (), "", rule=Rule("s"))
    window = Decision("d", (), Interval(2), Predictor("foca"), (), "d.weights")
    plain = Decision("e", (), Interval(2), Predictor(), (), "")
    assert needed(ruled, schedule(ruled.schedule, 8), 0) is None
    assert needed(window, schedule(window.schedule, 8), 0) is None
    assert needed(plain, schedule(plain.schedule, None), 0) is None
    assert needed(plain, schedule(plain.schedule, 8), 0) == 1


def test_what_is_written_in_parts_is_kept_until_the_last_step_that_reads_it():
    """And its first value is written whole: what would leave a part of it out computes at that step."""
    cache = replace(decision("1110110111", name="cache"), needs=("tokens",))
    tokens = replace(decision("1000000000", name="tokens"), needs=("cache",))
    rule = schedule(cache.schedule, 10)
    assert [needed(cache, rule, step) for step in range(10)] == [1] * 6 + [0] * 4
    assert needed(replace(cache, needs=()), rule, 0) == 0
    late = replace(cache, schedule=Interval(2, since=0.5))
    rows = [(now.step, row) for now, row, _ in walk([late, tokens], 10)]
    assert [s for s, row in rows if row["tokens"] == COMPUTE] == [0, 5]
    assert [s for s, row in rows if row["cache"] == REUSE] == [6, 8]
    alone = [row["tokens"] for _, row, _ in walk([replace(late, needs=()), tokens], 10)]
    assert alone == [COMPUTE] + [REUSE] * 9


def test_distinct_rows_are_those_that_a_request_takes():
    found = distinct([decision("110100", name="a"), decision("101100", name="b")], 6)
    assert found[0] in ({"a": "compute", "b": "compute"}, {"a": "reuse", "b": "reuse"})
    pairs = {(row["a"], row["b"]) for row in found}
    assert pairs == {("compute", "compute"), ("compute", "reuse"), ("reuse", "compute"), ("reuse", "reuse")}
    assert len(found) == 4


def test_wanted_sets_are_those_that_a_request_asks_for():
    found = wanted_sets([decision("110100", name="a"), decision("101100", name="b")], 6)
    assert found == {frozenset(): 2, frozenset("a"): 1, frozenset("b"): 1, frozenset("ab"): 2}


def test_what_a_rule_decides_may_go_either_way():
    ruled = [Decision(n, (), Interval(0, 2), Predictor(), (), "", rule=Rule("s")) for n in "abcde"]
    plain = decision("1010", name="z")
    assert wanted_sets([ruled[0], plain], 4) == {
        frozenset(): 2, frozenset("z"): 2, frozenset("a"): 1, frozenset("az"): 1
    }  # fmt: skip
    sizes = sorted({len(s) for s in wanted_sets(ruled, 4)})
    assert sizes == [0, 1, 5]


def test_no_cadence_means_that_only_the_ends_must_compute():
    rule = schedule(Interval(0, 2, 1), 8)
    assert [rule(s) for s in range(8)] == [True, True, False, False, False, False, False, True]


# -- windows -----------------------------------------------------------------------------------------------------------


def choices(interval: Interval, steps: int) -> str:
    """c, r or b for each step of a dry run."""
    d = Decision("c", (), interval, Predictor(), (), "")
    return "".join(row.choices["c"][0] for row in table([d], steps))


def test_outside_of_its_window_a_schedule_computes_and_keeps_nothing():
    assert choices(Interval(2, until=0.5), 12) == "crcrcrbbbbbb"
    assert choices(Interval(3, since=0.5), 12) == "bbbbbbcrrcrr"
    assert choices(Interval(2, 2, since=0.25, until=0.75), 12) == "bbbcrcrcrbbb"


def test_the_first_step_of_a_window_computes():
    rule = schedule(Interval(2, since=0.5), 8)
    assert choose(rule, (), 3) == BYPASS
    assert choose(rule, (), 4) == COMPUTE
    assert choose(rule, (Anchor(4),), 5) == REUSE


def test_a_window_needs_the_number_of_steps():
    with pytest.raises(SessionError, match=r"'c'.*0.5 to 1.*number of steps is unknown"):
        schedule(Interval(2, since=0.5), None, "c")


def test_two_windows_make_the_rows_of_both():
    early = Decision("a", (), Interval(2, until=0.5), Predictor(), (), "")
    late = Decision("b", (), Interval(2, since=0.5), Predictor(), (), "")
    found = {(row["a"], row["b"]) for row in distinct([early, late], 8)}
    assert found == {(COMPUTE, BYPASS), (REUSE, BYPASS), (BYPASS, COMPUTE), (BYPASS, REUSE)}
    rules = {d.name: schedule(d.schedule, 8) for d in (early, late)}
    assert [needed(early, rules["a"], s) for s in range(8)] == [1, 0, 1, 0, 0, 0, 0, 0]
    assert [needed(late, rules["b"], s) for s in range(4, 8)] == [1, 0, 1, 0]
