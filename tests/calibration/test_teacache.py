"""TeaCache's polynomial, fitted to a recording: known coefficients come back, and the signal is the published one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import ditopt
from ditopt.calibration import Profile, fit, record
from ditopt.errors import BadInput, RecipeError
from tests import tiny_sampler
from tests.recipes import oracle

STEPS = 14
KNOWN = (40.0, -12.0, 1.5, 0.3, 0.02)
CHANGES = np.random.default_rng(0).uniform(0.02, 0.3, size=(3, STEPS - 1))


def walk(changes: np.ndarray) -> np.ndarray:
    """A recording (N, T, 4, 2) that moves by these relative changes."""
    sizes = np.cumprod(np.concatenate([np.ones((len(changes), 1)), 1 + changes], 1), 1)
    return np.broadcast_to(sizes[:, :, None, None], (*sizes.shape, 4, 2)).copy()


def profile(signal: np.ndarray, blocks: np.ndarray) -> Profile:
    values = {"modulated": signal, "blocks": blocks}
    return Profile({"steps": str(STEPS)}, np.arange(STEPS, dtype=np.float64), values, {n: (n,) for n in values})


def options(recipe) -> dict[str, Any]:
    return next(step.options for step in recipe.steps if step.name == "cache")


def test_known_coefficients_come_back():
    made = options(fit("teacache{threshold=0.2,first=3}", profile(walk(CHANGES), walk(np.polyval(KNOWN, CHANGES)))))
    assert [float(c) for c in str(made["coefficients"]).split()] == pytest.approx(KNOWN, rel=1e-4)
    assert [float(d) for d in str(made["domain"]).split()] == pytest.approx([CHANGES.min(), CHANGES.max()])
    assert (made["threshold"], made["first"], made["signal"]) == (0.2, 3, "modulated")
    line = options(fit("teacache{degree=1}", profile(walk(CHANGES), walk(2 * CHANGES + 0.1))))
    assert [float(c) for c in str(line["coefficients"]).split()] == pytest.approx([2, 0.1])


def test_hetcache_takes_the_same_polynomial():
    given = profile(walk(CHANGES), walk(np.polyval(KNOWN, CHANGES)))
    made, other = options(fit("hetcache{threshold=0.2,first=3}", given)), options(fit("teacache", given))
    assert [made[name] for name in ("coefficients", "domain")] == [other[name] for name in ("coefficients", "domain")]
    assert (made["threshold"], made["partial"], made["signal"]) == (0.2, 1.5, "modulated")
    with pytest.raises(RecipeError, match="hetcache: coefficients and domain are what a calibration finds"):
        fit("hetcache{coefficients=2 0}", given)


def test_the_signal_is_what_the_first_layer_of_the_first_block_reads():
    """Against the parts of a denoiser, run by hand."""
    taken = []

    def sample(model, seed):
        x = oracle.start(seed)
        for t in oracle.TIMES:
            taken.append(x.clone())
            x = x - oracle.PACE * model(x, torch.full((2,), t), oracle.LABELS)

    made = record(oracle.model(), sample, regions=["modulated", "model"], steps=oracle.STEPS, seeds=[1], tokens=8,
                  progress=False)  # fmt: skip
    parts, found = oracle.Parts(), made.values["modulated"]
    order = torch.randperm(found.shape[2] if found.shape[2] > 8 else 32, generator=torch.Generator().manual_seed(0))[:8]
    for k, t in enumerate(oracle.TIMES):
        read = parts.modulated(parts.begin(taken[k].numpy(), t))
        flat = read.reshape(-1, read.shape[-1])
        assert len(flat) == 32
        np.testing.assert_allclose(found[0, k], flat[order.numpy()], rtol=1e-4, atol=1e-5)
    assert made.values["model"].shape[:2] == (1, oracle.STEPS)


def test_a_fitted_recipe_is_another_one_and_runs():
    given: dict[str, Any] = {"steps": 10, "seeds": [0, 1], "progress": False}
    made = ditopt.calibrate(tiny_sampler.model(), "teacache{threshold=0.3}", tiny_sampler.sample, **given)
    assert made.name == "teacache"
    assert made.calibrated["steps"] == "10"
    assert options(made)["coefficients"] != "1 0"
    counts = []
    for recipe in (made, "teacache{threshold=0.3}"):
        fast = ditopt.optimize(tiny_sampler.model(), recipe, target="eager", steps=10)
        tiny_sampler.sample(fast, 4, 10)
        counts.append([row.choices["cache0"] for row in fast.schedule_rows])
    assert counts[0] != counts[1]
    assert "reuse" in str(counts[0])


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(RecipeError, match="coefficients and domain are what a calibration finds"):
        fit("teacache{coefficients=2 0}", profile(walk(CHANGES), walk(CHANGES)))
    with pytest.raises(BadInput, match="cannot fix a polynomial of degree 4"):
        fit("teacache", profile(walk(np.ones_like(CHANGES)), walk(CHANGES)))
    with pytest.raises(RecipeError, match="degree has no effect unless the recipe is fitted"):
        ditopt.optimize(tiny_sampler.model(), "teacache{degree=3}")
