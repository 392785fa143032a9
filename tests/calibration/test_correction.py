"""Corrections and ERTACache's tables against independent regressions and hand-made trajectories."""

import numpy as np
import pytest

from ditopt.calibration.correction import (
    affine,
    decoupled,
    erta_mask,
    ertacache,
    held,
    phi,
    rectify,
    redistributed,
    reused_outputs,
)
from ditopt.errors import BadInput

MASK = "1001010"


def walk(seed, n=3, steps=7, tokens=4, channels=5):
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(n, steps, tokens, channels)), axis=1)


def mse(a, b):
    return ((a - b) ** 2).mean(axis=tuple(range(a.ndim - 1)))


def test_held_is_the_newest_computed_value():
    v = walk(0)
    for step, anchor in enumerate((0, 0, 0, 3, 3, 5, 5)):
        np.testing.assert_array_equal(held(v, MASK)[:, step], v[:, anchor])


@pytest.mark.parametrize("seed", range(5))
def test_affine_is_the_bounded_least_squares_fit(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6, 7, 8)) * rng.uniform(0.1, 3, size=8)
    y = x * rng.uniform(-1, 3, size=8) + rng.normal(size=8) + 0.3 * rng.normal(size=x.shape)
    scale, shift = affine(y, x)
    bounded = 0
    for c in range(8):
        slope, _ = np.polyfit(x[..., c].ravel(), y[..., c].ravel(), 1)
        bounded += not 0 <= slope <= 2
        assert scale[c] == pytest.approx(min(max(slope, 0), 2))
        assert shift[c] == pytest.approx(y[..., c].mean() - scale[c] * x[..., c].mean())
    assert bounded
    assert (mse(scale * x + shift, y) <= mse(x, y)).all()


def test_affine_of_a_constant_channel_moves_it():
    y = np.random.default_rng(0).normal(size=(9, 2))
    scale, shift = affine(y, np.full((9, 2), 1e6 / 3))
    np.testing.assert_array_equal(scale, [1, 1])
    np.testing.assert_allclose(shift, y.mean(axis=0) - 1e6 / 3)


def test_decoupled_tables():
    v = walk(1)
    scale, shift = decoupled(v, MASK)
    assert scale.shape == shift.shape == (7, 5)
    old = held(v, MASK)
    for step, digit in enumerate(MASK):
        if digit == "1":
            assert (scale[step] == 1).all()
            assert (shift[step] == 0).all()
        else:
            a, b = affine(v[:, step], old[:, step])
            np.testing.assert_array_equal([scale[step], shift[step]], [a, b])
            assert (mse(a * old[:, step] + b, v[:, step]) < mse(old[:, step], v[:, step])).all()


def test_rectification_is_not_bounded_and_nulls_an_affine_error():
    v, true_scale = walk(2), 4.0
    guess = (v - 0.7) / true_scale
    scale, shift = rectify(v, guess, MASK)
    for step, digit in enumerate(MASK):
        if digit == "0":
            np.testing.assert_allclose(scale[step], true_scale)  # the other correction stops at 2
            np.testing.assert_allclose(shift[step], 0.7)
            assert (affine(v[:, step], guess[:, step])[0] == 2).all()
            np.testing.assert_allclose(scale[step] * guess[:, step] + shift[step], v[:, step])
        else:
            assert (scale[step] == 1).all()
            assert (shift[step] == 0).all()


def test_rectification_is_the_regression_of_the_error():
    v, x = walk(3), walk(4)
    guess = reused_outputs(x, v, MASK)
    scale, shift = rectify(v, guess, MASK)
    step, c = 4, 2
    t, e = guess[:, step, :, c].ravel(), (guess - v)[:, step, :, c].ravel()
    k = np.cov(t, e, bias=True)[0, 1] / np.var(t)
    assert scale[step, c] == pytest.approx(1 - k)
    assert shift[step, c] == pytest.approx(-(e.mean() - k * t.mean()))
    np.testing.assert_allclose(guess[:, step], x[:, step] + v[:, 3] - x[:, 3])


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 9.0])
def test_erta_mask_against_a_loop(threshold):
    r = np.random.default_rng(5).normal(size=(3, 1, 4, 5)) * 3 + walk(5, steps=15)
    r = r[:, :15]
    kept, mask = r[:, 0], "1"
    for s in range(1, 15):
        far = np.mean([np.abs(k - own).sum() / np.abs(own).sum() for k, own in zip(kept, r[:, s], strict=True)])
        mask += "0" if far < threshold else "1"
        kept = kept if far < threshold else r[:, s]
    assert erta_mask(r, threshold) == mask
    assert (mask == "1" * 15) == (threshold == 0)
    assert (mask == "1" + "0" * 14) == (threshold == 9)


def test_phi_against_a_loop():
    x, v = walk(6), walk(7)
    v[:, :, :, 0] += 10  # so that some phi lie inside (0, 1)
    found, guess = phi(x, v, MASK), reused_outputs(x, v, MASK)
    for i in range(7):
        if MASK[i] == "1" or i == 6:
            assert found[i] == 1
        else:
            one = [1 - abs(guess[n, i] - v[n, i]).sum() / abs(v[n, i] - v[n, i + 1]).sum() for n in range(3)]
            assert found[i] == pytest.approx(np.mean([min(max(p, 0), 1) for p in one]))


def test_phi_by_hand():
    """Velocities 0, 1, 3, 3 with an input of 0: held at 0, step 1 errs by 1 of the 2 it turns by, step 2 by 3 of 0."""
    v = np.array([0.0, 1.0, 3.0, 3.0]).reshape(1, 4, 1, 1)
    np.testing.assert_allclose(phi(np.zeros_like(v), v, "1000"), [1, 0.5, 0, 1])
    np.testing.assert_allclose(phi(np.zeros_like(v), np.ones_like(v), "1000"), [1, 1, 1, 1])


def test_redistributed_steps_follow_the_published_rule():
    """A uniform schedule: each full step takes (what is left) / (steps left), a reused one phi times as much."""
    factor, left, times = np.array([1, 0.5, 0.25, 1, 0.8]), 1.0, [1.0]
    for i, f in enumerate(factor):
        left -= left / (5 - i) * f
        times.append(left)
    found = redistributed(np.linspace(1, 0, 6), factor)
    np.testing.assert_allclose(found[:-1], times[:-1])
    assert found[-1] == 0.0  # exactly, although the last step was to be shortened
    assert np.all(np.diff(found) < 0)


def test_redistributed_steps_of_an_uneven_schedule():
    sigmas = np.array([1.0, 0.95, 0.7, 0.2, 0.0])
    np.testing.assert_allclose(redistributed(sigmas, np.ones(4)), sigmas)
    found = redistributed(sigmas, [1, 0.5, 1, 1])
    np.testing.assert_allclose(found[2], 0.95 - 0.25 / 2)
    np.testing.assert_allclose((found[2] - found[3]) / found[2], 0.5 / 0.7)
    assert (found[0], found[-1]) == (1.0, 0.0)
    assert -np.diff(found).sum() == pytest.approx(1.0)
    rising = redistributed(1 - sigmas, [1, 0.5, 1, 1])
    np.testing.assert_allclose(rising, 1 - found)


def test_ertacache_puts_the_tables_together():
    x, v, sigmas = walk(8), walk(8) * 1.1 + 0.2 * walk(9), np.linspace(1, 0, 8) ** 2
    exact = ertacache(x, v, sigmas, 0.0)
    assert exact.mask == "1" * 7
    np.testing.assert_allclose(exact.sigmas, sigmas)
    assert (exact.scale == 1).all()
    assert (exact.shift == 0).all()
    erta = ertacache(x, v, sigmas, 1.2)
    assert "0" in erta.mask
    np.testing.assert_array_equal(erta.phi, phi(x, v, erta.mask))
    guess = reused_outputs(x, v, erta.mask)
    better = erta.scale[:, None] * guess + erta.shift[:, None]
    reused = [s for s, digit in enumerate(erta.mask) if digit == "0"]
    assert ((better - v)[:, reused] ** 2).mean() < ((guess - v)[:, reused] ** 2).mean()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: held(walk(0), "101"), "3 digits for a run of 7 steps"),
        (lambda: decoupled(walk(0), "0" * 7), "first digit must be 1"),
        (lambda: affine(np.ones((3, 2)), np.ones((3, 3))), "expected one shape"),
        (lambda: affine(np.full((3, 2), np.nan), np.ones((3, 2))), "truth hold NaN"),
        (lambda: affine(1.0, 1.0), "single numbers"),
        (lambda: erta_mask(walk(0), -1), "threshold=-1"),
        (lambda: phi(walk(0), walk(0)[:, :5], "10000"), "expected one shape"),
        (lambda: redistributed([1, 0.5, 0], [1.0]), "3 sigmas given for phi of 1 steps"),
        (lambda: redistributed([1, 0.5, 0], [1.0, 1.5]), "from 1 to 1.5"),
        (lambda: redistributed([1, 0.5, 0.5], [1.0, 1.0]), "do not fall"),
    ],
)
def test_wrong_input_is_one_sentence(call, says):
    with pytest.raises(BadInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
