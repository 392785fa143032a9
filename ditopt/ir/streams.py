"""The streams of each block: which results continue which of its inputs, over which axes of them its attention mixes,
and on what grid their tokens lie.

Three questions, each answered by dataflow and none by position or name:

* a result *continues* the formal from which a chain of residual sums, moves and norms leads to it;
* the *token axes* of a formal are those over which the attention of the block sums (ir/axes.py), or where nothing sums
  over them, those along which it has queries;
* what a stream is *made of*, and the *grid*: each input of the model that is a latent or a prompt is followed to the
  block. The tokens it fills are rows times columns where its own axes are found in them in that order. Two inputs that
  share one axis (text and image, joined before the block) are two streams with a range of tokens each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ditopt.ir.axes import contracted, follow, rows, source
from ditopt.ir.binding import Binding, data_operands
from ditopt.ir.dims import Atom, Dim, Dims, Known
from ditopt.ir.mixing import VARIES
from ditopt.ir.program import Function, MadeOf, Program, Stream, call_args, callee, formal
from ditopt.ir.reach import Reach
from ditopt.ir.residual import MOVES, find_branches

aten = torch.ops.aten


_Found = tuple[MadeOf, Known]
"""The role of an input, and all that it reaches."""


@dataclass(frozen=True)
class _Tokens:
    """A formal of a body that a result continues, and its token axes."""

    formal: str
    result: int
    at: int
    axes: tuple[int, ...]


def find_streams(program: Program, binding: Mapping[fx.Node, Binding]) -> dict[str, tuple[Stream, ...]]:
    """The streams of each block, by the id of its region."""
    calls = list(program.calls())
    bodies = {name: _body(program, program.functions[name], binding) for name in {callee(n) for n in calls}}
    found: list[_Found] = []
    roles: tuple[MadeOf, ...] = ("latent", "prompt")
    for role in roles:
        for node in program.step.placeholders:
            what = formal(node)
            if what.kind == "input" and any(i.name == what.ref and i.role == role for i in program.inputs):
                found.append((role, follow(program, program.step, {node: source(node.meta["val"].shape)})))
    return {str(n.meta["region"]): _through(n, bodies[callee(n)], found) for n in calls}


def _through(call: fx.Node, formals: Sequence[_Tokens], found: Sequence[_Found]) -> tuple[Stream, ...]:
    """The streams through one call. Where a result continues two values of the same tokens (a long skip), the one that
    was computed last is the stream."""
    when = {n: i for i, n in enumerate(call.graph.nodes)}
    chosen: dict[tuple[int, int], tuple[int, int, Stream]] = {}
    for tokens in formals:
        value = call_args(call)[tokens.at]
        for stream in _ranges(tokens, value, found):
            key, new = (stream.result, stream.start), (when[value], -tokens.at, stream)
            chosen[key] = max(chosen.get(key, new), new, key=lambda c: c[:2])
    return tuple(s for *_, s in sorted(chosen.values(), key=lambda c: (-c[1], c[2].start)))


def _ranges(tokens: _Tokens, value: fx.Node, found: Iterable[_Found]) -> list[Stream]:
    """The streams in ``value``: one for each range of tokens that some input of the model fills."""
    streams: dict[int, Stream] = {}
    for role, known in found:
        dims: Dims = known.get(value, ())
        if not dims or not any(dims[i].axes for i in tokens.axes):
            continue
        start, length, grid = _layout([dims[i] for i in tokens.axes])
        stream = Stream(tokens.formal, tokens.result, tokens.axes, length, start, grid, role)
        old = streams.get(start)
        if old is None or (role == old.made_of and len(grid) > len(old.grid)):
            streams[start] = stream
    if not streams:
        length = math.prod(int(value.meta["val"].shape[i]) for i in tokens.axes)
        return [Stream(tokens.formal, tokens.result, tokens.axes, length)]
    return [streams[k] for k in sorted(streams)]


def _layout(dims: Sequence[Dim]) -> tuple[int, int, tuple[int, ...]]:
    """Where the tokens of a source begin, how many there are, and their grid (() where the graph does not show it)."""
    if len(dims) == 1:
        start, length, atoms = dims[0].start, dims[0].length, list(dims[0].atoms)
    else:
        start, length, atoms = 0, math.prod(d.size for d in dims), []
        for d in dims:
            atoms += d.atoms if d.whole and d.axes else (Atom(d.size),)
    axes = [tuple(a.axes) for a in atoms if a.size > 1]
    plain = len(axes) > 1 and all(len(a) == 1 for a in axes) and len(set(axes)) == len(axes)
    return start, length, tuple(a.size for a in atoms if a.size > 1) if plain else ()


# -- inside a body -----------------------------------------------------------------------------------------------------


def _body(program: Program, body: Function, binding: Mapping[fx.Node, Binding]) -> list[_Tokens]:
    """The formals of ``body`` that its results continue."""
    reach = Reach(body)
    branches = find_branches(body, binding, reach)
    sums = {b.sum: b.stream for b in branches}
    mixing = [n for n in reach.nodes if any(b.attention >> reach.place[n] & 1 for b in branches)]
    best: dict[fx.Node, tuple[tuple[int, int], int, tuple[int, ...]]] = {}
    labels: dict[fx.Node, tuple[Known, tuple[int, ...]]] = {}
    for k, result in enumerate(body.results[: body.n_results]):
        for start, rank in _roots(result, sums, binding).items():
            if start not in labels:
                known = follow(program, body, {start: source(start.meta["val"].shape)})
                labels[start] = known, _token_axes(mixing, known)
            known, axes = labels[start]
            if rank[0] and axes and _carries(known.get(result), axes) and (start not in best or rank > best[start][0]):
                best[start] = rank, k, axes
    place = {p: i for i, p in enumerate(body.placeholders)}
    return [_Tokens(formal(p).ref, best[p][1], place[p], best[p][2]) for p in body.placeholders if p in best]


def _token_axes(mixing: Sequence[fx.Node], known: Known) -> tuple[int, ...]:
    summed = frozenset().union(*(contracted(n, known) for n in mixing))
    return tuple(sorted(summed or frozenset().union(*(rows(n, known) for n in mixing))))


def _carries(dims: object, axes: Iterable[int]) -> bool:
    """Whether all these axes of the source run along some dimension."""
    return isinstance(dims, tuple) and set(axes) <= set().union(*(d.axes for d in dims))


def _roots(
    result: fx.Node, sums: Mapping[fx.Node, fx.Node], binding: Mapping[fx.Node, Binding]
) -> dict[fx.Node, tuple[int, int]]:
    """The formals that ``result`` continues: through how many residual sums and, less than 0, how many other layers."""
    found: dict[fx.Node, tuple[int, int]] = {}
    todo = [(result, 0, 0)]
    while todo:
        node, passed, other = todo.pop()
        if node.op == "placeholder":
            found[node] = max(found.get(node, (0, -len(binding))), (passed, -other))
        elif node in sums:
            todo.append((sums[node], passed + 1, other))
        else:
            operands = [a for a in data_operands(node) if binding[a] & VARIES]
            joins = node.target is aten.cat.default
            move = joins or node.target in MOVES
            todo += [(a, passed, other + (not move)) for a in (operands if joins else operands[:1])]
    return found
