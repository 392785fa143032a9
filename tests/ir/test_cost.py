"""What operators cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ditopt.capture import bind as bind_call
from ditopt.capture import capture
from ditopt.ir import cost
from tests.tiny_models import ZOO, captured, optimized

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("call", "shapes", "want"),
    [
        (lambda x, w: F.linear(x, w), [(2, 5, 8), (3, 8)], 2 * 2 * 5 * 8 * 3),
        (lambda x, w, b: F.linear(x, w, b), [(7, 8), (3, 8), (3,)], 2 * 7 * 8 * 3),
        (lambda a, b: a @ b, [(4, 5), (5, 6)], 2 * 4 * 5 * 6),
        (lambda a, b: a @ b, [(3, 4, 5), (5, 6)], 2 * 3 * 4 * 5 * 6),
        (lambda a, b: a @ b, [(2, 3, 4, 5), (3, 5, 6)], 2 * 2 * 3 * 4 * 5 * 6),
        (lambda a, b: a @ b, [(4, 5), (5,)], 2 * 4 * 5),
        (lambda a, b: torch.bmm(a, b), [(3, 4, 5), (3, 5, 6)], 2 * 3 * 4 * 5 * 6),
        (lambda c, a, b: torch.addmm(c, a, b), [(6,), (4, 5), (5, 6)], 2 * 4 * 5 * 6),
        (lambda c, a, b: torch.baddbmm(c, a, b), [(3, 4, 6), (3, 4, 5), (3, 5, 6)], 2 * 3 * 4 * 5 * 6),
        (lambda x, w: F.conv2d(x, w, stride=2), [(2, 4, 8, 8), (16, 4, 2, 2)], 2 * 2 * 16 * 4 * 4 * 4 * 2 * 2),
        (lambda x, w: F.conv2d(x, w, padding="same"), [(2, 4, 8, 8), (16, 4, 3, 3)], 2 * 2 * 16 * 64 * 4 * 9),
        (lambda x, w: F.conv1d(x, w, groups=4, padding=1), [(2, 4, 9), (8, 1, 3)], 2 * 2 * 8 * 9 * 3),
        (lambda x, w: F.conv3d(x, w), [(1, 2, 4, 4, 4), (5, 2, 1, 2, 2)], 2 * 5 * 4 * 3 * 3 * 2 * 4),
        (lambda x, w: F.conv_transpose2d(x, w, stride=2), [(2, 4, 5, 5), (4, 3, 2, 2)], 2 * 2 * 4 * 25 * 3 * 4),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
            [(2, 3, 7, 8), (2, 3, 5, 8), (2, 3, 5, 4)],
            2 * 2 * 3 * 7 * 5 * (8 + 4),
        ),
        (lambda a, b: torch.einsum("bij,bjk->bik", a, b), [(3, 4, 5), (3, 5, 6)], 2 * 3 * 4 * 5 * 6),
        (lambda a, b: torch.einsum("...ij,jk->...ik", a, b), [(3, 4, 5), (5, 6)], 2 * 3 * 4 * 5 * 6),
        (lambda a: torch.einsum("nhwpqc->nchpwq", a), [(1, 2, 3, 4, 5, 6)], 0),
        (lambda a, b: F.gelu(a) + b.softmax(-1), [(4, 5), (4, 5)], 0),
    ],
)
def test_flops_counted_by_hand(call, shapes, want):
    class Call(nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    spec, tensors = bind_call(Call(), tuple(torch.randn(s) for s in shapes), {})
    program = capture(Call(), spec, tensors).program
    assert cost.step_flops(program) == (want, 0)


@pytest.mark.parametrize("name", list(ZOO))
def test_flops_agree_with_the_counter_of_torch(name):
    model, c = captured(name)
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(**ZOO[name].inputs())
    want = counter.get_total_flops()
    flat, _ = cost.step_flops(c.program)
    assert flat == cost.step_flops(optimized(name, "outline_blocks"))[0], "outlining moves work, it makes none"
    assert math.isclose(flat, want, rel_tol=0.02), (flat, want)
