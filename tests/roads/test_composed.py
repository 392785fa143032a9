"""All rewrites in one recipe: block skipping, token selection, cache, integer products, sparse attention."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import ditopt
from ditopt import zoo
from tests.roads.tiny import example, sample, sd3

STEPS, SIZE = 8, 16  # 64 tokens of the latent
PARTS = [
    "hoist_invariants",
    "skip_blocks{region=blocks.1,since=0.5}",
    "select_tokens{ratio=0.5,first=2}",
    "cache{region=blocks.2:-0,first=4,predictor=lagrange,order=1,time=timestep}",
    "quantize",
    "fuse_quantization",
    "sparse_attention{block=16,density=0.5}",
]


def fast(parts: list[str] = PARTS, target: str = "eager") -> Any:
    call = example(size=SIZE)
    return ditopt.optimize(sd3(layers=4), ", ".join(parts), example_inputs=call, target=target, steps=STEPS)


def request(model: Any, seed: int = 0) -> torch.Tensor:
    return sample(model, seed, STEPS, size=SIZE)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_every_rewrite_applies_and_every_decision_hits():
    model = fast()
    made = request(model)
    assert all(h.applied for h in model.history), [str(h) for h in model.history]
    assert {h.name for h in model.history} >= {p.partition("{")[0] for p in PARTS}
    assert set(model.stats.hits) == {d.name for d in model.program.decisions}
    assert len(model.program.decisions) == 3
    assert model.stats.share_block_flops < 0.5
    assert torch.equal(made, request(model)), "a second request"
    assert not torch.equal(made, request(sd3(layers=4)))


def test_a_weight_of_full_and_of_partial_steps_is_quantized_once():
    notes = []
    for parts in (["quantize"], ["select_tokens{ratio=0.5,first=2}", "quantize"]):
        notes.append(next(h.notes for h in fast(parts).history if h.name == "quantize"))
    assert "shrink from" in notes[0][0]
    assert notes[0] == notes[1]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_recipe_does_not_matter(seed):
    parts = PARTS[:]
    random.Random(seed).shuffle(parts)
    assert torch.equal(request(fast(parts)), request(fast()))


@pytest.mark.parametrize("target", ["onnxruntime", "inductor"])
def test_targets_agree(target):
    """Integers round otherwise on each, and a token whose score is near another's may then not be chosen: bounded as a
    whole. Without integers nothing of that happens."""
    eager, other = fast(), fast(target=target)
    for seed in (0, 1):
        assert apart(request(other, seed), request(eager, seed)) < 0.05
    assert other.stats.hits == eager.stats.hits
    assert other.stats.block_flops == eager.stats.block_flops


def test_targets_agree_closely_without_integers():
    parts = [p for p in PARTS if "quant" not in p]
    assert apart(request(fast(parts, "onnxruntime")), request(fast(parts))) < 1e-5


def test_a_saved_file_does_the_same(tmp_path):
    model = fast()
    ditopt.save(model, tmp_path / "dit.ditopt")
    loaded = ditopt.load(tmp_path / "dit.ditopt")
    assert apart(request(loaded), request(model)) < 0.05


@pytest.mark.parametrize("name", ["digits", "scenes", "sprites"])
def test_on_trained_models(name):
    """Each rewrite finds its sites in the models that ship; what they cost there is for the benchmark."""
    pipe = zoo.load(name)
    prompts = zoo.package(name).prompts(2, 0)
    parts = [p.replace("region=blocks.1,", "region=blocks.3,") for p in PARTS]
    optimized = ditopt.optimize(pipe, ", ".join(parts), steps=STEPS, target="eager")
    with torch.no_grad():
        optimized(prompts, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    model = optimized.transformer
    applied = {h.name: h.applied for h in model.history}
    assert all(applied[p.partition("{")[0]] for p in PARTS), applied
    assert all(model.stats.hits[d.name] for d in model.program.decisions)
    ditopt.restore(optimized)
