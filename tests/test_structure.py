"""What is found in a graph: blocks, stages, classes and modules; what values depend on; what operators cost."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ditopt import dynamo
from ditopt.capture import bind as bind_call
from ditopt.capture import capture
from ditopt.ir import cost
from ditopt.ir.binding import Binding, bind
from ditopt.ir.edit import Editor, replace_functions
from ditopt.ir.example import Builder, tiny_dit
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.outline import outline
from ditopt.ir.program import Formal, Program, Region, formal
from ditopt.ir.structure import Module, find_modules, rejoined
from ditopt.ir.verify import verify
from ditopt.pipeline import Context, PassManager
from ditopt.recipe import Recipe
from tests.denoisers import REGISTRY
from tests.tiny_models import ZOO, Joint, Plain, captured, flat, noise, optimized

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


class LongSkip(Plain):
    """Half a U: the second half of the blocks reads the results of the first half again, by a layer of its own."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__(depth=depth)
        self.skips = nn.ModuleList(nn.Linear(2 * self.width, self.width) for _ in range(depth // 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = t[:, None].expand(-1, self.width) * 1e-3 + self.label(y)
        x = self.patch(x).flatten(2).transpose(1, 2)
        kept: list[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= len(self.blocks) // 2:
                x = self.skips[i - len(self.blocks) // 2](torch.cat([x, kept.pop(0)], -1))
            x = block(x, c)
            kept.append(x)
        return self.head(x)


class Alternating(Plain):
    """Blocks that attend in space and in time by turns."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = t[:, None].expand(-1, self.width) * 1e-3 + self.label(y)
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x = block(x.transpose(0, 1), c[:1]).transpose(0, 1) if i % 2 else block(x, c)
        return self.head(x)


class Refined(nn.Module):
    """A joint model whose text passes blocks of its own before it meets the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, 32, batch_first=True) for _ in range(2))
        self.joint = Joint(depth=2)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        for layer in self.refiner:
            prompt_embeds = layer(prompt_embeds)
        return self.joint(latents, sigma, prompt_embeds)["sample"]


class GlobalSkip(Plain):
    """A model that predicts a difference to its input: an addition around all blocks is no module."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x, t, y)


class Tables(Plain):
    """Each block adds its own slice of one table to the modulation, and feeds forward what it thinks most of."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        self.tables = nn.Parameter(torch.randn(1, 3, self.width))
        self.router = nn.Linear(self.width, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = t[:, None, None] * 1e-3 + self.label(y)[:, None] + self.tables
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x = block(x, c[:, i])
            values, chosen = self.router(x).topk(2, -1)  # two results, of which each block reads its own
            x = x + values.sum(-1, keepdim=True) * F.one_hot(chosen[..., 0], self.width)
        return self.head(x)


class Parallel(nn.Module):
    """Attention and MLP side by side, added one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(16, n) for n in (48, 16, 32)) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x + timestep[:, None, None]
        for block, down in zip(self.blocks, self.downs, strict=True):
            qkv, out, up = block.children()
            h = F.layer_norm(x, (16,))
            q, k, v = qkv(h).chunk(3, -1)
            x = x + out(F.scaled_dot_product_attention(q, k, v)) + down(F.gelu(up(h)))
        return x


class FeedFirst(nn.Module):
    """Blocks that feed forward and then attend twice; ``bare``: the first of them has no feed-forward."""

    bare = False

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(3))
        self.qkvs = nn.ModuleList(nn.Linear(16, 48) for _ in range(6))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.stem(x + timestep[:, None, None])
        for i, mlp in enumerate(self.mlps):
            x = x if self.bare and not i else x + mlp(F.layer_norm(x, (16,)))
            for qkv in (self.qkvs[2 * i], self.qkvs[2 * i + 1]):
                q, k, v = qkv(F.layer_norm(x, (16,))).chunk(3, -1)
                x = x + F.scaled_dot_product_attention(q, k, v)
        return x

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return x


class AttendLast(FeedFirst):
    """The last block lacks what it would feed forward by."""

    bare = True


class Stemmed(AttendLast):
    """The same behind a residual stem, which feeds forward too."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.wide(x)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.scaled_dot_product_attention(*self.qkv(F.layer_norm(x, (16,))).chunk(3, -1))


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.convs[0](F.layer_norm(x, (16,)).transpose(1, 2)))
        return x + self.convs[1](h).transpose(1, 2)


class Listed(nn.Module):
    """A list of modules, one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x + timestep[:, None, None]
        for layer in self.layers:
            x = layer(x)
        return x


def parts(*kinds: type[nn.Module]) -> list[nn.Module]:
    return [kind() for kind in kinds]


class Reattending(nn.Module):
    """Blocks that attend again to what they attended to, before all of it is added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(16, n) for n in (48, 48, 16, 32)) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x + timestep[:, None, None]
        for block, down in zip(self.blocks, self.downs, strict=True):
            qkv, again, out, up = block.children()
            a = F.scaled_dot_product_attention(*qkv(F.layer_norm(x, (16,))).chunk(3, -1))
            x = x + out(a + F.scaled_dot_product_attention(*again(a).chunk(3, -1)))
            x = x + down(F.gelu(up(F.layer_norm(x, (16,)))))
        return x


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


def test_the_result_of_a_shared_body_is_laid_out_as_its_readers_were_traced_for():
    """Two bodies, each shared by two blocks whose inputs lie otherwise in memory, one after the other."""
    b = Builder()
    x, y = b.input("x", "latent", 2, 8, 4), b.input("y", "latent", 2, 4, 8)
    turned = [b(aten.permute.default, v, [0, 2, 1]) for v in (x, b(aten.exp.default, x))]
    first = [b(aten.relu.default, v, region=f"blocks.{i}") for i, v in enumerate((turned[0], y))]
    second = [b(aten.tanh.default, v, region=f"blocks.{i + 2}") for i, v in enumerate((first[0], turned[1]))]
    flat = b(aten.view.default, b(aten.permute.default, first[0], [0, 2, 1]), [2, 32])
    program = b.program(*first, *second, flat)
    regions = [Region("model", "model", ""), Region("stage.0", "stage", "model", 0)]
    regions += [Region(f"blocks.{i}", "block", "stage.0", 0) for i in range(4)]
    after = outline(program.replace(regions=tuple(regions)), "test")
    verify(after)
    assert len(after.functions) == 3
    inputs = random_inputs(program)
    for a, c in zip(run_program(program, inputs)[0], run_program(after, inputs)[0], strict=True):
        assert torch.equal(a, c)


# -- modules of a block, in all their spellings ------------------------------------------------------------------------


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


def add(b, x, y):
    return b(aten.add.Tensor, x, y)


def mul(b, x, y):
    return b(aten.mul.Tensor, x, y)


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


# -- binding times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "want"),
    [
        (lambda b, x, t, c: b(aten.zeros_like.default, x), Binding.CONSTANT),
        (lambda b, x, t, c: b(aten.full_like.default, x, 2.0), Binding.CONSTANT),
        (lambda b, x, t, c: add(b, c, b(aten.ones_like.default, x)), Binding.PROMPT),
        (lambda b, x, t, c: b(aten.expand_as.default, t, x), Binding.TIMESTEP),
        (lambda b, x, t, c: b(aten.type_as.default, t, x), Binding.TIMESTEP),
        (lambda b, x, t, c: b(aten.expand_as.default, add(b, t, c), x), Binding.TIMESTEP | Binding.PROMPT),
        (lambda b, x, t, c: b(aten.new_zeros.default, x, [2, 8]), Binding.CONSTANT),
        # the same value read for its content too
        (lambda b, x, t, c: b(aten.expand_as.default, x, x), Binding.LATENT),
        (lambda b, x, t, c: b(aten.type_as.default, x, x), Binding.LATENT),
        (lambda b, x, t, c: b(aten.type_as.default, x, t), Binding.LATENT),
        (lambda b, x, t, c: add(b, mul(b, x, 0.0), c), Binding.LATENT | Binding.PROMPT),
    ],
)
def test_an_operator_that_reads_only_a_type_does_not_depend_on_the_value(write, want):
    b = Builder()
    x, t, c = b.input("x", "latent", 2, 8), b.input("t", "timestep", 2, 1), b.input("c", "prompt", 2, 8)
    program = b.program(write(b, x, t, c))
    assert bind(program)[program.step.results[0]] == want


def test_the_time_embedding_of_wan_is_not_tainted_by_the_prompt():
    """``type_as`` there reads the dtype of the text (CAPTURE, point 23)."""
    program = captured("wan")[1].program
    binding = bind(program)
    model, _ = captured("wan")
    weight = model.condition_embedder.time_proj.weight
    (node,) = [p for p in program.step.placeholders if program.params.get(formal(p).ref) is weight]
    (product,) = node.users
    assert binding[product] == Binding.TIMESTEP


def test_bindings_of_body_nodes_join_over_their_calls():
    program = PassManager("outline_blocks").run(tiny_dit())[-1].program
    binding = bind(program)
    body = program.functions["block0"]
    by_result = {binding[r] for r in body.results}
    assert by_result == {Binding.LATENT | Binding.TIMESTEP | Binding.PROMPT}
    free = [n for n in body.graph.nodes if n.op == "call_function" and not binding[n] & Binding.LATENT]
    assert len([n for n in free if n.target is aten.linear.default]) == 2


# -- cost --------------------------------------------------------------------------------------------------------------


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
