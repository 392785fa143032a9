"""The attention of each block, for display and for passes that choose by it: who attends to whom, and on what scale.

A site is *self* attention where queries and keys are the tokens of one stream, *joint* where they are those of several,
*cross* where the keys come from another stream or from outside of the block (ir/streams.py). Where a video model
attends along some axes of its grid at a time, its self attention is *temporal* along the frames, and *spatial* inside
them: the keys run along these axes of the latent and no others (ir/factored.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ditopt.ir.attention import Operand, Refused
from ditopt.ir.axes import follow, source
from ditopt.ir.binding import Binding, bind, data_operands
from ditopt.ir.dims import Dim, Known
from ditopt.ir.factored import Along, Factors
from ditopt.ir.linear import find_linear
from ditopt.ir.mixing import VARIES
from ditopt.ir.program import Function, Program, Region, Stream, formal
from ditopt.ir.residual import MOVES
from ditopt.ir.softmax import find_softmax
from ditopt.ops import attention, block_sparse_attention, linear_attention

Kind = Literal["self", "joint", "cross", "temporal", "spatial"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention: ``heads`` (0 where the graph does not show them), how many queries attend to how many keys, and
    how the model writes it ("sdpa", "explicit", "linear"), or "block-sparse"."""

    kind: Kind
    heads: int
    queries: int
    keys: int
    masked: bool
    causal: bool
    spelling: str


def attention_sites(program: Program) -> dict[str, tuple[AttentionSite, ...]]:
    """The attention of each block by the id of its region, in trace order, and under "" that outside of blocks."""
    return {id: tuple(site for site, _ in found) for id, found in _located(program).items()}


def attention_kinds(program: Program) -> dict[str, dict[fx.Node, Kind]]:
    """For each block, by the id of its region: what attention each operator of its body is a part of."""
    return {id: {n: site.kind for site, nodes in found for n in nodes} for id, found in _located(program).items() if id}


def key_operands(function: Function, binding: Mapping[fx.Node, Binding]) -> list[tuple[fx.Node, fx.Node]]:
    """Queries and keys of each attention of a function."""
    return [(r.query.node, r.key.node) for r in _find(function, binding)]


def row_operands(function: Function, binding: Mapping[fx.Node, Binding]) -> list[fx.Node]:
    """Queries and keys of the attention of a function that are (*batch, rows, channels), as most are."""
    both = [x for r in _find(function, binding) for x in (r.query, r.key)]
    return [x.node for x in both if x.order[-2:] == (len(x.order) - 2, len(x.order) - 1)]


def _located(program: Program) -> dict[str, tuple[tuple[AttentionSite, frozenset[fx.Node]], ...]]:
    binding = bind(program)
    raw = {name: list(_find(program.functions[name], binding)) for name in {program.entry, *_bodies(program)}}
    blocks = [r for r in program.regions if r.role in ("block", "aux") and r.function in raw]
    factors = Factors(program)
    along: dict[str, list[Along]] = {r.id: factors.of(r.id, [x.key for x in raw[r.function]]) for r in blocks}
    along[""] = factors.of("", [x.key for x in raw[program.entry]])
    held: dict[tuple[str, tuple[Stream, ...]], list[_Tokens]] = {}
    out: dict[str, tuple[tuple[AttentionSite, frozenset[fx.Node]], ...]] = {}
    for r in blocks:
        here = raw[r.function]
        if (r.function, r.streams) not in held:
            held[r.function, r.streams] = _streams(program, program.functions[r.function], r) if here else []
        out[r.id] = _sites(here, held[r.function, r.streams], along[r.id], factors)
    if raw[program.entry]:
        out[""] = _sites(raw[program.entry], _inputs(program), along[""], factors)
    return out


def _bodies(program: Program) -> set[str]:
    return {r.function for r in program.regions if r.role in ("block", "aux") and r.function in program.functions}


def _sites(
    raw: Sequence[_Raw], held: Sequence[_Tokens], along: Sequence[Along], factors: Factors
) -> tuple[tuple[AttentionSite, frozenset[fx.Node]], ...]:
    out = []
    for r, axes in zip(raw, along, strict=True):
        kind: Kind = _kind(r, held)
        kind = factors.kind(axes) or kind if kind == "self" else kind
        queries, keys = r.query.shape()[-2], r.key.shape()[-2]
        out.append((AttentionSite(kind, _heads(r.query), queries, keys, r.masked, r.causal, r.spelling), r.nodes))
    return tuple(out)


@dataclass(frozen=True)
class _Raw:
    query: Operand
    key: Operand
    masked: bool
    causal: bool
    spelling: str
    nodes: frozenset[fx.Node]


def _find(function: Function, binding: Mapping[fx.Node, Binding]) -> Iterator[_Raw]:
    found = {f.output: f for _, f in (*find_softmax(function), *find_linear(function)) if not isinstance(f, Refused)}
    for node in function.graph.nodes:
        if node in found:
            f = found[node]
            if f.plain or all(binding[x.node] & VARIES for x in (f.key, f.value)):
                yield _Raw(f.query, f.key, bool(f.masks), f.is_causal, f.spelling, frozenset(f.inside))
        elif node.target in (attention, linear_attention):
            query, key = (Operand(a, tuple(range(a.meta["val"].ndim))) for a in node.args[:2])
            args = [*node.args, *(None,) * 8]
            soft = node.target is attention
            spelling = "linear" if not soft else "explicit" if args[7] not in (None, "sdpa") else "sdpa"
            yield _Raw(query, key, soft and args[3] is not None, soft and bool(args[5]), spelling, frozenset({node}))
        elif node.target is block_sparse_attention:
            query, key = (Operand(a, tuple(range(a.meta["val"].ndim))) for a in node.args[:2])
            yield _Raw(query, key, [*node.args, None, None][5] is not None, False, "block-sparse", frozenset({node}))


@dataclass(frozen=True)
class _Tokens:
    """A placeholder that holds the tokens of ``streams`` streams along ``axes``; what it reaches, with its axes there
    where they are known."""

    streams: int
    count: int
    axes: frozenset[int]
    known: Known
    below: frozenset[fx.Node]


def _streams(program: Program, body: Function, region: Region) -> list[_Tokens]:
    at = {formal(p).ref: p for p in body.placeholders}
    axes = {s.formal: frozenset(s.axes) for s in region.streams}
    found = [_tokens(program, body, at[n], a, sum(s.formal == n for s in region.streams)) for n, a in axes.items()]
    told = [sum(s.tokens for s in region.streams if s.formal == n) for n in axes]
    # tokens beside those of the streams that are known are of another one
    return [dataclasses.replace(t, streams=t.streams + (n < t.count)) for t, n in zip(found, told, strict=True)]


def _inputs(program: Program) -> list[_Tokens]:
    roles = {i.name: i.role for i in program.inputs}
    found = [p for p in program.step.placeholders if formal(p).kind == "input"]
    held = [p for p in found if roles[formal(p).ref] in ("latent", "prompt")]
    return [_tokens(program, program.step, p, frozenset(range(1, p.meta["val"].ndim)), 1) for p in held]


def _tokens(program: Program, function: Function, node: fx.Node, axes: frozenset[int], streams: int) -> _Tokens:
    shape = node.meta["val"].shape
    below, todo = {node}, [node]
    while todo:
        fresh = [u for u in todo.pop().users if u not in below]
        below.update(fresh)
        todo += fresh
    known = follow(program, function, {node: source(shape)})
    return _Tokens(streams, math.prod(int(shape[i]) for i in axes), axes, known, frozenset(below))


def _kind(raw: _Raw, held: Sequence[_Tokens]) -> Kind:
    asking, asked = _of(raw.query, held), _of(raw.key, held)
    if not {*asking} & {*asked}:
        return "cross"
    alone = asking == asked and len(asked) == 1 and held[asked[0]].streams == 1
    rows = _rows(raw.key, held[asked[0]])
    return "self" if alone and (rows is None or rows.whole) else "joint"


def _of(operand: Operand, held: Sequence[_Tokens]) -> list[int]:
    """Whose tokens the rows of an operand are. Where an operator hides the axes (a rotation that is spelled in an odd
    way), those from which it is computed and of which there are as many."""
    sure = [i for i, t in enumerate(held) if (dim := _rows(operand, t)) and dim.axes & t.axes]
    if sure or any(operand.node in t.known for t in held):
        return sure
    above = [i for i, t in enumerate(held) if operand.node in t.below]
    return [i for i in above if held[i].count == operand.shape()[-2]] or above


def _rows(operand: Operand, tokens: _Tokens) -> Dim | None:
    dims = tokens.known.get(operand.node)
    return dims[operand.order[-2]] if dims else None


def _heads(operand: Operand) -> int:
    """The dimension before the tokens, or where heads were merged into the batch, before that."""
    shape = operand.shape()
    if len(shape) > 3:
        return shape[-3]
    node, split = operand.node, False
    while node.target in MOVES and len(data_operands(node)) == 1:
        value = data_operands(node)[0].meta["val"]
        if not isinstance(value, torch.Tensor):
            break
        split |= value.shape[-1] != shape[-1]
        if value.ndim == 4 and value.shape[-1] == shape[-1]:
            return int(value.shape[1] if value.shape[2] == shape[-2] else value.shape[2])
        node = data_operands(node)[0]
    return 0 if split else 1
