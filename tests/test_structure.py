"""What is found in a graph: blocks, stages and classes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import nn

from ditopt import dynamo
from ditopt.capture import bind as bind_call
from ditopt.capture import capture
from ditopt.ir import cost
from ditopt.ir.binding import bind
from ditopt.ir.edit import Editor, replace_functions
from ditopt.ir.example import Builder
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.outline import outline
from ditopt.ir.program import Formal, Program, Region, formal
from ditopt.ir.structure import find_modules
from ditopt.ir.verify import verify
from ditopt.pipeline import Context, PassManager
from ditopt.recipe import Recipe
from tests.denoisers import REGISTRY
from tests.structures import (
    Alternating,
    Attending,
    AttendLast,
    Convolving,
    FeedFirst,
    GlobalSkip,
    Listed,
    LongSkip,
    Parallel,
    Reattending,
    Refined,
    Stemmed,
    Tables,
    parts,
)
from tests.tiny_models import ZOO, Plain, captured, flat, noise, optimized

aten = torch.ops.aten

SHAPE = {  # name -> number of blocks by class, in order, as (stage, body): the modules in each of them
    "dit": [4],
    "sd3": [3, 1],
    "flux": [2, 3],
    "wan": [3],
    "pixart": [3],
    "plain": [4],
    "joint": [3],
}


def outlined(model: nn.Module, *args: object, **kwargs: object) -> Program:
    spec, tensors = bind_call(model, args, kwargs)
    return PassManager("outline_blocks").run(capture(model, spec, tensors).program)[-1].program


def classes(program: Program) -> list[int]:
    """Number of blocks in each run of blocks of one stage and body."""
    runs: list[tuple[tuple[int, str], int]] = []
    for b in program.blocks():
        if runs and runs[-1][0] == (b.stage, b.function):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append(((b.stage, b.function), 1))
    assert len({kind for kind, _ in runs}) == len(runs), "a class of blocks is one run here"
    return [n for _, n in runs]


def roles(program: Program, block: str) -> list[str]:
    return [r.role for r in program.regions if r.parent == block]


@pytest.mark.parametrize("name", list(ZOO))
def test_blocks_of_the_tiny_models(name):
    program = optimized(name, "outline_blocks")
    model, _ = captured(name)
    blocks = program.blocks()
    assert [b.id for b in blocks] == [f"blocks.{i}" for i in range(sum(SHAPE[name]))]
    assert classes(program) == SHAPE[name]
    assert len(program.functions) == 1 + len(SHAPE[name]), "blocks that differ in their weights only share a body"
    assert [r.id for r in program.regions if r.role == "stage"] == [f"stage.{s}" for s in range(len(SHAPE[name]))]
    assert len(ZOO[name].blocks(model)) == len(blocks)
    for b in blocks:
        parallel = name == "flux" and b.stage == 1  # attention and MLP side by side add to the stream as one
        assert roles(program, b.id) == (["attn", "mod"] if parallel else ["attn", "mlp", "mod"]), b.id
    total, inside = cost.step_flops(program)
    assert sum(b.flops for b in blocks) == inside > 0.5 * total
    assert program.region("model").flops == total


@pytest.mark.parametrize("name", list(ZOO))
def test_aliases_are_the_model_own_paths(name):
    paths = [f"{path}.{i}" for path in ZOO[name].lists for i in range(len(captured(name)[0].get_submodule(path)))]
    assert [b.alias for b in optimized(name, "outline_blocks").blocks()] == paths


def anonymous(program: Program) -> Program:
    """``program`` without module paths, and with names that say nothing."""
    step = program.step
    inputs = {item.name: f"a{i}" for i, item in enumerate(program.inputs)}
    params = {name: f"w{i}" for i, name in enumerate(sorted(program.params, key=lambda n: hash(n) % 1009))}
    with Editor(step, "test") as e:
        for node in step.graph.nodes:
            if node.op == "output":
                continue
            e[node].meta.pop("path", None)
            if node.op == "placeholder":
                kind, ref = formal(node).kind, formal(node).ref
                new = (inputs if kind == "input" else params)[ref]
                e[node].meta["formal"] = Formal(kind, new)
                e[node].name = e[node].target = new
    return dataclasses.replace(
        program,
        functions={program.entry: e.function()},
        params={params[k]: v for k, v in program.params.items()},
        inputs=tuple(dataclasses.replace(i, name=inputs[i.name]) for i in program.inputs),
    )


@pytest.mark.parametrize("name", list(ZOO))
def test_no_name_is_read(name):
    program = anonymous(captured(name)[1].program)
    assert "transformer" not in str(program)
    (*_, last) = PassManager("outline_blocks").run(program)
    found, want = last.program, optimized(name, "outline_blocks")
    assert [dataclasses.replace(r, alias="") for r in want.regions] == list(found.regions)
    for f in want.functions:
        assert f == "step" or len(found.functions[f].graph.nodes) == len(want.functions[f].graph.nodes)


LATENTS = {"latents": torch.randn(2, 9, 8), "sigma": torch.rand(2) * 5, "prompt_embeds": torch.randn(2, 6, 24)}
TOKENS = {"x": torch.randn(2, 5, 16), "timestep": torch.rand(2)}
STRUCTURES: dict[
    str, Any
] = {  # how a model is built, its call, the class of each block of the main chain, its stages, other blocks
    "long skip": (LongSkip, ZOO["plain"].inputs(), "AABB", [0, 0, 1, 1], 0),
    "alternating": (lambda: Alternating(depth=6), ZOO["plain"].inputs(), "ABABAB", [0] * 6, 0),
    "refined text": (Refined, LATENTS, "AB", [0, 1], 2),  # the last one drops the text
    "global skip": (lambda: GlobalSkip(depth=3), ZOO["plain"].inputs(), "AAA", [0, 0, 0], 0),
    "parallel": (Parallel, TOKENS, "AAA", [0, 0, 0], 0),
    "reattending": (Reattending, TOKENS, "AAA", [0, 0, 0], 0),
    "feeds first": (FeedFirst, TOKENS, "AAA", [0, 0, 0], 0),
    # a block is what attends and feeds, whether two entries of a list are one, or one entry is two
    "attends, convolves": (lambda: Listed(*parts(*(Attending, Convolving) * 3)), TOKENS, "AAA", [0, 0, 0], 0),
    "convolves, attends": (lambda: Listed(*parts(*(Convolving, Attending) * 3)), TOKENS, "AAA", [0, 0, 0], 0),
    "two in one": (
        lambda: Listed(*(nn.Sequential(*parts(*(Attending, Convolving) * 2)) for _ in range(2))),
        TOKENS,
        "AAAA",
        [0] * 4,
        0,
    ),
    "tables": (Tables, ZOO["plain"].inputs(), "AAA", [0, 0, 0], 0),
}


@functools.cache
def structured(name: str) -> Program:
    build, inputs, *_ = STRUCTURES[name]
    model = noise(build())
    spec, tensors = bind_call(model, (), inputs)
    return capture(model, spec, tensors).program


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_structures(name):
    _, inputs, kinds, stages, others = STRUCTURES[name]
    flat = structured(name)
    program = PassManager("outline_blocks").run(flat)[-1].program
    verify(program)
    blocks = program.blocks()
    bodies = list(dict.fromkeys(b.function for b in blocks))
    assert "".join("AB"[bodies.index(b.function)] for b in blocks) == kinds
    assert [b.stage for b in blocks] == stages
    aside = [r for r in program.regions if r.role == "aux"]
    assert [r.id for r in aside] == [f"aux0.{i}" for i in range(others)]
    assert len({r.function for r in aside}) == bool(others)
    assert all({"attn", "mlp"} <= set(roles(program, b.id)) for b in (*blocks, *aside))
    assert torch.equal(run_program(program, inputs)[0][0], run_program(flat, inputs)[0][0])


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_structures_are_found_without_names(name):
    flat = structured(name)
    want = PassManager("outline_blocks").run(flat)[-1].program
    found = PassManager("outline_blocks").run(anonymous(flat))[-1].program
    assert want.blocks()
    assert [dataclasses.replace(r, alias="") for r in want.regions] == list(found.regions)


def test_long_skips_of_diffusers_are_found_without_names():
    denoiser = REGISTRY["hunyuan_dit"]
    model, call = denoiser.build()
    spec, tensors = bind_call(model, (), call)
    flat = capture(model, spec, tensors).program
    want, found = (PassManager("outline_blocks").run(p)[-1].program for p in (flat, anonymous(flat)))
    assert len(want.blocks()) == len(denoiser.block_modules(model)) > 4
    assert len({b.function for b in want.blocks()}) == 2, "blocks with a skip and blocks without"
    assert [dataclasses.replace(r, alias="") for r in want.regions] == list(found.regions)


@pytest.mark.parametrize("name", ["plain", "joint", "sd3", "flux"])
def test_the_flat_graph_of_dynamo_has_the_same_structure(name):
    tiny = ZOO[name]
    torch._dynamo.reset()
    options: dict[str, Any] = {"recipe": "outline_blocks", "target": "eager", "roles": dict(tiny.roles)}
    compiled = torch.compile(tiny.model(), backend="ditopt", options=options)
    with torch.no_grad():
        compiled(**tiny.inputs())
    last = dynamo.engines[-1].last
    assert last is not None
    model, exported = captured(name)
    context = Context("eager", given=flat(exported, tiny.inputs(), model))  # positions say where packed tokens lie
    found = last.history[-1].program
    want = PassManager(Recipe.parse("outline_blocks"), context).run(exported.program)[-1].program
    assert nameless(found) == nameless(want)


def nameless(program):
    """Its regions without module paths, and inputs by what both roads call them."""

    def stream(s):
        source = s.raster and s.raster.source.removeprefix("L_kwargs_").removesuffix("_")
        return dataclasses.replace(s, raster=s.raster and dataclasses.replace(s.raster, source=source))

    return [dataclasses.replace(r, alias="", streams=tuple(map(stream, r.streams))) for r in program.regions]


@pytest.mark.parametrize("cls", [AttendLast, Stemmed])
def test_what_is_left_of_blocks_that_attend_last_is_one_block(cls):
    program = outlined(noise(cls()), **TOKENS)
    assert classes(program) == [2, 1]
    assert [sorted(set(roles(program, f"blocks.{i}"))) for i in range(3)] == [["attn", "mlp"]] * 2 + [["attn"]]


def test_the_last_block_of_sd3_drops_the_text():
    program = optimized("sd3", "outline_blocks")
    whole, last = program.functions["block0"], program.functions["block1"]
    assert (len(whole.results), len(last.results)) == (2, 1)
    assert [program.region(f"blocks.{i}").function for i in range(4)] == ["block0"] * 3 + ["block1"]
    products = [sum(n.target is aten.linear.default for n in f.graph.nodes) for f in (whole, last)]
    assert products[0] - products[1] == 3, "no text projection, no text MLP"
    assert len(find_modules(whole, bind(program))) == 4
    assert len(find_modules(last, bind(program))) == 2


class Constant(Plain):
    """All blocks alike but for one constant in the one that is told."""

    def __init__(self, odd: int, depth: int) -> None:
        super().__init__(depth=depth)
        self.blocks[odd].get_submodule("norm1").eps = 1e-3  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("model", "want"),
    [
        (lambda: Plain(depth=5), [5]),
        (lambda: Plain(depth=5, skip=lambda i: i == 4), [4, 1]),
        (lambda: Plain(depth=6, skip=lambda i: i >= 3), [3, 3]),
        (lambda: Constant(4, 5), [4, 1]),
        (lambda: Constant(2, 5), [2, 1, 2]),
    ],
)
def test_blocks_share_a_body_if_and_only_if_they_are_equal(model, want):
    model = noise(model())
    inputs = ZOO["plain"].inputs()
    program = outlined(model, **inputs)
    stages = [b.stage for b in program.blocks()]
    assert [stages.count(s) for s in range(max(stages) + 1)] == want
    bodies = [b.function for b in program.blocks()]
    odd = {i for i, b in enumerate(model.blocks) if b.norm1.eps > 1e-4 or b.up.out_features > 4 * 32}
    assert len(set(bodies)) == 1 + bool(odd)
    assert {i for i in range(len(bodies)) if bodies[i] != bodies[0]} == odd
    with torch.no_grad():
        assert torch.equal(run_program(program, inputs)[0][0], model(**inputs))


def test_a_model_without_blocks_is_refused_with_a_sentence():
    model = noise(Plain(depth=0))
    spec, tensors = bind_call(model, (), ZOO["plain"].inputs())
    (*_, last) = PassManager("outline_blocks").run(capture(model, spec, tensors).program)
    assert last.applied == 0
    assert last.refused == ("the model has no residual branch that attends, and none that repeats",)


@pytest.mark.parametrize("depth", [1, 2])
def test_blocks_need_not_repeat(depth):
    program = outlined(noise(Plain(depth=depth)), **ZOO["plain"].inputs())
    assert classes(program) == [depth]
    assert roles(program, "blocks.0") == ["attn", "mlp", "mod"]


class Encoder(nn.Module):
    """PyTorch's own encoder layers: their attention is a module that takes a fast path of its own at inference."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True) for _ in range(3)
        )

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x + self.time(timestep[:, None])[:, None]
        for layer in self.layers:
            x = layer(x)
        return x


def test_pytorch_own_transformer_layers():
    model = noise(Encoder())
    program = outlined(model, torch.randn(2, 5, 16), torch.rand(2))
    assert classes(program) == [3]
    assert roles(program, "blocks.1") == ["attn", "mlp"]


def test_a_shared_body_takes_inputs_without_gaps_where_a_block_has_them():
    """The first block reads a dense value, the second a slice: the slice is copied, not the dense value given gaps."""
    b = Builder()
    x = b.input("x", "latent", 2, 4, 8)
    first, joined = b(aten.mul.Tensor, x, 2.0), b(aten.cat.default, [x, x], 1)
    second = b(aten.slice.Tensor, joined, 1, 2, 6)
    outs = [
        b(aten.linear.default, b(aten.relu.default, v), b.param(f"w{i}", 8, 8), region=f"blocks.{i}")
        for i, v in enumerate((first, second))
    ]
    program = b.program(*outs)
    regions = [Region("model", "model", ""), Region("stage.0", "stage", "model", 0)]
    regions += [Region(f"blocks.{i}", "block", "stage.0", 0) for i in range(2)]
    with Editor(program.step, "test") as e:
        for node in program.step.graph.nodes:
            if node.target is aten.linear.default:
                e[node.args[0]].meta["region"] = node.meta["region"]
    program = replace_functions(program, {"step": e.function()}).replace(regions=tuple(regions))
    after = outline(program, "test")
    verify(after)
    assert len(after.functions) == 2
    inputs = random_inputs(program)
    for a, c in zip(run_program(program, inputs)[0], run_program(after, inputs)[0], strict=True):
        assert torch.equal(a, c)


def assert_two_bodies(program, blocks):
    """``program``, whose nodes are marked as ``blocks`` blocks, gets two bodies for them, and computes the same."""
    regions = [Region("model", "model", ""), Region("stage.0", "stage", "model", 0)]
    regions += [Region(f"blocks.{i}", "block", "stage.0", 0) for i in range(blocks)]
    after = outline(program.replace(regions=tuple(regions)), "test")
    verify(after)
    assert len(after.functions) == 3
    inputs = random_inputs(program)
    for a, c in zip(run_program(program, inputs)[0], run_program(after, inputs)[0], strict=True):
        assert torch.equal(a, c)


def test_blocks_that_take_gaps_in_different_places_share_no_body():
    """Gaps cannot be copied to: of the two inputs each block reads one that is a slice, and another one."""
    b = Builder()
    x = b.input("x", "latent", 2, 4)
    dense = b(aten.mul.Tensor, x, 2.0)
    cut = b(aten.slice.Tensor, b(aten.cat.default, [x, x], 1), 1, 2, 6)
    pairs = [(dense, cut), (cut, dense), (dense, cut)]
    outs = [b(aten.add.Tensor, one, other, region=f"blocks.{i}") for i, (one, other) in enumerate(pairs)]
    program = b.program(*outs)
    assert_two_bodies(program, 3)


def test_the_result_of_a_shared_body_is_laid_out_as_its_readers_were_traced_for():
    """Two bodies, each shared by two blocks whose inputs lie otherwise in memory, one after the other."""
    b = Builder()
    x, y = b.input("x", "latent", 2, 8, 4), b.input("y", "latent", 2, 4, 8)
    turned = [b(aten.permute.default, v, [0, 2, 1]) for v in (x, b(aten.exp.default, x))]
    first = [b(aten.relu.default, v, region=f"blocks.{i}") for i, v in enumerate((turned[0], y))]
    second = [b(aten.tanh.default, v, region=f"blocks.{i + 2}") for i, v in enumerate((first[0], turned[1]))]
    flat = b(aten.view.default, b(aten.permute.default, first[0], [0, 2, 1]), [2, 32])
    program = b.program(*first, *second, flat)
    assert_two_bodies(program, 4)
