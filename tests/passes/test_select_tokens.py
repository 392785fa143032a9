"""Token selection on real classes: by structure alone, exact where all tokens run, half the work for half of them.

What RAS computes is checked in tests/recipes/test_ras.py; here, that it applies to models of all kinds, and refuses
those whose tokens meet outside of attention.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

import ditopt
from ditopt.pipeline import Context, PassManager
from ditopt.recipe import Recipe
from tests.denoisers import REGISTRY

STEPS = 4

KINDS = {
    "dit": 4,  # image tokens and a class
    "pixart_sigma": 3,  # cross attention
    "hunyuan_dit": 6,  # long skips
    "sd3": 4,  # image and text side by side
    "flux": 6,  # two streams, then one sequence of text and image
}


def request(name, model, call, session=False):
    """Predictions of a request whose latent and time change from step to step."""
    latent, time = REGISTRY[name].latent[0], REGISTRY[name].time[0]
    told = []
    with model.session(steps=STEPS) if session else contextlib.nullcontext(), torch.no_grad():
        for k in range(STEPS):
            given = {**call, latent: call[latent] * (1 - k / 10), time: call[time] * (1 - k / STEPS)}
            told.append(model(**given)[0].clone())
    return told


@pytest.mark.parametrize("name", KINDS)
def test_real_classes(name):
    model, call = REGISTRY[name].build()
    plain = request(name, model, call)
    shares = []
    for ratio in (1.0, 0.5):
        text = f"hoist_invariants, select_tokens{{ratio={ratio},first=2}}"
        fast = ditopt.optimize(model, text, target="eager", example_inputs=call)
        assert next(h.applied for h in fast.history if h.name == "select_tokens") == KINDS[name]
        told = request(name, fast, call, session=True)
        assert fast.stats.graphs == {"full": 2, "reuse": STEPS - 2}
        same = [torch.equal(a, b) for a, b in zip(told, plain, strict=True)]
        assert same == [True, True, ratio == 1, ratio == 1]
        shares.append(fast.stats.block_flops)
    text = {"sd3": 0.58, "flux": 0.58, "pixart_sigma": 0.55}.get(name, 0.52)  # text is never left out
    assert (2 * shares[1] - shares[0]) / shares[0] < text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sana", r"blocks\.0: aten\.(pad|conv2d|view|unflatten).*"),  # a convolution in the MLP
        ("latte", r"lays tokens out as \[128, 2, 32\]"),  # attention over space and over time, in turns
    ],
)
def test_tokens_that_meet_outside_of_attention(name, said):
    model, call = REGISTRY[name].build()
    with pytest.warns(ditopt.DitoptWarning, match=said):
        fast = ditopt.optimize(model, "select_tokens", target="eager", example_inputs=call)
    (last,) = [h for h in fast.history if h.name == "select_tokens"]
    assert last.applied == 0
    assert len(last.refused) == 1
    assert torch.equal(fast(**call)[0], model(**call)[0])


def captured(text):
    from tests.tiny_models import captured as made

    return PassManager(Recipe.parse(text), Context("eager", 10)).run(made("plain")[1].program)


def test_skipped_blocks_keep_their_keys():
    """A block that is left out for a part of the request leaves its keys and values as they were, and is not run."""
    last = captured("skip_blocks{region=blocks.1,since=0.5}, select_tokens{first=2}")[-1]
    assert (last.name, last.applied) == ("select_tokens", 4)
    from ditopt.codegen.lower import lower

    program = last.program
    skip, tokens = (d.name for d in program.decisions)
    (made,) = lower(program, [{skip: "reuse", tokens: "reuse"}])
    assert {str(n.meta["region"]) for n in made.program.calls()} == {f"blocks.{k}.{tokens}" for k in (0, 2, 3)}


def test_a_cache_of_blocks_says_what_goes_with_tokens():
    last = captured("select_tokens, cache{region=blocks.1:-1}")[-1]
    assert last.refused == ("blocks.0 runs on part of its tokens; only its model's output is cached: region=model",)


def test_a_cache_before_is_a_sentence():
    program = captured("cache{region=blocks}")[-1].program
    from ditopt.passes.select_tokens import SelectTokens

    out = SelectTokens().run(program, Context())
    assert out.refused == ("cache0 keeps values of all tokens already: select tokens once, then cache",)
