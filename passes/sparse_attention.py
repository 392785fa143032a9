"""Attention over some of the keys: each block of queries sees a list of blocks of keys.

Attention is found by structure, in every spelling and between any streams. The lists come from the grid of the tokens
(a window around the query, or a window of tiles) and are constants of the program, or they are chosen in every step by
a draft: the attention among the averages of blocks. Text sees everything and is seen by everything. Nowhere in the
program is a tensor with a row for each query and a column for each key.

Approximate; at ``density=1`` no key is dropped, and all attention stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ditopt.errors import RecipeError
from ditopt.ir import example
from ditopt.ir.program import Program
from ditopt.ir.select import select_regions
from ditopt.ir.sparse import Draft, Grid, Selector, SlidingTile, SparseAttn, Window, misfit, read_grid
from ditopt.ir.sparsify import Sparsify
from ditopt.pipeline import Context, Outcome, Pass


@dataclass(frozen=True)
class SparseAttention(Pass):
    """Let queries see blocks of keys that are near, or that a draft chooses.

    ``region``: in which blocks. ``pattern``: "window" (``Window``), "tile" (``SlidingTile``) or "draft" (``Draft``).
    ``density``: the part of the keys that a query keeps, (0, 1]; for patterns also as ``window``, sizes such as "24x24"
    in tokens, or for "tile" in tiles. ``block``: tokens of a block, 16 or more. ``tile``: tokens lie in blocks tile by
    tile, such as "8x8" (a block is a tile or a part of one); "auto" takes the tile of ``block`` tokens that is most
    like a square, "none" the order of the model. "default" is "none" for windows, "auto" for the others; where
    ``reorder_tokens`` has put tokens in tiles, these are taken.

    ``grid``: rows and columns of the tokens, such as "64x64", where neither the graph nor positions among the inputs
    show them (a pipeline may pack latents into tokens before it calls the model).

    For drafts: ``selector`` ("topk", "topp" until ``mass`` of the draft is held, "head" over all rows of a head),
    ``longest`` (the longest list, as a part of the blocks; 0: twice the density, or half of them for "topp"),
    ``cross`` ("sparse" lets a draft choose among the text keys of cross attention too).
    """

    region: str = "blocks"
    pattern: Literal["window", "tile", "draft"] = "window"
    density: float = 0.5
    window: str = ""
    block: int = 64
    tile: str = "default"
    grid: str = ""
    selector: Literal["topk", "topp", "head"] = "topk"
    mass: float = 0.9
    longest: float = 0.0
    cross: Literal["dense", "sparse"] = "dense"

    contract = "approximate"
    requires = ("recognize_attention", "outline_blocks")
    after = (
        "hoist_invariants",
        "reorder_tokens",
        "skip_blocks",
        "select_tokens",
        "edit_tokens",
        "cache",
        "cache_guidance",
    )

    def validate(self) -> None:
        for option, value in (("density", self.density), ("mass", self.mass)):
            if not 0 < value <= 1:
                raise RecipeError(
                    f"sparse_attention{{{option}={value}}}: expected a part of the keys, above 0 and at most 1"
                )
        if not 0 <= self.longest <= 1:
            raise RecipeError(f"sparse_attention{{longest={self.longest}}}: expected a part of the blocks, 0 to 1")
        if self.block < 16:
            raise RecipeError(f"sparse_attention{{block={self.block}}}: expected 16 tokens or more")
        window = self._grid("window", self.window)
        self._grid("grid", self.grid)
        tile = self._grid("tile", self.tile) if self.tile not in ("default", "auto", "none") else ()
        if self.tile not in ("default", "auto", "none") and not tile:
            raise RecipeError("sparse_attention{tile=...}: expected sizes such as 8x8, or auto, or none")
        if tile and math.prod(tile) % self.block:
            raise RecipeError(
                f"sparse_attention{{tile={self.tile},block={self.block}}}: {math.prod(tile)} tokens of a tile are no "
                f"whole number of blocks of {self.block}; choose a block that divides the tile"
            )
        if self.pattern == "tile" and self.tile == "none":
            raise RecipeError("sparse_attention{pattern=tile,tile=none}: a window of tiles needs tiles")
        if window and self.pattern == "draft":
            raise RecipeError("sparse_attention{window=...}: a draft has no window; choose density")
        drafts = [
            o for o, v in (("selector", "topk"), ("mass", 0.9), ("longest", 0.0), ("cross", "dense"))
            if getattr(self, o) != v
        ]  # fmt: skip
        if drafts and self.pattern != "draft":
            raise RecipeError(f"sparse_attention{{{drafts[0]}=...}} says how a draft chooses: give pattern=draft too")

    def _grid(self, option: str, text: str) -> Grid:
        try:
            return read_grid(text)
        except ValueError:
            raise RecipeError(
                f"sparse_attention{{{option}={text}}}: expected sizes with x between, such as 8x8 or 4x8x8"
            ) from None

    @classmethod
    def neutral(cls) -> SparseAttention:
        return cls(density=1.0)

    @property
    def attn(self) -> SparseAttn:
        """What it asks for, as data; ``tile`` is for the grid to choose where it is "auto"."""
        source: Window | SlidingTile | Draft
        size = read_grid(self.window)
        if self.pattern == "window":
            source = Window(size, self.density)
        elif self.pattern == "tile":
            source = SlidingTile(size, self.density)
        else:
            share = self.mass if self.selector == "topp" else self.density
            most = 0.5 if self.selector == "topp" else min(1.0, 2 * self.density)
            source = Draft(Selector(self.selector, share, self.longest or most))
        own = () if self.tile in ("default", "auto", "none") else read_grid(self.tile)
        return SparseAttn(source, self.block, own, self.cross)

    @property
    def auto(self) -> bool:
        """Whether the grid chooses the tile."""
        return self.tile == "auto" or (self.tile == "default" and self.pattern != "window")

    def run(self, program: Program, context: Context) -> Outcome:
        selections = select_regions(program, self.region)
        kinds = {s.role.removeprefix("attn").removeprefix(".") for s in selections if s.ids}
        if len(kinds) > 1:
            said = f"{self.region} asks for several kinds of attention: give each a pass of its own"
            return Outcome(program, 0, (said,))
        work = Sparsify(program, self.attn, self.auto, read_grid(self.grid), self.name, kinds.pop())
        whole = any(s.kind == "model" for s in selections)
        applied = work.apply(None if whole else {b.id for s in selections for b in s.blocks})
        if (told := read_grid(self.grid)) and work.grids and told not in work.grids:
            return Outcome(program, 0, (misfit(told, work.grids),))
        nothing = ("nothing attends in the blocks that were selected",)
        refused = tuple(work.refused) or (() if applied else nothing)
        return Outcome(work.program, applied, refused, tuple(work.notes))

    @classmethod
    def example_applies(cls) -> Program:
        return _prepared(example.grid_dit())

    @classmethod
    def example_refuses(cls) -> Program:
        return _prepared(example.grid_dit(rows=8, columns=8))


def _prepared(program: Program) -> Program:
    from ditopt.passes.outline_blocks import OutlineBlocks
    from ditopt.passes.recognize_attention import RecognizeAttention

    return OutlineBlocks().run(RecognizeAttention().run(program, Context()).program, Context()).program
