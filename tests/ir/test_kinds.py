"""Kinds of attention: self, joint, cross, temporal and spatial, by dataflow, as regions that selectors name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt import pipeline
from ditopt.capture import bind as bind_call
from ditopt.capture import capture
from ditopt.errors import RecipeError
from ditopt.ir.interpret import run_program
from ditopt.ir.program import Program
from ditopt.ir.select import select_regions
from ditopt.ir.text import parse_program, print_program
from ditopt.ir.verify import verify
from ditopt.pipeline import Context, PassManager
from tests.denoisers import REGISTRY
from tests.foreign import ZOO
from tests.foreign.base import Call, randn, sinusoid, times
from tests.foreign.video import SpaceTimeBlock
from tests.test_structure import anonymous
from tests.tiny_models import noise, optimized


def flat(model: nn.Module, call: Call) -> Program:
    spec, tensors = bind_call(model, call if isinstance(call, tuple) else (), {} if isinstance(call, tuple) else call)
    return capture(model, spec, tensors).program


@functools.cache
def captured(name: str) -> Program:
    if name in ZOO:
        return flat(ZOO[name].model(), ZOO[name].call(0, 0))
    return flat(*REGISTRY[name].build())


def outlined(program: Program) -> Program:
    return PassManager("outline_blocks").run(program)[-1].program


def kinds(program: Program) -> list[tuple[str, ...]]:
    """The kinds of attention in each block."""
    return [tuple(r.role for r in program.regions if r.parent == f"{b.id}.attn") for b in program.blocks()]


WANT: dict[str, list[tuple[str, ...]]] = {
    "pixart_sigma": [("self", "cross")] * 3,
    "wan": [("self", "cross")] * 3,
    "allegro": [("self", "cross")] * 3,
    "flux": [("joint",)] * 6,
    "cogvideox": [("joint",)] * 3,
    "latte": [("cross", "spatial"), ("temporal",)] * 3,
    "spacetime": [("cross", "temporal", "spatial")] * 3,
    "window": [("self",)] * 4,  # a window holds parts of all three axes
    "audio_video": [("self", "cross")] * 3,
}


@pytest.mark.parametrize("name", WANT)
def test_kinds_with_and_without_names(name):
    program = outlined(captured(name))
    verify(program)
    assert kinds(program) == WANT[name]
    assert kinds(outlined(anonymous(captured(name)))) == WANT[name]
    assert parse_program(print_program(program), program.params) == program


def test_kinds_share_the_work_of_the_attention():
    program = outlined(captured("spacetime"))
    flops = {r.id: r.flops for r in program.regions}
    for block in program.blocks():
        parts = [flops[f"{block.id}.attn.{k}"] for k in ("cross", "temporal", "spatial")]
        assert sum(parts) == flops[f"{block.id}.attn"]
        assert len(set(parts)) == 3
        assert min(parts) > 0


def test_kinds_outlive_hoisting_and_recognition():
    for passes in ("outline_blocks, hoist_invariants", "recognize_attention, outline_blocks, hoist_invariants"):
        program = PassManager(passes).run(captured("spacetime"))[-1].program
        assert kinds(program) == WANT["spacetime"]
        body = program.functions[program.blocks()[0].function]
        marks = {str(n.meta.get("region", "")) for n in body.graph.nodes}
        assert {".attn.cross", ".attn.temporal", ".attn.spatial", ".mlp"} <= marks


# -- other layouts -----------------------------------------------------------------------------------------------------


class Turns(nn.Module):
    """(B, C, F, H, W): equal blocks, over (B F, N, D) and (B N, F, D) by turns; ``order`` says where the axes are."""

    def __init__(self, order: tuple[int, int, int] = (0, 1, 2)) -> None:
        super().__init__()
        self.order = order
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True) for _ in range(4)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = x.permute(0, *(i + 2 for i in self.order), 1)  # B, frames, rows, columns, C
        b, f, r, c, _ = h.shape
        h = (self.embed(h) + sinusoid(t, 16)[:, None, None, None]).flatten(2, 3)
        for i, layer in enumerate(self.layers):
            if i % 2:
                h = layer(h.transpose(1, 2).flatten(0, 1)).view(b, r * c, f, -1).transpose(1, 2)
            else:
                h = layer(h.flatten(0, 1)).view(b, f, r * c, -1)
        h = self.head(h).view(b, f, r, c, -1)
        return h.permute(0, 4, *(self.order.index(i) + 1 for i in range(3)))


@pytest.mark.parametrize(
    ("order", "shape"),
    [((0, 1, 2), (2, 4, 3, 2, 4)), ((2, 0, 1), (2, 4, 2, 4, 3)), ((0, 1, 2), (2, 4, 4, 2, 2))],
    ids=["frames first", "frames last", "as many frames as tokens in one"],
)
def test_frames_are_what_attends_alone(order, shape):
    x = randn(*shape, seed=1)
    model = noise(Turns(order))
    inputs = {"x": x, "t": times(0, 1000)}
    found = outlined(flat(model, inputs))
    assert kinds(found) == [("spatial",), ("temporal",)] * 2
    assert len({b.function for b in found.blocks()}) == 2
    with torch.no_grad():
        assert torch.equal(run_program(found, inputs)[0][0], model(**inputs))


class Image(nn.Module):
    """The block of the video model on (B, rows, columns, C): no axis of an image is time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 24), nn.Linear(24, 4)
        self.blocks = nn.ModuleList(SpaceTimeBlock(24) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, text, sinusoid(t, 24))
        return self.head(h)


def test_axial_attention_of_an_image_is_self_attention():
    call = {"x": randn(2, 4, 6, 4, seed=1), "t": times(0, 1000), "text": randn(2, 5, 24, seed=2)}
    assert kinds(outlined(flat(noise(Image()), call))) == [("self", "cross")] * 2


# -- selectors ---------------------------------------------------------------------------------------------------------


def test_a_kind_is_selected():
    program = outlined(captured("latte"))
    temporal, cross = select_regions(program, "blocks.*.attn.temporal|blocks.:3.attn.cross")
    assert temporal.ids == tuple(f"blocks.{i}.attn.temporal" for i in (1, 3, 5))
    assert cross.ids == ("blocks.0.attn.cross", "blocks.2.attn.cross")
    (everything,) = select_regions(program, "blocks.*.attn")
    assert everything.ids == tuple(f"blocks.{i}.attn" for i in range(6))


@pytest.mark.parametrize("text", ["blocks.*.attn.joint", "blocks.*.attn.crossed", "blocks.*.mlp.self"])
def test_a_kind_that_there_is_none_of(text):
    with pytest.raises(RecipeError, match=r"matches nothing; .* roles attn \(cross, temporal, spatial\), mlp inside"):
        select_regions(outlined(captured("latte")), text)


def test_explain_names_the_kinds():
    foreign = ZOO["spacetime"]
    text = ditopt.explain(foreign.model(), "outline_blocks", example_inputs=foreign.call(0, 0), target="eager")
    assert "attn.cross|temporal|spatial+mlp" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for want in ("temporal 2 heads 3 x 3 tokens sdpa", "cross 2 heads 18 x 5 tokens sdpa"):
        assert want in lines
    assert any(line.endswith("spatial 2 heads 6 x 6 tokens explicit") for line in lines)


def test_caches_of_kinds_are_apart():
    """Three decisions on one body: each keeps the values of its own kind, and what is cached is cached once."""
    passes = "outline_blocks, hoist_invariants, cache{region=blocks.*.attn.spatial}, cache{region=blocks.*.attn.cross}"
    history = PassManager(f"{passes}, cache{{region=blocks.*.attn.temporal}}").run(captured("spacetime"))
    assert [r.applied for r in history[-3:]] == [3, 3, 3]
    program = history[-1].program
    verify(program)
    assert [d.regions[0] for d in program.decisions] == [f"blocks.0.attn.{k}" for k in ("spatial", "cross", "temporal")]
    assert all(len(d.slots) == 3 for d in program.decisions)
    again = PassManager(f"{passes}, cache{{region=blocks.*.attn}}").run(captured("spacetime"))[-1]
    assert again.applied == 0
    assert again.refused == ("blocks.0.attn is cached already by an earlier cache",)


def test_a_cache_of_a_kind_in_a_loop():
    """While temporal attention is reused, the rest computes: the first step of two is the plain model's."""
    foreign = ZOO["spacetime"]
    model: Any = foreign.model()
    fast = ditopt.optimize(
        model, "cache{region=blocks.*.attn.temporal}", example_inputs=foreign.call(0, 0), target="eager", steps=2
    )
    share = sum(r.flops for r in outlined(captured("spacetime")).regions if r.role == "temporal")
    with fast.session(steps=2), torch.no_grad():
        equal = [torch.equal(fast(**foreign.call(k, k)), model(**foreign.call(k, k))) for k in range(2)]
    assert equal == [True, False]
    saved = 2 * fast.stats.full_block_flops / 2 - fast.stats.block_flops
    assert 0.5 * share < saved <= share


def test_the_tiny_models_have_one_kind_a_module():
    assert kinds(optimized("sd3", "outline_blocks")) == [("joint",)] * 4
    assert kinds(optimized("joint", "outline_blocks")) == [("joint",)] * 3


@torch.no_grad()
def test_a_kind_is_left_out():
    """Skipping sees kinds as caching does; blocks that go for good take the regions of their kinds with them."""
    foreign = ZOO["spacetime"]
    program = PassManager("outline_blocks, skip_blocks{region=blocks.*.attn.temporal}").run(captured("spacetime"))[-1]
    assert program.applied == 3
    assert kinds(program.program) == [("cross", "spatial")] * 3
    model: Any = foreign.model()
    for block in model.trunk:
        block.outs[1].weight.zero_()
        block.outs[1].bias.zero_()
    call: Any = foreign.call(0, 0)
    (got, *_), _ = run_program(program.program, call)
    assert (got - model(**call)).norm() < 1e-5 * got.norm()
    gone = PassManager("outline_blocks, skip_blocks{region=blocks.1:2}").run(captured("spacetime"))[-1].program
    verify(gone)
    assert not [r.id for r in gone.regions if r.id.startswith("blocks.1.")]


def test_sparse_attention_takes_one_kind_at_a_time():
    cls = pipeline.get("sparse_attention")
    program = cls.example_applies()
    done = [cls.make({"region": r}).run(program, Context()) for r in ("blocks.*.attn", "blocks.*.attn.self")]
    assert done[0].applied == done[1].applied > 0
    assert done[0].program == done[1].program
    several = cls.make({"region": "blocks.*.attn.cross|blocks.*.attn.temporal"})
    out = several.run(
        PassManager("recognize_attention, outline_blocks").run(captured("spacetime"))[-1].program, Context()
    )
    assert out.applied == 0
    assert "asks for several kinds of attention: give each a pass of its own" in out.refused[0]


def test_quantization_keeps_a_kind():
    """Layers of all kinds are those of attention; one kind can be kept as it is."""
    done = {
        keep: PassManager(f"outline_blocks, quantize{{scheme=w8a8,keep={keep}}}").run(captured("spacetime"))[-1]
        for keep in ("blocks.0.attn", "blocks.0.attn.cross", "blocks.0.mlp")
    }
    counts = {keep: r.applied for keep, r in done.items()}
    assert counts["blocks.0.attn"] < counts["blocks.0.attn.cross"] < counts["blocks.0.mlp"] + 2
    assert counts["blocks.0.attn.cross"] - counts["blocks.0.attn"] == 4, "the layers of the two other kinds"
