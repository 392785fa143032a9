"""The streams of blocks: which results continue which formals, their token axes, ranges and grids."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from ditopt.capture import bind as bind_call
from ditopt.capture import capture
from ditopt.errors import VerifyError
from ditopt.explanation import stream_text
from ditopt.ir.axes import follow, source
from ditopt.ir.dims import Atom, Dim
from ditopt.ir.example import Builder
from ditopt.ir.program import Program, Stream
from ditopt.ir.text import parse_program, print_program
from ditopt.ir.verify import verify
from ditopt.pipeline import PassManager
from tests.tiny_models import ZOO, Plain, noise, optimized

aten = torch.ops.aten


def told(program: Program) -> list[list[str]]:
    """What is said of the streams, for each run of blocks with the same ones."""
    runs: list[list[str]] = []
    for region in program.regions:
        texts = [stream_text(s) for s in region.streams]
        if texts and texts not in runs:
            runs.append(texts)
    return runs


def outlined(model: nn.Module, **inputs: Any) -> Program:
    spec, tensors = bind_call(model, (), inputs)
    return PassManager("outline_blocks").run(capture(model, spec, tensors).program)[-1].program


IMAGE = "latent: 16 tokens (4 x 4), axis 1"
PACKED = "latent: 16 tokens, axis 1, grid unknown"
STREAMS = {
    "dit": [[IMAGE]],
    "sd3": [[IMAGE, "prompt: 6 tokens, axis 1"], [IMAGE]],
    "flux": [
        [PACKED, "prompt: 6 tokens, axis 1"],
        ["prompt: 6 tokens, axis 1", "latent: 16 tokens from 6 on, axis 1, grid unknown"],
    ],
    "wan": [["latent: 8 tokens (2 x 2 x 2), axis 1"]],
    "pixart": [[IMAGE]],
    "plain": [["latent: 16 tokens (4 x 4), axis 1"]],
    "joint": [["latent: 9 tokens, axis 1, grid unknown", "prompt: 6 tokens, axis 1"]],
}


@pytest.mark.parametrize("name", list(ZOO))
def test_streams_of_the_tiny_models(name):
    program = optimized(name, "outline_blocks")
    assert sorted(told(program)) == sorted(STREAMS[name])
    for block in program.blocks():
        body = program.functions[block.function]
        for s in block.streams:
            (start,) = [p.meta["val"] for p in body.placeholders if p.meta["formal"].ref == s.formal]
            end = body.results[s.result].meta["val"]
            assert start.shape == end.shape, "the residual goes in and comes out alike"
            assert s.start + s.tokens <= math.prod(start.shape[a] for a in s.axes)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_streams_print_and_parse(name):
    program = optimized(name, "outline_blocks")
    text = print_program(program)
    assert text.count("Stream(") >= len(program.blocks())
    assert parse_program(text, program.params) == program


class Volume(Plain):
    """Patches cut by view and permute; tokens go back to their grid, (B, H, W, C), between blocks."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.patches = nn.Linear(16, self.width)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = t[:, None].expand(-1, self.width) * 1e-3 + self.label(y)
        rows, _, h, w = x.shape
        x = x.view(rows, 4, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(rows, h // 2, w // 2, 16)
        x = self.patches(x)
        for block in self.blocks:
            x = x + (block(x.flatten(1, 2), c) - x.flatten(1, 2)).view(x.shape)
        return self.head(x.flatten(1, 2))


class Columns(Plain):
    """Each row of tokens attends by itself: only columns are mixed, whatever axis they are."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = (t[:, None].expand(-1, self.width) * 1e-3 + self.label(y))[:1]
        x = self.patch(x).permute(3, 0, 2, 1)  # W, B, H, C
        w, rows, h, _ = x.shape
        for block in self.blocks:
            tokens = x.reshape(w, rows * h, -1).transpose(0, 1)
            x = block(tokens, c).transpose(0, 1).reshape(x.shape)
        return self.head(x)


class Joined(Plain):
    """Tokens of the prompt and registers before those of the image, in one tensor through all blocks."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.registers = nn.Parameter(torch.randn(1, 3, self.width))

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        c = t[:, None].expand(-1, self.width) * 1e-3
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.registers.expand(len(x), -1, -1), prompt, x], 1)
        for block in self.blocks:
            x = block(x, c)
        return self.head(x[:, -6:])


FOREIGN: dict[str, tuple[type[Plain], dict[str, torch.Tensor], list[str]]] = {
    "columns": (Columns, {}, ["latent: 3 tokens, axis 1, grid unknown"]),
    "joined": (
        Joined,
        {"prompt": torch.randn(2, 5, 32)},
        ["prompt: 5 tokens from 3 on, axis 1", "latent: 6 tokens (2 x 3) from 8 on, axis 1"],
    ),
    "volume": (Volume, {}, ["latent: 6 tokens (2 x 3), axis 1"]),
}


@pytest.mark.parametrize("name", list(FOREIGN))
def test_token_axes_follow_the_attention(name):
    build, more, want = FOREIGN[name]
    rest = more or {"y": torch.tensor([1, 2])}
    x, t = torch.randn(2, 4, 4, 6), torch.tensor([3.0, 500.0])
    program = outlined(noise(build() if name != "columns" else build(depth=2)), x=x, t=t, **rest)
    assert len(program.blocks()) == 2
    assert told(program) == [want]


# -- axes --------------------------------------------------------------------------------------------------------------


def shown(dims: tuple[Dim, ...]) -> list[str]:
    """``3:4,4:5`` for a dimension of 4 x 5 positions along the axes 3 and 4."""
    return [",".join(map(atom_text, filter(lambda a: a.axes, d.atoms))) + f"@{d.start}" * bool(d.start) for d in dims]


def atom_text(atom: Atom) -> str:
    return f"{'+'.join(map(str, sorted(atom.axes)))}:{atom.size}"


@pytest.mark.parametrize(
    ("write", "want"),
    [
        (lambda b, x: b(aten.flatten.using_ints, x, 2), ["0:2", "1:3", "2:4,3:5"]),
        (lambda b, x: b(aten.permute.default, x, [3, 0, 2, 1]), ["3:5", "0:2", "2:4", "1:3"]),
        (lambda b, x: b(aten.transpose.int, x, 1, -1), ["0:2", "3:5", "2:4", "1:3"]),
        (lambda b, x: b(aten.view.default, x, [2, 3, 2, 2, 5]), ["0:2", "1:3", "2:2", "2:2", "3:5"]),
        (lambda b, x: b(aten.view.default, x, [2, 3, 5, 4]), []),  # 4 x 5 positions cut otherwise: no axis any more
        (lambda b, x: b(aten.slice.Tensor, x, 2, 1, 3), ["0:2", "1:3", "2:2", "3:5"]),
        (lambda b, x: b(aten.select.int, x, 1, 0), ["0:2", "2:4", "3:5"]),
        (lambda b, x: b(aten.unsqueeze.default, x, 1), ["0:2", "", "1:3", "2:4", "3:5"]),
        (lambda b, x: b(aten.cat.default, [b.param("p", 2, 3, 6, 5), x], 2), ["0:2", "1:3", "2:4@6", "3:5"]),
        (lambda b, x: b(aten.stack.default, [x, x], -1), ["0:2", "1:3", "2:4", "3:5", ""]),
        (lambda b, x: b(aten.mean.dim, x, [1], True), ["0:2", "1:1", "2:4", "3:5"]),
        (lambda b, x: b(aten.mean.dim, x, [1]), []),
        (lambda b, x: b(aten.linear.default, x, b.param("w", 7, 5)), ["0:2", "1:3", "2:4", ""]),
        (lambda b, x: b(aten.matmul.default, x, b.param("w", 5, 7)), ["0:2", "1:3", "2:4", ""]),
        (lambda b, x: b(aten.mul.Tensor, b.param("w", 6, 1, 1, 1, 1), x), ["", "0:2", "1:3", "2:4", "3:5"]),
        (lambda b, x: b(aten.conv2d.default, x, b.param("w", 7, 3, 2, 5), None, [2, 5]), ["0:2", "", "2:2", "3:1"]),
        (lambda b, x: b(aten.zeros_like.default, x), []),
    ],
)
def test_axes_are_followed_through_an_operator(write, want):
    b = Builder()
    x = b.input("x", "latent", 2, 3, 4, 5)
    program = b.program(write(b, x))
    known = follow(program, program.step, {program.step.placeholders[0]: source((2, 3, 4, 5))})
    assert shown(known.get(program.step.results[0], ())) == want


def test_a_range_of_joined_tokens_is_found_again():
    b = Builder()
    x, y = b.input("x", "latent", 2, 4, 8), b.input("y", "prompt", 2, 3, 8)
    joined = b(aten.cat.default, [y, x], 1)
    parts = [b(aten.slice.Tensor, joined, 1, *at) for at in ((3, 7), (0, 3), (2, 5))]
    program = b.program(*parts)
    known = follow(program, program.step, {program.step.placeholders[0]: source((2, 4, 8))})
    found = [shown(known.get(r, ())) for r in program.step.results]
    assert found == [["0:2", "1:4", "2:8"], [], ["0:2", "1:2@1", "2:8"]]


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formal": "nobody"}, "block0 has no parameter of this name"),
        ({"result": 2}, "block0 has no result 2; it has 2"),
        ({"axes": (3,)}, "axes [3] are no axes of [2, 16, 16]"),
        ({"axes": ()}, "axes [] are no axes"),
        ({"start": 1}, "tokens 1 to 17 are not among the 16"),
        ({"grid": (3, 5)}, "a grid of 3 x 5 does not hold 16 tokens"),
    ],
)
def test_a_stream_that_does_not_fit_its_block_is_refused(change, message):
    program = optimized("sd3", "outline_blocks")
    block = program.blocks()[0]
    stream = block.streams[0]
    assert isinstance(stream, Stream)
    broken = dataclasses.replace(block, streams=(dataclasses.replace(stream, **change),))
    regions = tuple(broken if r is block else r for r in program.regions)
    with pytest.raises(VerifyError) as error:
        verify(program.replace(regions=regions))
    assert f"region 'blocks.0', stream '{change.get('formal', stream.formal)}': " in str(error.value)
    assert message in str(error.value)
