"""Blocks that are left out: against the same model with the block taken out by hand, and what leaves with it."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.errors import BadInput, RecipeError, SessionError
from ditopt.passes.cache import Cache
from ditopt.pipeline import PassManager
from tests.roads.tiny import example, noise, prompt, sample, sd3, small, times

STEPS = 6


def without(model: Any, blocks: str, *gone: int) -> Any:
    """``model`` with blocks of its list taken out."""
    kept = [b for i, b in enumerate(getattr(model, blocks)) if i not in gone]
    setattr(model, blocks, nn.ModuleList(kept))
    return model


def silent(model: Any, *parts: str) -> Any:
    """``Small`` with what these layers give set to zero."""
    for name in parts:
        layer = model.get_submodule(name)
        for p in layer.parameters():
            p.data.zero_()
    return model


def run(model: Any, recipe: str, **options: Any) -> Any:
    return ditopt.optimize(model, recipe, example_inputs=example(), **{"target": "eager", "steps": STEPS, **options})


def alternating(first: Any, second: Any, mask: str, seed: int = 0) -> Tensor:
    """The request of ``sample`` in which each step runs ``first`` (1) or ``second`` (0)."""
    x, given = noise(seed), prompt(seed)
    with torch.no_grad():
        for now, digit in zip(times(len(mask)), mask, strict=True):
            model = first if digit == "1" else second
            t = torch.full((len(x),), now)
            x = x - model(hidden_states=x, timestep=t, **given, return_dict=False)[0] / len(mask)
    return x


def test_the_sampler_of_these_tests():
    assert torch.equal(alternating(small(), small(), "111111"), sample(small(), 0, STEPS))


@pytest.mark.parametrize("before", ["", "hoist_invariants, ", "recognize_attention, "])
def test_a_run_is_passed_by(before):
    fast = run(small(), f"{before}skip_blocks{{region=blocks.1}}")
    assert torch.equal(sample(fast, 0, STEPS), sample(without(small(), "blocks", 1), 0, STEPS))


def test_two_streams_pass_a_block_by():
    fast = run(sd3(layers=4), "lossless, skip_blocks{region=blocks.1:3}")
    wanted = sample(without(sd3(layers=4), "transformer_blocks", 1, 2), 0, STEPS)
    assert torch.equal(sample(fast, 0, STEPS), wanted)
    assert not torch.allclose(wanted, sample(sd3(layers=4), 0, STEPS), atol=1e-2), "the blocks must matter"


@pytest.mark.parametrize(("role", "layer"), [("attn", "out"), ("mlp", "down")])
def test_a_module_is_passed_by(role, layer):
    fast = run(small(), f"lossless, skip_blocks{{region=blocks.1.{role}}}")
    assert torch.equal(sample(fast, 0, STEPS), sample(silent(small(), f"blocks.1.{layer}"), 0, STEPS))
    assert fast.stats.share_block_flops < 0.95


@pytest.mark.parametrize(
    ("options", "mask"),
    [("until=0.5", "000111"), ("since=0.5", "111000"), ("since=0.3,until=0.7", "110001"), ("mask=010011", "010011")],
)
def test_a_part_of_the_request(options, mask):
    fast = run(small(), f"lossless, skip_blocks{{region=blocks.1,{options}}}")
    made = sample(fast, 0, STEPS)
    torch.testing.assert_close(made, alternating(small(), without(small(), "blocks", 1), mask), rtol=1e-5, atol=1e-6)
    assert fast.stats.hits["skip0"] == mask.count("0")
    assert fast.engine.session.state_bytes == 0, "nothing is kept"
    assert torch.equal(sample(fast, 0, STEPS), made), "a second request"


def test_what_is_held_is_the_difference():
    fast = run(small(), "lossless, skip_blocks{region=blocks.1:,since=0.5,hold=true}")
    cached = run(small(), "lossless, cache{region=blocks.1:,mask=111100}")
    assert torch.equal(sample(fast, 0, STEPS), sample(cached, 0, STEPS))
    assert not torch.equal(sample(fast, 0, STEPS), sample(small(), 0, STEPS))


def test_what_never_runs_leaves_program_file_and_memory(tmp_path):
    whole, fast = (run(small(), r) for r in ("lossless", "lossless, skip_blocks{region=blocks.1}"))
    assert any(n.startswith("blocks.1.") for n in whole.compiled.program.params)
    assert not any(n.startswith("blocks.1.") for n in fast.compiled.program.params)
    sizes = []
    for name, model in (("whole", whole), ("fast", fast)):
        ditopt.save(model, tmp_path / f"{name}.ditopt")
        sizes.append(sum(f.stat().st_size for f in (tmp_path / f"{name}.ditopt").rglob("*")))
    gone = sum(p.nbytes for p in small().blocks[1].parameters())
    assert sizes[0] - sizes[1] > 0.9 * gone
    loaded = ditopt.load(tmp_path / "fast.ditopt")
    torch.testing.assert_close(sample(loaded, 0, STEPS), sample(fast, 0, STEPS), rtol=1e-4, atol=1e-5)


def test_released_weights_of_a_block_that_never_runs():
    model = small()
    wanted = sample(without(small(), "blocks", 1), 0, STEPS)
    fast = run(model, "canonicalize, outline_blocks, skip_blocks{region=blocks.1}", release="free")
    assert torch.equal(sample(fast, 0, STEPS), wanted)
    assert fast.release.freed == sum(p.nbytes for p in small().blocks[1].parameters())
    assert all(p.numel() == 0 for p in model.blocks[1].parameters())
    with pytest.raises(BadInput, match="were freed"):
        ditopt.restore(fast)


@pytest.mark.parametrize("target", ["onnxruntime", "inductor"])
def test_targets(target):
    recipe = "lossless, skip_blocks{region=blocks.2,until=0.5}, cache{region=blocks.1:,mask=110100}"
    fast, eager = (run(small(), recipe, target=t) for t in (target, "eager"))
    for seed in (0, 1):
        torch.testing.assert_close(sample(fast, seed, STEPS), sample(eager, seed, STEPS), rtol=1e-4, atol=1e-5)
    assert fast.stats.hits == eager.stats.hits


def test_the_exported_file_lacks_the_block(tmp_path):
    for name, recipe in (("whole", "lossless"), ("fast", "lossless, skip_blocks{region=blocks.1}")):
        (tmp_path / name).mkdir()
        ditopt.export_onnx(small(), tmp_path / name / "dit.onnx", recipe=recipe, example_inputs=example())
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).iterdir()) for n in ("whole", "fast")]
    assert sizes[0] - sizes[1] > 0.9 * sum(p.nbytes for p in small().blocks[1].parameters())
    assert len(onnx.load(tmp_path / "fast" / "dit.onnx", load_external_data=False).graph.node) > 0


@pytest.mark.parametrize(
    ("recipe", "error", "said"),
    [
        ("skip_blocks{since=0.7,until=0.2}", RecipeError, "expected 0 <= since <= until <= 1"),
        ("skip_blocks{mask=10x}", RecipeError, "one digit a step"),
        ("skip_blocks{mask=101}", RecipeError, "mask has 3 steps, the request has 6"),
        ("skip_blocks{mask=101010,since=0.5}", RecipeError, "leave out since and until"),
        ("skip_blocks{mask=010101,hold=true}", RecipeError, "its digit must be 1"),
        ("skip_blocks{region=model}", RecipeError, "would leave nothing to run"),
        ("skip_blocks{region=blocks.9}", RecipeError, "the model has 3 blocks"),
    ],
)
def test_bad_input(recipe, error, said):
    model = small()
    with pytest.raises(error, match=said):
        run(model, recipe)
    assert torch.equal(sample(model, 0, STEPS), sample(small(), 0, STEPS))


def test_cached_blocks_are_not_skipped():
    """Asked for together, blocks are skipped first; a program that holds a cache already is refused."""
    cached = PassManager("cache{region=blocks.1:}").run(Cache.example_applies())[-1].program
    last = PassManager("skip_blocks{region=blocks.1}").run(cached)[-1]
    assert last.refused == ("blocks.1 is decided by an earlier pass; skip blocks before caching",)


def test_a_request_of_another_length_than_the_mask():
    fast = run(small(), "skip_blocks{mask=110110}", steps=None)
    said = "its mask has 6 entries and this request runs 4 steps"
    with pytest.raises(SessionError, match=said), fast.session(steps=4):
        sample(fast, 0, 4)
