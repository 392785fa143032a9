"""Every signal, predictor and storage on a model with double and single blocks, in bfloat16 and float16.

What is kept has the model's dtype, what the host reads is measured in float32, and the result is as near to that in
float32 as rounding lets it be.
"""

from __future__ import annotations

import functools

import pytest
import torch

from ditopt.artifact import Plan
from ditopt.capture import bind, capture
from ditopt.codegen.build import build
from ditopt.pipeline import PassManager
from ditopt.runtime.session import Session
from tests.tiny_models import ZOO

STEPS = 8
NEAR = {torch.bfloat16: 0.06, torch.float16: 0.008}
"""How far the last latent (of size 3) may be from that in float32; plain models are up to half as far."""

pytestmark = pytest.mark.filterwarnings("ignore:cache .* was never reused")


@functools.cache
def outlined(dtype):
    """The tiny Flux: its call and its Program."""
    model = ZOO["flux"].model(dtype)
    spec, tensors = bind(model, (), ZOO["flux"].inputs(0, dtype))
    return model, PassManager("outline_blocks").run(capture(model, spec, tensors).program)[-1].program


@functools.cache
def plan(recipe, dtype):
    program = PassManager(recipe).run(outlined(dtype)[1])[-1].program
    built = build(program, "eager")
    return Plan(built.manifest, built.run, lambda: program.params, more=built.more)


class Ran:
    """One request: the last latent, its computed steps, what was measured, and the slots at its end by name."""

    @torch.no_grad()
    def __init__(self, recipe, dtype):
        session, made = Session(), plan(recipe, dtype)
        given = ZOO["flux"].inputs(0, dtype)
        with session.open(steps=None):  # so that nothing is freed before we look
            for k in range(STEPS):
                given["timestep"] = torch.full((2,), 1 - k / STEPS, dtype=dtype)
                spec, tensors = bind(outlined(dtype)[0], (), given)
                by_name = dict(zip(spec.names, tensors, strict=True))
                out = session.call(made, [by_name[i.name] for i in made.manifest.inputs])[0]
                assert out.dtype is dtype
                given["hidden_states"] = given["hidden_states"] - 0.1 * out
            self.slots = dict(next(iter(session._branches.values())).slots)
            self.measured = session._ledger.measured.get("cache0", [])
            self.graphs = [r.graph for r in session.schedule_rows]
        self.latent = given["hidden_states"].float()

    def computed(self):
        return "".join("0" if "reuse" in g else "1" for g in self.graphs)


ran = functools.cache(Ran)


def near(recipe, dtype):
    want, got = ran(recipe, torch.float32), ran(recipe, dtype)
    assert got.latent.isfinite().all()
    return float((got.latent - want.latent).abs().max())


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize(
    "keep",
    [
        *(
            f"predictor={p}"
            for p in ("hold", "taylor,order=2", "newton,order=1", "hermite,order=2", "ab2", "foca", "dmd")
        ),
        "store=int8",
        "store=int8,predictor=foca",
    ],
)
def test_predictors_over_both_kinds_of_blocks(keep, dtype):
    """In float16 Flux clips its streams to what the dtype can hold: they are the same streams all the same."""
    recipe = f"cache{{region=blocks.1:-1,every=3,{keep}}}"
    assert near(recipe, dtype) < NEAR[dtype]
    got = ran(recipe, dtype)
    assert got.computed() == "10010010"
    kept = {n: s for n, s in got.slots.items() if not n.endswith("gram")}
    wide = (torch.int8, torch.float32) if "int8" in keep else (dtype,)
    assert {s.dtype for s in kept.values()} == set(wide)
    shapes = {n: tuple(s.type.shape) for n in kept for s in plan(recipe, dtype).manifest.state if s.name == n}
    assert (2, 22, 16) in shapes.values()  # text and image of the single blocks
    assert len({x.split(".")[1] for x in kept}) == len(wide)  # the difference of one joined stream


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("region", ["blocks.*.attn|blocks.*.mlp", "model", "blocks.2:"])
def test_other_regions(region, dtype):
    recipe = f"cache{{region={region},every=2,predictor=taylor,order=1}}"
    assert near(recipe, dtype) < NEAR[dtype]
    assert {s.dtype for s in ran(recipe, dtype).slots.values()} == {dtype}


SIGNALS = {
    "residual": "region=blocks.1:2,threshold=0.4",
    "hidden": "region=blocks.1:2,threshold=0.08",
    "forecast": "region=blocks.1:2,threshold=0.06,watch=1",
    "modulated": "region=blocks.1:-1,threshold=0.1",
    "boundary": "region=blocks.1:-1,threshold=0.15,first=2",
    "change": "region=blocks.1:-1,threshold=0.3",
}


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("signal", list(SIGNALS))
def test_signals_are_measured_in_float32(signal, dtype):
    recipe = f"cache{{{SIGNALS[signal]},every=0,signal={signal}}}"
    want, got = ran(recipe, torch.float32), ran(recipe, dtype)
    kept = {n: s.dtype for n, s in got.slots.items()}
    numbers = {n for n in kept if n.endswith((".rate", ".signal"))}
    assert {kept[n] for n in numbers} <= {torch.float32}
    assert {kept[n] for n in set(kept) - numbers} == {dtype}
    assert "0" in got.computed()
    # one number a step, near to that of the model in float32 as long as both did the same
    same = next((k for k in range(STEPS) if want.computed()[k] != got.computed()[k]), STEPS)
    pairs = list(zip(want.measured, got.measured, strict=False))[: max(same - 1, 1)]
    assert all(b == pytest.approx(a, rel=0.35, abs=0.02) for a, b in pairs)
    every = {g.name: g for g in plan(recipe, dtype).manifest.every_graph}
    assert ("probe" in every) == (signal != "change")


def test_a_clip_that_changes_numbers_is_no_continuation():
    from ditopt.ir.modules import saturates

    aten = torch.ops.aten
    graph = torch.fx.Graph()
    x = graph.placeholder("x")

    def clip(*limits, dtype=torch.float16):
        node = graph.call_function(aten.clamp.default, (x, *limits))
        node.meta["val"] = torch.empty(1, dtype=dtype)
        return node

    assert saturates(clip(-65504, 65504))
    assert not saturates(clip(-65504, 65504, dtype=torch.float32))
    assert not saturates(clip(-1, 1))
    assert not saturates(clip(-65504))
    assert not saturates(clip(None, 65504))
