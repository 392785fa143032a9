"""w8a8, w4a16 and svdquant against the formulas of their sources, written here in NumPy and put into the model itself:
the layers of its blocks are replaced, nothing of ditopt is used. Each formula tells the three apart."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ditopt
from tests.roads.tiny import Small

INSIDE = ("qkv", "out", "up", "down")
"""The layers of a block that see the latent; its modulation does not."""


def rows(x, q):
    """One scale a row: max|x| / q."""
    s = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-8) / q
    return np.rint(x / s), s


def groups(x, q, size):
    """Integers times their scales, one for each ``size`` numbers of a row."""
    parts = x.reshape(*x.shape[:-1], -1, size)
    n, s = rows(parts, q)
    return (n * s).reshape(x.shape)


def w8a8(x, w):
    (xq, sx), (wq, sw) = rows(x, 127), rows(w, 127)
    return (xq.astype(np.int64) @ wq.astype(np.int64).T) * sx * sw.T


def w4a16(x, w, size=16):
    return x @ groups(w, 7, size).T


def svdquant(x, w, rank=4, size=16):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    down, up = v[:rank], u[:, :rank] * s[:rank]
    return (x @ down.T) @ up.T + groups(x, 7, size) @ groups(w - up @ down, 7, size).T


FORMULAS = {
    "w8a8": w8a8,
    "w4a16{group=16}": w4a16,
    "svdquant{rank=4,group=16}": svdquant,
}


class Layer(nn.Module):
    def __init__(self, of: nn.Linear, formula: Callable) -> None:
        super().__init__()
        self.of, self.formula = of, formula

    def forward(self, x: Tensor) -> Tensor:
        y = self.formula(x.double().numpy(), self.of.weight.double().numpy())
        return (torch.from_numpy(y) + self.of.bias.double()).to(x.dtype)


def transcribed(model: nn.Module, formula: Callable, keep: tuple[int, ...] = ()) -> nn.Module:
    made = copy.deepcopy(model)
    for i, block in enumerate(made.blocks):
        for name in INSIDE if i not in keep else ():
            setattr(block, name, Layer(getattr(block, name), formula))
    return made


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


def call():
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor([300.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=g),
        "pooled_projections": torch.randn(2, 20, generator=g),
    }


def far(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("recipe", FORMULAS)
def test_it_computes_what_its_source_says(model, recipe):
    plain = model(**call())["sample"]
    wanted = transcribed(model, FORMULAS[recipe])(**call())["sample"]
    found = ditopt.optimize(model, recipe, target="eager")(**call())["sample"]
    rounding = far(wanted, plain)
    assert rounding > 5e-4, "the formula changes the result"
    # a number on the border between two integers may fall to either side: far less than the scheme's own error
    assert far(found, wanted) < rounding / 20
    for other, formula in FORMULAS.items():
        if other != recipe:
            assert far(found, transcribed(model, formula)(**call())["sample"]) > rounding / 4, f"{other} does the same"


def test_kept_blocks_stay(model):
    wanted = transcribed(model, w8a8, keep=(0, 2))(**call())["sample"]
    found = ditopt.optimize(model, "w8a8{keep=blocks.0|blocks.2}", target="eager")(**call())["sample"]
    assert far(found, wanted) < far(wanted, transcribed(model, w8a8)(**call())["sample"]) / 10


def test_more_rounds_bring_weight_and_reconstruction_closer():
    torch.manual_seed(0)
    weight = torch.randn(48, 64) * torch.logspace(0, 1, 64)

    def error(rounds):
        down, up, rest = torch.ops.ditopt.low_rank(weight, 8, 4, 16, rounds)
        values, scale = torch.ops.ditopt.quantize(rest, 4, 16)
        return float((up @ down + torch.ops.ditopt.dequantize(values, scale, torch.float32) - weight).norm())

    assert error(20) < error(1)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("w4a16{group=0}", "expected at least 1"),
        ("quantize{group=-2}", "expected 0 or more"),
        ("quantize{rank=4}", "has no branch of low rank"),
        ("quantize{scheme=w2a2}", "got 'w2a2'"),
        ("svdquant{rank=0}", "expected at least 1"),
        ("quantize{keep=nowhere}", "is not a selector"),
    ],
)
def test_refused_recipes(model, recipe, said):
    with pytest.raises(ditopt.errors.RecipeError, match=said):
        ditopt.optimize(model, recipe, target="eager")(**call())


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("w4a16{group=48}", "groups of 48 do not divide their 32 inputs"),
        ("quantize{group=16}", "takes a scale for each group of 16"),
        ("svdquant{rank=40,group=16}", "rank 40 is more than a weight"),
    ],
)
def test_refused_on_a_model_is_a_sentence_and_leaves_it_alone(model, recipe, said):
    fast = ditopt.optimize(model, recipe, target="eager")
    with pytest.warns(ditopt.errors.DitoptWarning, match="changed nothing"):
        found = fast(**call())["sample"]
    refused = [s for r in fast.history if r.name == "quantize" for s in r.refused]
    assert any(said in s for s in refused)
    assert far(found, model(**call())["sample"]) < 1e-6
