"""The mask of an edit, an input of the model, on the grid of its tokens: which tokens are generated anew.

A mask is an input of its own, or some channels of another one: inpainting models join it to the latent. It lies on
pixels, with whole pixels to a token, or on tokens. Which of its dimensions run along the tokens is read off the graph;
where nothing of it enters them, it is taken for (rows, [channels,] [frames,] height, width), or (rows, tokens[,
channels]).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from ditopt.errors import RecipeError
from ditopt.ir.axes import follow, source
from ditopt.ir.dims import Dims
from ditopt.ir.edit import Editor, moved
from ditopt.ir.program import Program, Stream, formal
from ditopt.ir.short import Mixes

aten = torch.ops.aten

_Op = Callable[..., fx.Node]

GENERATION, MARGIN, CONTEXT = 0.0, 1.0, 2.0
"""Classes of tokens."""

_HOW = (
    "say where it is: mask=NAME for an input of its own, or mask=NAME:FIRST:STOP for channels of an input, as in "
    "mask=hidden_states:4:5"
)


@dataclass(frozen=True)
class Mask:
    """``node``: the input's placeholder in the step. ``channels``: the dimension of its channels, -1 for none, of which
    those from ``first`` to ``stop`` count; ``spatial``: its dimensions of pixels, () where it lies on tokens."""

    node: fx.Node
    channels: int
    first: int
    stop: int
    spatial: tuple[int, ...]


def find_mask(program: Program, text: str, stream: Stream, entry: fx.Node | None = None) -> Mask:
    """The mask that ``text`` names; with "" the one input that is called a mask and fits the grid of ``stream``, whose
    tokens enter the first block in the node ``entry`` of the step.
    RecipeError where the name is none or its channels are not there; ``Mixes`` where nothing is found or fits."""
    inputs = {formal(p).ref: p for p in program.step.placeholders if formal(p).kind == "input"}
    listed = ", ".join(f"{name} {list(p.meta['val'].shape)}" for name, p in inputs.items())
    if not text:
        named = [n for n in inputs if _called(n) and _fits(program, inputs[n], stream, entry) is not None]
        if len(named) != 1:
            found = f"{' and '.join(named)} could each be" if named else "no input of this model is called"
            raise Mixes(f"{found} the mask of the edit; {_HOW} (tensor inputs: {listed})")
        text = named[0]
    name, *numbers = text.split(":")
    if name not in inputs:
        raise RecipeError(f"mask={text}: {name!r} is no tensor input of this model; there are {listed}")
    if len(numbers) > 2 or not all(n.isdigit() for n in numbers):
        raise RecipeError(f"mask={text}: expected NAME, NAME:CHANNEL or NAME:FIRST:STOP, as in hidden_states:4:5")
    shape = list(inputs[name].meta["val"].shape)
    fits = _fits(program, inputs[name], stream, entry)
    if fits is None:
        grid = " x ".join(map(str, stream.grid)) or f"unknown, of {stream.tokens}"
        raise Mixes(
            f"mask={text}: {shape} does not lie on the grid of tokens, which is {grid}; expected (rows, [channels,] "
            "pixels) with whole pixels to a token, or (rows, tokens[, channels])"
        )
    channels, spatial = fits
    count = shape[channels] if channels >= 0 else 0
    first = int(numbers[0]) if numbers else 0
    stop = int(numbers[1]) if len(numbers) > 1 else first + 1 if numbers else count
    if numbers and not 0 <= first < stop <= count:
        raise RecipeError(f"mask={text}: {name} {shape} has {count} channels; expected 0 <= FIRST < STOP <= {count}")
    return Mask(inputs[name], channels, first, stop, spatial)


def _called(name: str) -> bool:
    """Whether an input of this name may be the mask of an edit: other masks say what attention may read."""
    word = name.lower()
    return bool(re.search(r"(^|[._])masks?$", word)) and not re.search(r"attention|attn|pad|key|text|prompt", word)


def _fits(program: Program, node: fx.Node, stream: Stream, entry: fx.Node | None) -> tuple[int, tuple[int, ...]] | None:
    """The dimension of channels (-1: none) and those of pixels (none where the mask lies on tokens); None where the
    value has no such form."""
    shape = [int(n) for n in node.meta["val"].shape]
    rank, g = len(shape), len(stream.grid)
    if along := _along(program, node, stream, entry):
        rest = [i for i in range(1, rank) if i not in along]
        if along[0] == 0 or len(rest) > 1 or along != sorted(along):
            return None
        sizes = [shape[i] for i in along]
        if sizes == [stream.tokens]:
            return (rest[0] if rest else -1), ()
        if len(sizes) != g or any(n % k and n != 1 for n, k in zip(sizes, stream.grid, strict=True)):
            return None
        return (rest[0] if rest else -1), tuple(along)
    if rank in (2, 3) and shape[1] == stream.tokens:
        return (2 if rank == 3 else -1), ()
    if not g or not g < rank <= g + 2:
        return None
    if any(n % k and n != 1 for n, k in zip(shape[-g:], stream.grid, strict=True)):
        return None
    return (1 if rank == g + 2 else -1), tuple(range(rank - g, rank))


def _along(program: Program, node: fx.Node, stream: Stream, entry: fx.Node | None) -> list[int]:
    """The dimensions of an input that run along the tokens of ``stream``, in their order there; none where the graph
    does not show them."""
    if entry is None:
        return []
    known = follow(program, program.step, {node: source([int(n) for n in node.meta["val"].shape])})
    dims: Dims = known.get(entry, ())
    return list(dict.fromkeys(i for atom in dims[stream.axes[0]].atoms for i in sorted(atom.axes))) if dims else []


def classes(e: Editor, mask: Mask, stream: Stream, rows: int, margin: int, at: fx.Node) -> fx.Node:
    """The class of each token, float32 (rows, tokens), in nodes before ``at``.

    GENERATION: a token one of whose pixels is masked, which is where the mean of its channels is above 0.5. MARGIN:
    other tokens of the same frame whose distance to one of them is at most ``margin`` tokens. CONTEXT: the rest.
    """

    op: _Op = functools.partial(e.op, at=at)
    move: _Op = functools.partial(moved, e, at=at)
    value = move(aten._to_copy.default, e[mask.node], dtype=torch.float32)
    if mask.channels >= 0:
        value = move(aten.slice.Tensor, value, mask.channels, mask.first, mask.stop)
        value = op(aten.mean.dim, value, [mask.channels])
    value = op(aten._to_copy.default, op(aten.gt.Scalar, value, 0.5), dtype=torch.float32)
    shape = [int(n) for n in value.meta["val"].shape]
    if mask.spatial:
        parts = [[k, n // k] if n % k == 0 else [1, 1] for n, k in zip(shape[1:], stream.grid, strict=True)]
        value = op(aten.reshape.default, value, [shape[0], *(n for pair in parts for n in pair)])
        value = op(aten.amax.default, value, [2 * i + 2 for i in range(len(parts))])
        value = move(aten.expand.default, value, [shape[0], *stream.grid])
    if shape[0] not in (1, rows):
        raise Mixes(f"the mask is for {shape[0]} samples, and tokens are chosen for {rows}")
    whole = stream.grid if mask.spatial else (stream.tokens,)
    generated = move(aten.reshape.default, move(aten.expand.default, value, [rows, *whole]), [rows, stream.tokens])
    other = op(aten.add.Tensor, op(aten.mul.Tensor, generated, -1.0), 1.0)
    if not margin:
        return op(aten.mul.Tensor, other, CONTEXT)
    near = op(aten.mul.Tensor, _near(op, generated, stream, rows, margin), MARGIN - CONTEXT)
    return op(aten.mul.Tensor, other, op(aten.add.Tensor, near, CONTEXT))


def _near(op: _Op, generated: fx.Node, stream: Stream, rows: int, margin: int) -> fx.Node:
    """1 where a token of the frame within ``margin`` is generated, else 0."""
    if not stream.grid:
        raise Mixes("the grid of the tokens is not known, so no margin around the edit can be drawn; give margin=0")
    height, width = stream.grid[-2:]
    frames = math.prod(stream.grid[:-2])
    device = generated.meta["val"].device
    line = op(aten.arange.start, -margin, margin + 1, dtype=torch.float32, device=device)
    square = op(aten.mul.Tensor, line, line)
    round_ = op(aten.add.Tensor, op(aten.unsqueeze.default, square, 1), square)
    disk = op(aten._to_copy.default, op(aten.le.Scalar, round_, float(margin * margin)), dtype=torch.float32)
    side = 2 * margin + 1
    image = op(aten.reshape.default, generated, [rows * frames, 1, height, width])
    kernel = op(aten.reshape.default, disk, [1, 1, side, side])
    spread = op(aten.conv2d.default, image, kernel, None, [1, 1], [margin, margin])
    near = op(aten._to_copy.default, op(aten.gt.Scalar, spread, 0.5), dtype=torch.float32)
    return op(aten.reshape.default, near, [rows, stream.tokens])
