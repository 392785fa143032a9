"""Token selection on real classes: by structure alone, exact where all tokens run, half the work for half of them.

What RAS computes is checked in tests/recipes/test_ras.py; here, that it applies to models of all kinds, and refuses
those whose tokens meet outside of attention.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

import ditopt
from ditopt.ir import example
from ditopt.ir.short import Mixes
from ditopt.ir.tokens import part
from ditopt.ops import attention, block_sparse_attention
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
    most = {"sd3": 0.58, "flux": 0.58, "pixart_sigma": 0.55}.get(name, 0.52)  # text is never left out
    assert (2 * shares[1] - shares[0]) / shares[0] < most


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sana", r"blocks\.0: aten\.(pad|conv2d|view|unflatten).*"),  # a convolution in the MLP
        ("latte", r"lays tokens out as \[128, 2, 32\]"),  # attention over space and over time, in turns
        ("lumina2", "samples and tokens lie in one dimension"),  # sequences of prompt and image, joined and padded
        pytest.param(  # attention of each sample with as much text as it has
            "mochi", "samples are taken apart", marks=pytest.mark.filterwarnings("ignore:In CPU autocast")
        ),
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


def test_a_part_that_is_all_is_told():
    with pytest.raises(Mixes, match=r"multiple=100: of 16 tokens a partial step would compute all; give .* below 16"):
        part(16, 0.5, 100)
    assert [part(16, 0.5, 3), part(16, 0.1, 4), part(16, 1.0, 100), part(16, 0.99, 1)] == [6, 4, 16, 15]
    model, call = REGISTRY["dit"].build()
    with pytest.warns(ditopt.DitoptWarning, match=r"multiple=1000: of .* tokens a partial step would compute all"):
        ditopt.optimize(model, "select_tokens{multiple=1000}", target="eager", example_inputs=call)


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


@pytest.mark.parametrize(
    ("name", "text"),
    [("sd3", "cache{region=blocks.*.attn,mask=1010}"), ("flux", "cache{region=blocks.1:-1,mask=1010}")],
)
def test_text_and_image_under_a_cache(name, text):
    """Streams side by side, or in one sequence: with all tokens chosen the cache is as without."""
    model, call = REGISTRY[name].build()
    made = []
    for more in ("", ", select_tokens{ratio=1,first=1}"):
        fast = ditopt.optimize(model, f"hoist_invariants, {text}{more}", target="eager", example_inputs=call)
        assert all(h.applied for h in fast.history if h.asked)
        made.append(request(name, fast, call, session=True))
    assert all(map(torch.equal, *made))
    assert fast.stats.hits == {"cache0": 2, "tokens1": 3}


def test_a_half_of_a_doubled_batch_chooses_its_own_tokens():
    """Guidance in a batch, left out on some steps: the branch that stays is what it is without that."""
    model, call = REGISTRY["dit"].build()
    labels = torch.cat([call["class_labels"], 1 + call["class_labels"]])
    call = {k: torch.cat([v, v]) for k, v in call.items() if isinstance(v, torch.Tensor)} | {"class_labels": labels}
    tokens = "select_tokens{ratio=0.5,first=1,every=0}"
    guidance = "cache_guidance{form=batch,unconditional=first,every=2,first=1}"
    fast = [
        ditopt.optimize(model, text, target="eager", example_inputs=call) for text in (tokens, f"{guidance}, {tokens}")
    ]
    alone, both = (request("dit", m, call, session=True) for m in fast)
    half = len(alone[0]) // 2
    for a, b in zip(alone, both, strict=True):
        torch.testing.assert_close(a[half:], b[half:])
    assert (alone[1] - both[1])[:half].abs().max() > 0.1
    assert fast[1].stats.hits == {"tokens0": 3, "guidance1": 2}
    assert fast[1].stats.block_flops < 0.85 * fast[0].stats.block_flops


def test_sparse_attention_says_what_stays_dense():
    """Full steps attend by blocks; steps of chosen tokens do not, and say so."""
    recipe = Recipe.parse("select_tokens{first=2}, sparse_attention{block=16,density=0.5}")
    *_, tokens, _, last = PassManager(recipe).run(example.grid_dit())
    assert (tokens.name, last.name) == ("select_tokens", "sparse_attention")
    blocks = len(list(tokens.program.calls())) // 2
    assert (tokens.applied, last.applied) == (blocks, blocks)
    assert [s for s in last.refused if "stays dense on steps that compute part of the tokens" in s] == list(
        last.refused
    )
    assert len(last.refused) == 1
    bodies = [(r.role, last.program.functions[r.function]) for r in last.program.regions if r.function]
    kinds = {role: {n.target for n in body.graph.nodes} for role, body in bodies}
    assert block_sparse_attention in kinds["block"]
    assert attention in kinds["part"]
    assert block_sparse_attention not in kinds["part"]
