"""The systems of test_gates and test_blocks on a model with double and single blocks, in bfloat16 and float16, under
guidance, under Heun's method and at another resolution: each against the same transcription."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ditopt
from tests.recipes import test_blocks, test_forecasts, test_gates
from tests.recipes.oracle import STEPS, Case, agrees, captures_shared, drive, model, on, request, run

TWO = {
    "firstblock": Case("firstblock{threshold=0.25}", lambda: test_gates.firstblock(0.25)),
    "dbcache": Case("dbcache{F=2,B=1,R=0.3,W=3,MC=2}", lambda: test_gates.dbcache(2, 1, 0.3, 3, longest=2)),
    "dbcache_behind_the_join": Case(
        "dbcache{F=4,B=0,R=0.3,W=3,predictor=taylorseer,order=1}", lambda: test_gates.dbcache(4, 0, 0.3, 3, 1)
    ),
    "cg_taylor": Case(
        "cg_taylor{threshold=0.02,first_block_order=1,order=1,first=3}", lambda: test_gates.cg_taylor(0.02, 1, 1, 3)
    ),
    "teacache": Case(
        'teacache{threshold=0.3,coefficients="1 0"}', lambda: test_gates.teacache(0.3, np.poly1d([1, 0]), (0, 9))
    ),
    "easycache": Case("easycache{tau=0.1,ret_steps=3}", lambda: test_gates.easycache(0.1, 3)),
    "dbprune": Case("dbprune{F=1,B=1,R=0.2,W=3,MC=4}", lambda: test_blocks.dbprune(1, 1, 0.2, 3, 4)),
    "tdc": Case("tdc{threshold=0.21,longest=2,budget=0.35}", lambda: test_blocks.tdc(0.21, 2, 0.35)),
}


@pytest.mark.parametrize("name", TWO)
def test_double_and_single_blocks(name):
    with on("flux"):
        agrees(TWO[name])


# -- dtypes, guidance, solvers -----------------------------------------------------------------------------------------

ONE = {n: c for n, c in {**test_gates.CASES, **test_blocks.CASES}.items() if n != "dbcache_static"}
FORECASTS = test_forecasts.CASES
HALF = {  # of all blocks' numbers none lies so near to these thresholds that rounding would decide
    **ONE,
    **FORECASTS,
    "dbprune": Case("dbprune{F=1,B=1,R=0.17,W=3,MC=4}", lambda: test_blocks.dbprune(1, 1, 0.17, 3, 4)),
    "tdc": Case("tdc{threshold=0.09,longest=2,budget=0.15}", lambda: test_blocks.tdc(0.09, 2, 0.15)),
}
SAMPLED = {  # Heun's two evaluations at one time are far from a series in steps
    **ONE,
    "cg_taylor": Case(
        "cg_taylor{threshold=0.1,first_block_order=2,order=1,first=4}", lambda: test_gates.cg_taylor(0.1, 2, 1, 4)
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_decides_as_the_transcription_in_float32_does(name, dtype):
    """The transcription measures and predicts in float32 and float64 what the model's parts give in ``dtype``."""
    with on(dtype=dtype):
        agrees(HALF[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TWO)
def test_half_precision_of_double_and_single_blocks(name, dtype):
    with on("flux", dtype=dtype):
        agrees(TWO[name])


@pytest.mark.parametrize("sampler", ["doubled", "calls", "heun"])
@pytest.mark.parametrize("name", SAMPLED)
def test_guidance_and_heun(name, sampler):
    """A doubled batch is decided as one; each of two calls by its own numbers; Heun's second evaluation is a step."""
    with on(sampler=sampler):
        agrees(SAMPLED[name])


@pytest.mark.parametrize("sampler", ["doubled", "calls"])
@pytest.mark.parametrize("name", ["firstblock", "dbcache_behind_the_join", "tdc"])
def test_guidance_of_double_and_single_blocks(name, sampler):
    with on("flux", sampler=sampler):
        agrees(TWO[name])


@pytest.mark.filterwarnings("ignore:cache .* was never reused")  # where it is cancelled early
@pytest.mark.parametrize("name", ["firstblock", "dbcache_taylor", "teacache", "easycache", "tdc"])
def test_another_resolution_between_two_requests(name):
    """Each request is as in a model of its own, also after a cancelled one of the other size."""
    recipe = ONE[name].recipe
    with captures_shared():
        fast = ditopt.optimize(model(), recipe, steps=STEPS, target="eager")
        for size, stop in ((8, 5), (12, None), (12, 7), (8, None)):
            with on(size=size), fast.session(steps=STEPS):
                got = request(drive(fast), 0, stop)
            with on(size=size):
                assert np.array_equal(got, run(recipe).outputs[: len(got)])
