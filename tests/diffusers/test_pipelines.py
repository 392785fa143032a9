"""Real pipelines of diffusers, optimized in place: what they compute, and when."""

import copy
import warnings
from typing import Any

import pytest
import torch

import ditopt
from ditopt.errors import DitoptWarning
from tests.diffusers.tiny import make, run
from tests.diffusers.use import FORA, FORECAST, Stop, computed, fresh, plain, shared

NAMES = ("sd3", "flux", "wan")


def branches(name, guided):
    return 2 if guided and name != "sd3" else 1


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_lossless_is_the_pipeline_bit_for_bit(name, guided):
    pipe = shared(name, "lossless")
    before = copy.copy(pipe.transformer.stats)
    assert torch.equal(run(pipe, name, guided=guided), plain(name, guided=guided))
    stats = pipe.transformer.stats
    assert stats.calls - before.calls == 6 * branches(name, guided)
    assert stats.memo_hits > before.memo_hits
    assert stats.flops - before.flops < stats.full_flops - before.full_flops


def test_a_cache_that_always_computes_is_the_pipeline():
    name = "wan"
    pipe = ditopt.optimize(make(name), "fora{interval=1}", target="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DitoptWarning)  # it never hits, and says so
        assert torch.equal(run(pipe, name), plain(name))
    assert pipe.transformer.stats.calls


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_fora_follows_its_schedule(name, guided):
    pipe = shared(name, FORA)
    result = run(pipe, name, guided=guided)
    assert computed(pipe.transformer) == {b: ([0, 3], 6) for b in range(branches(name, guided))}
    assert not torch.equal(result, plain(name, guided=guided))
    assert (result - plain(name, guided=guided)).abs().max() < 0.5
    assert pipe.transformer.stats.hits["cache0"] > 0


def test_forecast_follows_its_schedule():
    pipe = shared("wan", FORECAST)
    run(pipe, "wan", steps=7)
    assert computed(pipe.transformer) == {b: ([0, 1, 3, 5], 7) for b in range(2)}


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_a_second_request_equals_that_of_a_fresh_process(name):
    pipe = shared(name, FORA)
    run(pipe, name, seed=1, prompt="fog and rain", guided=False)
    run(pipe, name, seed=2, steps=4)
    assert torch.equal(run(pipe, name), fresh(name, FORA))
    assert pipe.transformer.stats.hits["cache0"] > 0


def test_a_new_resolution():
    pipe = shared("sd3", FORA)
    run(pipe, "sd3")
    wide = run(pipe, "sd3", width=16)
    assert wide.shape == (1, 4, 8, 16)
    assert computed(pipe.transformer) == {0: ([0, 3], 6)}
    assert torch.equal(wide, fresh("sd3", FORA, width=16))
    assert torch.equal(run(pipe, "sd3"), fresh("sd3", FORA))


@pytest.mark.parametrize("how", [Stop, KeyboardInterrupt, "interrupt"])
def test_a_cancelled_request_leaves_nothing(how):
    pipe = shared("wan", FORA)
    seen = []

    def cancel(pipe_, index, time, kwargs):
        seen.append(index)
        if index == 1:
            if how == "interrupt":
                pipe_._interrupt = True
            else:
                raise how
        return kwargs

    if how == "interrupt":
        run(pipe, "wan", callback_on_step_end=cancel)
    else:
        with pytest.raises(how):
            run(pipe, "wan", callback_on_step_end=cancel)
    assert seen == [0, 1]
    assert computed(pipe.transformer) == {b: ([0], 2) for b in range(2)}
    assert torch.equal(run(pipe, "wan"), fresh("wan", FORA))
    assert computed(pipe.transformer) == {b: ([0, 3], 6) for b in range(2)}


def test_an_error_inside_the_denoiser_leaves_nothing():
    pipe = shared("wan", FORA)
    calls, session = [], pipe.transformer.engine.session
    own = session.call

    def failing(*args):
        calls.append(1)
        if len(calls) == 6:
            raise Stop
        return own(*args)

    session.call = failing
    try:
        with pytest.raises(Stop):
            run(pipe, "wan")
    finally:
        del session.call
    assert torch.equal(run(pipe, "wan"), fresh("wan", FORA))


def test_set_timesteps_without_a_run_is_a_request_that_never_was():
    pipe = shared("wan", FORA)
    before = pipe.transformer.stats.requests
    pipe.scheduler.set_timesteps(50)
    assert torch.equal(run(pipe, "wan"), fresh("wan", FORA))
    assert pipe.transformer.stats.requests == before + 1


def test_callbacks_change_what_the_next_step_sees():
    def halve(pipe_, index, time, kwargs):
        return {"latents": kwargs["latents"] * 0.5, "prompt_embeds": kwargs["prompt_embeds"] + index}

    request: dict[str, Any] = {
        "callback_on_step_end": halve,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    want = run(make("wan"), "wan", **request)
    assert torch.equal(run(shared("wan", "lossless"), "wan", **request), want)
    assert not torch.equal(want, plain("wan"))
    run(shared("wan", FORA), "wan", **request)
    # the context is the branch, whatever happens to its prompt
    assert computed(shared("wan", FORA).transformer) == {b: ([0, 3], 6) for b in range(2)}


def test_both_experts_of_a_pipeline():
    assert torch.equal(run(shared("wan2", "lossless"), "wan2"), plain("wan2"))
    pipe = shared("wan2", FORA)
    run(pipe, "wan2")
    # the second expert is first called at step 3, where the schedule of the whole request computes anyway
    assert computed(pipe.transformer) == {b: ([0], 3) for b in range(2)}
    assert computed(pipe.transformer_2) == {b: ([3], 3) for b in range(2)}
    assert min(r.step for r in pipe.transformer_2.schedule_rows) == 3


def test_inductor():
    pipe = ditopt.optimize(make("sd3"), FORECAST, target="inductor")
    result = run(pipe, "sd3", guided=False)
    assert computed(pipe.transformer) == {0: ([0, 1, 3, 5], 6)}
    assert (result - fresh("sd3", FORECAST, guided=False)).abs().max() < 1e-4
    assert torch.equal(run(pipe, "sd3", guided=False), result)
