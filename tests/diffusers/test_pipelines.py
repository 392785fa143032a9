"""Real pipelines of diffusers, optimized in place: what they compute, when, and that restore leaves no trace."""

import copy
import functools
import inspect
import pickle
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from torch import nn

import ditopt
from ditopt.errors import BadInput, CaptureError, DitoptWarning, RecipeError, SessionError
from tests.diffusers.tiny import ARGUMENTS, make, run

NAMES = ("sd3", "flux", "wan")
FORA, FORECAST = "fora{interval=3}", "forecast{interval=2,order=1}"


@functools.cache
def plain(name, **request):
    return run(make(name), name, **request)


@functools.cache
def shared(name, recipe):
    """An optimized pipeline that many tests use one after the other: none of them may change what the next one sees."""
    return ditopt.optimize(make(name), recipe, target="eager")


@functools.cache
def fresh(name, recipe, **request):
    """What a new process gives."""
    return run(ditopt.optimize(make(name), recipe, target="eager"), name, **request)


def computed(denoiser):
    """The steps at which each guidance branch computed, and the number of its calls, in the last request."""
    found = {}
    for row in denoiser.schedule_rows:
        steps, calls = found.setdefault(row.branch, ([], []))
        calls.append(row.step)
        if "compute" in row.choices.values():
            steps.append(row.step)
    assert all(calls == sorted(set(calls)) for _, calls in found.values())
    return {branch: (steps, len(calls)) for branch, (steps, calls) in found.items()}


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


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_a_cache_that_always_computes_is_the_pipeline(name):
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


class Stop(Exception):
    pass


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

    request = {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
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


# -- schedulers --------------------------------------------------------------------------------------------------------


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
        **{k: v for k, v in ARGUMENTS["sd3"].items()},
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


# -- the pipeline around it --------------------------------------------------------------------------------------------


def test_what_a_pipeline_reads_of_its_denoiser():
    pipe, own = shared("wan", FORA), make("wan")
    fast = pipe.transformer
    assert fast.config == own.transformer.config
    assert (fast.dtype, fast.device) == (torch.float32, torch.device("cpu"))
    assert pipe.components["transformer"] is fast
    assert pipe.config["transformer"] == own.config["transformer"]
    assert dict(pipe.config) == dict(own.config)
    assert pipe.device == own.device
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in own.transformer.named_parameters()]
    with fast.cache_context("cond", step_index=0, sigma=1.0):
        assert fast.engine.session.clock.context == "cond"
    assert pipe.to("cpu") is pipe


def test_a_pipeline_on_another_dtype_says_to_optimize_again():
    pipe = ditopt.optimize(make("sd3"), FORA, target="eager")
    run(pipe, "sd3")
    pipe.to(torch.float64)
    assert pipe.transformer.original.dtype == torch.float64
    with pytest.raises(SessionError, match="optimized as torch.float32"):
        run(pipe, "sd3")
    pipe.to(torch.float32)
    assert torch.equal(run(pipe, "sd3"), fresh("sd3", FORA))


def test_restore_leaves_no_trace():
    pipe = make("sd3")
    own, scheduler = pipe.transformer, dict(vars(pipe.scheduler))
    attributes, config = dict(vars(pipe)), dict(pipe.config)
    inside = dict(vars(own))
    ditopt.optimize(pipe, FORA, target="eager")
    assert pipe.transformer is not own
    assert ditopt.restore(pipe) is pipe
    assert vars(pipe) == attributes
    assert dict(pipe.config) == config
    assert pipe.transformer is own
    assert vars(own) == inside
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))
    assert ditopt.restore(pipe) is pipe  # nothing to do
    ditopt.optimize(pipe, FORA, target="eager")
    with pytest.raises(Stop):
        run(pipe, "sd3", callback_on_step_end=stop)
    ditopt.restore(pipe)
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))


def stop(*_):
    raise Stop


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


def test_bad_input_leaves_the_pipeline_as_it_was():
    pipe = make("sd3")
    before, scheduler = dict(vars(pipe)), set(vars(pipe.scheduler))
    bad = torch.zeros(1, 4, 8, 8)
    for arguments, error in [
        ({"recipe": "nonsense"}, RecipeError),
        ({"target": "abacus"}, BadInput),
        ({"steps": 0}, BadInput),
        ({"example_inputs": 3}, BadInput),
        ({"example_inputs": {"nothing": bad}}, BadInput),
        ({"example_inputs": {"hidden_states": bad}}, CaptureError),
    ]:
        with pytest.raises(error):
            ditopt.optimize(pipe, **{"target": "eager", **arguments})
        assert vars(pipe) == before
        assert set(vars(pipe.scheduler)) == scheduler
    ditopt.optimize(pipe, "lossless", target="eager")
    with pytest.raises(BadInput, match=r"optimized already; call ditopt.restore\(pipe\) first"):
        ditopt.optimize(pipe, "lossless", target="eager")
    ditopt.restore(pipe)
    pipe.transformer = None
    with pytest.raises(BadInput, match=r"no denoiser was found.*vae \(AutoencoderKL\)"):
        ditopt.optimize(pipe, "lossless", target="eager")


def test_an_adapter_loaded_after_optimize_is_not_ignored():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    pipe = ditopt.optimize(make("sd3"), "lossless", target="eager")
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))
    block = pipe.transformer.transformer_blocks[1]
    block.attn.to_q = Adapted(block.attn.to_q)
    with pytest.raises(SessionError, match="modules were exchanged after optimize"):
        run(pipe, "sd3")
    pipe.transformer.refresh()
    adapted = run(pipe, "sd3")
    assert not torch.equal(adapted, plain("sd3"))
    assert torch.equal(run(ditopt.restore(pipe), "sd3"), adapted)


def test_weights_fused_in_place_are_seen():
    pipe = ditopt.optimize(make("sd3"), "lossless", target="eager")
    run(pipe, "sd3")
    pipe.transformer.transformer_blocks[1].attn.to_q.weight.data += 0.5
    pipe.transformer.transformer_blocks[1].norm1.linear.weight.data += 0.5  # its product is a hoisted table
    fused = run(pipe, "sd3")
    assert not torch.equal(fused, plain("sd3"))
    assert torch.equal(run(ditopt.restore(pipe), "sd3"), fused)


def test_example_inputs_capture_ahead():
    inputs = {
        "hidden_states": torch.zeros(2, 4, 8, 8),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.zeros(2, 16, 32),
        "pooled_projections": torch.zeros(2, 32),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }
    pipe = ditopt.optimize(make("sd3"), FORA, example_inputs=inputs, target="eager")
    assert len(pipe.transformer.engine.compiled) == 1
    assert torch.equal(run(pipe, "sd3"), fresh("sd3", FORA))
    assert len(pipe.transformer.engine.compiled) == 1


def test_inductor():
    pipe = ditopt.optimize(make("sd3"), FORA, target="inductor")
    result = run(pipe, "sd3")
    assert computed(pipe.transformer) == {0: ([0, 3], 6)}
    assert (result - fresh("sd3", FORA)).abs().max() < 1e-4
    assert torch.equal(run(pipe, "sd3"), result)
