"""Schedules and predictors against the published ones."""

import math
import warnings
from typing import Any

import numpy as np
import pytest

from ditopt.artifact import StepGraph
from ditopt.errors import DitoptWarning, SessionError
from ditopt.ir.program import Decision, Interval, Predictor
from ditopt.runtime.policy import Anchor, choose, coefficients, filled, fit, in_window, schedule, table, wanted_sets
from ditopt.runtime.predict import weights


def computed(interval, steps):
    rule = schedule(interval, steps)
    return [s for s in range(steps) if rule(s)]


def decision(name="cache", interval=None, predictor=None):
    predictor = predictor or Predictor()
    slots = (tuple(f"{name}.{i}" for i in range(predictor.order + 1)),)
    return Decision(name, ("blocks.0",), interval or Interval(3, 1, 0), predictor, slots, f"{name}.weights")


@pytest.mark.parametrize(
    ("interval", "golden"),
    [
        (Interval(every=6, first=3), [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]),
        (Interval(every=4, first=2), [0, *range(1, 50, 4)]),
        (Interval(every=3, first=1), list(range(0, 50, 3))),
        (Interval(every=3, first=0), list(range(0, 50, 3))),
        (Interval(every=1, first=1), list(range(50))),
        (Interval(every=6, first=3, last=2), [0, 1, 2, 8, 14, 20, 26, 32, 38, 44, 48, 49]),
        (Interval(mask="1" * 10 + "0" * 40), list(range(10))),
    ],
)
def test_golden_schedules(interval, golden):
    assert computed(interval, 50) == golden


def test_schedule_first_reuse():
    assert schedule(Interval(6, 3), 50).first_reuse() == 3
    assert schedule(Interval(6, 3), None).first_reuse() == 3
    assert schedule(Interval(1), 50).first_reuse() is None
    assert schedule(Interval(6, 3, last=2), 5).first_reuse() is None
    assert schedule(Interval(mask="0010"), None).first_reuse() == 1  # step 0 computes whatever the mask says


def test_beyond_the_declared_steps_everything_computes():
    assert all(schedule(Interval(mask="10"), 2)(s) for s in range(2, 9))
    assert all(schedule(Interval(4, 1, last=1), 9)(s) for s in range(8, 20))


def test_mask_of_another_length():
    with pytest.raises(SessionError, match=r"'attn'.*4 entries.*runs 5 steps"):
        schedule(Interval(mask="1010"), 5, "attn")
    with pytest.raises(SessionError, match="mask"):
        schedule(Interval(mask="10x"), 3)
    with pytest.raises(SessionError, match="every"):
        schedule(Interval(every=-1), 3)


def test_last_without_a_number_of_steps_is_said():
    with pytest.warns(DitoptWarning, match="last 2 steps"):
        rule = schedule(Interval(4, 1, last=2), None)
    assert not rule(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule(Interval(4, 1, last=2), 10)


def taylorseer(order, anchors, values, at):
    """taylor_utils/__init__.py of the official repository: derivative_approximation and taylor_formula."""
    factors: dict[int, Any] = {}
    for i, (step, value) in enumerate(zip(anchors, values, strict=True)):
        new = {0: value}
        for k in range(order):
            if k in factors and i:
                new[k + 1] = (new[k] - factors[k]) / (step - anchors[i - 1])
            else:
                break
        factors = new
    x = at - anchors[-1]
    return sum(factors[i] * x**i / math.factorial(i) for i in factors)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("anchors", [[0], [0, 1], [0, 4, 8, 12], [0, 1, 2, 7, 12], [3, 4, 9, 30, 31, 40]])
def test_taylor_is_taylorseer(order, anchors):
    values = np.random.default_rng(0).normal(size=(len(anchors), 5))
    at = anchors[-1] + 3
    w = weights(Predictor("taylor", order), anchors[::-1], at)
    assert len(w) == order + 1
    recent = values[::-1][: order + 1]
    mine = sum(c * v for c, v in zip(w, recent, strict=False))
    # the published state is a running one; only the last order + 1 values can enter it
    expected = taylorseer(order, anchors[-(order + 1) :], values[-(order + 1) :], at)
    np.testing.assert_allclose(mine, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mine, taylorseer(order, anchors, values, at), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("basis", ["taylor", "newton", "lagrange"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_affine_features_are_exact(basis, order):
    anchors = [17, 12, 5, 1]
    w = weights(Predictor(basis, order), anchors, 21)
    assert sum(w) == pytest.approx(1)
    assert sum(c * (3 - 2 * a) for c, a in zip(w, anchors, strict=False)) == pytest.approx(3 - 2 * 21)


@pytest.mark.parametrize(
    ("order", "anchors", "error"), [(2, [0, 4, 8, 12], -4), (1, [0, 4, 8, 12], -6), (2, [0, 1, 2, 7, 12], -5)]
)
def test_taylor_has_the_quadratic_error_of_the_published_form(order, anchors, error):
    def feature(t):
        return 1 + 2 * t + t * t / 2

    w = weights(Predictor("taylor", order), anchors[::-1], 14)
    predicted = sum(c * feature(a) for c, a in zip(w, anchors[::-1], strict=False))
    assert predicted - feature(14) == pytest.approx(error)


@pytest.mark.parametrize("basis", ["newton", "lagrange"])
def test_the_polynomial_is_exact_for_its_degree(basis):
    anchors = [12.0, 7.0, 2.0, 1.0]
    w = weights(Predictor(basis, 3), anchors, 14.0)
    assert sum(c * (a**3 - 2 * a * a + 5) for c, a in zip(w, anchors, strict=True)) == pytest.approx(
        14**3 - 2 * 196 + 5
    )
    # fewer anchors: a lower degree, and the rest of the slots count nothing
    assert weights(Predictor(basis, 3), anchors[:2], 14.0)[2:] == [0, 0]


@pytest.mark.parametrize("basis", ["taylor", "newton", "lagrange"])
def test_a_repeated_time_divides_by_nothing(basis):
    w = weights(Predictor(basis, 2, "timestep"), [500.0, 500.0, 700.0], 400.0)
    assert w[1] == 0  # the older value of the repeated time
    assert w == pytest.approx([1.5, 0, -0.5])
    assert weights(Predictor(basis, 2, "timestep"), [500.0, 500.0, 500.0], 400.0) == [1, 0, 0]


def test_hold_takes_the_newest():
    assert weights(Predictor("hold", 0), [5], 9) == [1]
    assert weights(Predictor("hold", 2), [5, 3, 1], 9) == [1, 0, 0]


@pytest.mark.parametrize(
    ("anchors", "at"), [([math.nan, 1.0], 3.0), ([2.0, 1.0], math.inf), ([2.0, 2.0 - 4e-16], 1e60), ([], 1.0)]
)
def test_what_is_not_finite_names_the_decision(anchors, at):
    with pytest.raises(SessionError, match="'attn'"):
        weights(Predictor("taylor", 1), anchors, at, "attn")


def test_a_branch_that_missed_a_computation_computes():
    rule = schedule(Interval(every=4, first=1), 50)
    assert choose(rule, [], 3) == "compute"
    assert choose(rule, [Anchor(0)], 3) == "reuse"
    assert choose(rule, [Anchor(0)], 7) == "compute"  # step 4 was missed
    assert choose(rule, [Anchor(7), Anchor(0)], 8) == "compute"
    assert choose(rule, [Anchor(8)], 9) == "reuse"


GRAPHS = (
    StepGraph("full", {"a": "compute", "b": "compute"}, (), 1, flops=10),
    StepGraph("a", {"a": "reuse", "b": "compute"}, (), 1, flops=8),
    StepGraph("b", {"a": "compute", "b": "reuse"}, (), 1, flops=3),
)


def test_a_missing_variant_computes_more():
    assert fit({"a": "reuse", "b": "compute"}, GRAPHS).name == "a"
    assert fit({"a": "compute", "b": "compute"}, GRAPHS).name == "full"
    assert fit({"a": "reuse", "b": "reuse"}, GRAPHS).name == "b"
    assert fit({"a": "reuse", "b": "compute"}, GRAPHS[::2]).name == "full"
    with pytest.raises(SessionError, match="variant"):
        fit({"a": "compute", "b": "compute"}, GRAPHS[1:])


def test_the_table_is_a_dry_run():
    d = decision("a", Interval(4, 2), Predictor("taylor", 1))
    rows = table([d], 8)
    assert [r.choices["a"] for r in rows] == ["compute"] * 2 + ["reuse"] * 3 + ["compute"] + ["reuse"] * 2
    assert rows[4].weights["a"] == [4, -3]
    assert rows[6].weights["a"] == [1.25, -0.25]
    assert rows[0].weights["a"] == [0, 0]


def test_the_table_follows_the_compiled_variants():
    rows = table([decision("a", Interval(2, 1)), decision("b", Interval(3, 1))], 6, graphs=GRAPHS)
    assert [(r.choices["a"], r.choices["b"]) for r in rows[:3]] == [
        ("compute", "compute"),
        ("compute", "reuse"),  # both may be reused: no such variant
        ("compute", "reuse"),  # step 2 computes a by its own schedule
    ]
    assert rows[3].choices == {"a": "reuse", "b": "compute"}


def test_taylorseer_forms_no_difference_before_the_last_warm_up_step():
    d = decision("a", Interval(6, 3), Predictor("taylor", 2))
    rows = table([d], 12)
    assert rows[3].weights["a"] == [2, -1, 0]  # steps 2 and 1; step 0 entered no difference
    assert rows[9].weights["a"][2] != 0


def test_time_in_timesteps_needs_them():
    d = decision("a", Interval(3, 2), Predictor("lagrange", 1, "timestep"))
    with pytest.raises(SessionError, match="pass the timesteps"):
        table([d], 5)
    with pytest.raises(SessionError, match="4 times given for 5"):
        table([d], 5, [1.0] * 4)
    assert table([d], 5, [1000, 900, 600, 300, 0])[2].weights["a"] == pytest.approx([4, -3])


def test_a_window_in_the_models_time():
    """Outside of it, and at its ends, every step computes and is kept; inside the interval counts from step 0."""
    rule = schedule(Interval(4, low=100.0, high=800.0), None)
    kept = [Anchor(2)]
    assert [choose(rule, kept, 3, t) for t in (900.0, 800.0, 799.0, 101.0, 100.0, None)] == [
        "compute", "compute", "reuse", "reuse", "compute", "compute",
    ]  # fmt: skip
    assert choose(rule, [Anchor(3)], 4, 500.0) == "compute"
    times = [1000.0 - 100 * k for k in range(10)]
    rows = table([decision(interval=Interval(4, low=100.0, high=800.0))], 10, times)
    assert "".join(r.choices["cache"][0] for r in rows) == "cccrcrrrcc"
    with pytest.raises(SessionError, match="pass the timesteps of the 10 steps"):
        table([decision(interval=Interval(4, low=100.0, high=800.0))], 10)


def test_fitted_coefficients_hold_for_the_steps_that_they_were_fitted_to():
    rows = ((), (0.5,), (), (1.5, -0.25), (3.0,))
    d = decision("cache0", Interval(mask="10100"), Predictor("lagrange", 1, "step", rows))
    told = lambda computed, step: coefficients(d, d.predictor, [Anchor(s) for s in computed], Anchor(step))  # noqa: E731
    assert told([0], 1) == [0.5, 0.0]
    assert told([2, 0], 3) == [1.5, -0.25]
    assert told([2, 0], 4) == [3.0, 0.0]
    assert told([2], 3) == [1.0, 0.0]  # of a branch that was not called at step 0: the polynomial
    assert told([2, 1], 3) == [2.0, -1.0]
    assert told([1], 4) == [1.0, 0.0]
    assert told([4, 2], 5) == [1.5, -0.5]  # beyond the mask
    (row,) = [r.weights["cache0"] for r in table([d], 5) if r.step == 3]
    assert list(row) == [1.5, -0.25]


# -- learned predictors ------------------------------------------------------------------------------------------------

LEARNED = Decision(
    "cache0", ("blocks.0",), Interval(2, 1), Predictor("learned", 2), (("a", "b", "c"),), "",
    row="cache0.row", rows=8, reads=(0, 1, 0, 2, 0, 3, 0, 0),
)  # fmt: skip


def test_a_learned_predictor_reuses_where_it_was_trained_and_its_window_is_full():
    rows = table([LEARNED], 8)
    assert "".join(r.choices["cache0"][0] for r in rows) == "crcrcrcc"
    assert all(r.weights["cache0"] in ([], [0.0] * 3) for r in rows), "its weights are tables of the graph"
    for step, held, choice in ((3, 1, "compute"), (3, 2, "reuse"), (5, 2, "compute"), (7, 9, "compute")):
        assert filled([LEARNED], {"cache0": "reuse"}, {"cache0": held}, step) == {"cache0": choice}
    assert filled([LEARNED], {"cache0": "compute"}, {}, 9) == {"cache0": "compute"}
    with pytest.raises(SessionError, match="its predictor is for 8 steps and this is step 8; calibrate for more"):
        filled([LEARNED], {"cache0": "reuse"}, {"cache0": 8}, 8)


def test_what_a_window_holds():
    def after(choice, half_before=(), half_after=()):
        return in_window([LEARNED], {"cache0": choice}, {"cache0": 4}, half_before, half_after)["cache0"]

    assert (after("compute"), after("reuse"), after("bypass")) == (5, 5, 0)
    assert after("compute", half_after=["cache0"]) == 0, "half of the batch has no value"
    assert after("compute", half_before=["cache0"]) == 1, "and none before"
    assert in_window([], {}, {}, (), ()) == {}


def test_a_choice_among_paths_that_are_not_taken_is_none():
    """Later steps take another path of the partial step; a step that computes everything takes neither."""
    full = Decision("tokens0", ("blocks.0",), Interval(0, 1, resets="5"), Predictor(), (("tokens0.0.0",),), "")
    path = Decision("tokens1", ("blocks.0.tokens0",), Interval(0, 0, since=0.5), Predictor("none"), (), "")
    rows = [tuple(r.choices.values()) for r in table((full, path), 8)]
    first, second, all_ = ("reuse", "compute"), ("reuse", "reuse"), ("compute", "compute")
    assert rows == [all_, first, first, first, second, all_, second, second]
    assert set(wanted_sets((full, path), 8)) == {frozenset(), frozenset({"tokens0"}), frozenset({"tokens0", "tokens1"})}
