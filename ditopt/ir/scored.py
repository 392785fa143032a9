"""Who chooses the tokens of a partial step by a score of what the model predicted for them (RAS, arXiv 2502.10389).

Each step leaves a score and how often in a row each token was left out; the next partial step takes the tokens of the
lowest, after the share of them that has the highest (``Scoring``).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ditopt.ir.program import Rule
from ditopt.ir.score import Scoring, score
from ditopt.ir.short import Place
from ditopt.ir.tokens import Choosing
from ditopt.ops import select

aten = torch.ops.aten


class Scored:
    """See the module docstring, and ``Chooses``."""

    rule: Rule | None = None

    def __init__(self, scoring: Scoring, work: Choosing, start: fx.Node) -> None:
        self.work, self.scoring, e, o = work, scoring, work.e, scoring
        rows, tokens = work.set.rows, work.set.tokens
        with e.mode:
            empty = torch.empty((rows, tokens), dtype=torch.float32, device=start.meta["val"].device)
        self.scores = work.reuse.slot("score", empty)
        self.skips = work.reuse.slot("skips", empty)
        where: dict[str, Any] = {"at": next(n for n in e.graph.nodes if n.op != "placeholder")}
        self.where = where
        worth = self.scores
        if o.starvation:
            grown = e.op(aten.exp.default, e.op(aten.mul.Tensor, self.skips, -o.starvation, **where), **where)
            worth = e.op(aten.mul.Tensor, worth, grown, **where)
        if o.share != "sample" and rows > 1:
            groups = rows // 2 if o.share == "halves" else 1
            parts = e.op(aten.view.default, worth, [rows // groups, groups, tokens], **where)
            mean = e.op(aten.mean.dim, parts, [0], True, **where)
            both = e.op(aten.expand.default, mean, [rows // groups, groups, tokens], **where)
            worth = e.op(aten.reshape.default, both, [rows, tokens], **where)
        self.worth = worth

    def index(self, count: int) -> fx.Node:
        """The positions of ``count`` tokens in each row, in their order."""
        e, where = self.work.e, self.where
        skipped = self.work.set.tokens - count
        low = skipped - int(skipped * self.scoring.high)
        lowest = e.op(aten.topk.default, self.worth, count + low, -1, False, True, **where)
        ids = e.op(operator.getitem, lowest, 1, **where)
        if low:
            ids = e.op(aten.slice.Tensor, ids, 1, low, low + count, **where)
        order = e.op(aten.sort.default, ids, -1, **where)
        return e.op(operator.getitem, order, 0, **where)

    def finish(self, old: fx.Node, output: fx.Node, met: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        """Score this step's prediction, and count whom it left out. ``old``: what computes it in the Program before."""
        work, e = self.work, self.work.e
        scores = score(e, work.short, output, met, self.scoring, work.channels(output))
        work.reuse.update(self.scores, work.held(scores, self.scores, (None, old)), "always")
        end, place = e.graph.output_node(), Place(1, 0, work.set.tokens, 0)
        grown = e.op(aten.add.Tensor, self.skips, 1.0)
        skips = work.path([s.put(grown, s.gather(self.skips, place, 2, end), place, end) for s in work.shorts], end)
        chosen = e.op(select, self.skips, skips, work.name)
        work.reuse.update(self.skips, work.held(chosen, self.skips, (None, old)), "always")
