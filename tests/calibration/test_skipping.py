"""Which blocks can be left out: by influence on the stream, and by what leaving each out does to the samples."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import ditopt
from ditopt.calibration import record
from ditopt.calibration.sources.block_influence import influence
from ditopt.calibration.sources.laptop_diff import knapsack
from ditopt.errors import RecipeError
from ditopt.recipe import Recipe
from tests import tiny_sampler

STEPS = 6
GIVEN: dict[str, Any] = {"steps": STEPS, "seeds": [0, 1], "progress": False}


def region(recipe: Recipe) -> str:
    (step,) = [s for s in recipe.steps if s.name == "skip_blocks"]
    return str(step.options["region"])


def deeper(*scales: float) -> Any:
    """A model of as many blocks as ``scales``."""
    model = tiny_sampler.model()
    torch.manual_seed(1)
    model.blocks = torch.nn.ModuleList(tiny_sampler.Block() for _ in scales)
    with torch.no_grad():
        for block, scale in zip(model.blocks, scales, strict=True):
            for p in (*block.out.parameters(), *block.down.parameters()):  # type: ignore[union-attr]
                p.mul_(scale)
    return model.eval().requires_grad_(False)


def test_influence_is_what_hooks_measure() -> None:
    model = deeper(1.0, 0.3, 1.0, 0.02, 1.0)
    streams = []
    hooks = [b.register_forward_hook(lambda m, a, out: streams.append((a[0], out))) for b in model.blocks]
    for seed in GIVEN["seeds"]:
        tiny_sampler.sample(model, seed, STEPS)
    for hook in hooks:
        hook.remove()
    cosines = [torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item() for a, b in streams]
    wanted = 1 - np.reshape(cosines, (-1, len(model.blocks))).mean(0)
    found = influence(record(model, tiny_sampler.sample, regions=["streams"], tokens=10_000, **GIVEN))
    assert list(found) == [f"blocks.{i}" for i in range(5)]
    assert found["blocks.0"] == np.inf
    np.testing.assert_allclose([found[f"blocks.{i}"] for i in range(1, 5)], wanted[1:], rtol=1e-4, atol=1e-6)


def test_block_influence_leaves_out_what_turns_least() -> None:
    model = deeper(1.0, 0.3, 1.0, 0.02, 1.0)
    assert region(ditopt.calibrate(model, "block_influence{share=0.2}", tiny_sampler.sample, **GIVEN)) == "blocks.3"
    both = ditopt.calibrate(model, "block_influence{share=0.4}", tiny_sampler.sample, **GIVEN)
    assert region(both) == "blocks.1|blocks.3"
    with pytest.raises(RecipeError, match=r"share=0.8 of 5 blocks is 4, and 3 can be left out"):
        ditopt.calibrate(model, "block_influence{share=0.8}", tiny_sampler.sample, **GIVEN)


def test_laptop_diff_is_the_brute_force_of_summed_losses() -> None:
    model = deeper(1.0, 0.5, 0.3, 0.1, 1.0)
    plain = [tiny_sampler.sample(model, s, STEPS) for s in GIVEN["seeds"]]
    losses = {}
    for k in (1, 2, 3):
        blocks = model.blocks
        model.blocks = torch.nn.ModuleList(b for i, b in enumerate(blocks) if i != k)
        made = [tiny_sampler.sample(model, s, STEPS) for s in GIVEN["seeds"]]
        model.blocks = blocks
        rows = torch.cat(
            [(a.double() - b.double()).square().flatten(1).mean(1) for a, b in zip(made, plain, strict=True)]
        )
        losses[k] = 10 ** rows.log10().mean().item()
    best = min(itertools.combinations(losses, 2), key=lambda pair: sum(losses[k] for k in pair))
    found = ditopt.calibrate(model, "laptop_diff{share=0.4}", tiny_sampler.sample, **GIVEN)
    assert region(found) == "|".join(f"blocks.{k}" for k in best)
    fast = ditopt.optimize(model, found, target="eager", steps=STEPS)
    tiny_sampler.sample(fast, 5, STEPS)
    assert fast.stats.share_block_flops == pytest.approx(0.6, abs=0.02)  # less what is hoisted
    ditopt.restore(fast)
    with pytest.raises(RecipeError, match=r"3 of 5, are 0\.60 of the FLOPs"):
        ditopt.calibrate(model, "laptop_diff{share=0.9}", tiny_sampler.sample, **GIVEN)


def test_the_knapsack_is_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        items = [(float(c), round(float(s), 3)) for c, s in zip(rng.random(7), rng.random(7), strict=True)]
        sets = [c for n in range(8) for c in itertools.combinations(range(7), n)]
        fits = [c for c in sets if sum(items[i][1] for i in c) >= 1.5 - 1e-9]
        cost = min(sum(items[i][0] for i in c) for c in fits)
        found = knapsack(items, 1.5)
        assert found is not None
        assert sum(items[i][1] for i in found) >= 1.5 - 1e-9
        assert sum(items[i][0] for i in found) == pytest.approx(cost)
    assert knapsack([(1.0, 0.2)], 0.5) is None
