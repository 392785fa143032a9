"""A recipe that changes the pace of the sampler: the scheduler's times exchanged for a request, and put back."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    UniPCMultistepScheduler,
)

import ditopt
from ditopt.errors import BadInput, DitoptWarning, RecipeError, SessionError
from ditopt.ir.pacing import paced
from ditopt.ir.text import parse_program, print_program
from ditopt.recipe import Recipe
from tests.diffusers.tiny import ARGUMENTS, make, run
from tests.diffusers.use import Stop, plain

FACTORS = [1.0, 0.5, 0.0, 1.0, 0.25, 1.0]
TEXT = 'rescale_steps{factors="1 0.5 0 1 0.25 1"}'
RECIPE = f"fora{{interval=3}}, {TEXT}"


def optimized(name="sd3", recipe=TEXT):
    return ditopt.optimize(make(name), recipe, target="eager")


@functools.cache
def by_hand(name, cached=""):
    """The request with the times that the factors give, set by hand: the pipeline's loop takes any sigmas."""
    pipe = make(name)
    if cached:
        ditopt.optimize(pipe, cached, target="eager")
    own = pipe.scheduler.set_timesteps

    def set_timesteps(*args, **kwargs):
        own(*args, **kwargs)
        s = pipe.scheduler
        s.sigmas = torch.tensor(paced(s.sigmas.double().tolist(), FACTORS), dtype=torch.float32)
        s.timesteps = s.sigmas[:-1] * s.config.num_train_timesteps

    functools.update_wrapper(set_timesteps, own)
    pipe.scheduler.set_timesteps = set_timesteps
    return run(pipe, name)


def times(scheduler):
    return scheduler.sigmas.tolist(), scheduler.timesteps.tolist()


def after(name):
    """The times of a plain pipeline's scheduler after a request."""
    pipe = make(name)
    run(pipe, name)
    return times(pipe.scheduler)


# -- what it does ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_request_runs_at_the_times_of_its_factors(name):
    pipe = optimized(name)
    result = run(pipe, name)
    assert torch.allclose(result, by_hand(name), atol=1e-4)
    assert not torch.allclose(result, plain(name), atol=1e-2)
    assert torch.equal(run(pipe, name), result)


def test_a_cache_sees_the_new_times():
    """Tables of the timestep are filled for the times that the request really has."""
    pipe = optimized(recipe=f"lossless, {RECIPE}")
    seen: list[list[float]] = []
    own = pipe.transformer.engine.session.begin

    def begin(steps=None, timesteps=None):
        seen.append(timesteps.tolist())
        own(steps, timesteps)

    pipe.transformer.engine.session.begin = begin
    assert torch.allclose(run(pipe, "sd3"), by_hand("sd3", "lossless, fora{interval=3}"), atol=1e-4)
    assert len(seen) == 1
    wanted = paced(after("sd3")[0], FACTORS)
    assert seen[0] == pytest.approx([1000 * s for s in wanted[:-1]], abs=1e-2)


def test_times_in_front_of_the_first_factor_stay_bit_by_bit():
    pipe = optimized(recipe='rescale_steps{factors="1 1 1 0.5 1 1"}')
    own = make("sd3").scheduler
    own.set_timesteps(6)
    pipe.scheduler.set_timesteps(6)
    assert torch.equal(pipe.scheduler.sigmas[:4], own.sigmas[:4])
    assert torch.equal(pipe.scheduler.timesteps[:4], own.timesteps[:4])
    assert not torch.equal(pipe.scheduler.sigmas, own.sigmas)
    assert pipe.scheduler.sigmas[-1] == own.sigmas[-1] == 0
    assert (pipe.scheduler.sigmas.dtype, pipe.scheduler.timesteps.dtype) == (own.sigmas.dtype, own.timesteps.dtype)


def test_sigmas_of_the_caller_are_the_ones_that_are_paced():
    pipe = optimized(recipe='rescale_steps{factors="1 0.5 1"}')
    given = [1.0, 0.7, 0.3]
    pipe.scheduler.set_timesteps(sigmas=given)
    own = make("sd3").scheduler
    own.set_timesteps(sigmas=given)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(paced(own.sigmas.tolist(), [1, 0.5, 1]))


def test_one_factor_is_for_every_step():
    pipe = optimized(recipe="rescale_steps{factors=0.8}")
    own = make("sd3").scheduler
    for steps in (4, 9):
        own.set_timesteps(steps)
        pipe.scheduler.set_timesteps(steps)
        assert pipe.scheduler.sigmas.tolist() == pytest.approx(paced(own.sigmas.tolist(), [0.8] * steps))


def test_image_to_image_starts_in_the_middle_of_the_new_times():
    pipe = optimized()
    other = StableDiffusion3Img2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    began = []

    def keep(p, i, t, kwargs):
        began.append(float(t))
        return {}

    other(
        "a boat", image=torch.rand(1, 3, 8, 8), strength=0.5, guidance_scale=1.0, output_type="latent",
        num_inference_steps=6, callback_on_step_end=keep, generator=torch.Generator().manual_seed(0),
        **ARGUMENTS["sd3"],
    )  # fmt: skip
    wanted = paced(after("sd3")[0], FACTORS)
    assert began == pytest.approx([1000 * s for s in wanted[3:-1]], abs=1e-2)


# -- put back ----------------------------------------------------------------------------------------------------------


def same(a, b):
    """Whether two schedulers are bit-equal: what they hold, and their methods."""
    mine, other = vars(a), vars(b)
    return mine.keys() == other.keys() and all(
        torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else k.startswith("_") or v == other[k]
        for k, v in mine.items()
    )


def test_between_requests_and_after_restore_the_scheduler_is_its_own():
    pipe = optimized()
    run(pipe, "sd3")
    assert times(pipe.scheduler) == after("sd3")
    pipe.scheduler.set_timesteps(6)
    assert times(pipe.scheduler) != after("sd3")
    ditopt.restore(pipe)
    fresh = make("sd3").scheduler
    fresh.set_timesteps(6)
    assert same(pipe.scheduler, fresh)
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))


@pytest.mark.parametrize("where", ["denoiser", "callback", "interrupt"])
def test_after_a_failure(where):
    pipe = optimized()
    denoiser = pipe.transformer
    error = KeyboardInterrupt if where == "interrupt" else Stop

    def fail(p, i, t, kwargs):
        if i == 2:
            raise error
        return {}

    own = denoiser.engine.session.call
    if where == "callback":
        with pytest.raises(Stop):
            run(pipe, "sd3", callback_on_step_end=fail)
    else:
        calls = []

        def call(*args):
            calls.append(1)
            if len(calls) == 3:
                raise error
            return own(*args)

        denoiser.engine.session.call = call
        with pytest.raises(error):
            run(pipe, "sd3")
        assert times(pipe.scheduler) == after("sd3"), "a failed call leaves the scheduler its own times"
        denoiser.engine.session.call = own
    again = run(pipe, "sd3")
    assert torch.allclose(again, by_hand("sd3"), atol=1e-4)
    with pytest.raises(Stop):
        run(pipe, "sd3", callback_on_step_end=lambda *a: (_ for _ in ()).throw(Stop))
    ditopt.restore(pipe)
    assert times(pipe.scheduler) == after("sd3")
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))


def test_a_call_that_is_repeated_after_its_failure_goes_on_at_the_new_times():
    pipe = optimized()
    own = pipe.transformer.engine.session.call
    failed: list[int] = []

    def once(*args):
        if not failed:
            failed.append(1)
            raise Stop
        return own(*args)

    forward = pipe.transformer.forward

    def patient(*args, **kwargs):
        try:
            return forward(*args, **kwargs)
        except Stop:
            return forward(*args, **kwargs)

    pipe.transformer.engine.session.call = once
    pipe.transformer.__dict__["forward"] = patient
    assert torch.allclose(run(pipe, "sd3"), by_hand("sd3"), atol=1e-4)
    assert failed


def test_an_optimize_that_fails_leaves_the_scheduler_alone():
    pipe = make("sd3")
    before = copy.deepcopy(vars(pipe.scheduler))
    with pytest.raises(RecipeError, match="matches nothing"):
        ditopt.optimize(
            pipe, f"{TEXT}, cache{{region=blocks.77}}", target="eager",
            example_inputs={
                "hidden_states": torch.zeros(1, 4, 8, 8), "timestep": torch.ones(1),
                "encoder_hidden_states": torch.ones(1, 16, 32), "pooled_projections": torch.ones(1, 32),
            },
        )  # fmt: skip
    assert vars(pipe.scheduler).keys() == before.keys()
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))


# -- refusals ----------------------------------------------------------------------------------------------------------

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
UNSERVED = {
    "no sigmas": (lambda: DDIMScheduler(), "DDIMScheduler is none: it has no sigmas"),
    "multistep": (lambda: DPMSolverMultistepScheduler(**FLOW), "step 1 is no Euler step"),
    "multistep too": (lambda: UniPCMultistepScheduler(**FLOW), "is no Euler step"),
    "two calls a step": (lambda: FlowMatchHeunDiscreteScheduler(), r"is no Euler step|sigmas for|do not fall"),
    "noise": (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "step 0 is no Euler step"),
    "other times": (lambda: EulerDiscreteScheduler(), "timesteps are not proportional to its sigmas"),
}


OLD = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""Schedulers of diffusers use NumPy in ways that it will drop."""


@OLD
@pytest.mark.parametrize("kind", UNSERVED)
def test_schedulers_that_cannot_be_paced_are_refused_by_optimize(kind):
    made, says = UNSERVED[kind]
    pipe = make("sd3")
    pipe.scheduler, own = made(), pipe.transformer
    before, state = set(vars(pipe.scheduler)), torch.random.get_rng_state()
    with pytest.raises(BadInput, match=says) as caught:
        ditopt.optimize(pipe, TEXT, target="eager")
    assert str(caught.value).endswith("take rescale_steps out of the recipe")
    assert "\n" not in str(caught.value)
    assert pipe.transformer is own
    assert set(vars(pipe.scheduler)) == before
    assert torch.equal(torch.random.get_rng_state(), state), "trying a step draws no random number of the user's"


def test_a_scheduler_without_its_own_sigmas_is_refused_when_a_request_begins():
    """Where set_timesteps wants what only the pipeline knows, the answer has to wait."""
    pipe = make("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, stochastic_sampling=True)
    ditopt.optimize(pipe, TEXT, target="eager")
    with pytest.raises(BadInput, match="is no Euler step"):
        pipe.scheduler.set_timesteps(6, mu=0.7)


def test_another_number_of_steps():
    pipe = optimized()
    with pytest.raises(SessionError, match="6 factors and this request runs 4 steps; run 6, or calibrate for 4"):
        run(pipe, "sd3", steps=4)
    own = make("sd3").scheduler
    own.set_timesteps(4)
    assert times(pipe.scheduler) == times(own)
    assert torch.allclose(run(pipe, "sd3"), by_hand("sd3"), atol=1e-4)


def test_an_exchanged_scheduler_is_too_late_once():
    pipe = optimized()
    run(pipe, "sd3")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    with pytest.raises(BadInput, match=r"exchanged after ditopt.optimize.*run the request again"):
        run(pipe, "sd3")
    assert torch.allclose(run(pipe, "sd3"), by_hand("sd3"), atol=1e-4)
    ditopt.restore(pipe)
    assert torch.equal(run(pipe, "sd3"), plain("sd3"))


def test_a_shared_scheduler_has_one_pace():
    one, two = make("sd3"), make("sd3")
    two.scheduler = one.scheduler
    ditopt.optimize(one, TEXT, target="eager")
    denoiser = two.transformer
    with pytest.raises(BadInput, match=r"shared with another optimized pipeline.*from_config"):
        ditopt.optimize(two, "lossless", target="eager")
    assert two.transformer is denoiser
    ditopt.optimize(two, TEXT, target="eager")
    assert torch.allclose(run(two, "sd3"), by_hand("sd3"), atol=1e-4)
    ditopt.restore(two)
    assert torch.allclose(run(one, "sd3"), by_hand("sd3"), atol=1e-4)
    ditopt.restore(one)
    assert torch.equal(run(one, "sd3"), plain("sd3"))


EXAMPLE = {
    "hidden_states": torch.zeros(1, 4, 8, 8),
    "timestep": torch.ones(1),
    "encoder_hidden_states": torch.ones(1, 16, 32),
    "pooled_projections": torch.ones(1, 32),
    "return_dict": False,
}


def test_a_bare_model_is_refused(tmp_path):
    model = make("sd3").transformer
    says = "give ditopt.optimize the diffusers pipeline, or take rescale_steps out of the recipe"
    with pytest.raises(BadInput, match=f"a model alone has none: {says}"):
        ditopt.optimize(model, RECIPE)
    with pytest.raises(BadInput, match=f"an exported file has none: {says}"):
        ditopt.export_onnx(model, tmp_path / "m.onnx", RECIPE, example_inputs=EXAMPLE, steps=6)
    compiled = torch.compile(model, backend="ditopt", options={"recipe": TEXT})
    with pytest.raises(Exception, match=says):
        compiled(**EXAMPLE)
    assert not list(tmp_path.iterdir())
    torch._dynamo.reset()


def test_a_file_would_lose_the_pace(tmp_path):
    pipe = optimized(recipe=RECIPE)
    run(pipe, "sd3", guided=False)
    with pytest.raises(BadInput, match="cannot be saved with it; optimize with a recipe without rescale_steps"):
        ditopt.save(pipe.transformer, tmp_path / "m")
    with pytest.raises(BadInput, match="cannot be exported with it"):
        ditopt.export_onnx(pipe.transformer, tmp_path / "m.onnx", steps=6)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factors", ["1.5", "x", "-1", '"0 1"', '""', "nan"])
def test_factors_that_are_none(factors):
    with pytest.raises(RecipeError, match=r"rescale_steps: factors=.*expected one number a step") as caught:
        Recipe.parse(f"rescale_steps{{factors={factors}}}" if factors != '""' else 'rescale_steps{factors=" "}')
    assert "\n" not in str(caught.value)


def test_two_paces_are_one_too_many():
    with pytest.raises(RecipeError, match=r"changes the pace of the sampler 2 times.*join"):
        optimized(recipe=f"{TEXT}, rescale_steps{{factors=0.5}}")
    pipe = ditopt.optimize(make("sd3"), TEXT, target="eager", steps=4)
    with pytest.raises(RecipeError, match="6 factors given, the request has 4 steps"):
        run(pipe, "sd3")


# -- seen --------------------------------------------------------------------------------------------------------------


def test_it_is_data_and_can_be_seen(tmp_path):
    pipe = optimized(recipe=RECIPE)
    run(pipe, "sd3")
    program = pipe.transformer.program
    assert program.pace == tuple(FACTORS)
    assert parse_program(print_program(program), program.params).pace == program.pace
    recipe = Recipe.parse(RECIPE)
    assert Recipe.parse(str(recipe)) == recipe
    (tmp_path / "r.json").write_text(recipe.to_json())
    assert Recipe.parse(tmp_path / "r.json") == recipe
    told = "scheduler runs at other times: its steps go as far as they would, times 1 0.5 0 1 0.25 1"
    page = pipe.transformer.report(tmp_path / "r.html").read_text()
    assert told in page.replace("&#x27;", "'")
    shown = ditopt.explain(make("sd3").transformer, RECIPE, example_inputs=EXAMPLE)
    assert told in shown
    assert "a model alone has no scheduler: optimize the pipeline" in shown
    assert "other times" not in ditopt.explain(make("sd3").transformer, "lossless", example_inputs=EXAMPLE)


@OLD
def test_neutral_factors_leave_any_scheduler_alone():
    pipe = make("sd3")
    pipe.scheduler = DPMSolverMultistepScheduler(**FLOW)
    expected = run(copy.deepcopy(pipe), "sd3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DitoptWarning)
        ditopt.optimize(pipe, "rescale_steps{factors=1}", target="eager")
        assert torch.equal(run(pipe, "sd3"), expected)
