"""Sparse attention as data: which blocks of keys each block of queries sees, and in which order tokens lie in blocks.

One ``SparseAttn`` says all that tells published systems apart. A static source gives its lists here, once, from the
grid of the tokens; a draft measures them in every step (ops/select_blocks.py). Tokens of text belong to no grid: they
see everything and are seen by everything.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Grid = tuple[int, ...]
"""Sizes of the axes along which tokens lie, rows x columns or frames x rows x columns, the last one innermost."""


@dataclass(frozen=True)
class Window:
    """Keys near the query: a box of ``size`` tokens around it, moved inside the grid at its borders. A block that the
    box of one of the queries touches is seen whole. (): the nearest blocks, ``density`` of all."""

    size: Grid = ()
    density: float = 1.0


@dataclass(frozen=True)
class SlidingTile:
    """A box of ``size`` whole tiles around the query's tile, moved inside the grid at its borders; (): the largest box,
    of the grid's own shape, that holds at most ``density`` of all."""

    size: Grid = ()
    density: float = 1.0


@dataclass(frozen=True)
class Selector:
    """ "topk": ``share`` of each row's blocks. "topp": as many as hold ``share`` of its draft. "head": ``share`` of all
    entries of a draft, over all rows. ``longest``: the most of all blocks in a list; lists are so long."""

    kind: Literal["topk", "topp", "head"] = "topk"
    share: float = 1.0
    longest: float = 1.0

    def length(self, blocks: int) -> int:
        """How long lists over so many blocks are."""
        part = self.share if self.kind == "topk" else self.longest
        return min(blocks, max(1, math.ceil(part * blocks - 1e-9)))


@dataclass(frozen=True)
class Draft:
    """Blocks chosen in every step by the attention among the averages of blocks (ops/select_blocks.py)."""

    selector: Selector


@dataclass(frozen=True)
class SparseAttn:
    """``source`` of the lists; ``block``: tokens of a block of queries and of keys; ``tile``: tokens lie in blocks tile
    by tile (() leaves them in the order of the model); ``text``: "dense", or "sparse" where the keys of cross attention
    are chosen too; ``normaliser``: the softmax runs over the keys that are listed."""

    source: Window | SlidingTile | Draft
    block: int = 64
    tile: Grid = ()
    text: Literal["dense", "sparse"] = "dense"
    normaliser: Literal["listed"] = "listed"


_ORDER = "reorder_tokens"


def order_name(grid: Grid, tile: Grid) -> str:
    """The name of the constant by which reorder_tokens puts the tokens of a grid in tiles."""
    return f"{_ORDER}.{show_grid(grid)}.{show_grid(tile)}"


def reordered(params: Iterable[str]) -> dict[Grid, Grid]:
    """The tiles in which the tokens of each grid lie in the blocks of a program with these constants."""
    found = {}
    for name in params:
        word, _, rest = name.partition(".")
        if word == _ORDER and "." in rest:
            grid, tile = map(read_grid, rest.split(".")[:2])
            found[grid] = tile
    return found


def read_grid(text: str) -> Grid:
    """``8x8`` as (8, 8); ValueError where it is no such text."""
    sizes = tuple(int(word) for word in text.split("x")) if text else ()
    if any(s < 1 for s in sizes):
        raise ValueError(text)
    return sizes


def show_grid(grid: Sequence[int]) -> str:
    """(8, 8) as ``8x8``."""
    return "x".join(map(str, grid))


def misfit(told: Grid, found: Collection[Grid]) -> str:
    """Why tokens that lie on ``found`` (one size where only their number is known) are not those of a grid ``told``."""
    there = " or ".join(
        f"{math.prod(grid)} tokens" + (f", {show_grid(grid)}" if len(grid) > 1 else "") for grid in sorted(found)
    )
    return (
        f"grid={show_grid(told)} is of {math.prod(told)} tokens, and there are {there}; leave grid out where the graph "
        "shows it"
    )


@functools.cache
def tile_of(grid: Grid, tokens: int) -> Grid | None:
    """The tile of so many tokens that divides the grid and is most like a cube; None where there is none."""
    divisors = [[d for d in range(1, size + 1) if size % d == 0] for size in grid]
    fits = [t for t in itertools.product(*divisors) if math.prod(t) == tokens]
    return min(fits, key=lambda t: (max(t) / min(t), t), default=None)


def divides(tile: Sequence[int], grid: Sequence[int]) -> bool:
    """Whether the grid consists of whole tiles."""
    return len(tile) == len(grid) and all(n % t == 0 for n, t in zip(grid, tile, strict=True))


def tile_order(grid: Grid, tile: Grid) -> Tensor:
    """The tokens of a grid tile by tile: places in the order of the grid, int32 (tokens,). The grid consists of whole
    tiles."""
    places = torch.arange(math.prod(grid), dtype=torch.int32)
    split = [n for size, t in zip(grid, tile, strict=True) for n in (size // t, t)]
    rank = len(grid)
    return places.view(split).permute([*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]).reshape(-1).contiguous()


def inverse(order: Tensor) -> Tensor:
    """What takes a permutation back."""
    out = torch.empty_like(order)
    out[order.long()] = torch.arange(len(order), dtype=order.dtype)
    return out


def boxed(grid: Grid, density: float) -> Grid:
    """The sizes of the largest box, about of the grid's shape, with at most ``density`` of it (one place at least)."""
    size = [max(1, int(n * density ** (1 / len(grid)))) for n in grid]
    most = density * math.prod(grid) + 1e-9
    while True:
        grown = [i for i, n in enumerate(grid) if size[i] < n and math.prod(size) // size[i] * (size[i] + 1) <= most]
        if not grown:
            return tuple(size)
        size[min(grown, key=lambda i: size[i] / grid[i])] += 1


def window_lists(queries: Grid, keys: Grid, source: Window, block: int, tile: Grid) -> Tensor:
    """What each block of queries sees, int32 (blocks of queries, k), ascending. All lists are as long as the longest:
    others are filled with the blocks next to the window."""
    (low, high), (first, last) = (_boxes(grid, block, tile) for grid in (queries, keys))
    scale = torch.tensor([b / a for a, b in zip(queries, keys, strict=True)])
    low, high = low * scale, (high + 1) * scale - 1
    between = ((first + last) - (low + high)[:, None]) / 2
    far = between.square().sum(-1)
    if source.size:
        wide = torch.tensor(source.size)
        room = torch.tensor(keys) - wide
        start = (low - wide // 2).floor().clamp(min=0).minimum(room)
        end = (high - wide // 2).ceil().clamp(min=0).minimum(room) + wide - 1
        seen = ((last >= start[:, None]) & (first <= end[:, None])).all(-1)
        length = int(seen.sum(-1).max())
        far = far.masked_fill(seen, -1)
    else:
        length = max(1, int(source.density * len(first) + 1e-9))
    return far.sort(dim=-1, stable=True).indices[:, :length].sort(dim=-1).values.int()


def _boxes(grid: Grid, block: int, tile: Grid) -> tuple[Tensor, Tensor]:
    """The least and the largest coordinates of each block, (blocks, axes)."""
    tokens = math.prod(grid)
    order = tile_order(grid, tile) if tile else torch.arange(tokens, dtype=torch.int32)
    filled = torch.cat([order, order[-1:].expand(-tokens % block)])
    at = torch.stack(torch.unravel_index(filled.long(), grid), -1).view(-1, block, len(grid)).float()
    return at.amin(1), at.amax(1)


def tile_lists(queries: Grid, keys: Grid, source: SlidingTile, block: int, tile: Grid) -> Tensor:
    """The same for a window of whole tiles; ``block`` divides a tile."""
    tiles_q, tiles_k = (tuple(n // t for n, t in zip(g, tile, strict=True)) for g in (queries, keys))
    size = tuple(map(min, source.size or boxed(tiles_k, source.density), tiles_k))
    rows = []
    for at in itertools.product(*map(range, tiles_q)):
        ranges = []
        for a, nq, nk, w in zip(at, tiles_q, tiles_k, size, strict=True):
            start = min(max(a * nk // nq - w // 2, 0), nk - w)
            ranges.append(range(start, start + w))
        rows.append([_place(c, tiles_k) for c in itertools.product(*ranges)])
    parts = math.prod(tile) // block
    lists = torch.tensor(rows, dtype=torch.int32)
    lists = (lists[:, :, None] * parts + torch.arange(parts, dtype=torch.int32)).flatten(1)
    return lists.repeat_interleave(parts, 0)


def _place(at: Sequence[int], grid: Sequence[int]) -> int:
    place = 0
    for a, n in zip(at, grid, strict=True):
        place = place * n + a
    return place
