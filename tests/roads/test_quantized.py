"""Quantized models on every road: targets agree, integer kernels run, changed weights are seen, files shrink."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import ditopt
from ditopt.codegen.claims import claims
from ditopt.errors import BadInput
from ditopt.kernels import observe
from tests.recipes.test_quantization import call, far
from tests.roads.tiny import Small

RECIPES = ("w8a8", "w4a16{group=16}", "w4a16{group=8}", "svdquant{rank=4,group=16}")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


def step(fast, **more):
    return fast(**{**call(), **more})["sample"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("target", ["inductor", "onnxruntime"])
def test_targets_agree(model, recipe, target):
    plain, eager = step(model), step(ditopt.optimize(model, recipe, target="eager"))
    assert far(step(ditopt.optimize(model, recipe, target=target)), eager) < far(eager, plain) / 20


@pytest.mark.parametrize("target", ["eager", "inductor", "onnxruntime"])
def test_the_engine_itself_says_that_integers_are_multiplied(model, target):
    fast = ditopt.optimize(model, "w8a8", target=target)
    seen = observe(fast, **call())
    assert seen.share == pytest.approx(1.0)
    assert sum(seen.kernels.values()) == 12  # four layers of three blocks
    assert seen.quantized == 3 * 2 * 2 * (16 + 5) * 32 * (96 + 32 + 128 + 128)
    assert "100.0%" in str(seen)
    weights_only = observe(ditopt.optimize(model, "w4a16{group=16}", target=target), **call())
    assert (weights_only.share, dict(weights_only.kernels)) == (0.0, {})
    assert "100.0%: only their weight is integers" in str(weights_only)


def test_reports_say_which_share_is_in_integer_kernels(model, tmp_path):
    fast = ditopt.optimize(model, "w8a8", target="eager")
    step(fast)
    planned = fast.report(tmp_path / "r.html").read_text()
    assert "100.0% of the 3.1 MFLOP of quantized layers, as planned for eager" in planned
    seen = fast.integer_share(**call())
    assert seen.share == pytest.approx(1.0)
    assert "by its own profile (12 x aten::_int_mm)" in fast.report(tmp_path / "r.html").read_text()
    told = ditopt.explain(model, "svdquant{rank=4,group=16}", example_inputs=call(), target="eager")
    assert "integer kernels: 0.0% of the" in told
    assert "no CPU multiplies 4 bits" in told
    assert "integer kernels" not in ditopt.explain(model, "lossless", example_inputs=call(), target="eager")
    lossless = ditopt.optimize(model, "lossless", target="eager").integer_share(**call())
    assert (lossless.share, str(lossless)) == (0.0, "integer kernels on eager: no layer is quantized")


def test_observe_takes_optimized_models(model):
    with pytest.raises(BadInput, match=r"takes what ditopt\.optimize returned"):
        observe(model, **call())


def test_every_claim_has_a_reason(model):
    fast = ditopt.optimize(model, "w8a8", target="eager")
    step(fast)
    for target in ("eager", "inductor", "onnxruntime"):
        found = {c.op: c for c in claims(fast.program, target)}
        assert found["int8_linear"].count == 12
        assert found["int8_linear"].form == ("written out" if target == "inductor" else "kernel")
        assert all(c.reason for c in found.values())


def test_4_bit_layers_and_their_branch_are_one_operator(model):
    fast = ditopt.optimize(model, "svdquant{rank=4,group=16}", target="eager")
    step(fast)
    for target in ("eager", "inductor", "onnxruntime"):
        found = {c.op: c for c in claims(fast.program, target)}
        assert found["int4_linear"].count == 12
        assert "dequantize" not in found
        assert found["int4_linear"].form == ("written out" if target == "inductor" else "kernel")
        assert all(c.reason for c in found.values())
    body = next(fast.program.functions[str(n.args[1])] for n in fast.program.calls())
    linear = [n for n in body.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len(linear) == 4  # to the thin side of each branch; the way back is in the operator


def test_a_weight_that_changes_in_place_is_seen(model):
    fast = ditopt.optimize(model, "w8a8", target="eager")
    before = step(fast)
    model.blocks[1].up.weight.mul_(1.5)
    fast.reset()
    after = step(fast)
    assert far(after, before) > 1e-3
    assert torch.equal(after, step(ditopt.optimize(model, "w8a8", target="eager")))


def test_a_weight_that_changes_is_seen_by_onnxruntime(model):
    fast = ditopt.optimize(model, "w8a8", target="onnxruntime")
    before = step(fast)
    model.blocks[1].up.weight.mul_(1.5)
    fast.reset()
    assert far(step(fast), before) > 1e-3


@pytest.mark.parametrize(("recipe", "bytes_of"), [("w8a8", 1.0), ("w4a16{group=16}", 0.5)])
def test_files_hold_integers(model, recipe, bytes_of, tmp_path):
    sizes: dict[str, int] = {}
    for name in ("lossless", recipe):
        fast = ditopt.optimize(model, name, target="eager")
        wanted = step(fast)
        file = tmp_path / f"{len(sizes)}.onnx"
        ditopt.export_onnx(fast, file, example_inputs=call())
        sizes[name] = file.with_suffix(".safetensors").stat().st_size
        assert far(step(ditopt.load(file)), wanted) < 1e-4
    quantized = 3 * 32 * (96 + 32 + 128 + 128)
    scales = 3 * 4 * (96 + 32 + 128 + 32) if recipe == "w8a8" else quantized / 16 * 4
    saved = sizes["lossless"] - sizes[recipe]
    assert saved == pytest.approx(quantized * (4 - bytes_of) - scales, rel=0.02)


@pytest.mark.parametrize("recipe", ["w8a8", "svdquant{rank=4,group=16}"])
def test_saved_and_loaded(model, recipe, tmp_path):
    fast = ditopt.optimize(model, recipe, target="eager")
    wanted = step(fast)
    ditopt.save(fast, tmp_path / "saved")
    assert torch.equal(step(ditopt.load(tmp_path / "saved", target="eager")), wanted)


@pytest.mark.parametrize("target", ["eager", "inductor", "onnxruntime"])
def test_it_composes_with_caching(model, target):
    """The cached steps reuse what quantized ones computed; computed steps are those of w8a8 alone."""
    alone = ditopt.optimize(model, "w8a8", target="eager", steps=6)
    both = ditopt.optimize(model, "fora{interval=2}, w8a8", target=target, steps=6)
    times = torch.linspace(900, 100, 6)
    with both.session(steps=6), alone.session(steps=6):
        for k, t in enumerate(times):
            a, b = (step(m, timestep=t.expand(2)) for m in (alone, both))
            assert far(b, a) < (2e-4 if k % 2 == 0 else 0.5)
    names = [r.name for r in both.history]
    assert names.index("hoist_invariants") < names.index("cache") < names.index("quantize")
    assert both.stats.share_block_flops < 0.75


def test_blocks_go_on_sharing_a_body(model):
    fast = ditopt.optimize(model, "w8a8{keep=blocks.1}", target="eager")
    step(fast)
    bodies = [n.args[1] for n in fast.program.calls()]
    assert len(set(bodies)) == 2
    assert bodies[0] == bodies[2]


def test_the_manifest_says_what_is_reused(model, tmp_path):
    fast = ditopt.optimize(model, "w8a8", target="eager")
    step(fast)
    ditopt.export_onnx(fast, tmp_path / "m.onnx", example_inputs=call())
    graphs = json.loads((tmp_path / "m.json").read_text())["graphs"]
    assert all(f["kind"] != "param" for f in graphs[0]["inputs"])
    assert np.isclose(graphs[0]["flops"], fast.compiled.plan.manifest.graphs[0].flops)
