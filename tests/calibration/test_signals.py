"""TeaCache, EasyCache and AdaCache on recordings, against step-by-step state machines and published numbers."""

import math

import numpy as np
import pytest

from ditopt.calibration.mask import computed
from ditopt.calibration.signals import (
    ADACACHE,
    TEACACHE,
    Rescale,
    adacache,
    choose_signal,
    easycache,
    fit_rescale,
    interval_of,
    pearson,
    relative_changes,
    teacache,
)
from ditopt.errors import BadInput

IDENTITY = Rescale((1.0, 0.0))


def walk(seed, n=2, steps=24, tokens=3, channels=4, most=0.3):
    rng = np.random.default_rng(seed)
    speed = rng.uniform(0.0, most, size=(1, steps, 1, 1))
    return np.cumsum(rng.normal(size=(n, steps, tokens, channels)) * speed, axis=1) + rng.normal(
        size=(n, 1, tokens, channels)
    )


def test_relative_changes_against_a_loop():
    v = walk(0)
    found = relative_changes(v)
    assert found.shape == (2, 23)
    for n in range(2):
        for t in range(1, 24):
            assert found[n, t - 1] == pytest.approx(abs(v[n, t] - v[n, t - 1]).mean() / abs(v[n, t - 1]).mean())
    with pytest.raises(BadInput, match="zero everywhere at step 0"):
        relative_changes(np.arange(3.0).reshape(1, 3, 1, 1))
    with pytest.raises(BadInput, match="at least two"):
        relative_changes(v[:, :1])


def test_pearson_and_the_choice_of_a_signal():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(3, 20))
    close, far = y + 0.3 * rng.normal(size=y.shape), rng.normal(size=y.shape)
    assert pearson(close, y) == pytest.approx(np.corrcoef(close.ravel(), y.ravel())[0, 1])
    assert pearson(np.ones(4), np.arange(4.0)) == 0.0
    name, found = choose_signal({"input": far, "modulated": close, "opposite": -y / 2}, y)
    assert name == "opposite"
    assert found["opposite"] == pytest.approx(-1)
    assert choose_signal({"input": far, "modulated": close}, y)[0] == "modulated"


def test_published_polynomials():
    """Values of the published fits, and where they turn negative."""
    at = (0.01, 0.02, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40)
    flux = [round(TEACACHE["flux"].raw(d), 3) for d in at]
    assert flux == pytest.approx([0.231, 0.208, 0.181, 0.207, 0.243, 0.262, 0.314, 0.522, 2.28], abs=5e-3)
    assert TEACACHE["wan2.1-t2v-1.3b-ret"].raw(0.15) == pytest.approx(-5.1, abs=0.05)
    assert TEACACHE["wan2.1-t2v-14b-ret"].raw(0.10) == pytest.approx(-2.3, abs=0.05)
    assert TEACACHE["wan2.1-t2v-14b"].raw(0.01) == pytest.approx(-10.6, abs=0.05)
    assert TEACACHE["wan2.1-t2v-14b"](0.01) == 0.0  # an expected change is never negative
    assert len(TEACACHE) == 8
    assert all(len(p.coefficients) == 5 and "2411.19108" in p.source for p in TEACACHE.values())


def test_fit_finds_a_polynomial_again():
    x = np.random.default_rng(1).uniform(0.01, 0.06, size=(4, 30))
    true = TEACACHE["wan2.1-t2v-1.3b-ret"]
    fitted = fit_rescale(x, np.polyval(true.coefficients, x))
    np.testing.assert_allclose(fitted.coefficients, true.coefficients, rtol=1e-6)
    assert (fitted.low, fitted.high) == (x.min(), x.max())


def test_fit_is_the_least_squares_one():
    rng = np.random.default_rng(2)
    x = rng.uniform(0.02, 0.4, size=60)
    y = 0.1 + x**2 + 0.02 * rng.normal(size=60)
    fitted = fit_rescale(x.reshape(3, 20), y.reshape(3, 20))
    solved = np.linalg.lstsq(np.stack([x**k for k in (4, 3, 2, 1, 0)], axis=1), y, rcond=None)[0]
    np.testing.assert_allclose(fitted.coefficients, solved, rtol=1e-6)
    assert fitted.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert fitted(9.0) == fitted.raw(float(x.max()))  # clamped into what it was fitted on
    assert fitted(0.0) == fitted.raw(float(x.min()))
    with pytest.raises(BadInput, match="2 different changes"):
        fit_rescale([0.1, 0.2, 0.1, 0.2, 0.1, 0.2], np.arange(6.0))
    with pytest.raises(BadInput, match="signal and output have shapes"):
        fit_rescale(x, y[:5])


def teacache_run(signal, rescale, threshold, first, last):
    """The state machine of the running system: it sees values, not changes."""
    steps, mask, acc, before = len(signal), "", 0.0, signal[0]
    for s, now in enumerate(signal):
        if s < first or s >= steps - last:
            compute, acc = True, 0.0
        else:
            acc += rescale(np.mean(np.abs(now - before)) / np.mean(np.abs(before)))
            compute = not acc < threshold
            if compute:
                acc = 0.0
        before = now
        mask += "1" if compute else "0"
    return mask


@pytest.mark.parametrize(("first", "last"), [(1, 1), (5, 0), (3, 2)])
def test_teacache_against_a_state_machine(first, last):
    seen = set()
    for seed in range(4):
        v = walk(seed, n=1)
        for threshold in (0.0, 0.2, 0.5, 9.0):
            mask = teacache(relative_changes(v)[0], IDENTITY, threshold, first, last)
            assert mask == teacache_run(v[0], IDENTITY, threshold, first, last)
            seen.add(mask)
    assert "1" * 24 in seen
    assert "1" * first + "0" * (24 - first - last) + "1" * last in seen
    assert len(seen) >= 8


def test_teacache_of_flux_never_skips_twice_below_the_smallest_value():
    """The polynomial of FLUX is at least 0.18: at 0.25 no two steps in a row are reused, at 0.6 at most three."""
    changes = np.random.default_rng(0).uniform(0.02, 0.3, size=27)
    assert "00" not in teacache(changes, TEACACHE["flux"], 0.25)
    assert "0000" not in teacache(changes, TEACACHE["flux"], 0.6)
    assert "00" in teacache(changes, TEACACHE["flux"], 0.6)


def easycache_run(x, o, threshold, first, last):
    """As the authors' code keeps its state: what was computed before, what was seen before."""
    steps, mask, acc, k = len(x), "1", 0.0, None
    seen = newest_x = x[0]
    newest_o = o[0]
    for s in range(1, steps):
        compute = s < first or s >= steps - last or k is None
        if compute:
            acc = 0.0
        else:
            acc += k * np.mean(np.abs(x[s] - seen)) / np.mean(np.abs(newest_o))
            if acc >= threshold:
                compute, acc = True, 0.0
        seen = x[s]
        if compute:
            k = np.mean(np.abs(o[s] - newest_o)) / np.mean(np.abs(x[s] - newest_x))
            newest_x, newest_o = x[s], o[s]
        mask += "1" if compute else "0"
    return mask


@pytest.mark.parametrize(("first", "last"), [(1, 1), (5, 1), (4, 2)])
def test_easycache_against_a_state_machine(first, last):
    seen = set()
    for seed in range(4):
        x, o = walk(seed, n=1), walk(seed + 50, n=1)
        for threshold in (0.0, 0.3, 1.0, 50.0):
            mask = easycache(x, o, threshold, first, last)
            assert mask == easycache_run(x[0], o[0], threshold, first, last)
            seen.add(mask)
    assert "1" * 24 in seen
    assert len(seen) >= 8
    with pytest.raises(BadInput, match="differ in recordings or steps"):
        easycache(walk(0), walk(0)[:, :5], 0.1)


def test_easycache_of_an_output_that_stands_still():
    x = walk(0, n=1)
    assert easycache(x, np.ones_like(x), 0.05, 2) == "11" + "0" * 21 + "1"
    assert easycache(np.ones_like(x), np.ones_like(x), 0.05, 2) == "11" + "0" * 21 + "1"


def test_codebooks():
    assert [interval_of(c, ADACACHE["100"]) for c in (0.0, 0.03, 0.06, 0.08, 0.1, 0.11, 5.0)] == [12, 10, 8, 6, 4, 3, 3]
    assert [interval_of(c, ADACACHE["30-fast"]) for c in (0.07, 0.15, 0.2, 0.3, 0.39, 0.4, 1e9)] == [
        6,
        5,
        4,
        3,
        2,
        1,
        1,
    ]
    assert [interval_of(c, ADACACHE["30-slow"]) for c in (0.07, 0.08, 0.16)] == [3, 2, 1]
    with pytest.raises(BadInput, match="up to inf"):
        interval_of(0.1, [(0.2, 3)])
    with pytest.raises(BadInput, match="ascending"):
        interval_of(0.1, [(0.2, 3), (0.1, 2), (math.inf, 1)])
    with pytest.raises(BadInput, match="change of nan"):
        interval_of(math.nan, ADACACHE["100"])


@pytest.mark.parametrize("book", ADACACHE)
def test_adacache_against_a_state_machine(book):
    masks = set()
    for seed in range(4):
        v = walk(seed, steps=40, most=0.08)
        cache, rate, due, mask = v[:, 0], 1, 1, "1"
        for s in range(1, 40):
            if s == due:
                c = np.mean([abs(a - b).sum() / abs(a).sum() for a, b in zip(cache, v[:, s], strict=True)]) / rate
                rate = next(n for bound, n in ADACACHE[book] if c < bound)
                cache, due, digit = v[:, s], s + rate, "1"
            else:
                digit = "1" if s >= 38 else "0"
            mask += digit
        assert adacache(v, ADACACHE[book]) == mask
        masks.add(mask)
    assert all(m[0] == m[1] == m[-1] == m[-2] == "1" for m in masks)
    assert any("0" in m for m in masks)


def test_adacache_of_a_value_that_stands_still():
    assert computed(adacache(np.ones((1, 40, 2, 2)), ADACACHE["30-fast"])) == [0, 1, 7, 13, 19, 25, 31, 37, 38, 39]


def test_the_three_systems_differ():
    v, o = walk(1, n=1), walk(7, n=1)
    masks = {teacache(relative_changes(v)[0], IDENTITY, 0.4), easycache(v, o, 0.4, 1), adacache(v, ADACACHE["30-fast"])}
    assert len(masks) == 3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: teacache([0.1, float("nan")], IDENTITY, 0.1), "changes hold NaN"),
        (lambda: teacache([0.1], IDENTITY, -1), "threshold=-1"),
        (lambda: teacache([0.1], IDENTITY, 0.1, first=0), "first=0 given; expected a whole number from 1 to 2"),
        (lambda: teacache([0.1], IDENTITY, 0.1, last=3), "last=3"),
        (lambda: easycache(walk(0), walk(0), float("nan")), "threshold=nan"),
        (lambda: choose_signal({}, [1.0]), "no signal"),
        (lambda: fit_rescale([0.1], [0.1], degree=-1), "degree=-1"),
    ],
)
def test_wrong_input_is_one_sentence(call, says):
    with pytest.raises(BadInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
