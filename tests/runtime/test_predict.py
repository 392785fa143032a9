"""Coefficients of predictors, against the formulas they come from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ditopt.errors import SessionError
from ditopt.ir.program import Predictor
from ditopt.runtime.modes import modes
from ditopt.runtime.predict import HORIZON, weights


def told(predictor: Predictor, anchors, at, feature, **more):
    """What ``predictor`` says of ``feature`` at ``at``, from its values at ``anchors`` (newest first)."""
    w = weights(predictor, anchors, at, **more)
    assert len(w) == predictor.size
    return sum(a * feature(x) for a, x in zip(w, anchors, strict=False))


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["taylor", "newton", "lagrange"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_series_are_exact_for_affine_features(basis, order):
    anchors = [12, 7, 2, 1][: order + 1]
    assert told(Predictor(basis, order), anchors, 15, lambda t: 3 - 2 * t) == pytest.approx(-27)


def test_ab2_is_exact_for_affine_features_and_half_a_step_off_a_quadratic():
    assert told(Predictor("ab2"), [9, 6, 3], 11, lambda t: 3 - 2 * t) == pytest.approx(-19)
    # newest + k (3/2 f0 - 1/2 f1) with f the last two slopes
    slope0, slope1 = (81 - 36) / 3, (36 - 9) / 3
    assert told(Predictor("ab2"), [9, 6, 3], 11, lambda t: t * t) == pytest.approx(
        81 + 2 * (1.5 * slope0 - 0.5 * slope1)
    )


def test_ab2_with_two_values_is_the_line_through_them():
    assert weights(Predictor("ab2"), [4, 2], 5) == pytest.approx([1.5, -0.5, 0.0])


def test_taylor_misses_a_quadratic_by_the_published_amount():
    """The method sheet of TaylorSeer: 1 + 2t + t^2/2 from 8, 4, 0 at 10 with order 2 is G2 k d / 2 too small."""
    feature = lambda t: 1 + 2 * t + t * t / 2  # noqa: E731
    assert told(Predictor("taylor", 2), [12, 8, 4], 14, feature) - feature(14) == pytest.approx(-4)
    assert told(Predictor("taylor", 1), [12, 8], 14, feature) - feature(14) == pytest.approx(-6)


def test_hermite_is_the_series_in_contracted_hermite_polynomials():
    anchors, at, sigma = [8.0, 4.0, 0.0], 10.0, 0.5
    feature = math.exp
    g0, g1 = feature(8), (feature(8) - feature(4)) / 4
    g2 = (g1 - (feature(4) - feature(0)) / 4) / 4
    k = at - anchors[0]
    h1, h2 = 2 * (sigma * k), 4 * (sigma * k) ** 2 - 2
    want = g0 + g1 * sigma * h1 + g2 / 2 * sigma**2 * h2
    assert told(Predictor("hermite", 2), anchors, at, feature) == pytest.approx(want)


def test_hermite_of_order_one_damps_the_slope_by_half():
    w = weights(Predictor("hermite", 1), [4, 2], 6)
    assert w == pytest.approx([1 + 0.5 * 2 / 2, -0.5 * 2 / 2])


@pytest.mark.parametrize(("progress", "want"), [(0.0, [1, 0]), (0.5, [1.5, -0.5]), (1.0, [2, -1])])
def test_ramp_adds_more_of_the_last_change_as_the_request_goes_on(progress, want):
    assert weights(Predictor("ramp"), [6, 4], 7, progress=progress) == pytest.approx(want)


def test_ramp_needs_to_know_how_long_the_request_is():
    with pytest.raises(SessionError, match=r"'cache'.*needs the number of steps"):
        weights(Predictor("ramp"), [6, 4], 7)


def test_foca_adds_half_of_both_changes_and_fades_beyond_its_horizon():
    assert weights(Predictor("foca"), [6, 4], 8) == pytest.approx([2, -1, 1, -1])
    far, blend = weights(Predictor("foca"), [6, 4], 20), HORIZON / 14
    assert far == pytest.approx([1 + 1.5 * blend, -1.5 * blend, 1.5 * blend, -1.5 * blend])
    assert weights(Predictor("foca"), [6], 8) == pytest.approx([1, 0, 0, 0])


# -- fewer values, repeated ones, and what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["hold", "taylor", "newton", "hermite", "ab2", "foca", "dmd"])
def test_one_value_is_held(basis):
    predictor = Predictor(basis, 2 if basis in ("taylor", "newton", "hermite") else 0)
    w = weights(predictor, [5], 9)
    assert w[0] == 1
    assert not any(w[1:])
    assert len(w) == predictor.size


def test_a_repeated_position_carries_no_slope():
    assert weights(Predictor("newton", 2), [5, 5, 3], 6) == pytest.approx([1.5, 0, -0.5])


def test_what_is_not_finite_is_refused():
    with pytest.raises(SessionError, match=r"'warm'.*must be finite"):
        weights(Predictor("newton", 1), [1.0, math.nan], 2.0, "warm")
    with pytest.raises(SessionError, match="nothing was computed yet"):
        weights(Predictor(), [], 2.0)
    with pytest.raises(SessionError, match="coefficients"):
        weights(Predictor("newton", 1), [0.0, 1e-300], 1e300)


# -- dynamic modes -----------------------------------------------------------------------------------------------------


def snapshots(times, seed=0):
    """Values (n, 40) of a decaying and an oscillating mode."""
    rng = np.random.default_rng(seed)
    a, b, c = rng.normal(size=(3, 40))
    return np.stack([0.95**t * a + np.cos(0.1 * t) * b + np.sin(0.1 * t) * c for t in times])


@pytest.mark.parametrize("ahead", [1, 2, 0.5])
def test_modes_are_exact_for_modal_dynamics(ahead):
    v = snapshots([15, 12, 9, 6, 3, 0])
    found = np.array(modes((v @ v.T).tolist(), ahead)) @ v
    np.testing.assert_allclose(found, snapshots([15 + 3 * ahead])[0], atol=1e-5)


def test_modes_of_a_constant_hold_it():
    v = np.ones((5, 7))
    assert np.array(modes((v @ v.T).tolist(), 3)) @ v == pytest.approx(np.ones(7))


def test_dmd_uses_the_newest_evenly_spaced_values():
    times = [15, 12, 9, 6, 1]
    v = snapshots(times)
    gram = (v @ v.T).tolist()
    w = np.array(weights(Predictor("dmd"), times, 18, gram=gram))[:5]
    assert w[4] == 0
    np.testing.assert_allclose(w @ v, snapshots([18])[0], atol=1e-4)


def test_dmd_without_enough_of_them_is_hermite_of_order_one():
    v = snapshots([9, 8, 5, 0])
    gram = (v @ v.T).tolist()
    found = weights(Predictor("dmd"), [9, 8, 5, 0], 10, gram=gram)
    assert found[:2] == pytest.approx(weights(Predictor("hermite", 1), [9, 8], 10))
    assert not any(found[2:])
