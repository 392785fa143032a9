"""How attention operators become block-sparse ones, body by body (passes/sparse_attention.py)."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.ir.edit import Editor, fake_of, prune
from ditopt.ir.modules import name_of
from ditopt.ir.placed import Followed, Placed, by_body
from ditopt.ir.program import Formal, Function, Program, Raster, Region, TensorType, call_args, callee, formal, is_call
from ditopt.ir.regions import describe
from ditopt.ir.sparse import (
    Draft,
    Grid,
    SlidingTile,
    SparseAttn,
    Window,
    divides,
    inverse,
    reordered,
    show_grid,
    tile_lists,
    tile_of,
    tile_order,
    window_lists,
)
from ditopt.ops import attention, block_sparse_attention, linear_attention, select_blocks
from ditopt.ops.block_sparse_attention import blocks

aten = torch.ops.aten

PARAM = "sparse_attention"
"""Constants of a Program that begin so are lists of blocks and orders of tokens."""


class _Dense(Exception):
    """Attention that stays dense, with the reason."""


@dataclass
class _Body:
    """One body under edit: the constants that it reads, by name, as formals."""

    e: Editor
    formals: dict[str, fx.Node] = field(default_factory=dict)


@dataclass(frozen=True)
class _Side:
    """The queries or the keys of one attention: where the tokens are, how they are cut, and what puts them in order."""

    at: Placed
    tile: Grid
    order: Tensor | None

    def count(self, block: int) -> int:
        return blocks(self.at.total, self.at.ends, block)


def _span(ids: Sequence[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1].rpartition('.')[2]}"


class Sparsify:
    """Works on ``program``; ``auto``: the grid chooses the tile; ``grid``: of tokens whose grid the graph does not
    show; ``kind``: of the attention that is rewritten ("": any). ``refused`` and ``notes`` are for the Outcome;
    ``grids`` are those on which tokens of the latent were found to lie."""

    def __init__(self, program: Program, attn: SparseAttn, auto: bool, grid: Grid, origin: str, kind: str = "") -> None:
        self.program = program
        self.refused: list[str] = []
        self.notes: list[str] = []
        self.grids: set[Grid] = set()
        self._attn, self._auto, self._grid, self._origin = attn, auto, grid, origin
        self._kind = kind
        self._params: dict[str, Tensor] = {}
        self._tiles = reordered(program.params)
        self._rasters: list[Raster | None] = []

    def apply(self, ids: Collection[str] | None) -> int:
        """Rewrite the attention of these blocks (None: of all); how many operators, counted once a block."""
        applied = 0
        remembered = {
            callee(n) for m in self.program.memos for n in self.program.functions[m.function].graph.nodes if is_call(n)
        }
        changed: dict[str, tuple[Function, list[str]]] = {}
        chosen: dict[str, list[Region]] = {}
        for body, regions in by_body(self.program).items():
            wanted = [r for r in regions if ids is None or r.id in ids]
            if not wanted:
                continue
            span = _span([r.id for r in wanted])
            if body in remembered or len({r.streams for r in wanted}) > 1:
                self.refused.append(f"attention of {span} stays dense: its blocks run on different tokens")
                continue
            name = body if len(wanted) == len(regions) else self._fresh(body, changed)
            function, refs, count = self._rewrite(self.program.functions[body], wanted[0], span)
            if count:
                changed[name], chosen[name] = (dataclasses.replace(function, name=name), refs), wanted
                applied += count * len(wanted)
        if applied:
            self._parts(ids)
            self._commit(changed, chosen)
        return applied

    def _parts(self, ids: Collection[str] | None) -> None:
        """Say what is not rewritten: blocks once more, on chosen tokens (passes/select_tokens.py)."""
        found = [r.parent for r in self.program.regions if r.role == "part" and (ids is None or r.parent in ids)]
        if found:
            self.refused.append(
                f"attention of {_span(found)} stays dense on steps that compute part of the tokens: lists are of "
                "blocks of neighbours, and the tokens of such a step are chosen one by one"
            )

    def _fresh(self, body: str, taken: Collection[str]) -> str:
        name = f"{body}_sparse"
        while name in self.program.functions or name in taken:
            name += "_"
        return name

    def _rewrite(self, body: Function, region: Region, span: str) -> tuple[Function, list[str], int]:
        """The new body, the constants that its last formals are, and how many operators were rewritten."""
        sites = [n for n in body.graph.nodes if n.target in (attention, linear_attention)]
        sites = [n for n in sites if not self._kind or name_of(n) == f"attn.{self._kind}"]
        if not sites:
            return body, [], 0
        followed = Followed(self.program, body, region)
        count = 0
        with Editor(body, self._origin) as e:
            work = _Body(e)
            for node in sites:
                args: Any = node.args
                sizes = " x ".join(str(a.meta["val"].shape[-2]) for a in args[:2])
                where = f"attention of {sizes} tokens in {span}"
                try:
                    if node.target is linear_attention:
                        raise _Dense("it is linear, and has no scores to leave out")
                    said = self._site(work, node, followed)
                except _Dense as why:
                    self.refused.append(f"{where} stays dense: {why}")
                    continue
                self.notes.append(f"{where}: {said}")
                count += 1
            e.drop_dead(formals=False)
        return (e.function() if count else body), list(work.formals), count

    # -- one attention -------------------------------------------------------------------------------------------------

    def _site(self, work: _Body, node: fx.Node, followed: Followed) -> str:
        """Rewrite one attention; what it keeps, in words."""
        names = ("query", "key", "value", "mask", "scale", "is_causal", "enable_gqa")
        given: dict[str, Any] = dict.fromkeys(names) | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if given["is_causal"]:
            raise _Dense("it is causal")
        mask, rows = given["mask"], [int(given[n].meta["val"].shape[-2]) for n in ("query", "key")]
        if mask is not None and (mask.meta["val"].ndim < 2 or mask.meta["val"].shape[-2] != 1):
            raise _Dense("its mask differs from query to query, which no list of whole blocks can follow")
        q = self._side(given["query"], followed, "queries")
        k = self._side(given["key"], followed, "keys", also=isinstance(self._attn.source, Draft))
        block = self._attn.block
        lists, length = self._lists(q, k)
        there = k.count(block)
        if length >= there:
            raise _Dense(
                f"nothing would be left out, for lists would hold all {there} block{'s' if there > 1 else ''} of "
                f"{block} keys"
            )
        e, at = work.e, work.e[node]

        def op(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            made = e.op(target, *args, at=at, region=str(at.meta["region"]), **kwargs)
            made.meta["path"] = at.meta.get("path", "")
            return made

        self._rasters += [q.at.raster, k.at.raster]
        query = e[given["query"]]
        key, value = (self._like(op, e[given[n]], query, bool(given["enable_gqa"])) for n in ("key", "value"))
        seen = None if mask is None else e[mask]
        if seen is not None and int(seen.meta["val"].shape[-1]) != rows[1]:
            seen = op(aten.expand.default, seen, [*seen.meta["val"].shape[:-1], rows[1]])
        if q.order is not None:
            query = op(aten.index_select.default, query, query.meta["val"].ndim - 2, self._order(work, q))
        if k.order is not None:
            turn = self._order(work, k)
            key, value = (op(aten.index_select.default, x, x.meta["val"].ndim - 2, turn) for x in (key, value))
            if seen is not None:
                seen = op(aten.index_select.default, seen, seen.meta["val"].ndim - 1, turn)
        count: fx.Node | None = None
        if lists is not None:
            index = self._operand(work, "index", lists)
        else:
            index, count = self._draft(op, query, key, q, k, length, given["scale"])
        more = [count, seen, given["scale"], block, block, list(q.at.ends), list(k.at.ends)]
        out = op(block_sparse_attention, query, key, value, index, *more)
        if q.order is not None:
            out = op(aten.index_select.default, out, out.meta["val"].ndim - 2, self._order(work, q, back=True))
        out = self._as(op, out, node)
        e.replace(at, out)
        tiles = f" in tiles of {show_grid(q.tile)}" if q.tile else ""
        return f"each block of {block} queries{tiles} keeps {'' if count is None else 'at most '}{length} of {there}"

    def _side(self, operand: fx.Node, followed: Followed, what: str, also: bool = False) -> _Side:
        at = followed.rows(operand)
        source = self._attn.source
        if not isinstance(at, Placed):
            if at:
                raise _Dense(at)
            if not (also and self._attn.text == "sparse" and what == "keys"):
                raise _Dense(f"its {what} are no tokens of the latent, and text is never left out")
            rows = int(operand.meta["val"].shape[-2])
            return _Side(Placed(rows, 0, rows, ()), (), None)
        if (not at.grid or at.raster) and math.prod(self._grid) == at.length:
            at = dataclasses.replace(at, grid=self._grid, raster=None)
        self.grids.add(at.grid or (at.length,))
        if not at.grid and (not isinstance(source, Draft) or self._attn.tile):
            raise _Dense(
                f"no grid was found for the {at.length} tokens of its {what}; where the graph does not show it, give "
                "grid=ROWSxCOLUMNS"
            )
        tile = self._tile(at)
        placed = at.grid in self._tiles
        if not tile or placed:
            return _Side(at, tile, None)
        head, tail = at.ends
        order = tile_order(at.grid, tile) + head
        ends = torch.arange(head, dtype=torch.int32), torch.arange(at.total - tail, at.total, dtype=torch.int32)
        return _Side(at, tile, torch.cat([ends[0], order, ends[1]]))

    def _tile(self, at: Placed) -> Grid:
        """In which tiles the tokens are to lie."""
        wanted, block = self._attn.tile, self._attn.block
        there = self._tiles.get(at.grid)
        if there is not None:
            if wanted and wanted != there:
                raise _Dense(
                    f"its tokens lie in tiles of {show_grid(there)} (reorder_tokens), not of {show_grid(wanted)}"
                )
            return there
        if not at.grid:
            return ()
        if self._auto:
            tile = tile_of(at.grid, block)
            if tile is None:
                raise _Dense(f"its grid {show_grid(at.grid)} has no tiles of {block} tokens; choose block or tile")
            return tile
        if wanted and not divides(wanted, at.grid):
            raise _Dense(f"its grid {show_grid(at.grid)} does not consist of tiles of {show_grid(wanted)}")
        return wanted

    def _lists(self, q: _Side, k: _Side) -> tuple[Tensor | None, int]:
        """The lists, where they are known beforehand, and how long they are."""
        source, block = self._attn.source, self._attn.block
        if isinstance(source, Draft):
            return None, source.selector.length(k.count(block))
        grids = q.at.grid, k.at.grid
        if len(grids[0]) != len(grids[1]):
            raise _Dense(f"its queries lie on a grid {show_grid(grids[0])} and its keys on {show_grid(grids[1])}")
        if source.size and len(source.size) != len(grids[0]):
            raise _Dense(f"its grid {show_grid(grids[0])} has another number of axes than the window")
        if isinstance(source, Window):
            source = dataclasses.replace(source, size=tuple(map(min, source.size, grids[1])))
            lists = window_lists(*grids, source, block, q.tile)
        else:
            assert isinstance(source, SlidingTile)
            lists = tile_lists(*grids, source, block, q.tile)
        return lists, lists.shape[-1]

    def _draft(
        self, op: Any, query: fx.Node, key: fx.Node, q: _Side, k: _Side, length: int, scale: float | None
    ) -> tuple[fx.Node, fx.Node | None]:
        assert isinstance(self._attn.source, Draft)
        kind, block = self._attn.source.selector, self._attn.block
        args = [length, block, block, list(q.at.ends), list(k.at.ends), kind.kind, kind.share, scale]
        found = op(select_blocks, query, key, *args)
        index, count = (op(operator.getitem, found, i) for i in (0, 1))
        return index, None if kind.kind == "topk" else count

    def _like(self, op: Any, x: fx.Node, query: fx.Node, gqa: bool) -> fx.Node:
        """Keys or values with the batch and the type of the queries."""
        batch, own = list(query.meta["val"].shape[:-2]), list(x.meta["val"].shape)
        if gqa and own[-3] != batch[-1]:
            x = op(aten.repeat_interleave.self_int, x, batch[-1] // own[-3], len(own) - 3)
            own = list(x.meta["val"].shape)
        if own[:-2] != batch:
            try:
                x = op(aten.expand.default, x, [*batch, *own[-2:]])
            except RuntimeError:
                raise _Dense("its queries are broadcast over batches of keys") from None
        dtype = query.meta["val"].dtype
        return x if x.meta["val"].dtype is dtype else op(aten._to_copy.default, x, dtype=dtype)

    def _as(self, op: Any, out: fx.Node, node: fx.Node) -> fx.Node:
        """``out`` in the type and the memory layout of what it replaces."""
        value = node.meta["val"]
        if out.meta["val"].dtype is not value.dtype:
            out = op(aten._to_copy.default, out, dtype=value.dtype)
        if TensorType.of(out.meta["val"]) == TensorType.of(value):
            return out
        order = sorted(range(value.ndim), key=lambda d: (-value.stride(d), d))
        back = [order.index(d) for d in range(value.ndim)]
        out = op(aten.clone.default, op(aten.permute.default, out, order), memory_format=torch.contiguous_format)
        out = op(aten.permute.default, out, back)
        if TensorType.of(out.meta["val"]) != TensorType.of(value):
            raise _Dense("its result has gaps in memory")
        return out

    # -- constants -----------------------------------------------------------------------------------------------------

    def _order(self, work: _Body, side: _Side, back: bool = False) -> fx.Node:
        assert side.order is not None
        return self._operand(work, "back" if back else "order", inverse(side.order) if back else side.order)

    def _operand(self, work: _Body, kind: str, content: Tensor) -> fx.Node:
        """A constant as a formal of the body."""
        known = {**self.program.params, **self._params}
        mine = [n for n in known if n.startswith(f"{PARAM}.{kind}.")]
        ref = next((n for n in mine if torch.equal(known[n].cpu(), content)), f"{PARAM}.{kind}.{len(mine)}")
        like = [n.meta["val"] for n in work.e.graph.nodes if n.op == "placeholder"]
        device = like[0].device
        self._params.setdefault(ref, known.get(ref, content.to(device)))
        if ref not in work.formals:
            value = fake_of(TensorType.of(content), like, device)
            name = ref.replace(".", "_")
            work.formals[ref] = work.e.placeholder(name, Formal("formal", name), value)
        return work.formals[ref]

    # -- the program ---------------------------------------------------------------------------------------------------

    def _commit(self, changed: dict[str, tuple[Function, list[str]]], chosen: dict[str, list[Region]]) -> None:
        program = self.program
        by_region = {r.id: name for name, regions in chosen.items() for r in regions}
        with Editor(program.step, self._origin) as e:
            actuals = {formal(p).ref: p for p in e.graph.find_nodes(op="placeholder") if formal(p).kind == "param"}
            like = [p.meta["val"] for p in e.graph.find_nodes(op="placeholder")]
            for ref in dict.fromkeys(r for _, refs in changed.values() for r in refs):
                if ref not in actuals:
                    content = self._params[ref]
                    value = fake_of(TensorType.of(content), like, content.device)
                    actuals[ref] = e.placeholder(ref.replace(".", "_"), Formal("param", ref), value)
            for call in list(program.calls()):
                name = by_region.get(str(call.meta["region"]))
                if name is None:
                    continue
                at = e[call]
                args = [*call_args(at), *(actuals[r] for r in changed[name][1])]
                outs = e.call(name, args, at.meta["val"], at, str(at.meta["region"]))
                for old in list(at.users):
                    item: Any = old.args[1]
                    e.replace(old, outs[item])
            e.drop_dead(formals=False)
        functions = {**program.functions, **{n: f for n, (f, _) in changed.items()}, program.entry: e.function()}
        program = program.relying(self._rasters)
        self.program = describe(prune(program.replace(functions=functions, params={**program.params, **self._params})))
