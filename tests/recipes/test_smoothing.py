"""Smoothing against its formula, written here in NumPy and put into the model itself, and what it does not touch."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import ditopt
from ditopt.calibration import fit, record
from ditopt.ir.interpret import run_program
from ditopt.ir.quantizing import quantized
from ditopt.ir.scheme import Format, QuantScheme, Smooth
from ditopt.ir.smoothing import read_maxima
from tests.recipes.test_quantization import INSIDE, Layer, call, far, svdquant, w8a8
from tests.roads.tiny import Small

SMOOTHED = ("qkv", "up")
"""The layers of a block that read a modulated norm."""


@pytest.fixture(scope="module")
def model():
    """Some channels of what the norms give are large: what smoothing is for."""
    torch.manual_seed(0)
    made = Small().eval().requires_grad_(False)
    block: Any
    for block in made.blocks:
        block.mod.bias[[3, 40, 96 + 7, 128 + 9]] += 25.0
    return made


def sampler(model, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 8, 8, generator=g)
    for t in (900.0, 600.0, 300.0):
        given = {**call(), "hidden_states": x, "timestep": torch.tensor([t, t])}
        x = x - 0.3 * model(**given)["sample"]


def magnitudes(model):
    """By layer the largest magnitude of each channel of its input, taken by hooks."""
    found: dict[str, torch.Tensor] = {}

    def hook(name, module, given):
        row = given[0].abs().amax(dim=(0, 1))
        found[name] = torch.maximum(found[name], row) if name in found else row

    handles = [
        getattr(block, name).register_forward_pre_hook(functools.partial(hook, f"blocks.{i}.{name}.weight"))
        for i, block in enumerate(model.blocks)
        for name in INSIDE
    ]
    for seed in (0, 1):
        sampler(model, seed)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module")
def table(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("smooth") / "maxima.safetensors"
    save_file(magnitudes(model), path)
    return path


def smoothed(formula, name, model, block, alpha, maxima):
    def run(x, w):
        act, most = maxima[f"blocks.{block}.{name}.weight"].double().numpy(), np.abs(w).max(0)
        s = act**alpha / most ** (1 - alpha)
        return formula(x / s, w * s)

    return run


def transcribed(model, alpha, maxima, formula=w8a8):
    made: Any = copy.deepcopy(model)
    for i, block in enumerate(made.blocks):
        for name in INSIDE:
            own = smoothed(formula, name, model, i, alpha, maxima) if name in SMOOTHED else formula
            setattr(block, name, Layer(getattr(block, name), own))
    return made


def test_calibration_finds_what_hooks_find(model, tmp_path):
    path = tmp_path / "m.safetensors"
    recipe = ditopt.calibrate(model, f"smoothquant{{table={path}}}", sampler, steps=3, seeds=[0, 1], progress=False)
    found, wanted = load_file(path), magnitudes(model)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[k], wanted[k], rtol=1e-4) for k in found)
    assert recipe.name == "smoothquant"
    assert "scheme=w8a8" in str(recipe)
    assert "alpha=0.5" in str(recipe)
    assert recipe.calibrated["steps"] == "3"


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_it_computes_what_its_source_says(model, table, alpha):
    plain = model(**call())["sample"]
    maxima = load_file(table)
    wanted = transcribed(model, alpha, maxima)(**call())["sample"]
    more = f",maxima={table}" if alpha else ""
    found = ditopt.optimize(model, f"w8a8{{alpha={alpha}{more}}}", target="eager")(**call())["sample"]
    assert far(found, wanted) < far(wanted, plain) / 15
    other = ditopt.optimize(model, "w8a8", target="eager")(**call())["sample"]
    assert far(other, wanted) > far(wanted, plain) / 4, "without smoothing it is the same"


def test_svdquant_smooths_before_the_branch_is_found(model, table):
    plain, maxima = model(**call())["sample"], load_file(table)
    wanted = transcribed(model, 0.5, maxima, svdquant)(**call())["sample"]
    recipe = f"svdquant{{rank=4,group=16,alpha=0.5,maxima={table}}}"
    found = ditopt.optimize(model, recipe, target="eager")(**call())["sample"]
    assert far(found, wanted) < far(wanted, plain) / 15


def test_outliers_cost_less(model, table):
    plain = model(**call())["sample"]
    errors = [
        far(ditopt.optimize(model, r, target="eager")(**call())["sample"], plain)
        for r in ("w8a8", f"w8a8{{alpha=0.5,maxima={table}}}")
    ]
    assert errors[1] < 0.75 * errors[0]


def test_no_operator_is_added_to_the_loop(model, table):
    """As many operators as without; the table of modulations is what is divided."""
    plain = ditopt.optimize(model, "w8a8", target="eager")
    fast = ditopt.optimize(model, f"w8a8{{alpha=0.5,maxima={table}}}", target="eager")
    for m in (plain, fast):
        m(**call())
    counts = [
        [len(f.graph.nodes) - len(f.placeholders) for n, f in sorted(m.program.functions.items()) if "memo" not in n]
        for m in (plain, fast)
    ]
    assert counts[0] == counts[1]
    said = next(r for r in fast.history if r.name == "quantize")
    assert any("6 of 12 inputs of layers are divided" in n for n in said.notes)
    assert sorted(s.partition("comes from ")[2] for s in said.refused) == [
        "gelu, which takes no factor",
        "scaled dot product attention, which takes no factor",
    ]


@pytest.mark.parametrize("target", ["inductor", "onnxruntime"])
def test_targets_agree(model, table, target):
    recipe = f"w8a8{{alpha=0.5,maxima={table}}}"
    plain = model(**call())["sample"]
    eager = ditopt.optimize(model, recipe, target="eager")(**call())["sample"]
    assert far(ditopt.optimize(model, recipe, target=target)(**call())["sample"], eager) < far(eager, plain) / 20


def test_files_hold_it(model, table, tmp_path):
    fast = ditopt.optimize(model, f"w8a8{{alpha=0.5,maxima={table}}}", target="eager")
    wanted = fast(**call())["sample"]
    ditopt.export_onnx(fast, tmp_path / "m.onnx", example_inputs=call())
    assert far(ditopt.load(tmp_path / "m.onnx")(**call())["sample"], wanted) < 1e-4
    ditopt.save(fast, tmp_path / "saved")
    assert torch.equal(ditopt.load(tmp_path / "saved", target="eager")(**call())["sample"], wanted)


def test_a_weight_that_changes_in_place_is_seen(table):
    torch.manual_seed(0)
    model: Any = Small().eval().requires_grad_(False)
    recipe = f"w8a8{{alpha=0.5,maxima={table}}}"
    fast = ditopt.optimize(model, recipe, target="eager")
    before = fast(**call())["sample"]
    model.blocks[1].up.weight.mul_(1.5)  # the factors, the integers and the table change
    fast.reset()
    after = fast(**call())["sample"]
    assert far(after, before) > 1e-3
    assert torch.equal(after, ditopt.optimize(model, recipe, target="eager")(**call())["sample"])


@pytest.mark.parametrize(
    ("recipe", "done"),
    [
        (
            "canonicalize, outline_blocks, quantize{alpha=0}, fuse_quantization",
            "6 of 12",
        ),  # no table: divided where made
        ("ras, w8a8{alpha=0}", "12 of 24"),  # each block once more, on part of the tokens, with the same integers
        ("fora, w8a8{alpha=0,keep=blocks.1}", "4 of 8"),
    ],
)
def test_it_composes(model, recipe, done):
    fast = ditopt.optimize(model, recipe, target="eager", steps=12)
    found = fast(**call())["sample"]
    result = next(r for r in fast.history if r.name == "quantize")
    assert any(f"{done} inputs" in n for n in result.notes), result.notes
    alone = ditopt.optimize(model, "w8a8{alpha=0}", target="eager")(**call())["sample"]
    assert far(found, alone) < (1e-5 if "keep" not in recipe else 0.05)


class Shared(nn.Module):
    """Layers that share what they read, or read it besides others, in blocks with an affine norm."""

    blocks: Any

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inp, self.head = nn.Linear(8, 32), nn.Linear(32, 8)
        self.time = nn.Linear(1, 32)
        self.blocks = nn.ModuleList(SharedBlock(kind) for _ in range(3))
        if kind == "tied":
            for b in self.blocks:
                b.up.weight = self.blocks[0].q.weight

    def forward(self, x, timestep):
        h, t = self.inp(x), self.time(timestep[:, None])[:, None]
        for b in self.blocks:
            h = b(h, t)
        return self.head(h)


class SharedBlock(nn.Module):
    narrow: Any

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.norm2 = nn.LayerNorm(32), nn.RMSNorm(32)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.out, self.up, self.down = (nn.Linear(32, 32) for _ in range(3))
        nn.init.uniform_(self.norm.weight, 0.2, 5)

    def forward(self, x, t):
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        a = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + a * t + (y if self.kind == "read" else 0 * a)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def shared(kind):
    torch.manual_seed(0)
    made = Shared(kind).eval().requires_grad_(False)
    given = {"x": torch.randn(2, 9, 8), "timestep": torch.tensor([0.3, 0.3])}
    return made, given


@pytest.mark.parametrize(
    ("kind", "done", "said"),
    [
        ("", 6, "comes from"),
        ("read", 3, "something else reads their input too"),
        ("tied", 2, "their weight is read elsewhere, where no factor can be"),
    ],
)
def test_where_it_is_not_legal_it_is_not_done(kind, done, said):
    model, given = shared(kind)
    fast = ditopt.optimize(model, "w8a8{alpha=0}", target="eager", example_inputs=given)
    found, plain = fast(**given), model(**given)
    result = next(r for r in fast.history if r.name == "quantize")
    assert any(f"{done} of 12 inputs of layers are divided" in n for n in result.notes), result.notes
    assert any(said in s for s in result.refused), result.refused
    alone = ditopt.optimize(model, "w8a8", target="eager", example_inputs=given)(**given)
    assert far(found, plain) < 4 * far(alone, plain)
    assert not torch.equal(found, alone)


class Halves(SharedBlock):
    """The input of one layer is a part of what another one makes."""

    def forward(self, x, t):
        a, b = self.up(self.norm(x)).chunk(2, -1)
        return x + t * self.down(torch.cat([self.narrow(a), b], -1)) + F.scaled_dot_product_attention(x, x, x)


def test_parts_of_a_product_take_no_factor():
    torch.manual_seed(0)
    model: Any = Shared("")
    model.blocks = nn.ModuleList(Halves("") for _ in range(3))
    for block in model.blocks:
        block.narrow = nn.Linear(16, 16)
    model.eval().requires_grad_(False)
    given = {"x": torch.randn(2, 9, 8), "timestep": torch.tensor([0.3, 0.3])}
    fast = ditopt.optimize(model, "w8a8{alpha=0}", target="eager", example_inputs=given)
    result = next(r for r in fast.history if r.name == "quantize")
    assert any("3 of 9 inputs of layers are divided" in n for n in result.notes), (result.notes, result.refused)
    assert {s.partition("comes from ")[2].partition(",")[0] for s in result.refused} == {"linear", "cat"}, (
        result.refused
    )


def test_it_is_exact_without_rounding(model, table):
    """The program with factors in its table computes what the plain one does, where integers are wide."""
    fast = ditopt.optimize(model, "lossless", target="eager")
    fast(**call())
    program = fast.program
    scheme = QuantScheme(Format(8, 1), transforms=(Smooth(0.5),))  # a scale for each number: weights are themselves
    made = quantized(program, scheme, (), "quantize", read_maxima(table)).program
    (plain,), (divided,) = (run_program(p, call())[0] for p in (program, made))
    assert not torch.equal(plain, divided)
    assert far(divided, plain) < 2e-6


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("w8a8{alpha=0.5}", "takes alpha > 0 and the file"),
        ("w8a8{alpha=0,maxima=m.safetensors}", "takes alpha > 0 and the file"),
        ("w8a8{alpha=2}", "expected at most 1"),
        ("quantize{alpha=-0.5}", "expected 0 to 1"),
        ("w8a8{alpha=0.5,maxima=nowhere.safetensors}", "cannot be read"),
        ("smoothquant", "fitted to a model"),
    ],
)
def test_refused_recipes(model, recipe, said):
    with pytest.raises(ditopt.errors.DitoptError, match=said):
        ditopt.optimize(model, recipe, target="eager")(**call())


def test_files_of_other_models_are_told(model, table, tmp_path):
    rows = load_file(table)
    path = tmp_path / "other.safetensors"
    save_file({k: v if "qkv" in k else v[:5].clone() for k, v in rows.items() if "blocks.1.qkv" not in k}, path)
    fast = ditopt.optimize(model, f"w8a8{{alpha=0.5,maxima={path}}}", target="eager")
    fast(**call())
    said = next(r for r in fast.history if r.name == "quantize")
    assert any("their activations were not recorded" in s for s in said.refused)
    assert any("5 channels of their input were recorded, and it has 32" in s for s in said.refused)
    save_file({"a": torch.tensor([-1.0])}, path)
    with pytest.raises(ditopt.errors.RecipeError, match="expected one row of magnitudes"):
        ditopt.optimize(model, f"w8a8{{alpha=0.5,maxima={path}}}", target="eager")(**call())


def test_the_source_needs_a_file_to_write(model):
    profile = record(model, sampler, regions=["maxima"], steps=3, seeds=[0], progress=False)
    assert profile.values["blocks.0.qkv.weight"].shape == (1, 3, 1, 32)
    with pytest.raises(ditopt.errors.RecipeError, match="table= is missing"):
        fit("smoothquant", profile)
