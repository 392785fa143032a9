"""Estimates from a recording against the errors of a loop whose outputs do not depend on the latent: exact there."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import ditopt
from ditopt.calibration.estimate import Estimate, Response, best_orders, grown, moved
from ditopt.calibration.profile import Profile
from ditopt.calibration.sampled import sampled
from ditopt.calibration.sources.searched import refined
from ditopt.calibration.trial import Trials, Worth
from ditopt.errors import BadInput
from ditopt.ir.program import Predictor
from tests import tiny_sampler

STEPS = 9
RNG = np.random.default_rng(0)
TIMES = np.array([1000.0, 930, 850, 700, 610, 450, 330, 200, 40])
CARRY, GAIN = 0.9, np.append(np.diff(TIMES), -40.0) / 1000
OUTPUTS = np.cumsum(np.cumsum(RNG.normal(size=(3, STEPS, 6, 2)), 1) * 0.3 + 1, 1)
LINE = Predictor("lagrange", 1, "timestep")


def latents(outputs: np.ndarray) -> np.ndarray:
    """What the loop makes of these outputs, the sample last: (N, STEPS + 1, P, C)."""
    x = [np.ones_like(outputs[:, 0])]
    for s in range(STEPS):
        x.append(CARRY * x[-1] + GAIN[s] * outputs[:, s])
    return np.stack(x, 1)


def profile(outputs: np.ndarray = OUTPUTS) -> Profile:
    values = {"model": outputs, "latent": latents(outputs)[:, :-1]}
    sigmas = np.append(TIMES, 0) / 1000
    return Profile({}, TIMES, values, {"model": ("model",), "latent": ("latent",)}, sigmas=sigmas)


def error(mask: str, order: int) -> float:
    """The error of the loop itself, with forecasts as NumPy's own polynomials."""
    made = OUTPUTS.copy()
    for s, digit in enumerate(mask):
        if digit == "0":
            anchors = [a for a in range(s) if mask[a] == "1"][-(order + 1) :]
            flat = OUTPUTS[:, anchors].swapaxes(0, 1).reshape(len(anchors), -1)
            fit = np.polynomial.polynomial.polyfit(TIMES[anchors] / 1000, flat, len(anchors) - 1)
            made[:, s] = np.polynomial.polynomial.polyval(TIMES[s] / 1000, fit).reshape(made[:, s].shape)
    off = latents(made)[:, -1] - latents(OUTPUTS)[:, -1]
    return float(np.log10((off**2).mean((1, 2))).mean())


def every(count: int) -> list[str]:
    rest = itertools.combinations(range(1, STEPS), count - 1)
    return ["".join("1" if s in (0, *on) else "0" for s in range(STEPS)) for on in rest]


def test_worth_is_what_a_change_of_an_output_does_to_the_sample():
    found = sampled(profile()).worth
    for s in range(STEPS):
        changed = OUTPUTS.copy()
        changed[:, s] += 1
        moved_by = np.abs(latents(changed)[:, -1] - latents(OUTPUTS)[:, -1]).mean()
        expected = abs(GAIN[s]) * CARRY ** (STEPS - 1 - s)
        assert moved_by == pytest.approx(expected)
        if s < STEPS - 1:
            assert found[s] * CARRY == pytest.approx(expected)  # the last step's own carry cannot be recorded
    # the last step from its distance to 0
    assert found[-1] == pytest.approx(abs(GAIN[-2]) * TIMES[-1] / (TIMES[-2] - TIMES[-1]))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_estimate_is_the_error_of_the_loop(order):
    estimate = Estimate.of(profile(), Predictor("lagrange", order, "timestep"))
    estimate.worth[:-1] *= CARRY
    estimate.worth[-1] = abs(GAIN[-1])
    masks = [m for n in (2, 4, 6) for m in every(n)[::3]]
    assert [estimate(m) for m in masks] == pytest.approx([error(m, order) for m in masks], abs=1e-6)
    assert estimate("1" * STEPS) < -100


def test_a_response_is_what_becomes_of_errors():
    """Against the sum over pairs of steps, written out."""
    line = Estimate.of(profile(), LINE)
    answered = line.by(response=Response(4.0, 2.5))
    mask = "101001010"
    off = {}
    for s, (anchors, told) in line.rows(mask).items():
        off[s] = sum(c * OUTPUTS[:, a] for c, a in zip(told, anchors, strict=True)) - OUTPUTS[:, s]
    total = np.zeros(3)
    for s, one in off.items():
        for r, other in off.items():
            grown = 4.0 ** (2 - s / (STEPS - 1) - r / (STEPS - 1)) * math.exp(-abs(s - r) / 2.5)
            total += grown * line.worth[s] * line.worth[r] * (one * other).mean((1, 2))
    assert answered(mask) == pytest.approx(np.log10(total).mean())
    assert answered(mask) != pytest.approx(line(mask), abs=0.1)


def test_the_chain_finds_the_best_masks():
    estimate = Estimate.of(profile(), LINE)
    chain = estimate.chain(7)
    assert sorted(chain) == list(range(1, 8))
    for count, mask in chain.items():
        assert mask.count("1") == count
        assert estimate(mask) == pytest.approx(min(map(estimate, every(count))), abs=0.15)
    again = Estimate.of(profile(), LINE).chain(7)
    assert again == chain


def test_the_order_is_chosen_by_what_it_is_worth():
    curve = (TIMES[None, :, None, None] / 1000) ** 2 * RNG.normal(size=(3, 1, 6, 2))
    estimates = [Estimate.of(profile(curve), Predictor("lagrange", order, "timestep")) for order in (1, 2)]
    ((chosen, chain),) = best_orders(estimates, 5)
    assert chosen.predictor.order == 2  # the parabola through three values is exact
    assert chosen(chain[5]) < -20
    assert [e.predictor.order for e, _ in best_orders(estimates, 5, within=1e3)] == [2, 1]
    with pytest.raises(BadInput, match="predictor=foca depends on what it predicted"):
        Estimate.of(profile(), Predictor("foca"))


def test_moves():
    assert sorted(grown("1010")) == ["1011", "1110"]
    assert sorted(moved("1010")) == ["1001", "1100"]
    assert moved("10010", 1) == ["10100", "10001"]


class Loop:
    """The loop above, without a model."""

    def __init__(self) -> None:
        self.runs: list[str] = []

    def __call__(self, mask: str, best: Worth | None = None) -> Worth:
        self.runs.append(mask)
        return Worth(error(mask, 1), mask.count("1") / STEPS, ())


def test_more_compute_is_never_worse():
    found = []
    for count in range(2, STEPS):
        estimate, loop = Estimate.of(profile(), LINE), Loop()
        mask = refined(loop, estimate, list(estimate.chain(count).values()), count, most=200)
        assert mask.count("1") <= count
        assert error(mask, 1) == min(error(m, 1) for m in loop.runs)
        assert len(loop.runs) == len(set(loop.runs))
        found.append(error(mask, 1))
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


def test_runs_are_counted_and_the_result_is_the_same():
    runs = []
    for _ in range(2):
        estimate, loop = Estimate.of(profile(), LINE), Loop()
        runs.append((refined(loop, estimate, list(estimate.chain(4).values()), 4, most=7), loop.runs))
    assert runs[0] == runs[1]
    assert len(runs[0][1]) == 7


def test_a_trial_is_given_up_when_it_is_clearly_worse():
    ran = []

    def run(model, seed):
        ran.append(seed)
        return tiny_sampler.sample(model, seed, 8)

    recipe = "cache{region=model,predictor=lagrange,order=1}"
    with Trials(tiny_sampler.model(), recipe, run, seeds=[0, 1, 2], steps=8) as trial:
        good = trial({"cache0": "11110110"})
        assert len(good.each) == 3
        assert good.error == pytest.approx(sum(good.each) / 3)
        ran.clear()
        bad = trial({"cache0": "10000000"}, good)
        assert ran == [0]
        assert bad.error == math.inf
        assert len(bad.each) == 1
        assert trial({"cache0": "11110111"}, bad).error < math.inf


def test_a_search_of_so_many_trials_is_the_same_each_time():
    given: dict[str, Any] = {"steps": 8, "seeds": [0, 1], "progress": False, "seconds": 0.0}
    one, two = (
        ditopt.calibrate(tiny_sampler.model(), "searched{share=0.5,trials=5}", tiny_sampler.sample, **given)
        for _ in range(2)
    )
    assert str(one) == str(two)
    mask = next(str(s.options["mask"]) for s in one.steps if s.name == "cache")
    assert 2 <= mask.count("1") <= 4
