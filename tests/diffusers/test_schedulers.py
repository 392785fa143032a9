"""The hooked scheduler: exchanged, copied, shared, repeating its times, starting in their middle."""

import copy
import inspect
import pickle

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler, StableDiffusion3Img2ImgPipeline

import ditopt
from ditopt.errors import DitoptWarning, SessionError
from tests.diffusers.tiny import ARGUMENTS, make, run
from tests.diffusers.use import FORA, computed, fresh, shared


@pytest.fixture
def sd3_pipe():
    """The shared pipeline, with its own scheduler put back afterwards."""
    pipe = shared("sd3", FORA)
    own = pipe.scheduler
    yield pipe
    pipe.scheduler = own


def test_a_scheduler_that_repeats_its_times(sd3_pipe):
    heun = FlowMatchHeunDiscreteScheduler(shift=3.0)
    want = make("sd3")
    want.scheduler = copy.deepcopy(heun)
    expected = run(want, "sd3", steps=4)
    sd3_pipe.scheduler = heun  # exchanged after optimize: heard of at the next call
    result = run(sd3_pipe, "sd3", steps=4)
    assert computed(sd3_pipe.transformer) == {0: ([0, 3, 6], 7)}
    again = run(sd3_pipe, "sd3", steps=4)  # announced by its own set_timesteps
    assert torch.equal(result, again)
    assert not torch.equal(result, expected)
    lossless = shared("sd3", "lossless")
    own, lossless.scheduler = lossless.scheduler, copy.deepcopy(heun)
    try:
        assert torch.equal(run(lossless, "sd3", steps=4), expected)
    finally:
        lossless.scheduler = own


def test_the_last_steps_are_known_to_an_exchanged_scheduler():
    pipe = ditopt.optimize(make("sd3"), "cache{region=blocks.*.attn,every=4,last=2}", target="eager")
    first = run(pipe, "sd3")
    assert computed(pipe.transformer) == {0: ([0, 4, 5], 6)}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    assert torch.equal(run(pipe, "sd3"), first)
    assert computed(pipe.transformer) == {0: ([0, 4, 5], 6)}
    ditopt.restore(pipe)
    assert not {"set_timesteps", "step", "__getstate__"} & set(vars(pipe.scheduler))


def test_copies_of_a_hooked_scheduler_are_plain():
    pipe = shared("sd3", FORA)
    before = pipe.transformer.stats.requests, pipe.transformer.engine.session.clock.running
    pipe.scheduler.set_timesteps(3)
    for copied in (
        copy.copy(pipe.scheduler),
        copy.deepcopy(pipe.scheduler),
        pickle.loads(pickle.dumps(pipe.scheduler)),
    ):
        copied.set_timesteps(9)
        assert len(copied.timesteps) == 9
        assert not {"set_timesteps", "step"} & set(vars(copied))
    assert len(pipe.scheduler.timesteps) == 3
    state = copy.deepcopy(pipe.scheduler.__dict__)  # panorama pipelines save and load a scheduler in this way
    pipe.scheduler.__dict__.update(state)
    pipe.scheduler.set_timesteps(4)
    assert len(pipe.scheduler.timesteps) == 4
    assert pipe.transformer.engine.session.clock.running > (before[1] or 0)


def test_pipelines_can_inspect_the_shadowed_methods():
    pipe, own = shared("sd3", FORA), make("sd3").scheduler
    for name in ("set_timesteps", "step"):
        assert inspect.signature(getattr(pipe.scheduler, name)) == inspect.signature(getattr(own, name))
        assert getattr(pipe.scheduler, name).__doc__ == getattr(own, name).__doc__
    custom = run(pipe, "sd3", steps=None, sigmas=[1.0, 0.7, 0.3])
    assert torch.equal(custom, fresh("sd3", FORA, steps=3, sigmas=(1.0, 0.7, 0.3)))
    assert computed(pipe.transformer) == {0: ([0], 3)}


def test_image_to_image_runs_the_steps_that_remain():
    pipe = ditopt.optimize(make("sd3"), "cache{region=blocks.*.attn,mask=1011}", steps=4, target="eager")
    parts = {**pipe.components}
    image = torch.rand(1, 3, 8, 8)
    request = {
        "prompt": "a boat",
        "image": image,
        "strength": 0.5,
        "guidance_scale": 1.0,
        "output_type": "latent",
        **ARGUMENTS["sd3"],
    }
    other = StableDiffusion3Img2ImgPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    other(num_inference_steps=8, generator=torch.Generator().manual_seed(0), **request)
    assert computed(pipe.transformer) == {0: ([0, 2, 3], 4)}
    # the full loop has other steps than the mask
    with pytest.raises(SessionError, match="4 entries and this request runs 8 steps"):
        other(num_inference_steps=8, generator=torch.Generator().manual_seed(0), **{**request, "strength": 1.0})
    restored = ditopt.restore(other)
    assert restored.transformer is pipe.transformer.original
    assert "step" in vars(pipe.scheduler)  # the first pipeline still is optimized
    ditopt.restore(pipe)
    assert "step" not in vars(pipe.scheduler)


def test_a_scheduler_that_does_not_count_its_steps():
    """DDIM has neither step_index nor begin_index: indices come from the order of its steps and their times."""
    pipe = ditopt.optimize(make("sd3"), "cache{region=blocks.*.attn,mask=1011}", target="eager")
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    loop(pipe, 4)
    assert computed(pipe.transformer) == {0: ([0, 2, 3], 4)}
    loop(pipe, 8, start=4)
    assert computed(pipe.transformer) == {0: ([0, 2, 3], 4)}
    assert pipe.transformer.engine.session.clock.running is None  # its last step ended the request


def loop(pipe, steps, start=0):
    """What pipelines do, with inputs of the denoiser that are made up."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, pooled = torch.ones(1, 16, 32), torch.ones(1, 32)
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps[start:]:
        noise = pipe.transformer(
            hidden_states=latents,
            timestep=t.expand(1),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        latents = pipe.scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def test_steps_that_differ_from_those_of_optimize():
    pipe = ditopt.optimize(make("sd3"), "cache{region=blocks.*.attn,every=4,last=1}", steps=9, target="eager")
    with pytest.warns(DitoptWarning, match="this request runs 6 steps and the model was optimized for 9"):
        run(pipe, "sd3")
    assert computed(pipe.transformer) == {0: ([0, 4, 5], 6)}


def test_a_cache_that_never_hits_is_told_when_the_request_ends():
    pipe = shared("wan", FORA)
    with pytest.warns(DitoptWarning, match="never reused in this request"):
        run(pipe, "wan", steps=1)
    assert not pipe.transformer.engine.session._branches


def test_two_pipelines_with_one_scheduler():
    one, two = make("sd3"), make("sd3")
    two.scheduler = one.scheduler
    ditopt.optimize(one, FORA, target="eager")
    ditopt.optimize(two, FORA, target="eager")
    run(one, "sd3")
    assert torch.equal(run(two, "sd3"), fresh("sd3", FORA))
    assert computed(one.transformer) == computed(two.transformer) == {0: ([0, 3], 6)}
    ditopt.restore(one)
    assert computed(two.transformer) == {0: ([0, 3], 6)}
    run(two, "sd3")
    ditopt.restore(two)
    assert "step" not in vars(one.scheduler)
