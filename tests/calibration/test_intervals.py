"""Closed-form schedules against published ones and against the running counters of the systems."""

import cmath
import math

import pytest

from ditopt.calibration.intervals import (
    PAB,
    cfg_delta,
    deepcache,
    delta_dit,
    diffusers_taylorseer,
    fastercache,
    fora,
    interval_guidance,
    pab,
    profiling_dit,
    ramp,
    step_rehash,
    taylorseer,
    tgate,
)
from ditopt.calibration.mask import computed
from ditopt.errors import BadInput
from ditopt.ir.program import Interval
from ditopt.recipes.scm import POLICIES, scm, scm_policy
from ditopt.runtime.policy import schedule


def test_taylorseer_golden():
    assert computed(taylorseer(50, 6, 3)) == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]
    assert computed(taylorseer(50, 4, 2)) == [0, *range(1, 50, 4)]
    assert computed(taylorseer(2, 4, 3)) == [0, 1]


@pytest.mark.parametrize("steps", [1, 7, 28, 50])
def test_taylorseer_and_fora_are_the_intervals_of_the_runtime(steps):
    for interval in (1, 2, 3, 6):
        for first in (1, 2, 5):
            rule = schedule(Interval(every=interval, first=first), steps)
            assert computed(taylorseer(steps, interval, first)) == [s for s in range(steps) if rule(s)]
        assert fora(steps, interval) == taylorseer(steps, interval, 1)
    assert fora(steps, 1) == "1" * steps


def test_diffusers_taylorseer_lies_one_step_off():
    assert computed(diffusers_taylorseer(28)) == [0, 1, 2, 4, 9, 14, 19, 24]
    assert computed(diffusers_taylorseer(28, after=26)) == [0, 1, 2, 4, 9, 14, 19, 24, 26, 27]
    assert computed(taylorseer(28, 5, 3)) == [0, 1, 2, 7, 12, 17, 22, 27]
    assert computed(diffusers_taylorseer(12, 4, 0)) == [0, 1, 5, 9]
    assert diffusers_taylorseer(9, 1, 2) == "1" * 9


def test_deepcache_golden():
    """Lists that the authors' function gives."""
    assert computed(deepcache(50, 5)) == list(range(0, 50, 5))
    assert computed(deepcache(50, 5, 15, 1.4)) == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    assert computed(deepcache(50, 5, 10, 1.2)) == [0, 5, 9, 12, 16, 21, 26, 32, 38, 43]
    assert computed(deepcache(20, 2, 5, 1.4)) == [0, 2, 4, 5, 6, 8, 10, 12, 14, 17]


def deepcache_reference(steps, count, center, power):
    while power > 1:
        low = abs(center) ** (1 / power) * cmath.exp(1j * math.pi / power)
        high = (steps - center) ** (1 / power)
        points = sorted({int(((low + (high - low) * i / count) ** power).real) for i in range(count + 1)})
        found = [0, *(p + center for p in points[1:-1])]
        if len(found) == count:
            return found
        power -= 0.02
    return None


def test_deepcache_against_complex_arithmetic():
    found = 0
    for center in range(1, 50, 7):
        for interval in (3, 5, 10):
            want = deepcache_reference(50, 50 // interval, center, 1.4)
            if want is None:
                with pytest.raises(BadInput, match=f"around step {center}"):
                    deepcache(50, interval, center)
            else:
                found += 1
                assert computed(deepcache(50, interval, center)) == want
    assert found > 5


def test_delta_dit():
    front, rear = delta_dit(12, 3, 7)
    assert front == "111111110100"
    assert rear == "100100111111"
    for s in range(12):
        assert (front[s], rear[s]) != ("0", "0")  # one of the two spans computes at every step
    assert delta_dit(9, 1, 4) == ("1" * 9, "1" * 9)
    assert delta_dit(9, 2, 9) == ("1" * 9, "101010101")
    assert delta_dit(9, 2, 0) == ("101010101", "1" * 9)


def test_profiling_dit():
    refresh = [6, 18, 26, 32, 38, 42, 46, 48]
    assert computed(profiling_dit(50, 6, refresh)) == [0, 1, 2, 3, 4, 5, *refresh]
    assert computed(profiling_dit(20, 6, 6)) == [0, 1, 2, 3, 4, 5, 6, 12, 18]
    assert profiling_dit(4, 6, 6) == "1111"
    with pytest.raises(BadInput, match="refresh step 5 given; expected steps from 6 to 49"):
        profiling_dit(50, 6, [5, 9])


def test_gates_and_guidance():
    assert tgate(8, 3) == "11100000"
    assert tgate(8, 8) == "1" * 8
    assert interval_guidance(8, 2, 5) == "00111000"
    assert interval_guidance(8, 0, 8) == "1" * 8
    assert interval_guidance(8, 3, 3) == "0" * 8
    assert cfg_delta(10, 3) == "1001001001"
    assert cfg_delta(10, 3, first=2, last=2) == "1100100111"
    assert cfg_delta(3, 5, first=9) == "111"
    assert step_rehash(10, 3, 8) == "1111010111"
    assert step_rehash(6, 0, 6) == "101010"


def counter(timesteps, stride, window):
    """As VideoSys and diffusers count: at every step, inside the window or not."""
    mask, left = "", 0
    for t in timesteps:
        mask += "0" if left and window[0] < t < window[1] else "1"
        left = (left or stride) - 1
    return mask


TIMES = [1000 - 20 * s for s in range(50)]


def test_pab_against_a_counter():
    for model, kinds in PAB.items():
        masks = pab(TIMES, kinds)
        assert masks.keys() == kinds.keys()
        for kind, (stride, window) in kinds.items():
            assert masks[kind] == counter(TIMES, stride, window), model
    spatial, cross = (pab(TIMES, PAB["open-sora"])[k] for k in ("spatial", "cross"))
    assert spatial[:11] == "1" * 11  # 1000 to 800: the window is open at its ends
    assert spatial[11:15] == "0101"
    assert spatial[45:] == "1" * 5
    assert cross.count("1") < spatial.count("1")
    assert pab(TIMES, PAB["latte"])["temporal"] != pab(TIMES, PAB["open-sora"])["temporal"]


def test_fastercache_against_a_counter():
    attention, uncond = fastercache(TIMES)
    assert attention == counter(TIMES, 2, (-1, 681))
    assert uncond == counter(TIMES, 5, (-1, 641))
    assert attention[:17] == "1" * 17  # t = 1000 ... 680 (16 steps above), the first even step below
    assert attention[17:21] == "0101"
    assert "0" not in uncond[:18]
    assert uncond[18:26] == "00100001"
    assert ramp(5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ramp(1) == [0.0]


def test_scm_bins():
    assert scm([6, 1, 1, 1, 1], [1, 2, 5, 5, 5]) == "111111" + "0" + "100" + "100000" * 3
    assert scm([2, 1], [3], 5) == "11000"
    assert scm([2, 1, 2], [3]) == "110001" + "11"
    assert scm([1], [2, 3]) == "100000"
    with pytest.raises(BadInput, match="cover 6 steps of a run of 7"):
        scm([2, 1], [3], 7)
    with pytest.raises(BadInput, match="compute_bins is empty"):
        scm([], [3])
    with pytest.raises(BadInput, match="compute_bins=0"):
        scm([2, 0], [3])


# Printed by cache_dit.steps_mask of cache-dit 1.5.
POLICY_GOLDEN = """
4 ultra 1101
6 fast 111001
8 slow 11111011
8 ultra 11001001
9 fast 111101001
12 medium 111101101001
12 ultra 110100100011
15 fast 111010010010001
16 slow 1111111101110011
16 ultra 1100000000000001
20 fast 11111101000000000001
24 ultra 111100100000100000000001
28 slow 1111111101110011100110010001
28 medium 1111110110001100011000110001
28 fast 1111110100010000100000100001
28 ultra 1111001000001000000100000001
30 slow 111111111111011100111001100101
35 fast 11111111100110000110000100000100001
50 medium 11111111111111110011100000111000001110000011100001
50 ultra 11111110001100000000011000000000001100000000000001
"""


@pytest.mark.parametrize("line", POLICY_GOLDEN.strip().splitlines())
def test_scm_policies_golden(line):
    steps, policy, mask = line.split()
    assert scm_policy(policy, int(steps)) == mask


def test_scm_policies_order_and_length():
    for steps in (4, 6, *range(8, 120)):
        masks = [scm_policy(p, steps) for p in POLICIES]
        assert all(len(m) == steps and m[0] == m[-1] == "1" for m in masks)
    for steps in (5, 7):
        with pytest.raises(BadInput, match=f"no preset for {steps} steps"):
            scm_policy("fast", steps)
    with pytest.raises(BadInput, match="one of slow, medium, fast, ultra"):
        scm_policy("quick", 28)


def test_the_systems_differ():
    """Schedules of one setting, so that none of them stands for another by mistake."""
    masks = [
        taylorseer(50, 5, 3),
        diffusers_taylorseer(50, 5, 3),
        fora(50, 5),
        deepcache(50, 5, 15),
        *delta_dit(50, 5, 23),
        profiling_dit(50, 4, 5),
        tgate(50, 5),
        step_rehash(50, 5, 45),
        interval_guidance(50, 5, 45),
        *fastercache(TIMES),
        scm_policy("fast", 50),
    ]
    assert len(set(masks)) == len(masks)
    assert all(len(m) == 50 for m in masks)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fora(10, 0), "interval=0"),
        (lambda: fora(0, 3), "steps=0"),
        (lambda: fora(10, 2.5), "interval=2.5"),  # type: ignore[arg-type]
        (lambda: taylorseer(10, 3, 0), "first=0"),
        (lambda: deepcache(10, 3, 10), "center=10 given; expected a whole number from 0 to 9"),
        (lambda: deepcache(10, 11, 3), "interval=11"),
        (lambda: delta_dit(10, 3, 11), "boundary=11"),
        (lambda: tgate(10, 0), "gate=0"),
        (lambda: interval_guidance(10, 5, 4), "end=4"),
        (lambda: step_rehash(10, 2, 11), "end=11"),
        (lambda: pab([], PAB["latte"]), "timesteps are empty"),
        (lambda: pab([1.0, float("nan")], PAB["latte"]), "timesteps hold NaN"),
        (lambda: pab(TIMES, {"x": (2, (9, 1))}), "low below high"),
        (lambda: fastercache(TIMES, attention_every=0), "attention stride=0"),
    ],
)
def test_wrong_input_is_one_sentence(call, says):
    with pytest.raises(BadInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
