"""Run blocks on part of the tokens: those whose prediction the last steps left open.

Region-adaptive sampling (RAS): some steps compute all tokens; the others only a fixed number of them, chosen in each
sample by a score of what the model predicted for them last. Chosen tokens are gathered behind the embedding, with their
positions, and run through the blocks as a shorter sequence; attention reads the keys and values of the others as they
were computed last, and their prediction stays what it was, so that any sampler moves them on with it. Text is never
left out. Nothing of this is read by the host: counts are static, positions are data.

In the Program, both paths stand side by side, and ``select`` is asked once a step which of them is taken
(``Program.decisions``): "compute" is all tokens, "reuse" is part of them. At ``ratio=1`` all tokens are chosen on every
step, the neutral setting: what is computed is the same, bit for bit. Approximate otherwise.

With caches of blocks, modules or the model (passes/cache.py, which runs first) a step is full, partial or reused, and
partial and reused at once: what is kept of a region has a row for each token, a partial step writes the rows that it
computes, and a step that reuses reads those that it needs. A token that is left out stands still there too: each step
that computes counts as one of its own for a predictor of higher order, which so sees no change of such a token. The
first value of a cache is that of all tokens: such a step is not partial. Signals that a step measures behind a chosen
token are refused.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass

from ditopt.errors import RecipeError
from ditopt.ir import example
from ditopt.ir.program import Interval, Program
from ditopt.ir.score import Metric, Scoring, Share
from ditopt.ir.scored import Scored
from ditopt.ir.short import Mixes
from ditopt.ir.tokens import Choosing, never_partial, part, run_of_blocks
from ditopt.pipeline import Context, Outcome, Pass


@dataclass(frozen=True)
class SelectTokens(Pass):
    """Compute only part of the tokens on some steps.

    ``region``: the run of blocks (ir/select.py). ``ratio``: the share of tokens that a partial step computes, rounded
    down to a ``multiple`` of them (at least one). ``then``: other shares for later steps, each from a share of the
    request on, such as "0.35@40% 0.25@70%". ``first``, ``every``, ``last``, ``resets``, ``mask``: the steps that
    compute all (``Interval``). ``metric``, ``starvation``, ``high``, ``share``: how tokens are chosen (``Scoring``).
    """

    region: str = "blocks"
    ratio: float = 0.5
    then: str = ""
    multiple: int = 1
    first: int = 4
    every: int = 0
    last: int = 0
    resets: str = ""
    mask: str = ""
    metric: Metric = "std"
    starvation: float = 0.1
    high: float = 1.0
    share: Share = "sample"

    contract = "approximate"
    requires = ("outline_blocks",)
    after = ("hoist_invariants", "skip_blocks", "cache")

    def validate(self) -> None:
        if not 0 < self.ratio <= 1:
            raise RecipeError(
                f"select_tokens{{ratio={self.ratio}}}: expected a share above 0 and at most 1 (all tokens)"
            )
        for option, least in (("multiple", 1), ("first", 1), ("every", 0), ("last", 0)):
            if getattr(self, option) < least:
                raise RecipeError(f"select_tokens{{{option}={getattr(self, option)}}}: expected {least} or more")
        if not 0 <= self.high <= 1:
            raise RecipeError(f"select_tokens{{high={self.high}}}: expected a share from 0 to 1")
        if not all(re.fullmatch(r"\d+|\d+(\.\d+)?%", word) for word in self.resets.split()):
            raise RecipeError(
                f"select_tokens{{resets={self.resets}}}: expected steps such as '12 22', or shares of the request such "
                "as '40% 73%'"
            )
        self._later()
        if set(self.mask) - {"0", "1"}:
            raise RecipeError(
                f"select_tokens{{mask={self.mask}}}: expected a text of 1 (all tokens) and 0 (part of them), one a step"
            )
        if self.mask.startswith("0"):
            raise RecipeError(f"select_tokens{{mask={self.mask}}}: the first step has nothing to keep and must be 1")

    @classmethod
    def neutral(cls) -> SelectTokens:
        return cls(ratio=1.0)

    @property
    def schedule(self) -> Interval:
        """The steps that compute all tokens."""
        return Interval(self.every, self.first, self.last, self.mask, resets=self.resets)

    def _later(self) -> list[tuple[float, float]]:
        """Each further share of tokens, and the share of the request from which on it holds."""
        found = re.findall(r"(\d*\.?\d+)@(\d+(?:\.\d+)?)%", self.then)
        later = [(float(share), float(since) / 100) for share, since in found]
        rising = [0.0, *(since for _, since in later), 1.0]
        good = all(0 < share <= 1 for share, _ in later) and all(a < b for a, b in itertools.pairwise(rising))
        if len(later) != len(self.then.split()) or not good:
            raise RecipeError(
                f"select_tokens{{then={self.then}}}: expected shares of the tokens with the share of the request from "
                "which on they hold, rising, such as '0.35@40% 0.25@70%'"
            )
        return later

    def run(self, program: Program, context: Context) -> Outcome:
        parts = [r.parent for r in program.regions if r.role == "part"]
        if parts:
            said = f"{parts[0]} runs on part of its tokens already: one select_tokens a recipe; then= gives more shares"
            return Outcome(program, 0, (said,))
        context.check_mask(self.mask)
        if why := never_partial(self.schedule, context.steps):
            return Outcome(program, 0, (why,))
        blocks = run_of_blocks(program, self.name, self.region)
        try:
            scoring = Scoring(self.metric, self.starvation, self.high, self.share)
            ratios = [self.ratio, *(share for share, _ in self._later())]
            counts = [functools.partial(part, ratio=ratio, multiple=self.multiple) for ratio in ratios]
            work = Choosing(program, blocks, counts, functools.partial(Scored, scoring))
            later = [Interval(0, 0, since=since) for _, since in self._later()]
            return Outcome(work.program(self.schedule, later), len(work.blocks))
        except Mixes as reason:
            return Outcome(program, 0, (str(reason),))

    @classmethod
    def example_applies(cls) -> Program:
        from ditopt.passes.outline_blocks import OutlineBlocks

        return OutlineBlocks().run(example.tiny_dit(), Context()).program

    @classmethod
    def example_refuses(cls) -> Program:
        once = cls().run(cls.example_applies(), Context())
        return once.program.replace(applied=())
