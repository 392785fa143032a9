"""Tokens in the order of tiles: neighbours on the grid lie side by side in all blocks.

The stream is put in order once before the first block and back behind the last one; positions and rotations come
along. A pass that treats tokens block by block (``sparse_attention``) then needs no permutation of its own. The same
up to the order in which attention sums over keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditopt.errors import RecipeError
from ditopt.ir import example
from ditopt.ir.program import Program
from ditopt.ir.reordering import Refused, Reorder
from ditopt.ir.sparse import divides, misfit, read_grid, reordered, show_grid, tile_of
from ditopt.pipeline import Context, Outcome, Pass


@dataclass(frozen=True)
class ReorderTokens(Pass):
    """Put tokens in tiles. ``tile``: its size, such as "8x8" or "4x8x8"; "auto" takes the tile of ``block`` tokens that
    divides the grid and is most like a square. ``grid``: of the tokens, where neither the graph nor positions among the
    inputs show it."""

    tile: str = "auto"
    block: int = 64
    grid: str = ""

    contract = "approximate"
    requires = ("recognize_attention", "outline_blocks")
    after = ()

    def validate(self) -> None:
        for option, text in (("tile", "" if self.tile == "auto" else self.tile), ("grid", self.grid)):
            try:
                read_grid(text)
            except ValueError:
                raise RecipeError(
                    f"reorder_tokens{{{option}={text}}}: expected sizes with x between, such as 8x8 or 4x8x8"
                ) from None
        if self.block < 1:
            raise RecipeError(f"reorder_tokens{{block={self.block}}}: expected 1 token or more")

    @classmethod
    def neutral(cls) -> ReorderTokens:
        return cls(tile="1x1")

    def run(self, program: Program, context: Context) -> Outcome:
        def no(why: str) -> Outcome:
            return Outcome(program, 0, (why,))

        if reordered(program.params):
            return no("the tokens lie in tiles already")
        if program.decisions:
            return no("the program keeps values from step to step already; reorder tokens before caching")
        blocks = program.blocks()
        if not blocks:
            return no("there are no blocks before which tokens could be put in order")
        streams = [s for s in blocks[0].streams if s.made_of == "latent"]
        stream = max(streams, key=lambda s: s.tokens, default=None)
        if stream is None:
            return no("no stream of the latent enters the first block")
        given = read_grid(self.grid)
        told = given if given and _size(given) == stream.tokens else ()
        grid = told if told and (stream.raster or not stream.grid) else stream.grid
        if given and given != grid:
            return no(misfit(given, {grid or (stream.tokens,)}))
        if not grid:
            return no(
                f"no grid was found for the {stream.tokens} tokens; where the graph does not show it, give "
                "grid=ROWSxCOLUMNS"
            )
        tile = tile_of(grid, self.block) if self.tile == "auto" else read_grid(self.tile)
        if tile is None:
            return no(f"the grid {show_grid(grid)} has no tiles of {self.block} tokens; choose block or tile")
        if not divides(tile, grid):
            return no(f"the grid {show_grid(grid)} does not consist of tiles of {show_grid(tile)}")
        if _same(grid, tile):
            return no(f"tiles of {show_grid(tile)} leave the grid {show_grid(grid)} in its order")
        try:
            out, count = Reorder(program, grid, tile, self.name).run(blocks[0], stream.formal, stream.start)
        except Refused as why:
            return no(f"the order of the tokens means something: {why}")
        out = out if told else out.relying([stream.raster])
        return Outcome(out, count, notes=(f"{stream.tokens} tokens lie in tiles of {show_grid(tile)}",))

    @classmethod
    def example_applies(cls) -> Program:
        return _prepared(example.grid_dit())

    @classmethod
    def example_refuses(cls) -> Program:
        return _prepared(example.tiny_dit())


def _size(grid: tuple[int, ...]) -> int:
    size = 1
    for n in grid:
        size *= n
    return size


def _same(grid: tuple[int, ...], tile: tuple[int, ...]) -> bool:
    from ditopt.ir.sparse import tile_order

    order = tile_order(grid, tile)
    return bool((order[1:] > order[:-1]).all())


def _prepared(program: Program) -> Program:
    from ditopt.passes.outline_blocks import OutlineBlocks
    from ditopt.passes.recognize_attention import RecognizeAttention

    return OutlineBlocks().run(RecognizeAttention().run(program, Context()).program, Context()).program
