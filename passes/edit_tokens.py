"""Run blocks on the tokens that an edit changes, and on those of the rest that matter to it.

In masked editing (inpainting, masked video to video) most of the latent is context that hardly changes. A partial step
computes the tokens that the mask of the request has generated, the band around them, and of the context a share of each
cluster: those that attend most to what is generated. The others keep their keys, values and prediction, as in
``select_tokens``, whose rewrite this is (HetCache, arXiv 2603.24260).

How many tokens a partial step computes is fixed when it is compiled (``ratio``), which of them is the request's: the
tokens stand in an order (ir/edited.py), and the first are taken. So a mask that needs fewer has more of its context
computed, never less, and one that needs more has its steps computed whole, with one warning. Several counts would
follow the mask more closely, and would cost a compiled step each.

At ``ratio=1`` all tokens are computed on every step, the neutral setting. Approximate otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ditopt.errors import RecipeError
from ditopt.ir import example
from ditopt.ir.edited import Edited, Editing
from ditopt.ir.program import Interval, Program
from ditopt.ir.short import Mixes
from ditopt.ir.tokens import Choosing, never_partial, part, run_of_blocks
from ditopt.pipeline import Context, Outcome, Pass


@dataclass(frozen=True)
class EditTokens(Pass):
    """Compute on some steps only what an edit needs.

    ``region``: the run of blocks (ir/select.py). ``mask``: the input that holds the mask, above 0.5 where the edit is:
    NAME, or NAME:FIRST:STOP for channels of an input, as in hidden_states:4:5; "" finds an input called mask
    (ir/edit_mask.py). ``margin``: how many tokens around it belong to the edit. ``context``: the share of each cluster
    of the other tokens that is needed. ``clusters``, ``iterations``: of K-means. ``ema``: the weight of earlier full
    steps in the attention that ranks a cluster. ``ratio``: the share of tokens that a partial step computes, rounded
    down to a ``multiple`` of them (at least one). ``first``, ``every``, ``last``: the steps that compute all
    (``Interval``); a ``cache`` behind this one can decide the others (its option ``partial``).
    """

    region: str = "blocks"
    mask: str = ""
    margin: int = 5
    context: float = 0.7
    clusters: int = 16
    iterations: int = 4
    ema: float = 0.0
    ratio: float = 0.8
    multiple: int = 1
    first: int = 1
    every: int = 0
    last: int = 0

    contract = "approximate"
    requires = ("outline_blocks",)
    after = ("hoist_invariants", "skip_blocks")

    def validate(self) -> None:
        if not 0 < self.ratio <= 1:
            raise RecipeError(
                f"edit_tokens{{ratio={self.ratio:g}}}: expected a share above 0 and at most 1 (all tokens)"
            )
        if not 0 <= self.context <= 1:
            raise RecipeError(f"edit_tokens{{context={self.context:g}}}: expected a share of the context from 0 to 1")
        if not 0 <= self.ema < 1:
            raise RecipeError(f"edit_tokens{{ema={self.ema:g}}}: expected a weight from 0 (none) to below 1")
        for option, least in (
            *(("margin", 0), ("clusters", 1), ("iterations", 0)),
            *(("multiple", 1), ("first", 1), ("every", 0), ("last", 0)),
        ):
            if getattr(self, option) < least:
                raise RecipeError(f"edit_tokens{{{option}={getattr(self, option)}}}: expected {least} or more")

    @classmethod
    def neutral(cls) -> EditTokens:
        return cls(ratio=1.0)

    def run(self, program: Program, context: Context) -> Outcome:
        before = [d.name for d in program.decisions if d.slots]
        if before:
            return Outcome(
                program, 0, (f"{before[0]} keeps values of all tokens already: choose tokens once, then cache",)
            )
        schedule = Interval(self.every, self.first, self.last)
        if why := never_partial(schedule, context.steps):
            return Outcome(program, 0, (why,))
        blocks = run_of_blocks(program, self.name, self.region)
        editing = Editing(self.mask, self.margin, self.context, self.clusters, self.iterations, self.ema)
        try:
            count = functools.partial(part, ratio=self.ratio, multiple=self.multiple)
            work = Choosing(program, blocks, [count], functools.partial(Edited, editing), "edit_tokens")
            made = work.program(schedule)
        except Mixes as reason:
            return Outcome(program, 0, (str(reason),))
        return Outcome(made.relying([work.stream.raster]), len(work.blocks))

    @classmethod
    def example_applies(cls) -> Program:
        from ditopt.passes.outline_blocks import OutlineBlocks

        return OutlineBlocks().run(example.grid_dit(4, 4, masked=True), Context()).program

    @classmethod
    def example_refuses(cls) -> Program:
        once = cls().run(cls.example_applies(), Context())
        return once.program.replace(applied=())
