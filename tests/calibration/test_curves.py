"""SmoothCache and MagCache: the published schedules, and transcriptions of their definitions."""

import itertools
import math

import numpy as np
import pytest

from ditopt.calibration.curves import (
    FLUX_RATIOS,
    lookahead,
    magcache,
    magnitude_ratios,
    resample,
    smoothcache,
    smoothcache_by_type,
)
from ditopt.calibration.mask import computed
from ditopt.errors import BadInput


def walk(seed, n=2, steps=14, tokens=3, channels=4):
    rng = np.random.default_rng(seed)
    speed = rng.uniform(0.02, 0.6, size=(1, steps, 1, 1))
    return np.cumsum(rng.normal(size=(n, steps, tokens, channels)) * speed, axis=1) + rng.normal(
        size=(n, 1, tokens, channels)
    )


def test_lookahead_against_a_loop():
    v = walk(0)
    curves = lookahead(v, 3)
    assert curves.shape == (3, 14)
    for k, t in itertools.product((1, 2, 3), range(14)):
        if t + k >= 14:
            assert curves[k - 1, t] == math.inf
            continue
        ratios = [abs(one[t] - one[t + k]).sum() / abs(one[t + k]).sum() for one in v]
        assert curves[k - 1, t] == pytest.approx(sum(ratios) / len(ratios))


def smoothcache_reference(curves, alpha):
    """The rule from the side of a step: it is reused when some computed step reaches it."""
    reach, steps = curves.shape
    mask = ["1"]
    for s in range(1, steps):
        since = "".join(mask)[::-1].index("1") + 1  # distance to the newest computed step
        reused = since <= reach and all(curves[k, s - since] <= alpha for k in range(since)) and s < steps - 1
        mask.append("0" if reused else "1")
    return "".join(mask)


@pytest.mark.parametrize("seed", range(6))
def test_smoothcache_against_the_rule(seed):
    curves = lookahead(walk(seed), 3)
    masks = {a: smoothcache(curves, a) for a in (0.0, 0.08, 0.18, 0.35, 0.6, 5.0)}
    for alpha, mask in masks.items():
        assert mask == smoothcache_reference(curves, alpha)
        assert mask[0] == mask[-1] == "1"
    assert masks[0.0] == "1" * 14
    assert masks[5.0] == "10001000100011"
    assert len(set(masks.values())) >= 4


def test_smoothcache_by_hand():
    curves = np.array([[0.1, 0.1, 0.9, 0.1, 0.1, np.inf], [0.1, 0.1, 0.1, 0.3, np.inf, np.inf]])
    assert smoothcache(curves, 0.2) == "100101"  # 0 reaches 1 and 2; 3 reaches 4 only; the last computes
    assert smoothcache(curves, 0.05) == "111111"
    curves[0, 0] = 0.9  # what lies behind a bad step is not reached, however good
    assert smoothcache(curves, 0.2) == "110011"


def test_smoothcache_by_type_takes_the_mean_of_layers():
    a, b, c = walk(1), walk(2), walk(3)
    masks = smoothcache_by_type({"attn": [a, b], "mlp": [c]}, 0.3)
    assert masks["mlp"] == smoothcache(lookahead(c), 0.3)
    assert masks["attn"] == smoothcache((lookahead(a) + lookahead(b)) / 2, 0.3)
    with pytest.raises(BadInput, match=r"\[9, 14\] steps"):
        smoothcache_by_type({"attn": [a, b[:, :9]]}, 0.3)
    with pytest.raises(BadInput, match="no layer of type 'attn'"):
        smoothcache_by_type({"attn": []}, 0.3)


def test_magcache_of_flux():
    assert computed(magcache(FLUX_RATIOS, 0.24, 5, 0.1)) == [0, 1, 2, 5, 9, 15, 21, 26]
    assert computed(magcache(FLUX_RATIOS, 0.24, 5, 0.1, never=[11])) == [0, 1, 2, 5, 9, 11, 17, 23, 26]
    assert computed(magcache(FLUX_RATIOS)) == [0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 21, 24, 26, 27]


def test_magcache_limits():
    flat = np.ones(10)
    assert magcache(flat, 0.0, 3, 0.0) == "1000100010"
    assert magcache(flat, 1.0, 0, 0.0) == "1" * 10
    assert magcache(flat * 1.5, 0.4, 9, 0.0) == "1" * 10
    assert magcache(flat, 0.0, 99, 0.45) == "11111" + "0" * 5
    assert magcache(flat, 0.0, 2, 0.0, never=[0, 2]) == "1010010010"


def test_magnitude_ratios_against_a_loop():
    v = walk(4)
    v[0, 3, 1] = 0.0  # a token that is zero once is left out of the ratio to the next step
    found = magnitude_ratios(v)
    assert found[0] == 1.0
    for t in range(1, v.shape[1]):
        ratios = []
        for one in v:
            for now, before in zip(one[t], one[t - 1], strict=True):
                length = math.sqrt(sum(x * x for x in before))
                if length:
                    ratios.append(math.sqrt(sum(x * x for x in now)) / length)
        assert found[t] == pytest.approx(sum(ratios) / len(ratios))
    growing = 1.25 ** np.arange(5).reshape(1, 5, 1, 1) * np.ones((2, 1, 3, 4))
    np.testing.assert_allclose(magnitude_ratios(growing), [1, 1.25, 1.25, 1.25, 1.25])
    with pytest.raises(BadInput, match="step 2 is zero everywhere"):
        magnitude_ratios(np.where(np.arange(5).reshape(1, 5, 1, 1) == 2, 0.0, growing))


def test_resample_is_the_nearest():
    assert list(resample([10.0, 11.0, 12.0, 13.0], 7)) == [10, 10, 11, 12, 12, 12, 13]  # halves go to the even one
    assert list(resample([10.0, 11.0, 12.0, 13.0, 14.0], 3)) == [10, 12, 14]
    assert list(resample(FLUX_RATIOS, 28)) == list(FLUX_RATIOS)
    assert list(resample(FLUX_RATIOS, 1)) == [FLUX_RATIOS[-1]]
    for steps in (9, 50):
        where = [i * 27 / (steps - 1) for i in range(steps)]
        nearest = [min((abs(w - j), j % 2, j) for j in range(28))[2] for w in where]
        assert list(resample(FLUX_RATIOS, steps)) == [FLUX_RATIOS[j] for j in nearest]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: magcache([1.0, float("nan")]), "ratios hold NaN"),
        (lambda: magcache([[1.0]]), r"ratios have shape \(1, 1\)"),
        (lambda: magcache(FLUX_RATIOS, -0.1), "threshold=-0.1"),
        (lambda: magcache(FLUX_RATIOS, retention=1.5), "retention=1.5 given; expected a number from 0 to 1"),
        (lambda: magcache(FLUX_RATIOS, longest=-1), "longest=-1"),
        (lambda: magcache(FLUX_RATIOS, never=[28]), "never"),
        (lambda: resample(FLUX_RATIOS, 0), "steps=0"),
        (lambda: smoothcache([0.1], 0.1), "curves of shape"),
        (lambda: smoothcache([[float("nan")]], 0.1), "NaN"),
        (lambda: smoothcache([[0.1]], -1), "alpha=-1"),
        (lambda: lookahead(walk(0), 0), "reach=0"),
    ],
)
def test_wrong_input_is_one_sentence(call, says):
    with pytest.raises(BadInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
