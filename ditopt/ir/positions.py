"""The grid of tokens that come packed: read off the positions that come with the call.

A pipeline may pack a latent into tokens before it calls the model; no axis of the latent is a row or a column then, and
what tells one token's place are the positions beside it: ids (row, column) of each token, or the rotary table made of
them. Such an input is followed to the queries and keys of an attention. Where its rows meet the tokens of a stream, one
row for each token, and hold the positions of a grid one after the other (ir/raster.py), the stream lies on this grid.

That the rows meet is read off the graph, the grid off the values of an example. So what uses it has to say so
(``Program.relies``), and is no longer valid for inputs that hold other positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ditopt._torch import is_fake
from ditopt.ir.axes import follow, source
from ditopt.ir.binding import bind
from ditopt.ir.dims import Atom, Dim, Known
from ditopt.ir.placed import Followed
from ditopt.ir.program import Program, Raster, Region, Stream, call_args, formal
from ditopt.ir.raster import enumerated
from ditopt.ir.sites import row_operands

aten = torch.ops.aten

_STIRS = {
    aten.flip.default: 1,
    aten.roll.default: 2,
    aten.index_select.default: 1,
    aten.gather.default: 1,
    aten.sort.default: 1,
    aten.index.Tensor: None,
}
"""Operators that may put rows in another order along an axis, and the number of the argument that says which."""

_Key = tuple[str, str]
"""The id of a block and the formal of a stream in it."""


def with_grids(program: Program, given: Mapping[str, Tensor]) -> Program:
    """``program`` with the grid of each stream of the latent that only positions among the inputs ``given`` (by name)
    show. Where two inputs show two grids there is none."""
    blocks = {r.id: r for r in program.regions if r.function in program.functions and any(map(_open, r.streams))}
    found: dict[_Key, dict[tuple[int, ...], Raster]] = {}
    search = _Search(program, blocks) if blocks else None
    for node in program.step.placeholders if search else ():
        what = formal(node)
        values = given.get(what.ref) if what.kind == "input" else None
        if search is None or values is None or values.ndim < 2 or is_fake(values) or values.device.type == "meta":
            continue
        for key, raster in search.places(node, values):
            found.setdefault(key, {}).setdefault(raster.grid, raster)
    rasters = {key: next(iter(by_grid.values())) for key, by_grid in found.items() if len(by_grid) == 1}
    regions = [
        dataclasses.replace(r, streams=tuple(_on(s, rasters.get((r.id, s.formal))) for s in r.streams))
        for r in program.regions
    ]
    return program.replace(regions=tuple(regions)) if rasters else program


def with_rasters(streams: tuple[Stream, ...], before: Sequence[Stream]) -> tuple[Stream, ...]:
    """``streams`` of a block with the grids that positions showed of the same ones ``before``."""

    def same(a: Stream, b: Stream) -> bool:
        return (a.made_of, a.start, a.tokens) == (b.made_of, b.start, b.tokens)

    out = []
    for s in streams:
        known = {b.raster for b in before if same(s, b)}
        out.append(_on(s, known.pop()) if len(known) == 1 else s)
    return tuple(out)


def _open(stream: Stream) -> bool:
    return stream.made_of == "latent" and not stream.grid


def _on(stream: Stream, raster: Raster | None) -> Stream:
    if raster is None or not _open(stream):
        return stream
    return dataclasses.replace(stream, grid=raster.grid, raster=raster)


class _Search:
    """Where the rows of inputs meet tokens: blocks by id, whose bodies are looked at once."""

    def __init__(self, program: Program, blocks: Mapping[str, Region]) -> None:
        self._program = program
        self._calls = [(n, blocks[r]) for n in program.calls() if (r := str(n.meta["region"])) in blocks]
        binding = bind(program)
        bodies = {r.function: program.functions[r.function] for r in blocks.values()}
        self._operands = {name: row_operands(body, binding) for name, body in bodies.items()}
        self._followed: dict[tuple[str, tuple[Stream, ...]], Followed] = {}

    def places(self, node: fx.Node, values: Tensor) -> Iterator[tuple[_Key, Raster]]:
        """The streams whose tokens have one row each of the input ``node``, and the grid that the rows of ``values``
        enumerate."""
        program = self._program
        reached = _in_order(follow(program, program.step, {node: source(values.shape)}))
        seen: dict[object, list[tuple[str, Raster]]] = {}
        for call, block in self._calls:
            given = tuple(reached.get(a, ()) for a in call_args(call))
            if not any(given):
                continue
            key = block.function, given, block.streams
            if key not in seen:
                body = program.functions[block.function]
                start = {p: d for p, d in zip(body.placeholders, given, strict=True) if d}
                seen[key] = list(self._inside(block, _in_order(follow(program, body, start)), formal(node).ref, values))
            yield from (((block.id, name), raster) for name, raster in seen[key])

    def _inside(self, block: Region, known: Known, name: str, values: Tensor) -> Iterator[tuple[str, Raster]]:
        at = block.function, block.streams
        if at not in self._followed:
            self._followed[at] = Followed(self._program, self._program.functions[block.function], block)
        asked: dict[tuple[int, int, int], tuple[int, ...]] = {}
        for stream in filter(_open, block.streams):
            for operand in self._operands[block.function]:
                rows = self._rows(self._followed[at], stream, operand, known, values)
                if rows is None:
                    continue
                if rows not in asked:
                    asked[rows] = _grid(values, *rows)
                if asked[rows]:
                    yield stream.formal, Raster(name, rows[0], rows[1], asked[rows])

    def _rows(
        self, followed: Followed, stream: Stream, operand: fx.Node, known: Known, values: Tensor
    ) -> tuple[int, int, int] | None:
        """Axis, first row and number of rows of ``values`` that meet the tokens of a stream in an operand."""
        dims, tokens = known.get(operand), followed.of(stream, operand)
        if not isinstance(dims, tuple) or len(dims) < 2 or isinstance(tokens, str):
            return None
        atoms = [a for a in dims[-2].atoms if a.size > 1]
        if len(atoms) != 1 or len(atoms[0].axes) != 1:
            return None
        (axis,) = atoms[0].axes
        first, whole = tokens.start - dims[-2].start, int(values.shape[axis])
        if atoms[0].size != whole or not 0 <= first <= whole - tokens.length:  # a part of the rows: which, is not known
            return None
        return axis, first, tokens.length


def _in_order(known: Known) -> Known:
    """What is known without the axes along which rows have come in another order on the way."""
    lost: dict[fx.Node, frozenset[int]] = {}
    for node in known:  # in the order of the graph
        axes = frozenset().union(_stirred(node, known), *(lost.get(a, ()) for a in node.all_input_nodes))
        if axes:
            lost[node] = axes
    return {n: _without(d, lost[n]) if n in lost else d for n, d in known.items()}


def _without(dims: Any, axes: frozenset[int]) -> Any:
    if isinstance(dims, Dim):
        return Dim(dims.size, tuple(Atom(a.size, a.axes - axes) for a in dims.atoms), dims.start)
    return tuple(_without(d, axes) for d in dims)


def _stirred(node: fx.Node, known: Known) -> frozenset[int]:
    """The axes along which an operator may put rows in another order."""
    args: Any = node.args
    dims = known.get(args[0]) if args and isinstance(args[0], fx.Node) else None
    if node.target not in _STIRS or not isinstance(dims, tuple):
        return frozenset()
    which = _STIRS[node.target]
    if which is None:
        moved = [i for i, index in enumerate(args[1]) if index is not None]
    else:
        told: Any = args[which] if len(args) > which else node.kwargs.get("dim", ())
        moved = [told] if isinstance(told, int) else list(told)
    return frozenset().union(*(dims[i].axes for i in moved or range(len(dims))))


def _grid(values: Tensor, axis: int, start: int, length: int) -> tuple[int, ...]:
    rows = values.detach().narrow(axis, start, length).movedim(axis, 0).reshape(length, -1).cpu()
    return enumerated(torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows)
