"""Trials of schedules on one optimized model, and the systems that are found by them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import ditopt
from ditopt.calibration import fit
from ditopt.calibration.trial import Trials
from ditopt.errors import BadInput, RecipeError, SessionError
from tests import tiny_sampler

STEPS = 8
HALVES = "cache{region=blocks.*.attn}, cache{region=blocks.*.mlp}"


def run(model, seed):
    return tiny_sampler.sample(model, seed, STEPS)


def trials(recipe="cache{region=model,predictor=lagrange,order=1}", model=None):
    return Trials(model or tiny_sampler.model(), recipe, run, seeds=[0, 1], steps=STEPS)


def test_a_mask_that_computes_everything_is_worth_the_plain_samples():
    with trials() as trial:
        assert trial.decisions == {"cache0": ("model",)}
        worth = trial({"cache0": "1" * STEPS})
        assert worth.error == -math.inf
        assert worth.share == 1.0


def test_a_trial_is_what_the_recipe_with_that_mask_does():
    mask = "11010010"
    with trials() as trial:
        trial({"cache0": "10101010"})
        worth = trial({"cache0": mask})
    recipe = f"cache{{region=model,predictor=lagrange,order=1,mask={mask}}}"
    fast = ditopt.optimize(tiny_sampler.model(), recipe, target="eager", steps=STEPS)
    errors = []
    for seed in (0, 1):
        squared = (run(fast, seed) - run(tiny_sampler.model(), seed)).double().square().flatten(1).mean(1)
        errors += squared.log10().tolist()
    assert worth.error == pytest.approx(sum(errors) / len(errors))
    assert worth.share == pytest.approx(mask.count("1") / STEPS)


def test_decisions_are_tried_apart():
    with trials(HALVES) as trial:
        attention = trial({"cache0": "10101010", "cache1": "1" * STEPS})
        both = trial({"cache0": "10101010", "cache1": "10101010"})
        assert trial.count == 2
        assert 0 < both.share < attention.share < 1
        assert attention.error != both.error


def test_the_model_is_as_before_also_after_an_error():
    model = tiny_sampler.model()
    with pytest.raises(SessionError, match="no decision cache7"), trials(model=model) as trial:
        trial({"cache7": "1" * STEPS})
    assert not model._forward_hooks
    assert torch.equal(run(model, 3), run(tiny_sampler.model(), 3))


@pytest.mark.filterwarnings("ignore:.*changed nothing")
def test_what_cannot_be_tried_is_refused():
    with pytest.raises(BadInput, match="0 seeds and 8 steps"):
        Trials(tiny_sampler.model(), "fora", run, seeds=[], steps=STEPS)
    with pytest.raises(BadInput, match="decides nothing"), trials("lossless"):
        pass


def test_searched_finds_a_mask_of_the_share_that_beats_the_interval():
    found = ditopt.calibrate(
        tiny_sampler.model(),
        "searched{share=0.5,order=1}",
        tiny_sampler.sample,
        steps=STEPS,
        seeds=[0, 1],
        seconds=4,
        progress=False,
    )
    (step,) = [s for s in found.steps if s.name == "cache"]
    mask = str(step.options["mask"])
    assert mask.count("1") == STEPS // 2
    assert found.calibrated["steps"] == str(STEPS)
    with trials() as trial:
        assert trial({"cache0": mask}).error <= trial({"cache0": "10101010"}).error


def test_ecad_stays_within_its_share():
    found = ditopt.calibrate(
        tiny_sampler.model(),
        "ecad{share=0.6,groups=1,population=6}",
        tiny_sampler.sample,
        steps=STEPS,
        seeds=[0],
        seconds=3,
        progress=False,
    )
    fast = ditopt.optimize(tiny_sampler.model(), found, target="eager", steps=STEPS)
    run(fast, 5)
    assert 0 < fast.stats.share_block_flops <= 0.6 + 1e-9
    assert fast.stats.hits.total() > 0


def test_what_a_search_refuses():
    given: dict[str, Any] = {"steps": STEPS, "seeds": [0], "seconds": 1, "progress": False}
    with pytest.raises(RecipeError, match=r"share=1\.0 of 8 steps is all of them"):
        ditopt.calibrate(tiny_sampler.model(), "searched{share=1.0}", tiny_sampler.sample, **given)
    with pytest.raises(BadInput, match="returned a NoneType; a search compares samples"):
        ditopt.calibrate(tiny_sampler.model(), "searched", _nothing, **given)
    with pytest.raises(RecipeError, match="found by trying schedules"):
        fit("searched", None)  # type: ignore[arg-type]


def _nothing(model, seed):
    """A sampler that keeps its samples to itself."""
    tiny_sampler.sample(model, seed, STEPS)
