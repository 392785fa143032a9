"""Reuse across steps: on some steps a region is computed, on the others its value is predicted from earlier ones.

The region is the model's output, a run of blocks, or a module (attention, MLP) inside blocks. Each value that leaves
it gets order + 1 state slots; the prediction is a linear combination of them, with coefficients that come in as a
tensor, so that one reuse graph serves every gap. A run of blocks keeps ``out - in`` and adds the fresh input (residual
hold, as DeepCache and first-block caches do); modules and the model's output keep the value itself, modules before
their gate (FORA, TaylorSeer).

In the Program, the value becomes ``select(computed, predicted)`` and each slot ``select(new, old)``. Which one a step
takes is asked once a step (``Program.decisions``); an undecided program computes, and so does ``every=1``: the neutral
setting. Approximate otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ditopt.errors import RecipeError
from ditopt.ir import example
from ditopt.ir.binding import Binding, bind
from ditopt.ir.edit import Editor, prune, replace_functions
from ditopt.ir.outline import clone_body
from ditopt.ir.program import (
    Decision,
    Formal,
    Function,
    Interval,
    Predictor,
    Program,
    Region,
    TensorType,
    call_args,
    callee,
    is_call,
)
from ditopt.ir.reuse import Reuse, coefficients, dense, dense_type, predict
from ditopt.ir.select import Selection, select_regions
from ditopt.ir.structure import find_modules, rejoined, stream_origins
from ditopt.ops import select
from ditopt.pipeline import Context, Outcome, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class Cache(Pass):
    """Compute a region on some steps and predict its value on the others.

    ``region``: a selector (ir/select.py). ``every``, ``first``, ``last``, ``mask``: the schedule (``Interval``).
    ``predictor``, ``order``, ``time``: ``Predictor``. ``residual``: predict ``out - in`` instead of ``out``; "auto"
    does so for runs of blocks.
    """

    region: str = "blocks.1:-1"
    every: int = 2
    first: int = 1
    last: int = 0
    mask: str = ""
    predictor: Literal["hold", "taylor", "newton", "lagrange"] = "hold"
    order: int = 0
    time: Literal["step", "timestep"] = "step"
    residual: Literal["auto", "yes", "no"] = "auto"

    contract = "approximate"
    requires = ("outline_blocks",)
    after = ("hoist_invariants",)

    def validate(self) -> None:
        for option, least in (("every", 1), ("first", 0), ("last", 0), ("order", 0)):
            if getattr(self, option) < least:
                raise RecipeError(f"cache{{{option}={getattr(self, option)}}}: expected {least} or more")
        if self.predictor == "hold" and self.order:
            raise RecipeError(
                f"cache{{order={self.order}}}: hold has order 0; choose predictor=taylor, newton or lagrange"
            )
        if set(self.mask) - {"0", "1"}:
            raise RecipeError(f"cache{{mask={self.mask}}}: expected a text of 1 (compute) and 0 (reuse), one a step")
        if self.mask.startswith("0"):
            raise RecipeError(f"cache{{mask={self.mask}}}: the first step has nothing to reuse and must be 1")

    @classmethod
    def neutral(cls) -> Cache:
        return cls(every=1)

    def run(self, program: Program, context: Context) -> Outcome:
        if self.mask and context.steps and len(self.mask) != context.steps:
            raise RecipeError(
                f"mask has {len(self.mask)} steps, the request has {context.steps}: give one digit a step"
            )
        timed = self.time == "timestep" and self.predictor != "hold"
        if timed and not any(i.role == "timestep" for i in program.inputs):
            return Outcome(program, 0, ("there is no timestep to measure distance in; cache{time=step} counts steps",))
        selections = select_regions(program, self.region)
        taken = {r for d in program.decisions for r in d.regions}
        for region in (i for s in selections for i in s.ids):
            if any(
                region == t or region.startswith(f"{t}.") or t.startswith(f"{region}.") or "model" in (region, t)
                for t in taken
            ):
                return Outcome(program, 0, (f"{region} is cached already by an earlier cache",))
        work = _Rewrite(self, program)
        alternatives = [text.strip() for text in self.region.split("|")]
        work.refused += [f"{t} matches nothing" for t, s in zip(alternatives, selections, strict=True) if not s.ids]
        work.apply(selections)
        if not work.reuse.groups:
            return Outcome(program, 0, tuple(work.refused) or ("nothing that leaves the region depends on the latent",))
        return Outcome(work.program(), len(work.regions), tuple(work.refused))

    @classmethod
    def example_applies(cls) -> Program:
        from ditopt.passes.outline_blocks import OutlineBlocks

        return OutlineBlocks().run(example.tiny_dit(), Context()).program

    @classmethod
    def example_refuses(cls) -> Program:
        once = cls().run(cls.example_applies(), Context())
        return once.program.replace(applied=())


class _Rewrite:
    """The rewrite of one ``cache``: collects regions and what is kept of them while it edits."""

    def __init__(self, options: Cache, program: Program) -> None:
        self.o = options
        self.before = program
        self.name = f"cache{len(program.decisions)}"
        self.regions: list[str] = []
        self.refused: list[str] = []
        self.binding = bind(program)
        self.functions: dict[str, Function] = {}
        self.e = Editor(program.step, "cache")
        self.reuse = Reuse(self.e, self.name, options.order)

    def apply(self, selections: Sequence[Selection]) -> None:
        modules: dict[str, list[str]] = {}
        for selection in selections:
            if selection.kind == "model":
                self._model()
            elif selection.kind == "run":
                self._run({b.id for b in selection.blocks})
            else:
                for block in selection.blocks:
                    modules.setdefault(block.id, []).append(selection.role)
        self._modules(modules)

    def program(self) -> Program:
        self.reuse.finish(self.before.step.state_out)
        decision = Decision(
            self.name,
            tuple(self.regions),
            Interval(self.o.every, self.o.first, self.o.last, self.o.mask),
            Predictor(self.o.predictor, self.o.order, self.o.time),
            tuple(self.reuse.groups),
            self.reuse.weights,
        )
        step = self.e.function()
        body = {str(n.meta["region"]): callee(n) for n in step.graph.nodes if is_call(n)}
        out = replace_functions(self.before, {**self.functions, self.before.entry: step})
        regions = [dataclasses.replace(r, function=body[r.id]) if r.id in body else r for r in out.regions]
        if "model" in self.regions and not regions:  # a model without repeated blocks still has an output
            regions = [Region("model", "model", "")]
        return prune(
            out.replace(
                state=(*out.state, *self.reuse.types),
                decisions=(*out.decisions, decision),
                regions=tuple(regions),
            )
        )

    def _cached(self, value: fx.Node, base: fx.Node | None) -> fx.Node:
        """What readers of ``value`` read from now on; with ``base`` the difference to it is kept."""
        value = dense(self.e, value, value.next)
        at = max([value, *([base] if base is not None else [])], key=list(self.e.graph.nodes).index).next
        kept = value if base is None else self.e.op(aten.sub.Tensor, value, base, at=at)
        slots = self.reuse.slots(kept.meta["val"])
        guess = predict(self.e, slots, self.reuse.control(), at)
        if base is not None:
            guess = self.e.op(aten.add.Tensor, base, guess, at=at)
        self.reuse.keep(slots, kept)
        return self.e.op(select, value, guess, self.name, at=at)

    # -- regions ---------------------------------------------------------------------------------------------------

    def _model(self) -> None:
        results = list(self.e.results)
        old = self.before.step.results
        for i in range(self.before.step.n_results):
            if self.binding[old[i]] & Binding.LATENT and old[i].op != "placeholder":
                base = self._latent_like(old[i]) if self.o.residual == "yes" else None
                results[i] = self._cached(results[i], base)
        self.e.set_results(results)
        self.regions.append("model")

    def _latent_like(self, value: fx.Node) -> fx.Node | None:
        for p in self.before.step.placeholders:
            if (
                p.meta["formal"].kind == "input"
                and self.binding[p] & Binding.LATENT
                and TensorType.of(p.meta["val"]).shape == TensorType.of(value.meta["val"]).shape
            ):
                return self.e[p]
        self.refused.append("no latent input has the shape of the output: its value is kept instead of the difference")
        return None

    def _run(self, ids: set[str]) -> None:
        inside, first = self._inside(ids)
        for value in [n for n in inside if isinstance(n.meta["val"], torch.Tensor)]:
            readers = [u for u in value.users if u not in inside]
            if not readers or not self.binding[value] & Binding.LATENT:
                continue
            base = None if self.o.residual == "no" else self._entry_of(value, first, inside)
            node = self.e[value]
            chosen = self._cached(node, base)
            for reader in readers:
                self.e[reader].replace_input_with(node, chosen) if reader.op != "output" else self._output(node, chosen)
        self.regions.extend(sorted(ids, key=lambda i: int(i.split(".")[1])))

    def _output(self, old: fx.Node, new: fx.Node) -> None:
        n = self.before.step.n_results
        results = self.e.results
        self.e.set_results([*(new if r is old else r for r in results[:n]), *results[n:]])

    def _inside(self, ids: set[str]) -> tuple[list[fx.Node], fx.Node]:
        """Entry nodes of a run: its calls, their results, and what lies between two of them on a path."""
        nodes = [n for n in self.before.step.graph.nodes if n.op == "call_function"]
        calls = [n for n in nodes if is_call(n) and n.meta["region"] in ids]
        after: set[fx.Node] = set()
        for n in nodes:
            if n in calls or any(a in after for a in n.all_input_nodes):
                after.add(n)
        before: set[fx.Node] = set()
        for n in reversed(nodes):
            if n in calls or any(u in before for u in n.users):
                before.add(n)
        inside = [n for n in nodes if n in calls or (n in after and n in before) or (n.args and n.args[0] in calls)]
        return inside, calls[0]

    def _entry_of(self, value: fx.Node, first: fx.Node, inside: Sequence[fx.Node]) -> fx.Node | None:
        """What the (editable) ``value`` is the sum of a difference and: what it continues, else what has its type."""
        base = self._origin(value, inside)
        want = TensorType.of(value.meta["val"])
        if base is not None and TensorType.of(base.meta["val"]).shape == want.shape:
            return base
        for arg in call_args(first):
            if self.binding[arg] & Binding.LATENT and (arg.meta["val"].dtype, tuple(arg.meta["val"].shape)) == (
                want.dtype,
                want.shape,
            ):
                return self.e[arg]
        if self.o.residual == "yes":
            self.refused.append(
                f"{value.name} continues no input of the run: its value is kept instead of the difference"
            )
        return None

    def _origin(self, value: fx.Node, inside: Sequence[fx.Node]) -> fx.Node | None:
        """The value outside the run that ``value`` continues along residual adds, splits and joins of streams."""
        if value not in inside:
            return self.e[value]
        whole = rejoined(value)
        if whole is not None:
            return self._origin(whole, inside)
        source, *rest = value.args
        if isinstance(source, fx.Node) and is_call(source):
            origin = stream_origins(self.before.functions[callee(source)], self.binding)[rest[0]]  # type: ignore[index]
            return None if origin is None else self._origin(call_args(source)[origin], inside)
        if value.target not in (aten.cat.default, aten.slice.Tensor):
            return None
        found = [self._origin(n, inside) for n in value.all_input_nodes]
        known = {n: o for n, o in zip(value.all_input_nodes, found, strict=True) if o is not None}
        if len(known) < len(found):
            return None
        return self.e.op(value.target, *fx.map_arg(value.args, known.__getitem__), at=self.e[value])

    def _modules(self, wanted: dict[str, list[str]]) -> None:
        """Modules inside block bodies: the body takes slots and weights, and returns what it computed."""
        made: dict[tuple[str, tuple[str, ...]], tuple[str, list[Any]]] = {}
        for call in list(self.before.calls()):
            block = str(call.meta["region"])
            if block not in wanted:
                continue
            key = (callee(call), tuple(sorted(wanted[block])))
            if key not in made:
                made[key] = self._cached_body(*key)
            name, values = made[key]
            if not values:
                self.refused.append(f"{block}: {' and '.join(key[1])} add nothing to the stream that could be cached")
                continue
            slots = [self.reuse.slots(v) for v in values]
            control = self.reuse.control()
            node = self.e[call]
            more = [s for group in slots for s in group] + ([control] if control is not None else [])
            old = len(self.before.functions[callee(call)].results)
            types = [*node.meta["val"], *values]
            results = self.e.call(name, [*call_args(node), *more], types, node.next, block)
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            for group, result in zip(slots, results[old:], strict=True):
                self.reuse.keep(group, result)
            self.regions.extend(f"{block}.{role}" for role in wanted[block])

    def _cached_body(self, name: str, roles: tuple[str, ...]) -> tuple[str, list[Any]]:
        """A copy of a body whose modules of these roles can be predicted; the types of the values it keeps."""
        body = self.before.functions[name]
        modules = [m for m in find_modules(body, self.binding) if m.role in roles]
        if self.o.residual == "yes":
            raise RecipeError("residual=yes fits runs of blocks; a module's value is added to the stream as it is")
        new = f"{name}_{self.name}" if len(roles) > 1 else f"{name}_{self.name}_{roles[0]}"
        with clone_body(body, new, "cache") as e:
            kept: list[fx.Node] = []
            types = [dense_type(m.output.meta["val"]) for m in modules]
            groups = [
                [_formal(e, f"{self.name}_{k}_{i}", t) for i in range(self.o.order + 1)] for k, t in enumerate(types)
            ]
            control = _formal(e, f"{self.name}_weights", coefficients(e, self.o.order)) if self.o.order else None
            for module, slots in zip(modules, groups, strict=True):
                node, at = e[module.output], e[module.output].next
                kept.append(dense(e, node, at))
                guess = predict(e, slots, control, at)
                e.replace(node, e.op(select, kept[-1], guess, self.name, at=at), keep=kept)
            e.set_results([*e.results, *kept])
        self.functions[new] = e.function(new)
        return new, types


def _formal(e: Editor, name: str, value: Any) -> fx.Node:
    return e.placeholder(name, Formal("formal", name), value)
