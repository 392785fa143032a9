"""Coefficients fitted to a recording, and what a recording says of guidance."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from ditopt.calibration.coefficients import fitted, text
from ditopt.calibration.estimate import Estimate, Response
from ditopt.calibration.sampled import sampled
from ditopt.ir.program import Predictor
from tests.calibration.test_estimate import CARRY, OUTPUTS, STEPS, latents, profile

MASK = "110100100"


def estimate(order: int = 1) -> Estimate:
    return Estimate.of(profile(), Predictor("lagrange", order, "timestep"))


def at_the_end(rows, outputs=OUTPUTS):
    """The error of the loop itself: mean over requests of log10 of the mean square."""
    made = outputs.copy()
    for s, row in enumerate(rows):
        if row:
            anchors = [a for a in range(s) if not rows[a]][::-1][: len(row)]
            made[:, s] = sum(c * outputs[:, a] for c, a in zip(row, anchors, strict=True))
    return np.log10(np.square(latents(made)[:, -1] - latents(outputs)[:, -1]).mean((1, 2))).mean()


def polynomial(order=1):
    told = estimate(order).rows(MASK)
    return tuple(tuple(told[s][1]) if s in told else () for s in range(STEPS))


@pytest.mark.parametrize("order", [1, 2])
def test_fitted_coefficients_are_those_of_least_error_in_the_sample(order):
    known = estimate(order)
    known.worth[:-1] *= CARRY
    rows = fitted(known, MASK)
    assert [len(r) for r in rows] == [0, 0, 2, 0, min(3, order + 1), min(3, order + 1), 0, order + 1, order + 1]
    best = at_the_end(rows)
    assert best < at_the_end(polynomial(order)) - 0.4
    for s in (2, 5, 8):  # no neighbour is better, but for the ridge
        for change in (0.05, -0.05):
            other = list(rows)
            other[s] = (rows[s][0] + change, *rows[s][1:])
            assert at_the_end(other) > best


def test_more_values_than_the_polynomial_reads():
    known = estimate(1)
    known.worth[:-1] *= CARRY
    rows = fitted(known, MASK, 3)
    assert [len(r) for r in rows] == [0, 0, 2, 0, 3, 3, 0, 3, 3]
    assert at_the_end(rows) < at_the_end(fitted(known, MASK))
    assert known.rows(MASK, 3)[8][1][2:].tolist() == [0.0]
    assert known.squares(known.rows(MASK, 3)) == pytest.approx(known.squares(known.rows(MASK)))


def test_a_response_decides_how_far_errors_may_cancel():
    def single(rows):
        """The mean square of the errors of the single steps, in the sample."""
        off = 0.0
        for s, row in enumerate(rows):
            if row:
                anchors = [a for a in range(s) if not rows[a]][::-1][: len(row)]
                told = sum(c * OUTPUTS[:, a] for c, a in zip(row, anchors, strict=True))
                off += estimate().worth[s] ** 2 * np.square(told - OUTPUTS[:, s]).mean()
        return off

    firm, loose = (fitted(estimate().by(response=Response(memory=m)), MASK) for m in (0.01, math.inf))
    assert single(firm) < single(polynomial()) < single(loose)
    assert at_the_end(loose) < at_the_end(firm)


def test_nothing_reused_has_no_coefficients():
    assert fitted(estimate(), "1" * STEPS) == ((),) * STEPS
    assert text("1101", ((), (), (1.23456789, -0.25), ())) == "1.23457 -0.25"
    assert text("1010", ((), (1.0,), (), (2.0, -1.0))) == "1; 2 -1"


def test_a_step_that_goes_nowhere_keeps_the_polynomial():
    known = estimate()
    known.worth[8] = 0.0
    rows = fitted(known, MASK)
    assert rows[8] == pytest.approx(polynomial()[8])
    assert rows[5] != pytest.approx(polynomial()[5], abs=1e-3)


def test_an_estimate_by_another_predictor_is_that_of_the_recording():
    line, parabola = (Predictor("lagrange", order, "timestep") for order in (1, 2))
    made = Estimate.of(profile(), line)
    assert made(MASK) == made.by(line)(MASK)
    assert made.by(parabola)(MASK) == Estimate.of(profile(), parabola)(MASK) != made(MASK)


# -- guidance ----------------------------------------------------------------------------------------------------------

SCALE = 3.5


def guided(recordings, latent, outputs):
    plain = profile()
    values = {"model": outputs, "latent": latent}
    return dataclasses.replace(plain, values=values, recordings=recordings)


def branches():
    """Conditional and unconditional outputs, and the latents that guidance makes of them."""
    other = OUTPUTS[::-1] * 0.5 + 1
    joined = other + SCALE * (OUTPUTS - other)
    return OUTPUTS, other, joined, latents(joined)[:, :-1]


@pytest.mark.parametrize("how", ["calls", "batch", "channels"])
def test_guidance_is_read_off_the_latents(how):
    given, other, joined, latent = branches()
    if how == "calls":  # branch by branch, request by request
        order = [i for r in range(3) for i in (r, r + 3)]
        outputs, seen = np.concatenate([given, other])[order], np.concatenate([latent, latent])[order]
    else:
        outputs, seen = np.concatenate([given, other], 2), np.concatenate([latent, latent], 2)
    if how == "channels":  # a condition joined to the latent
        seen = np.concatenate([seen, np.ones_like(seen)], 3)
    found = sampled(guided(("",) * len(outputs), seen, outputs))
    assert found.outputs == pytest.approx(joined.reshape(3, STEPS, -1))
    assert found.worth == pytest.approx(sampled(profile()).worth)


def test_where_latents_do_not_tell_each_branch_stands_alone():
    noise = np.random.default_rng(1).normal(size=OUTPUTS.shape)
    found = sampled(guided(("",) * 3, noise, OUTPUTS))
    assert found.outputs == pytest.approx(OUTPUTS.reshape(3, STEPS, -1))
    few = sampled(guided(("",) * 3, noise[:, :, :1], OUTPUTS))
    assert few.outputs == pytest.approx(OUTPUTS.reshape(3, STEPS, -1))
    assert few.worth[:-1] == pytest.approx(np.abs(np.diff(profile().times)))
