"""Reuse across steps: on some steps a region is computed, on the others its value is predicted from earlier ones.

The region is the model's output, a run of blocks, or a module (attention, MLP) inside blocks. Each value that leaves
it gets state slots; the prediction is a linear combination of them, with coefficients that come in as a tensor, so that
one reuse graph serves every gap. A run of blocks keeps ``out - in`` and adds the fresh input (residual hold, as
DeepCache and first-block caches do); modules and the model's output keep the value itself, modules before their gate
(FORA, TaylorSeer).

In the Program, the value becomes ``select(computed, predicted)`` and each slot ``select(new, old)``. Which one a step
takes is asked once a step (``Program.decisions``): a static schedule answers, or on the steps that it leaves open a
number that the loop measures (``signal``, ir/signals.py). An undecided program computes, and so does ``every=1``: the
neutral setting. Approximate otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ditopt.errors import RecipeError
from ditopt.ir import example
from ditopt.ir.caching import Caching, Keeping
from ditopt.ir.program import Basis, Decision, Interval, Predictor, Program, Rows, Rule
from ditopt.ir.reuse import Store
from ditopt.ir.select import Selection, lacking, select_regions
from ditopt.ir.signals import Signal
from ditopt.ir.widening import Restart, partial_decision, widened
from ditopt.pipeline import Context, Outcome, Pass

_ORDERED = ("taylor", "newton", "lagrange", "hermite")
"""Predictors whose order can be chosen."""


@dataclass(frozen=True)
class Cache(Pass):
    """Compute a region on some steps and predict its value on the others.

    ``region``: a selector (ir/select.py). ``each``: one decision for all of it, or one for every block of it.
    ``every``, ``first``, ``last``, ``mask``, ``since``, ``until``, ``low``, ``high``: the schedule (``Interval``).
    ``predictor``, ``order``, ``time``: ``Predictor``; ``table``: the file of predictor=learned (ir/learned.py).
    ``fitted``: coefficients of the newest computed values for each 0 of ``mask``, in order, as in "1.9 -0.9; 2.8 -1.8":
    they take the place of the predictor's own. ``residual``: predict ``out - in`` instead of ``out``; "auto" does so
    for runs of blocks. ``store``: keep values as they are, or in 8 bits. ``correction``: a file with tables ``scale``
    and ``shift`` (steps, channels), applied to predicted values: with ``residual`` to the difference
    (``corrected=kept``), or to what it adds up to (``whole``).

    ``signal`` (ir/signals.py): decide on the steps that the schedule leaves open by a number; then ``every=0`` (the
    default there) forces none, and a ``mask`` allows reuse at its zeros. The rest is the ``Rule``: ``test``,
    ``threshold`` (its limit), ``coefficients`` and ``domain`` (numbers, highest degree first; lowest and highest),
    ``book`` (as in "0.03:12 0.05:10 inf:3": below 0.03 the next step that computes is the twelfth from here),
    ``longest``, ``most``, ``budget``; ``watch``: order of the Taylor series that signal=forecast checks.
    ``partial``: behind edit_tokens, which runs blocks on part of their tokens, and with test=sum: below ``partial``
    times the threshold a step that is not reused computes that part, beyond it all (ir/widening.py); 0 leaves that to
    the earlier pass. ``restart``: the steps that set the sum to 0: "full" ones, or "any" that compute.
    """

    region: str = "blocks.1:-1"
    each: Literal["region", "block"] = "region"
    every: int = -1
    first: int = 1
    last: int = 0
    mask: str = ""
    since: float = 0.0
    until: float = 1.0
    low: float = 0.0
    high: float = 0.0
    predictor: Basis = "hold"
    order: int = 0
    time: Literal["step", "timestep"] = "step"
    fitted: str = ""
    residual: Literal["auto", "yes", "no"] = "auto"
    store: Store = "full"
    correction: str = ""
    table: str = ""
    corrected: Literal["kept", "whole"] = "kept"
    signal: Literal["none", "residual", "hidden", "modulated", "forecast", "boundary", "change", "drift"] = "none"
    test: Literal["below", "sum", "book"] = "below"
    threshold: float = 0.0
    coefficients: str = ""
    domain: str = ""
    book: str = ""
    longest: int = 0
    most: int = 0
    budget: float = 0.0
    watch: int = 1
    partial: float = 0.0
    restart: Restart = "full"

    contract = "approximate"
    requires = ("outline_blocks",)
    after = ("hoist_invariants", "skip_blocks", "edit_tokens")

    def validate(self) -> None:
        for option, least in (("first", 0), ("last", 0), ("order", 0), ("longest", 0), ("most", 0), ("budget", 0)):
            self._least(option, least)
        self._least("watch", 0)
        if self.every != -1:
            self._least("every", 0)
        if self.order and self.predictor not in _ORDERED:
            raise RecipeError(
                f"cache{{order={self.order}}}: {self.predictor} has no order to choose; choose predictor=taylor, "
                "newton, lagrange or hermite"
            )
        self._validate_table()
        if not 0 <= self.since < self.until <= 1:
            raise RecipeError(f"cache{{since={self.since},until={self.until}}}: expected 0 <= since < until <= 1")
        if not self.low < self.high and (self.low or self.high):
            raise RecipeError(f"cache{{low={self.low:g},high={self.high:g}}}: expected low < high, or 0 for both")
        if self.corrected == "whole" and not self.correction:
            raise RecipeError("cache{corrected=whole} says what a correction is of: give its file as well, correction=")
        if set(self.mask) - {"0", "1"}:
            raise RecipeError(f"cache{{mask={self.mask}}}: expected a text of 1 (compute) and 0 (reuse), one a step")
        if self.mask.startswith("0"):
            raise RecipeError(f"cache{{mask={self.mask}}}: the first step has nothing to reuse and must be 1")
        self._validate_rule()
        self._rows()

    def _rows(self) -> Rows:
        """``fitted``, for each step of the mask."""
        if not self.fitted:
            return ()
        given = [_numbers(row, "fitted") for row in self.fitted.split(";")]
        if not self.mask or self.signal != "none" or len(given) != self.mask.count("0"):
            raise RecipeError(
                f"cache{{fitted=...}} has {len(given)} rows, with semicolons between; expected a mask=, one row for "
                "each 0 of it, and no signal="
            )
        if self.predictor not in _ORDERED:
            raise RecipeError(
                f"cache{{fitted=...,predictor={self.predictor}}}: expected a predictor that combines as many values as "
                "its order says: taylor, newton, lagrange or hermite"
            )
        rows, made = iter(given), []
        for step, digit in enumerate(self.mask):
            row = () if digit == "1" else next(rows)
            most = min(self.order + 1, self.mask.count("1", 0, step))
            if digit == "0" and not 1 <= len(row) <= most:
                raise RecipeError(
                    f"cache{{fitted=...}}: the row of step {step} has {len(row)} numbers; expected 1 to {most}, one "
                    "for each of the newest computed values, and no more than order + 1"
                )
            made.append(row)
        return tuple(made)

    def _least(self, option: str, least: int) -> None:
        if getattr(self, option) < least:
            raise RecipeError(f"cache{{{option}={getattr(self, option)}}}: expected {least} or more")

    def _validate_table(self) -> None:
        if self.predictor == "learned" and not self.table:
            raise RecipeError(
                "cache{predictor=learned} needs table=, the file of its weights; ditopt.calibrate(model, 'lesa', "
                "sampler, steps=...) trains one"
            )
        if self.table and self.predictor != "learned":
            raise RecipeError(f"cache{{table={self.table}}} holds a trained predictor: give predictor=learned as well")
        if self.table and self.time != "step":
            raise RecipeError(
                "cache{predictor=learned,time=timestep}: its gate was fitted step by step; leave time out"
            )
        if self.table and self.correction:
            raise RecipeError("cache{table=...,correction=...}: a trained predictor is not corrected; give one of both")

    def _validate_rule(self) -> None:
        read = ("threshold", "coefficients", "domain", "book", "longest", "most", "budget", "partial")
        given = [o for o in read if getattr(self, o)]
        if self.signal == "none":
            if given or self.test != "below":
                raise RecipeError(
                    f"cache{{{(given or ['test'])[0]}=...}} says how to read a signal: give signal= as well"
                )
            return
        if not 0 <= self.threshold < math.inf:
            raise RecipeError(f"cache{{threshold={self.threshold}}}: expected a number from 0 (never reuse) on")
        if self.partial and not 1 < self.partial < math.inf:
            raise RecipeError(
                f"cache{{partial={self.partial:g}}}: expected a number above 1, or 0 for no partial steps"
            )
        if self.partial and self.test != "sum":
            raise RecipeError(f"cache{{partial={self.partial:g}}} is a limit of a sum: give test=sum as well")
        if (self.test == "book") != bool(self.book):
            raise RecipeError("cache{test=book} goes with book=, such as '0.03:12 0.05:10 inf:3'")
        if len(_numbers(self.domain, "domain")) not in (0, 2):
            raise RecipeError(f"cache{{domain={self.domain}}}: expected two numbers, the lowest and the highest")
        _numbers(self.coefficients, "coefficients")
        _book(self.book)

    @classmethod
    def neutral(cls) -> Cache:
        return cls(every=1)

    @property
    def schedule(self) -> Interval:
        """The steps that compute in any case."""
        every = self.every if self.every != -1 else 2 if self.signal == "none" else 0
        return Interval(every, self.first, self.last, self.mask, self.since, self.until, self.low, self.high)

    def run(self, program: Program, context: Context) -> Outcome:
        context.check_mask(self.mask)
        timed = self.time == "timestep" and self.predictor != "hold"
        if (timed or self.schedule.timed) and not any(i.role == "timestep" for i in program.inputs):
            said = "measure distance in; cache{time=step} counts steps" if timed else "compare low and high with"
            return Outcome(program, 0, (f"there is no timestep to {said}",))
        if missing := lacking(program, self.region):
            return Outcome(program, 0, (missing,))
        selections = select_regions(program, self.region)
        parts = [r.parent for r in program.regions if r.role == "part"]
        if parts and any(s.kind != "model" for s in selections):
            return Outcome(
                program,
                0,
                (
                    f"{parts[0]} runs on part of its tokens already: cache blocks and modules first, then select "
                    "tokens, as one recipe with both does",
                ),
            )
        chosen = partial_decision(program)
        if self.partial and chosen is None:
            return Outcome(
                program,
                0,
                (f"partial={self.partial:g} needs edit_tokens in the recipe: a part of the tokens to run on",),
            )
        decided = [d for d in program.decisions if d.slots and not self._apart(d)]
        taken = {r for d in decided for r in d.regions if r not in parts}
        for region in (i for s in selections for i in s.ids):
            if any(
                region == t or region.startswith(f"{t}.") or t.startswith(f"{region}.") or "model" in (region, t)
                for t in taken
            ):
                return Outcome(program, 0, (f"{region} is cached already by an earlier cache",))
        alternatives = [text.strip() for text in self.region.split("|")]
        refused = [f"{t} matches nothing" for t, s in zip(alternatives, selections, strict=True) if not s.ids]
        applied = 0
        for part in [selections] if self.each == "region" else _by_block(selections):
            work = Caching(program, self.keeping())
            work.apply(part)
            refused += work.refused
            if work.reuse.groups:
                applied += len(work.regions)
                program = work.program(self.schedule, self.rule)
                if self.partial and chosen is not None:
                    program = widened(program, chosen, self.partial, self.restart)
        if not applied:
            return Outcome(program, 0, tuple(refused) or ("nothing that leaves the region depends on the latent",))
        return Outcome(program, applied, tuple(refused))

    def _apart(self, other: Decision) -> bool:
        """Whether this cache and ``other`` are never at work in the same step."""
        a, b = self.schedule, other.schedule
        static = self.signal == "none" and other.rule is None and not (a.mask or b.mask)
        return static and (a.until <= b.since or b.until <= a.since)

    def keeping(self) -> Keeping:
        """What is kept, and how it is predicted."""
        order = self.order if self.predictor in _ORDERED else 0
        return Keeping(
            Predictor(self.predictor, order, self.time, self._rows()),
            self.residual,
            self.store,
            Path(self.correction) if self.correction else None,
            "" if self.signal == "none" else self.signal,
            Predictor("taylor", self.watch) if self.signal == "forecast" else Predictor(),
            Path(self.table) if self.table else None,
            self.corrected,
        )

    def rule(self, slot: str, found: Signal) -> Rule:
        """How the host reads the signal that ``slot`` holds."""
        return Rule(
            slot,
            self.test,
            self.threshold,
            found.lag,
            _numbers(self.coefficients, "coefficients"),
            _numbers(self.domain, "domain"),
            _book(self.book),
            self.longest,
            self.most,
            self.budget,
            found.slots,
            found.weights,
            Predictor("taylor", self.watch) if found.slots else Predictor(),
            self.signal,
        )

    @classmethod
    def example_applies(cls) -> Program:
        from ditopt.passes.outline_blocks import OutlineBlocks

        return OutlineBlocks().run(example.tiny_dit(), Context()).program

    @classmethod
    def example_refuses(cls) -> Program:
        once = cls().run(cls.example_applies(), Context())
        return once.program.replace(applied=())


def _by_block(selections: Sequence[Selection]) -> list[list[Selection]]:
    """What the selections select, block by block."""
    blocks = dict.fromkeys(b.id for s in selections for b in s.blocks)
    parts = [[replace(s, blocks=tuple(b for b in s.blocks if b.id == i)) for s in selections] for i in blocks]
    model = [s for s in selections if s.kind == "model"]
    return [[s for s in part if s.blocks] for part in parts] + ([model] if model else [])


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in re.split(r"[,;\s]+", text.strip()) if word)
    except ValueError:
        raise RecipeError(f"cache{{{option}={text}}}: expected numbers with spaces between") from None


def _book(text: str) -> tuple[tuple[float, ...], ...]:
    pairs = []
    for word in text.split():
        bound, _, steps = word.partition(":")
        try:
            pairs.append((float(bound), float(int(steps))))
            if int(steps) < 1:
                raise ValueError(steps)
        except ValueError:
            raise RecipeError(
                f"cache{{book={text}}}: {word!r} is no bound:steps, 1 step or more; write as in '0.03:12 inf:3'"
            ) from None
    if pairs and ([b for b, _ in pairs] != sorted({b for b, _ in pairs}) or pairs[-1][0] != math.inf):
        raise RecipeError(f"cache{{book={text}}}: bounds must rise, and the last one be inf")
    return tuple(pairs)
