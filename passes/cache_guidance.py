"""Guidance without its unconditional branch: at some steps that is not run, and made of the conditional one.

Classifier-free guidance runs the model twice a step, for ``cond + (scale - 1) (cond - uncond)``. Where the decision of
this pass reuses, ``uncond`` is what ``keep`` says: "nothing" takes ``cond`` itself, so that guidance is off (interval
guidance); "difference" adds what ``uncond - cond`` was at the last step that ran both, or what a predictor makes of
several (CFG caching); "bands" weighs low and high frequencies of it by step (FasterCache).

Two calls a step (``form=calls``): the first one leaves its output for the others, and what these would compute is
selected against a prediction. One call with a doubled batch (``form=batch``): the step is written once more for the
conditional half (ir/half.py), and both outputs are put together. Other decisions go on in that half; what the other
one missed is computed again before it is reused. Exact where every step computes; approximate otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ditopt.errors import RecipeError
from ditopt.ir import example
from ditopt.ir.bands import Bands
from ditopt.ir.binding import Binding, bind
from ditopt.ir.edit import Editor, prune
from ditopt.ir.half import Half, Lost
from ditopt.ir.program import (
    Basis,
    Decision,
    Formal,
    Function,
    Interval,
    Predictor,
    Program,
    Region,
    StateSlot,
    TensorType,
)
from ditopt.ir.reuse import Reuse, dense, guess
from ditopt.ops import select
from ditopt.pipeline import Context, Guidance, Outcome, Pass

aten = torch.ops.aten

_ORDERED = ("taylor", "newton", "lagrange", "hermite")


@dataclass(frozen=True)
class CacheGuidance(Pass):
    """Make the unconditional branch of guidance of the conditional one at some steps.

    ``every``, ``first``, ``last``, ``mask``, ``since``, ``until``, ``outside``, ``low``, ``high``: the steps that run
    both (``Interval``).
    ``keep``: what of earlier steps is kept; ``predictor``, ``order``: how a difference is predicted. ``form``: how the
    sampler guides, by "calls" or by a doubled "batch"; "auto" looks at the batch of the first call. ``unconditional``:
    which half of a batch that is; "auto" takes the half with one prompt for all of its samples where the other one has
    several, else the first, as diffusers does. ``held``: what the conditional half of a batch reads of other caches
    that hold both, its own or the "mean" (T-GATE).
    """

    every: int = 5
    first: int = 1
    last: int = 0
    mask: str = ""
    since: float = 0.0
    until: float = 1.0
    outside: Literal["compute", "reuse"] = "compute"
    keep: Literal["nothing", "difference", "bands"] = "difference"
    predictor: Basis = "hold"
    order: int = 0
    form: Literal["auto", "calls", "batch"] = "auto"
    unconditional: Literal["auto", "first", "second"] = "auto"
    held: Literal["own", "mean"] = "own"
    low: float = 0.0
    high: float = 0.0

    contract = "approximate"
    requires = ("canonicalize",)
    after = ("outline_blocks", "hoist_invariants", "select_tokens", "edit_tokens", "cache")

    def validate(self) -> None:
        for option, least in (("every", 0), ("first", 0), ("last", 0), ("order", 0)):
            if getattr(self, option) < least:
                raise RecipeError(f"cache_guidance{{{option}={getattr(self, option)}}}: expected {least} or more")
        if not 0 <= self.since < self.until <= 1:
            raise RecipeError(
                f"cache_guidance{{since={self.since},until={self.until}}}: expected 0 <= since < until <= 1"
            )
        if not self.low < self.high and (self.low or self.high):
            raise RecipeError(
                f"cache_guidance{{low={self.low:g},high={self.high:g}}}: expected low < high, or 0 for both"
            )
        if set(self.mask) - {"0", "1"}:
            raise RecipeError(f"cache_guidance{{mask={self.mask}}}: expected 1 (run both) and 0 (one), one a step")
        if self.keep != "difference" and (self.predictor != "hold" or self.order):
            raise RecipeError(f"cache_guidance{{keep={self.keep}}} has no predictor to choose: that is for differences")
        if self.predictor in ("dmd", "foca", "bands", "learned"):
            raise RecipeError(f"cache_guidance{{predictor={self.predictor}}}: choose one without a window")
        if self.order and self.predictor not in _ORDERED:
            raise RecipeError(f"cache_guidance{{order={self.order}}}: {self.predictor} has no order to choose")
        if self.keep != "nothing" and (self.mask.startswith("0") or (self.outside == "reuse" and self.since > 0)):
            raise RecipeError("the first step has nothing to reuse; only keep=nothing can leave a branch out there")

    @classmethod
    def neutral(cls) -> CacheGuidance:
        return cls(every=1)

    def run(self, program: Program, context: Context) -> Outcome:
        context.check_mask(self.mask)
        if any(d.guidance for d in program.decisions):
            return Outcome(program, 0, ("guidance is cached already by an earlier pass",))
        if self.low < self.high and not any(i.role == "timestep" for i in program.inputs):
            return Outcome(program, 0, ("there is no timestep to compare low and high with",))
        asks = self.form != "calls" and "auto" in (self.form, self.unconditional)
        found = context.guidance() if asks else Guidance()
        if self.form == "auto" and found.copies == 3:
            return Outcome(program, 0, ("the batch holds each latent three times: that is no pair of branches",))
        batched = self.form == "batch" or (self.form == "auto" and found.copies > 1)
        last = (self.unconditional if self.unconditional != "auto" else found.unconditional) != "second"
        work = _Skipping(self, program)
        if not work.outputs:
            return Outcome(program, 0, ("no output depends on the latent",))
        try:
            made = work.batch(last) if batched else work.calls()
        except Lost as lost:
            return Outcome(program, 0, (str(lost),))
        told = f"the {'second' if last else 'first'} half of the batch" if batched else "the first call of a step"
        return Outcome(made, len(work.outputs), (), (f"{told} is taken for the conditional branch",))

    @classmethod
    def example_applies(cls) -> Program:
        return example.tiny_dit()

    @classmethod
    def example_refuses(cls) -> Program:
        return cls().run(example.tiny_dit(), Context()).program.replace(applied=())


class _Skipping:
    """The rewrite: ``outputs`` are the results that guidance combines."""

    def __init__(self, options: CacheGuidance, program: Program) -> None:
        self.o, self.before = options, program
        self.name = f"guidance{len(program.decisions)}"
        binding = bind(program)
        results = program.step.results[: program.step.n_results]
        self.outputs = [i for i, r in enumerate(results) if binding[r] & Binding.LATENT and r.op != "placeholder"]
        self.e = Editor(program.step, "cache_guidance")
        kept = Predictor(options.predictor, options.order)
        predictor = {"bands": Predictor("bands"), "nothing": Predictor("none")}.get(options.keep, kept)
        self.reuse = Reuse(self.e, self.name, predictor)
        self.bands = Bands(self.e, self.name)
        self.shared: list[StateSlot] = []
        self._slots = {p.meta["formal"].ref: p for p in program.step.placeholders if p.meta["formal"].kind == "state"}

    def calls(self) -> Program:
        """Where each branch is a call of its own."""
        step, results = self.before.step, list(self.e.results)
        written: dict[str, fx.Node] = {}
        for k, i in enumerate(self.outputs):
            out = dense(self.e, results[i], self.e.graph.output_node())
            slot = StateSlot(f"{self.name}.first.{k}", TensorType.of(out.meta["val"]), "step")
            first = self.e.placeholder(slot.name.replace(".", "_"), Formal("state", slot.name), out.meta["val"])
            self.shared.append(slot)
            written[slot.name] = self.e.op(select, out, first, self.name)
            results[i] = self.e.op(select, out, self._told(out, first, first), self.name)
        for k, slot_name in enumerate(step.state_out, step.n_results):
            if slot_name in self._slots:
                results[k] = self.e.op(select, results[k], self.e[self._slots[slot_name]], self.name)
        self.e.set_results([*results, *written.values()], [*step.state_out, *written])
        return self._program("calls", (*step.state_out, *written))

    def batch(self, last: bool) -> Program:
        """Where the branches are the halves of a batch, the conditional one being the ``last`` one or not."""
        step, results = self.before.step, list(self.e.results)
        ruled = [d.name for d in self.before.decisions if d.rule is not None or d.gram]
        if ruled:
            raise Lost(
                f"{ruled[0]} measures numbers of the whole batch, of which half is missing; use a static schedule"
            )
        if self.o.held == "mean" and any(not s.type.dtype.is_floating_point for s in self.before.state):
            raise Lost("held=mean needs caches that store values as they are")
        sizes = {int(step.results[i].meta["val"].shape[0]) for i in self.outputs}
        rows = sizes.pop()
        if sizes or rows % 2:
            raise Lost(f"the batch has {rows} samples, which are no two halves for guidance")
        half = Half(self.before, self.e, rows, last, self.o.held == "mean")
        for i in self.outputs:
            node, out = step.results[i], results[i]
            uncond, cond = half.parts(node, out)
            told = half.join(node, self._told(uncond, cond, half[node]), half[node])
            results[i] = self.e.op(select, out, told, self.name)
        for k, slot in enumerate(step.state_out, step.n_results):
            held = self._slots.get(slot)
            if held is not None and half.splits(held):
                results[k] = self._state(step.results[k], held, half)
        self.e.set_results(results)
        return self._program("batch", step.state_out, half.functions)

    def _told(self, uncond: fx.Node, cond: fx.Node, base: fx.Node) -> fx.Node:
        """What is taken for ``uncond`` where it is not computed, beside ``base``; where it is, it is compared with
        ``cond``."""
        if self.o.keep == "nothing":
            return base
        out = self.e.graph.output_node()
        kept = dense(self.e, self.e.op(aten.sub.Tensor, uncond, cond), out)
        if self.o.keep == "bands" and kept.meta["val"].ndim < 4:
            raise Lost("keep=bands needs an output with rows and columns, (batch, channels, rows, columns)")
        slots = self.reuse.slots(kept.meta["val"])
        told = guess(self.e, slots, kept.meta["val"], self.reuse.control(), out)
        if self.o.keep == "bands":
            for slot, part in zip(slots[0], self.bands.split(kept), strict=True):
                self.reuse.update(slot, part, "computed")
        else:
            self.reuse.keep(slots, [kept], [kept])
        return self.e.op(aten.add.Tensor, base, told)

    def _state(self, node: fx.Node, held: fx.Node, half: Half) -> fx.Node:
        """New state for both halves of a batch, of which one step computes ``node`` for both or for one of them."""
        if node.target is select and node.args[1] is held:
            computed, _, decision = node.args
            assert isinstance(computed, fx.Node)
            return self.e.op(select, self._state(computed, held, half), self.e[held], decision)
        other, _ = half.parts(held, self.e[held])
        return self.e.op(select, self.e[node], half.join(held, other, half[node]), self.name)

    def _program(
        self, form: Literal["calls", "batch"], state_out: Sequence[str], bodies: Mapping[str, Function] | None = None
    ) -> Program:
        self.reuse.finish(state_out)
        o = self.o
        decision = Decision(
            self.name,
            ("model",),
            Interval(o.every, o.first, o.last, o.mask, o.since, o.until, o.low, o.high, outside=o.outside),
            self.reuse.predictor,
            tuple(self.reuse.groups),
            self.reuse.weights if self.reuse.groups else "",
            guidance=form,
        )
        return prune(
            self.before.replace(
                functions={**self.before.functions, **(bodies or {}), self.before.entry: self.e.function()},
                params={**self.before.params, **self.bands.params},
                state=(*self.before.state, *self.shared, *self.reuse.types),
                decisions=(*self.before.decisions, decision),
                regions=self.before.regions or (Region("model", "model", ""),),
            )
        )
