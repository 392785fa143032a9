"""Where the tokens of the latent are among the queries and keys of an attention, and on which grid they lie.

Read off the axes (ir/dims.py): the formal of a block that holds a stream of the latent (ir/streams.py) is followed to
the rows of the operand. All other rows (text, reference images) belong to no grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from ditopt.ir.axes import follow, source
from ditopt.ir.dims import Dim, Known
from ditopt.ir.program import Function, Program, Raster, Region, Stream, formal


@dataclass(frozen=True)
class Placed:
    """``length`` of ``total`` rows, from ``start`` on, are the tokens of ``grid`` in its order; () where none was
    found. ``raster``: the positions that show it, None where the graph does."""

    total: int
    start: int
    length: int
    grid: tuple[int, ...]
    raster: Raster | None = None

    @property
    def ends(self) -> tuple[int, int]:
        """How many rows are before and behind them."""
        return self.start, self.total - self.start - self.length


class Followed:
    """The streams of the latent in one block body."""

    def __init__(self, program: Program, body: Function, region: Region) -> None:
        at = {formal(p).ref: p for p in body.placeholders}
        self._streams = [s for s in region.streams if s.made_of == "latent" and s.formal in at]
        self._formals = {s.formal: at[s.formal] for s in self._streams}
        self._held = {s.formal: sum(o.formal == s.formal for o in region.streams) for s in self._streams}
        self._known: dict[str, Known] = {
            name: follow(program, body, {p: source(p.meta["val"].shape)}) for name, p in self._formals.items()
        }
        self._below = {name: _below(p) for name, p in self._formals.items()}

    def rows(self, operand: fx.Node) -> Placed | str:
        """The tokens of the latent in an operand (*batch, rows, channels): the longest stream of it; "" where there is
        none, else what cannot be told."""
        found = [p for s in self._streams if (p := self.of(s, operand))]
        if not found and not any(operand in known for known in self._known.values()):
            found += self._hidden(operand)
        placed = [p for p in found if isinstance(p, Placed)]
        return max(placed, key=lambda p: p.length) if placed else next(iter(found), "")

    def of(self, stream: Stream, operand: fx.Node) -> Placed | str:
        """The tokens of one stream of the latent in an operand, as ``rows`` tells them."""
        dims = self._known[stream.formal].get(operand)
        if not (isinstance(dims, tuple) and len(dims) > 1 and dims[-2].axes & set(stream.axes)):
            return ""
        return self._place(stream, dims[-2])

    def _place(self, stream: Stream, dim: Dim) -> Placed | str:
        shape = self._formals[stream.formal].meta["val"].shape
        whole = math.prod(int(shape[a]) for a in stream.axes)
        axes = [a for atom in dim.atoms if atom.size > 1 for a in sorted(atom.axes)]
        if len(set(axes)) < len(axes) or axes != sorted(axes) or dim.length not in (whole, stream.tokens):
            return "its tokens are cut or regrouped before it"
        if dim.length == whole:
            return Placed(dim.size, dim.start + stream.start, stream.tokens, stream.grid, stream.raster)
        if whole == 2 * stream.tokens:
            return "its tokens are a half of a joint stream, and the graph does not show which"
        return Placed(dim.size, dim.start, stream.tokens, stream.grid, stream.raster)

    def _hidden(self, operand: fx.Node) -> Iterable[Placed]:
        """Where an operator hides the axes (a rotation that is spelled in an odd way): what is computed from one formal
        alone, with as many rows as it has tokens, has them in its order."""
        rows = int(operand.meta["val"].shape[-2])
        for stream in self._streams:
            shape = self._formals[stream.formal].meta["val"].shape
            if operand in self._below[stream.formal] and math.prod(int(shape[a]) for a in stream.axes) == rows:
                yield Placed(rows, stream.start, stream.tokens, stream.grid, stream.raster)


def _below(node: fx.Node) -> frozenset[fx.Node]:
    below, todo = {node}, [node]
    while todo:
        fresh = [u for u in todo.pop().users if u not in below]
        below.update(fresh)
        todo += fresh
    return frozenset(below)


def by_body(program: Program) -> Mapping[str, list[Region]]:
    """The blocks that call each body."""
    out: dict[str, list[Region]] = {}
    for region in program.regions:
        if region.role in ("block", "aux") and region.function in program.functions:
            out.setdefault(region.function, []).append(region)
    return out
