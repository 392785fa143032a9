"""Modules whose Python looks at the latent: tokens that choose their experts, as one operator of the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.errors import CaptureError, DitoptError
from ditopt.ir.parse import parse_program
from ditopt.ir.text import print_program
from ditopt.ir.verify import verify
from ditopt.ops.call_module import call_module
from tests.capture.use import run, same, take
from tests.tiny_models import noise

WIDTH, TOKENS = 8, 6


class Experts(nn.Module):
    """Each token goes through the expert that it likes best; one that nobody likes is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3, bias=False)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, str]:
        flat = x.flatten(0, 1)
        choice = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (choice == i).nonzero().flatten()
            if len(rows.tolist()):
                out[rows] = expert(flat[rows]) * scale
        return out.view_as(x), "routed"


class Block(nn.Module):
    def __init__(self, experts: type[nn.Module]) -> None:
        super().__init__()
        self.qkv, self.ff = nn.Linear(WIDTH, 3 * WIDTH), experts()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        q, k, v = self.qkv(x * t[:, None, None]).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.ff(x, scale=0.5)[0]


class Model(nn.Module):
    def __init__(self, experts: type[nn.Module] = Experts) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(experts) for _ in range(3)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t)
        return x


def make(experts: type[nn.Module] = Experts) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noise(Model(experts))  # type: ignore[return-value]


def inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, TOKENS, WIDTH, generator=generator), "t": torch.rand(2, generator=generator)}


@torch.no_grad()
def test_experts_are_one_operator_of_each_block():
    model = make()
    c = take(model, **inputs())
    verify(c.program)
    calls = [n for n in c.program.step.graph.nodes if n.target is call_module]
    assert len(calls) == 3
    assert len({n.args[2] for n in calls}) == 1  # equal up to weights
    assert c.guard is None
    assert c.notes[1] == "captured by torch.export with 3 modules that stay Python"
    assert c.notes[2].startswith("blocks.0.ff, blocks.1.ff, blocks.2.ff stay Python")
    assert "if len(rows.tolist())" in c.notes[2]
    assert parse_program(print_program(c.program), c.program.params) == c.program
    for seed in range(4):  # other routes, and experts that nobody likes
        assert same(run(model, c, **inputs(seed)), model(**inputs(seed)))


@torch.no_grad()
@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_experts_are_cached_and_their_weights_seen(target):
    model = make()
    fast = ditopt.optimize(model, "outline_blocks, cache{region=blocks.*.mlp,every=2}", target=target)

    def close(a, b):
        return torch.equal(a, b) if target == "eager" else torch.allclose(a, b, atol=1e-5)

    calls = [{**inputs(k), "t": torch.full((2,), 1 - k / 8)} for k in range(4)]
    with fast.session(steps=4):
        assert [close(fast(**c), model(**c)) for c in calls] == [True, False, True, False]
    assert len(fast.program.blocks()) == 3
    assert len({b.function for b in fast.program.blocks()}) == 1
    assert 0 < fast.stats.share_block_flops < 1
    model.blocks[1].ff.experts[0].weight.mul_(3)  # type: ignore[index, union-attr]
    with fast.session(steps=4):
        assert [close(fast(**c), model(**c)) for c in calls] == [True, False, True, False]


def test_what_stays_python_cannot_be_written(tmp_path):
    fast = ditopt.optimize(make(), "outline_blocks", target="eager", example_inputs=inputs())
    for write in (ditopt.save, ditopt.export_onnx):
        with pytest.raises(DitoptError, match=r"looks at values of the latent at .*rows.tolist.* stays Python"):
            write(fast, tmp_path / "x")
    with pytest.raises(ValueError, match="calls Nobody, Python of a model that is not part of this process"):
        call_module([torch.ones(1)], [], "Nobody")


class Counting(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x, *, scale=1.0):
        self.count += 1
        return super().forward(x, scale=scale)


class Writing(Experts):
    def forward(self, x, *, scale=1.0):
        return super().forward(x.mul_(2), scale=scale)


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        (Counting, r"changes its attribute blocks\.0\.ff\.count"),
        (Writing, r"looks at values of the latent at .* and changes itself or its inputs"),
    ],
)
def test_experts_that_are_no_function_are_refused(experts, says):
    with pytest.raises(CaptureError, match=says):
        take(make(experts), **inputs())


class Whole(Experts):
    """The model itself looks: nothing would be left for a graph."""

    def forward(self, x, t):  # type: ignore[override]
        return super().forward(x * t[:, None, None])[0]


def test_a_model_that_looks_itself_is_refused():
    with pytest.raises(CaptureError, match=r"at .*test_outside.py:\d+ .* depends on the latent, so each step"):
        take(noise(Whole()), **inputs())
