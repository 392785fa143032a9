"""Leave blocks out: the streams pass them by, or are handed what they last added.

A transformer's block adds to its streams, so without it they run on as they are. ``region`` names what is left out: a
run of blocks (``blocks.4:7``) or a module of each of some blocks (``blocks.10:14.attn``). For the whole request that is
an edit of the graph, and the weights of what never runs leave the Program, its artifact and, with ``release``, memory.
For a part of it (``since``, ``until``, ``mask``) each value becomes ``select(computed, passed by)``, a decision that a
table answers; ``hold=true`` adds what the blocks added when they last ran, as Delta-DiT does (arXiv 2406.01125).

Which blocks to leave out is measured, not known: ``ditopt calibrate`` fits the recipe ``laptop_diff`` to a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from ditopt.errors import RecipeError
from ditopt.ir import example
from ditopt.ir.caching import Caching, Keeping
from ditopt.ir.program import Interval, Predictor, Program
from ditopt.ir.select import select_regions
from ditopt.ir.skipping import Skipping
from ditopt.pipeline import Context, Outcome, Pass


@dataclass(frozen=True)
class SkipBlocks(Pass):
    """Do not run some blocks, or a module of them.

    ``region``: a selector (ir/select.py). ``since``, ``until``: the part of the request, 0 to 1, in which they are left
    out. ``mask``: a text of 1 (run) and 0 (leave out), one digit a step, in their place. ``hold``: add what they added
    when they last ran, instead of nothing.
    """

    region: str = "blocks.40%:60%"
    since: float = 0.0
    until: float = 1.0
    mask: str = ""
    hold: bool = False

    contract = "approximate"
    requires = ("outline_blocks",)
    after = ("hoist_invariants",)

    def validate(self) -> None:
        if not 0 <= self.since <= self.until <= 1:
            raise RecipeError(
                f"skip_blocks{{since={self.since},until={self.until}}}: expected 0 <= since <= until <= 1"
            )
        if set(self.mask) - {"0", "1"}:
            raise RecipeError(f"skip_blocks{{mask={self.mask}}}: expected 1 (run) and 0 (leave out), one digit a step")
        if self.mask and (self.since, self.until) != (0.0, 1.0):
            raise RecipeError("skip_blocks: mask says of every step what to do; leave out since and until")
        if self.hold and self.mask.startswith("0"):
            raise RecipeError("skip_blocks{hold=true}: the first step has nothing to hold, its digit must be 1")

    @classmethod
    def neutral(cls) -> SkipBlocks:
        return cls(until=0.0)

    def run(self, program: Program, context: Context) -> Outcome:
        if self.since == self.until:
            return Outcome(program, 0, (f"since and until are {self.until:g}: no step leaves anything out",))
        context.check_mask(self.mask)
        selections = select_regions(program, self.region)
        if any(s.kind == "model" for s in selections):
            raise RecipeError("region 'model' would leave nothing to run; name blocks, as in 'blocks.40%:60%'")
        decided = {r for d in program.decisions for r in d.regions}
        for region in (i for s in selections for i in s.ids):
            if any(region == t or region.startswith(f"{t}.") or t.startswith(f"{region}.") for t in decided):
                return Outcome(program, 0, (f"{region} is decided by an earlier pass; skip blocks before caching",))
        texts = [text.strip() for text in self.region.split("|")]
        refused = [f"{t} matches nothing" for t, s in zip(texts, selections, strict=True) if not s.ids]
        if self.hold:
            work = Caching(program, Keeping(Predictor()))
            work.apply(selections)
            refused += work.refused
            if not work.reuse.groups:
                return Outcome(program, 0, tuple(refused) or ("nothing that leaves them depends on the latent",))
            held = Interval(0, 1, 0, self.mask, self.since, self.until)
            return Outcome(work.program(held), len(work.regions), tuple(refused))
        skipping = Skipping(program, self._schedule())
        skipping.apply(selections)
        return Outcome(skipping.program, len(skipping.regions), tuple(refused + skipping.refused))

    def _schedule(self) -> Interval | None:
        """The steps that run what is left out otherwise; None where none does."""
        if not self.mask and (self.since, self.until) == (0.0, 1.0):
            return None
        return Interval(0, 0, 0, self.mask, self.since, self.until)

    @classmethod
    def example_applies(cls) -> Program:
        from ditopt.passes.outline_blocks import OutlineBlocks

        return OutlineBlocks().run(example.tiny_dit(), Context()).program

    @classmethod
    def example_refuses(cls) -> Program:
        once = cls(until=0.5).run(cls.example_applies(), Context())
        return once.program.replace(applied=())
