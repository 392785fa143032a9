"""Pass by pass: each tiny model, interpreted after every pass of a recipe, against the model itself.

Undecided programs compute, so every pass has to be bit-equal; the first that is not is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.capture import bind, capture
from ditopt.ir.edit import Editor, replace_functions
from ditopt.ir.interpret import run_program
from ditopt.ir.program import Program, Region
from ditopt.pipeline import PassManager, PassResult
from tests.tiny_models import ZOO, captured, flat, leaves, optimized

aten = torch.ops.aten

RECIPES = [
    "canonicalize, outline_blocks, hoist_invariants, cache",
    "outline_blocks, hoist_invariants, cache{region=blocks.*.attn|blocks.*.mlp,every=3,predictor=taylor,order=1}",
]
MORE = [
    "outline_blocks, cache{region=blocks.*.attn,predictor=taylor,order=2}",
    "hoist_invariants, cache{region=model,predictor=newton,order=1,time=timestep}",
    "outline_blocks, cache{region=blocks,residual=no}",
]


def first_differing(
    program: Program, history: Sequence[PassResult], calls: Sequence[tuple[Mapping[str, Tensor], Sequence[Tensor]]]
) -> str:
    """Name of the first pass (or "capture") after which a result differs from the wanted one, else ""."""
    states: list[dict[str, Tensor]] = [{} for _ in range(len(history) + 1)]
    for inputs, want in calls:
        for k, (name, p) in enumerate([("capture", program), *((r.text, r.program) for r in history)]):
            got, states[k] = run_program(p, inputs, states[k])
            if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
                return name
    return ""


def calls(name: str, model: nn.Module, c: Any, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Steps: flat inputs and the model's own results; two of them where a test can afford it."""
    given = [ZOO[name].inputs(seed, dtype) for seed in ((4, 0) if name == "plain" else (4,))]
    with torch.no_grad():
        return [(flat(c, inputs, model), leaves(model(**inputs))) for inputs in given]


@pytest.mark.parametrize(
    ("name", "recipe"), [(n, r) for n in ZOO for r in RECIPES] + [(n, r) for n in ("plain", "sd3") for r in MORE]
)
def test_every_pass_computes_what_the_model_does(name, recipe):
    model, c = captured(name)
    history = PassManager(recipe).run(c.program)
    assert all(r.applied for r in history if r.name != "canonicalize"), [str(r) for r in history]
    assert first_differing(c.program, history, calls(name, model, c)) == ""


@pytest.mark.parametrize(
    ("name", "dtype"), [("plain", torch.float64), ("joint", torch.bfloat16), ("wan", torch.bfloat16)]
)
def test_in_other_dtypes(name, dtype):
    model = ZOO[name].model(dtype)
    spec, tensors = bind(model, (), ZOO[name].inputs(dtype=dtype))
    c = capture(model, spec, tensors)
    history = PassManager(RECIPES[1]).run(c.program)
    assert first_differing(c.program, history, calls(name, model, c, dtype)) == ""


def test_the_first_differing_pass_is_named():
    model, c = captured("plain")
    history = PassManager(RECIPES[0]).run(c.program)
    with Editor(history[2].program.step, "test") as e:
        e.set_results([e.op(aten.mul.Tensor, r, 1.0 + 1e-6) for r in e.results])
    wrong = replace_functions(history[2].program, {"step": e.function()})
    broken = [*history[:2], PassResult("hoist", "hoist", wrong, wrong, 1, (), (), 0.0), history[3]]
    assert first_differing(c.program, broken, calls("plain", model, c)) == "hoist"
    assert first_differing(wrong, history, calls("plain", model, c)) == "capture"


@pytest.mark.parametrize("name", list(ZOO))
def test_what_leaves_the_loop(name):
    """The modulation does, with its weights; what the latent flows through stays, in the same blocks."""
    before, after = optimized(name, "outline_blocks"), optimized(name, "outline_blocks, hoist_invariants")
    assert {m.lifetime for m in after.memos} == {"request", "schedule"}
    latents = {i.name for i in after.inputs if i.role == "latent"}
    times = {i.name for i in after.inputs if i.role == "timestep"}
    for memo in after.memos:
        assert not latents & set(memo.keys), memo
        assert bool(times & set(memo.keys)) == (memo.lifetime == "schedule")
        assert not set(memo.keys) - times or memo.name not in ("constant", "timestep")  # every request shares these
    read = [
        {p.meta["formal"].ref for p in q.step.placeholders if q.params.get(p.meta["formal"].ref) is not None}
        for q in (before, after)
    ]
    assert len(read[0] - read[1]) >= 3
    assert not read[1] - read[0]
    pairs = list(zip(before.blocks()[1:], after.blocks()[1:], strict=True))  # the first one's text may leave the loop
    assert len({b.function for b, _ in pairs}) == len({a.function for _, a in pairs}) == len(set(map(_bodies, pairs)))


def _bodies(pair: tuple[Region, Region]) -> tuple[str, str]:
    return pair[0].function, pair[1].function
