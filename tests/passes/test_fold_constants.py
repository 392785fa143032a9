"""What is made of numbers alone is computed once, by eager, also where shared bodies compute it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.ir import example
from ditopt.ir.example import Builder
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.program import Program, callee, is_call
from ditopt.pipeline import Context, PassManager
from tests.foreign.base import randn
from tests.tiny_models import noise

aten = torch.ops.aten


def folded(program: Program, before: str = "") -> Program:
    return PassManager(f"{before}, fold_constants" if before else "fold_constants", Context()).run(program)[-1].program


def same(a: Program, b: Program) -> bool:
    given = random_inputs(a)
    pairs = zip(run_program(a, given)[0], run_program(b, given)[0], strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_rates_of_an_embedding_are_computed_once():
    before = example.tiny_dit(rates=True)
    after = folded(before)
    assert not any(n.target is aten.exp.default for n in after.step.graph.nodes)
    (memo,) = after.memos
    assert memo.keys == ()
    assert [n.target for n in after.functions[memo.function].graph.nodes if n.op == "call_function"] == [
        aten.arange.start_step,
        aten.mul.Tensor,
        aten.exp.default,
    ]
    assert same(before, after)
    assert PassManager("fold_constants").run(after)[0].refused == ("constants are computed once already",)


@pytest.mark.parametrize(
    "make",
    [
        lambda b: b(aten.full.default, [6, 8], 0.1, device="cpu"),
        lambda b: b(aten.view.default, b(aten.arange.start, 0, 48, dtype=torch.float32, device="cpu"), [6, 8]),
        lambda b: b(aten.exp.default, b.param("rate", 6, 8)),
        lambda b: b(aten.rand.default, [6, 8], device="cpu"),
    ],
    ids=["a fill", "a range", "weights", "chance"],
)
def test_what_rounds_nothing_or_is_no_constant_stays(make):
    b = Builder()
    x = b.input("x", "latent", 6, 8)
    (result,) = PassManager("fold_constants").run(b.program(b(aten.mul.Tensor, x, make(b))))
    assert result.refused == ("nothing is computed from numbers alone",)


class Embeds(nn.Module):
    """Each block has rates of its own, as blocks of class-conditional models do, and all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(3))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            time, body = block.children()
            rates = torch.exp(torch.arange(8, dtype=torch.float32) * -1.3)
            x = x + body(torch.tanh(x)) * time(torch.sin(1000 * t[:, None] * rates))[:, None]
        return self.head(x)


def call(step: int) -> dict[str, Tensor]:
    return {"x": randn(2, 5, 8, seed=step), "t": torch.full((2,), 0.9 - 0.1 * step)}


def test_bodies_read_them_from_their_callers():
    fast = ditopt.optimize(noise(Embeds()), "canonicalize, outline_blocks", example_inputs=call(0))
    before = fast.program
    assert len({b.function for b in before.blocks()}) == 1
    after = folded(before)
    assert len(after.memos[0].values) == 1
    calls = [n for n in after.step.graph.nodes if is_call(n)]
    assert len(calls) == 3
    (body,) = {callee(n) for n in calls}
    assert not any(n.target is aten.exp.default for n in after.functions[body].graph.nodes)
    assert same(before, after)


@pytest.mark.parametrize(
    "recipe", ["lossless", "canonicalize, outline_blocks", "fora", "canonicalize, cache{region=blocks}"]
)
@pytest.mark.parametrize("target", ["inductor", "onnxruntime"])
def test_compiled_targets_have_the_numbers_of_eager(recipe, target):
    model = noise(Embeds())
    fast = ditopt.optimize(model, recipe, example_inputs=call(0), target=target, steps=3)
    plain = ditopt.optimize(model, recipe, example_inputs=call(0), steps=3)
    with torch.no_grad(), fast.session(), plain.session():
        for step in range(3):
            got, want = fast(**call(step)), plain(**call(step))
            assert (got - want).norm() / want.norm() < 1e-6
    assert any(r.name == "fold_constants" for r in fast.history) == ("lossless" != recipe != "fora")


def test_files_hold_them_as_weights(tmp_path):
    model = noise(Embeds())
    recipe = "canonicalize, outline_blocks"
    manifest = ditopt.export_onnx(model, tmp_path / "dit.onnx", recipe, example_inputs=call(0))
    assert not manifest.memos
    with torch.no_grad():
        got, want = ditopt.load(tmp_path / "dit.onnx")(**call(1)), model(**call(1))
    assert (got - want).norm() / want.norm() < 1e-6
