"""The attention of each block, for display and for passes that choose by it: who attends to whom, and on what scale.

A site is *self* attention where queries and keys are the tokens of one stream, *joint* where they are those of several,
*cross* where the keys come from another stream or from outside of the block (ir/streams.py).
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
from ditopt.ir.linear import find_linear
from ditopt.ir.mixing import VARIES
from ditopt.ir.program import Function, Program, Region, Stream, formal
from ditopt.ir.residual import MOVES
from ditopt.ir.softmax import find_softmax
from ditopt.ops import attention, block_sparse_attention, linear_attention

Kind = Literal["self", "joint", "cross"]


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
    binding = bind(program)
    known: dict[tuple[str, tuple[Stream, ...]], tuple[AttentionSite, ...]] = {}
    out: dict[str, tuple[AttentionSite, ...]] = {}
    for region in program.regions:
        if region.role in ("block", "aux") and region.function in program.functions:
            body, key = program.functions[region.function], (region.function, region.streams)
            if key not in known:
                raw = list(_find(body, binding))
                held = _streams(program, body, region) if raw else []
                known[key] = tuple(_site(r, held) for r in raw)
            out[region.id] = known[key]
    raw = list(_find(program.step, binding))
    if raw:
        held = _inputs(program)
        out[""] = tuple(_site(r, held) for r in raw)
    return out


def _site(raw: _Raw, held: Sequence[_Tokens]) -> AttentionSite:
    queries, keys = raw.query.shape()[-2], raw.key.shape()[-2]
    return AttentionSite(_kind(raw, held), _heads(raw.query), queries, keys, raw.masked, raw.causal, raw.spelling)


@dataclass(frozen=True)
class _Raw:
    query: Operand
    key: Operand
    masked: bool
    causal: bool
    spelling: str


def _find(function: Function, binding: Mapping[fx.Node, Binding]) -> Iterator[_Raw]:
    found = {f.output: f for _, f in (*find_softmax(function), *find_linear(function)) if not isinstance(f, Refused)}
    for node in function.graph.nodes:
        if node in found:
            f = found[node]
            if f.plain or all(binding[x.node] & VARIES for x in (f.key, f.value)):
                yield _Raw(f.query, f.key, bool(f.masks), f.is_causal, f.spelling)
        elif node.target in (attention, linear_attention):
            query, key = (Operand(a, tuple(range(a.meta["val"].ndim))) for a in node.args[:2])
            args = [*node.args, *(None,) * 8]
            soft = node.target is attention
            spelling = "linear" if not soft else "explicit" if args[7] not in (None, "sdpa") else "sdpa"
            yield _Raw(query, key, soft and args[3] is not None, soft and bool(args[5]), spelling)
        elif node.target is block_sparse_attention:
            query, key = (Operand(a, tuple(range(a.meta["val"].ndim))) for a in node.args[:2])
            yield _Raw(query, key, [*node.args, None, None][5] is not None, False, "block-sparse")


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
