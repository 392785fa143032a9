"""Who chooses the tokens of a partial step of an edit (HetCache, arXiv 2603.24260).

A step that computes all of them leaves an order of the tokens: those that the mask has generated, then the margin
around them, then the context by rank in its cluster. Context is clustered by what the run of blocks gave for it; in a
cluster the first is the token that attends most to generated ones, in the last block. A partial step takes the first of
that order, so that its number of tokens is fixed and the set is the request's.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ditopt.ir.clusters import clusters, item, ranking
from ditopt.ir.edit import moved
from ditopt.ir.edit_mask import CONTEXT, GENERATION, classes, find_mask
from ditopt.ir.outline import clone_body
from ditopt.ir.program import Formal, Rule, call_args, callee, is_call
from ditopt.ir.short import Mixes
from ditopt.ir.tokens import Choosing, stream_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Editing:
    """``mask``: where the mask of the edit is (ir/edit_mask.py). ``margin``: of the band around it, in tokens.
    ``context``: the share of each cluster of the context that a partial step needs. ``clusters``, ``iterations``: of
    K-means. ``ema``: the weight of what earlier full steps attended to; 0 ranks by the newest."""

    mask: str
    margin: int
    context: float
    clusters: int
    iterations: int
    ema: float


class Edited:
    """See the module docstring, and ``Chooses``."""

    def __init__(self, options: Editing, work: Choosing, start: fx.Node) -> None:
        self.work, self.o, e = work, options, work.e
        self.stream = work.stream
        self.mask = find_mask(work.before, options.mask, work.stream, work.entry)
        rows, tokens = work.set.rows, work.set.tokens
        with e.mode:
            order = torch.empty((rows, tokens), dtype=torch.int64, device=start.meta["val"].device)
            need = torch.empty((1,), dtype=torch.float32, device=start.meta["val"].device)
        self.order, self.need = work.reuse.slot("order", order), work.reuse.slot("need", need)
        self.first = next(n for n in e.graph.nodes if n.op != "placeholder")
        ref = self.need.meta["formal"].ref
        room = work.set.count / tokens * (1 + 1e-6)  # the need is a share in float32
        # a share is always below 2: only the room decides, until a cache brings a signal
        self.rule: Rule | None = Rule(ref, "below", 2.0, lag=True, kind="need", need=ref, room=room)

    def index(self, count: int) -> fx.Node:
        """The first ``count`` tokens of the order that the last full step left."""
        e, at = self.work.e, self.first
        taken = moved(e, aten.slice.Tensor, self.order, 1, 0, count, at=at)
        return e.op(operator.getitem, e.op(aten.sort.default, taken, -1, at=at), 0, at=at)

    def finish(self, old: fx.Node, output: fx.Node, met: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        """Order the tokens anew where all of them were computed."""
        work, e, o = self.work, self.work.e, self.o
        rows, tokens = work.set.rows, work.set.tokens
        call = [n for n in e.graph.nodes if is_call(n) and n.meta["region"] == work.blocks[-1]][-1]
        kind = classes(e, self.mask, self.stream, rows, o.margin, call)
        worth, features = self._attended(call, kind)
        if o.ema:
            with e.mode:
                empty = torch.empty_like(worth.meta["val"])
            past = work.reuse.slot("attended", empty)
            worth = e.op(aten.add.Tensor, e.op(aten.mul.Tensor, past, o.ema), e.op(aten.mul.Tensor, worth, 1 - o.ema))
            work.reuse.update(past, worth, "computed")
        context = self._number(e.op(aten.eq.Scalar, kind, CONTEXT))
        found = clusters(e, features, context, min(o.clusters, tokens), o.iterations)
        order, rank = ranking(e, found, worth)
        kind = e.op(aten.gather.default, kind, 1, order)
        # generation -2, margin -1, context from 0 on
        ahead = e.op(aten.add.Tensor, e.op(aten.sub.Tensor, kind, CONTEXT), rank)
        best = item(e, e.op(aten.sort.default, self._distinct(ahead), -1), 1)
        work.reuse.update(self.order, e.op(aten.gather.default, order, 1, best), "computed")
        wanted = e.op(aten.sum.dim_IntList, self._number(e.op(aten.lt.Scalar, ahead, o.context)), [-1])
        most = e.op(aten.div.Tensor, e.op(aten.amax.default, wanted, [0], True), float(tokens))
        work.reuse.update(self.need, most, "computed")

    def _distinct(self, ahead: fx.Node) -> fx.Node:
        """Whole numbers in the order of ``ahead``, and where that is the same in the order in which they stand: sorting
        has no order of its own to break ties by."""
        e, tokens = self.work.e, self.work.set.tokens
        fine = e.op(aten._to_copy.default, e.op(aten.mul.Tensor, ahead, float(2**24)), dtype=torch.int64)
        place = e.op(aten.arange.start, 0, tokens, dtype=torch.int64, device=ahead.meta["val"].device)
        return e.op(aten.add.Tensor, e.op(aten.mul.Tensor, fine, tokens), place)

    def _number(self, truth: fx.Node) -> fx.Node:
        return self.work.e.op(aten._to_copy.default, truth, dtype=torch.float32)

    def _attended(self, call: fx.Node, kind: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Of each token the share of its attention in the last block that goes to generated ones, the mean over heads:
        float32 (rows, tokens); and what the block gives for it, float32 (rows, tokens, channels).

        The attention of a value that is 1 at generated tokens and 0 elsewhere is that share: no matrix of tokens by
        tokens is made.
        """
        work, e = self.work, self.work.e
        rows, tokens, block = work.set.rows, work.set.tokens, str(call.meta["region"])
        attended = work.attended[callee(call)]
        if not attended:
            raise Mixes(f"{block}: no attention of the tokens to each other ranks the context")
        node, query, key = attended[-1]
        body = work.functions[callee(call)]
        with clone_body(body, f"{body.name}_attended", work.origin) as b:
            with b.mode:
                like = torch.empty((rows, tokens), dtype=torch.float32, device=kind.meta["val"].device)
            ones = b.placeholder("generated", Formal("formal", "generated"), like)
            _, _, value, *rest = node.args
            shape = [int(n) for n in value.meta["val"].shape]  # type: ignore[union-attr]
            if len(shape) != 4 or shape[0] != rows or key.dim != 2 or query.dim != 2:
                raise Mixes(f"{block}: its attention does not show rows, heads and tokens")
            at, dtype = b[node].next, value.meta["val"].dtype  # type: ignore[union-attr]
            if key.size > tokens:
                behind = key.size - key.start - tokens
                ones = b.op(aten.constant_pad_nd.default, ones, [key.start, behind], 0.0, at=at)
            ones = moved(b, aten._to_copy.default, ones, dtype=dtype, at=at)
            ones = b.op(aten.reshape.default, ones, [rows, 1, key.size, 1], at=at)
            ones = b.op(aten.clone.default, b.op(aten.expand.default, ones, shape, at=at), at=at)
            rest = [b[n] if isinstance(n, fx.Node) else n for n in rest]
            named: dict[str, Any] = {k: b[v] if isinstance(v, fx.Node) else v for k, v in node.kwargs.items()}
            share = b.op(node.target, b[node.args[0]], b[node.args[1]], ones, *rest, at=at, **named)  # type: ignore[index]
            share = b.op(aten.select.int, share, -1, 0, at=at)
            share = moved(b, aten.slice.Tensor, share, 2, query.start, query.start + tokens, at=at)
            share = moved(b, aten._to_copy.default, share, dtype=torch.float32, at=at)
            share = b.op(aten.mean.dim, share, [1], at=at)
            b.set_results([*b.results, share])
        made = b.function()
        work.functions[made.name] = made
        chosen = e.op(aten.eq.Scalar, kind, GENERATION, at=call)
        generated = e.op(aten._to_copy.default, chosen, dtype=torch.float32, at=call)
        types = [*call.meta["val"], share.meta["val"]]
        results = e.call(made.name, [*call_args(call), generated], types, call.next, block)
        for user in list(call.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        stream = stream_of(work.before, block)
        value = moved(e, aten.slice.Tensor, results[stream.result], stream.axes[0], stream.start, stream.start + tokens)
        value = moved(e, aten._to_copy.default, value, dtype=torch.float32)
        return results[-1], moved(e, aten.reshape.default, value, [rows, tokens, int(value.meta["val"].shape[-1])])
