"""Denoisers whose own forward looks at the latent or the timestep: their blocks are captured, exact and cached."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import ditopt
from ditopt.calibration import record
from ditopt.capture import bind, capture
from ditopt.fitted import latent_text
from tests.foreign.base import STEPS, Foreign, run, times
from tests.foreign.looking import LOOKING
from tests.foreign.test_foreign import plain_of, same, tensors

EVERY = [pytest.param(f, id=f.name) for f in LOOKING]


@functools.cache
def captured(foreign: Foreign) -> tuple[Any, Any]:
    """One model for all tests, and its capture."""
    model: Any = foreign.model()
    call = foreign.call(0, 0)
    args, kwargs = (call, {}) if isinstance(call, tuple) else ((), call)
    return model, capture(model, *bind(model, args, kwargs))


def optimized(foreign: Foreign, recipe: str) -> Any:
    model, found = captured(foreign)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ditopt.capture.captures.capture", lambda *_: found)
        return ditopt.optimize(model, recipe, example_inputs=foreign.call(0, 0), target="eager", steps=STEPS)


def request(foreign: Foreign, fast: Any, seed: int) -> list[bool]:
    """Whether each step of a request gives the bits of the plain model."""
    found = []
    with fast.session(steps=STEPS):
        for step in range(STEPS):
            call = foreign.call(step, seed + step)
            output = tensors(run(fast, call))
            assert all(type(v) is torch.Tensor and v.isfinite().all() for v in output)
            found.append(same(output, plain_of(fast.original, call)))
    return found


@pytest.mark.parametrize("foreign", EVERY)
def test_exact_is_exact(foreign):
    fast = optimized(foreign, "lossless")
    notes = fast.compiled.captured.notes
    assert [n.partition(":")[0] for n in notes[:4]] == [
        "torch.export alone",
        "torch.export with values as constants",
        "a module that stays Python, or a recording of a run",
        "captured by blocks",
    ]
    assert all("looking.py:" in n for n in notes[:2])
    outlined = next(r.program for r in fast.history if r.name == "outline_blocks")
    assert sum(r.id.startswith("blocks.") for r in outlined.blocks()) == foreign.blocks
    assert next(r for r in fast.history if r.name == "hoist_invariants").applied > 5
    assert request(foreign, fast, 0) == [True] * STEPS
    fills = fast.stats.memo_fills
    assert fills > 0
    assert request(foreign, fast, 20) == [True] * STEPS
    assert fast.stats.memo_fills == fills  # the second request has the times and the prompt of the first
    assert len(fast.engine.compiled) == 1


@pytest.mark.parametrize("foreign", EVERY)
@pytest.mark.parametrize("recipe", ["fora{interval=2}", "taylorseer{interval=2,order=1}"])
def test_caches_reuse_the_blocks(foreign, recipe):
    fast = optimized(foreign, recipe)
    computed = request(foreign, fast, 0)
    rows = ["compute" if set(r.choices.values()) == {"compute"} else "reuse" for r in fast.schedule_rows]
    assert rows.count("reuse") >= STEPS // 2 - 1
    # a step that computes has the bits of the plain model, one that reuses has not
    assert computed == [r == "compute" for r in rows]
    assert fast.stats.share_block_flops < 0.8
    assert fast.stats.share_flops > fast.stats.share_block_flops  # Python around the blocks runs in every step


@pytest.mark.parametrize("foreign", EVERY)
def test_a_second_request_is_the_first_of_a_fresh_process(foreign):
    used = optimized(foreign, "fora{interval=2}")
    request(foreign, used, 40)
    fresh = optimized(foreign, "fora{interval=2}")
    for step in range(STEPS):  # nobody says where a request begins
        call = foreign.call(step, 60 + step)
        assert same(tensors(run(used, call)), tensors(run(fresh, call))), f"step {step}"
    assert sum(fresh.stats.hits.values()) == STEPS // 2


def test_it_is_explained():
    foreign = LOOKING[0]
    text = ditopt.explain(foreign.model(), "fora", example_inputs=foreign.call(0, 0), steps=STEPS, target="eager")
    assert "captured by blocks: blocks.0 .. blocks.2 (3 calls) are a graph, with " in text
    assert "the rest of forward stays Python and runs in every step" in text
    assert "blocks.0.x on the latent; blocks.0.c on the timestep and the prompt" in text
    assert text.count("if float(t[0]) > 0.5:") == 2  # once for each way that failed
    assert "blocks.0.c  timestep  float32[2, 32]" in text


def test_a_recipe_is_fitted_to_the_models_own_latent_and_times():
    foreign = LOOKING[0]
    model, _ = captured(foreign)
    seen: list[torch.Tensor] = []

    def sampler(denoiser: Any, seed: int) -> torch.Tensor:
        for step in range(STEPS):
            seen.append(run(denoiser, foreign.call(step, seed)))
        return seen[-1]

    profile = record(model, sampler, regions=["latent", "blocks.*.attn"], steps=STEPS, seeds=[3])
    x = foreign.call(0, 3)[0]  # type: ignore[index]
    assert profile.key["latent"] == latent_text(x)
    assert profile.times.tolist() == [float(times(step)[0]) for step in range(STEPS)]
    assert sum(map(len, profile.regions.values())) == 1 + foreign.blocks
