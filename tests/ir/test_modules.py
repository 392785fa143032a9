"""Modules of a block, attention and MLP, in all their spellings."""

from __future__ import annotations

import pytest
import torch

from ditopt.ir import cost
from ditopt.ir.binding import bind
from ditopt.ir.example import Builder
from ditopt.ir.program import Program
from ditopt.ir.structure import Module, find_modules, rejoined
from tests.ir.build import add, mul
from tests.tiny_models import optimized

aten = torch.ops.aten


def spell(write, gates: int = 1, dtype: torch.dtype = torch.float32) -> tuple[list[Module], Program]:
    """The modules of a body that ``write(b, x, c, w, g)`` makes of a stream, a context, weights and a gate."""
    b = Builder()
    x = b.input("x", "latent", 2, 6, 8, dtype=dtype)
    c = b.input("context", "prompt", 2, 3, 8, dtype=dtype)
    t = b.input("t", "timestep", 2, 8, dtype=dtype)
    weights = [b(aten.to.dtype, b.param(f"w{i}", 8, 8), dtype) for i in range(4)]
    gate = b(aten.unsqueeze.default, b(aten.linear.default, t, weights[3]), 1)
    program = b.program(write(b, x, c, weights, gate))
    return find_modules(program.step, bind(program)), program


def attend(b, x, c, w):
    y = b(aten.linear.default, b(aten.layer_norm.default, x, [8]), w[0])
    return b(aten.linear.default, b(aten.scaled_dot_product_attention.default, y, c, c), w[1])


def mlp(b, x, w):
    return b(aten.linear.default, b(aten.gelu.default, b(aten.linear.default, x, w[2])), w[1])


def cast(b, x, dtype):
    return b(aten._to_copy.default, x, dtype=dtype)


@pytest.mark.parametrize(
    "join",
    [
        lambda b, x, y, g: add(b, x, y),
        lambda b, x, y, g: add(b, y, x),
        lambda b, x, y, g: add(b, x, mul(b, g, y)),
        lambda b, x, y, g: add(b, x, mul(b, y, g)),
        lambda b, x, y, g: add(b, mul(b, g, y), x),
        lambda b, x, y, g: add(b, mul(b, y, g), x),
        lambda b, x, y, g: add(b, x, b(aten.clone.default, mul(b, g, y))),
    ],
)
def test_attention_and_mlp_are_found_before_their_gate(join):
    def write(b, x, c, w, g):
        kept.clear()
        for part in (lambda v: attend(b, v, c, w), lambda v: mlp(b, v, w)):
            kept.append(part(x))
            x = join(b, x, kept[-1], g)
        return x

    kept: list[torch.fx.Node] = []
    modules, program = spell(write)
    assert [m.role for m in modules] == ["attn", "mlp"]
    linears = [n for n in program.step.graph.nodes if n.target is aten.linear.default]
    assert [m.output for m in modules] == [linears[2], linears[4]], "the projection, not the gated product"
    assert not modules[0].nodes & modules[1].nodes


@pytest.mark.parametrize("gated", [True, False])
def test_casts_between_branch_and_stream_are_seen_through(gated):
    """bf16 models with float32 streams, as Wan writes them: x = (x.float() + y * gate).to(bf16)."""

    def write(b, x, c, w, g):
        for part in (lambda v: attend(b, v, c, w), lambda v: mlp(b, v, w)):
            y = part(x)
            y = mul(b, cast(b, y, torch.float32), cast(b, g, torch.float32)) if gated else cast(b, y, torch.float32)
            x = cast(b, add(b, cast(b, x, torch.float32), y), torch.bfloat16)
        return x

    modules, program = spell(write, dtype=torch.bfloat16)
    linears = [n for n in program.step.graph.nodes if n.target is aten.linear.default]
    assert [m.role for m in modules] == ["attn", "mlp"]
    outputs = [m.output.args[0] if m.output.target is aten._to_copy.default else m.output for m in modules]
    assert outputs == [linears[2], linears[4]]


def test_a_block_with_self_and_cross_attention_has_three_modules():
    def write(b, x, c, w, g):
        x = add(b, x, mul(b, g, attend(b, x, x, w)))
        x = add(b, x, attend(b, x, c, w))
        return add(b, x, mul(b, g, mlp(b, x, w)))

    modules, _ = spell(write)
    assert [m.role for m in modules] == ["attn", "attn", "mlp"]
    attentions = [[n for n in m.nodes if cost.is_attention(n)] for m in modules]
    assert [len(a) for a in attentions] == [1, 1, 0]
    assert attentions[0] != attentions[1]


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_cross_attention_blocks_of_diffusers(name):
    program = optimized(name, "outline_blocks")
    modules = find_modules(program.functions["block0"], bind(program))
    assert [m.role for m in modules] == ["attn", "attn", "mlp"]


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (lambda b, x, c, w, g: mlp(b, x, w), "no residual"),
        (lambda b, x, c, w, g: add(b, x, mul(b, g, x)), "no matrix product"),
        (lambda b, x, c, w, g: b(aten.sub.Tensor, x, mlp(b, x, w)), "a difference"),
        (lambda b, x, c, w, g: mul(b, x, mlp(b, x, w)), "a product"),
        (lambda b, x, c, w, g: add(b, x, g), "what is added does not depend on the latent"),
        (lambda b, x, c, w, g: add(b, row_of(b, x, 1), mlp(b, row_of(b, x, 0), w)), "made of another row"),
        (lambda b, x, c, w, g: add(b, slice_of(b, x, 0, 3), mlp(b, slice_of(b, x, 3, 6), w)), "made of other rows"),
        (
            lambda b, x, c, w, g: add(
                b, row_of(b, x, 2), mlp(b, add(b, row_of(b, x, 1), mlp(b, row_of(b, x, 0), w)), w)
            ),
            "a scan over rows",
        ),
    ],
)
def test_what_is_no_module(write, why):
    assert spell(write)[0] == [], why


@pytest.mark.parametrize(
    "write",
    [
        lambda b, x, c, w, g: add(b, row_of(b, x, 1), mlp(b, row_of(b, x, 1), w)),
        lambda b, x, c, w, g: add(b, row_of(b, x, 1), row_of(b, mlp(b, x, w), 1)),
        lambda b, x, c, w, g: add(b, slice_of(b, x, 0, 3), mlp(b, slice_of(b, x, 2, 5), w)),
    ],
    ids=["the same row", "all rows", "rows that overlap"],
)
def test_a_module_of_a_part_of_the_stream(write):
    assert [m.role for m in spell(write)[0]] == ["mlp"]


def row_of(b, x, row):
    return b(aten.select.int, x, 1, row)


def slice_of(b, x, start, stop):
    return b(aten.slice.Tensor, x, 1, start, stop)


@pytest.mark.parametrize(
    ("join", "want"),
    [
        (lambda b, x, y: b(aten.cat.default, [slice_of(b, x, 0, 2), slice_of(b, x, 2, 9)], 1), True),
        (
            lambda b, x, y: b(aten.cat.default, [slice_of(b, x, 0, 1), slice_of(b, x, 1, 3), slice_of(b, x, 3, 6)], 1),
            True,
        ),
        (lambda b, x, y: b(aten.cat.default, [slice_of(b, x, 2, 9), slice_of(b, x, 0, 2)], 1), False),
        (lambda b, x, y: b(aten.cat.default, [slice_of(b, x, 0, 2), slice_of(b, x, 3, 9)], 1), False),
        (lambda b, x, y: b(aten.cat.default, [slice_of(b, x, 0, 2), slice_of(b, x, 2, 4)], 1), False),
        (lambda b, x, y: b(aten.cat.default, [slice_of(b, x, 0, 2), slice_of(b, y, 2, 9)], 1), False),
        (lambda b, x, y: b(aten.cat.default, [slice_of(b, x, 0, 3), slice_of(b, x, 3, 6)], 2), False),
        (lambda b, x, y: b(aten.cat.default, [x], 1), False),
        (lambda b, x, y: slice_of(b, x, 0, 6), False),
    ],
)
def test_a_stream_that_is_split_and_joined_again_is_itself(join, want):
    b = Builder()
    x, y = b.input("x", "latent", 2, 6, 8), b.input("y", "latent", 2, 6, 8)
    node = join(b, x, y)
    assert rejoined(node) is (x if want else None)
