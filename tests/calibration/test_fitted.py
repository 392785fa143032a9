"""A calibrated recipe says when what runs is not what it was fitted to; and how many bytes its state takes."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import ditopt
from ditopt.errors import DitoptWarning, SessionError
from ditopt.explanation import size
from ditopt.fitted import guidance_text, latent_text, model_text, scheduler_text
from ditopt.footprint import live_slots
from ditopt.recipe import Recipe
from tests import tiny_models, tiny_sampler
from tests.calibration.use import Pipe, Scheduler, sampler

STEPS = 5


@functools.cache
def fitted() -> Recipe:
    """Fitted to the pipeline with guidance by a doubled batch."""
    return ditopt.calibrate(
        Pipe("batch"), "magcache{threshold=9,retention_ratio=0}", sampler, steps=STEPS, seeds=[0], progress=False
    )


def run(pipe: Pipe, *requests: dict[str, Any], recipe: Recipe | None = None) -> list[str]:
    """What is warned about in some requests of the optimized pipeline."""
    ditopt.optimize(pipe, recipe or fitted(), target="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for request in requests:
            pipe(**{"seed": 1, "steps": STEPS, **request})
    return [str(w.message) for w in caught if issubclass(w.category, DitoptWarning)]


def changed(pipe: Pipe) -> Pipe:
    with torch.no_grad():
        pipe.transformer.blocks[1].up.weight.data += 0.01
    return pipe


def shifted(pipe: Pipe) -> Pipe:
    pipe.scheduler = Scheduler(shift=3.0)
    return pipe


def test_what_fits_is_silent():
    assert str(fitted()).endswith("cache{region=blocks,mask=10001,residual=yes}")
    assert run(Pipe("batch"), {}, {"seed": 2}, {"rows": 2}) == []


@pytest.mark.parametrize(
    ("pipe", "request_", "said"),
    [
        (lambda: Pipe("batch"), {"tokens": 4}, "latent was 8x16 and is 4x16"),
        (lambda: Pipe(), {}, "guidance was 1 call a step, 2 copies of the latent and is 1 call a step, 1 copy"),
        (lambda: Pipe("calls"), {}, "2 copies of the latent and is 2 calls a step, 1 copy of the latent"),
        (lambda: shifted(Pipe("batch")), {}, "scheduler was Scheduler "),
        (lambda: changed(Pipe("batch")), {}, "model was TinyDiT "),
    ],
)
def test_one_warning_says_what_differs(pipe, request_, said):
    told = run(pipe(), request_, {"seed": 2, **request_})
    assert len(told) == 1, "once, not at every request"
    assert said in told[0]
    assert told[0].count(" and is ") == 1
    assert "Calibrate again" in told[0]


def test_several_differences_are_one_warning():
    (told,) = run(shifted(Pipe()), {"tokens": 4})
    assert [word in told for word in ("scheduler was", "latent was", "guidance was")] == [True] * 3
    assert "model was" not in told


def test_another_number_of_steps():
    with pytest.raises(SessionError, match=r"its mask has 5 entries and this request runs 7 steps"):
        run(Pipe("batch"), {"steps": 7})
    free = dataclasses.replace(fitted(), steps=Recipe.parse("cache{region=blocks,every=2}").steps)
    (told,) = run(Pipe("batch"), {"steps": 7}, recipe=free)
    assert "steps was 5 and is 7." in told


def test_changed_weights_are_noticed_between_requests():
    pipe = ditopt.optimize(Pipe("batch"), fitted(), target="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(1, STEPS)
    changed(pipe)
    with pytest.warns(DitoptWarning, match="model was TinyDiT"):
        pipe(1, STEPS)


def test_a_bare_model_is_not_judged_by_what_nobody_told():
    recipe = Recipe(
        Recipe.parse("cache{region=blocks,every=2}").steps,
        calibrated={"scheduler": "Euler 1", "steps": "7", "latent": "8x16", "guidance": "unknown", "model": "unknown"},
    )
    fast = ditopt.optimize(tiny_sampler.model(), recipe, target="eager")

    def calls():
        for time in (900.0, 600.0, 300.0):
            fast(torch.zeros(3, 8, 16), torch.full((3,), time), torch.arange(3))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls()
    with fast.session(steps=3), pytest.warns(DitoptWarning, match="steps was 7 and is 3"):
        calls()


# -- the words ---------------------------------------------------------------------------------------------------------


def test_a_model_has_one_digest_everywhere():
    code = (
        "from tests import tiny_sampler; from ditopt.fitted import model_text; print(model_text(tiny_sampler.model()))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert other.stdout.strip() == model_text(tiny_sampler.model()), other.stderr
    model = tiny_sampler.model()
    assert model_text(changed(Pipe(denoiser=tiny_sampler.model())).transformer) != model_text(model)
    assert model_text(tiny_sampler.model().to(torch.float64)) != model_text(model)
    conv: Any = torch.nn.Conv2d(3, 5, 3)
    expected = model_text(conv)
    assert model_text(conv.to(memory_format=torch.channels_last)) == expected, "the layout in memory is no difference"


def test_schedulers_latents_and_guidance_in_words():
    assert scheduler_text(Scheduler()) == scheduler_text(Scheduler())
    assert scheduler_text(Scheduler()) != scheduler_text(Scheduler(2.0))
    assert scheduler_text(None) == "unknown"
    assert scheduler_text(object()).startswith("object ")
    x = torch.randn(2, 4, 8, 6)
    assert latent_text(x) == "4x8x6"
    assert guidance_text(1, x) == "1 call a step, 1 copy of the latent"
    assert guidance_text(2, torch.cat([x, x])) == "2 calls a step, 2 copies of the latent"
    assert guidance_text(1, torch.cat([x, x, x])) == "1 call a step, 3 copies of the latent"


# -- bytes of state ----------------------------------------------------------------------------------------------------

RECIPES = {
    "cache{region=blocks.*.attn|blocks.*.mlp,every=3}": 6,
    "cache{region=blocks.1:,every=3,residual=yes}": 1,
    "cache{region=blocks.*.mlp,every=4,first=3,predictor=taylor,order=2}": 9,
    "hoist_invariants, cache{region=model,every=3}": 1,
    "lossless": 0,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bytes_that_explain_names_are_held(recipe):
    pipe = Pipe("calls")
    text = ditopt.explain(pipe.transformer, recipe, example_inputs=tiny_sampler.example())
    ditopt.optimize(pipe, recipe, target="eager")
    fast, held = pipe.transformer, []
    fast.register_forward_hook(lambda *_: held.append(fast.engine.session.state_bytes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DitoptWarning)
        pipe(0, STEPS)
    slots = live_slots(fast.program)
    assert len(slots) == RECIPES[recipe]
    predicted = sum(s.type.nbytes for s in slots)
    assert predicted == RECIPES[recipe] * 3 * 8 * 16 * 4
    assert 2 * predicted * 0.95 <= max(held) <= 2 * predicted * 1.05, "two guidance branches"
    assert fast.engine.session.state_bytes == 0, "the request is over"
    if slots:
        assert f"{size(predicted)} for a guidance branch in {len(slots)} slots" in text
    else:
        assert "for a guidance branch" not in text


def test_streams_that_matter_only_to_what_is_skipped_are_not_held():
    """The text stream of joint attention is no part of the prediction, nor of what is held."""
    tiny = tiny_models.ZOO["joint"]
    fast = ditopt.optimize(tiny.model(), "cache{region=blocks,every=2}", example_inputs=tiny.inputs(), target="eager")
    fast(**tiny.inputs())
    predicted = sum(s.type.nbytes for s in live_slots(fast.program))
    assert 0 < predicted * 0.95 <= fast.engine.session.state_bytes <= predicted * 1.05
