"""The rewrite behind the pass ``cache``: values that leave a region are kept from step to step and predicted.

A Caching edits one Program for one decision: it collects the regions, the slots of what is kept of them, the signal by
which the host decides, and the tables that correct predictions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx

from ditopt.errors import RecipeError
from ditopt.ir.binding import Binding, bind
from ditopt.ir.correct import Correction
from ditopt.ir.edit import Editor, prune, replace_functions
from ditopt.ir.gram import inner_products
from ditopt.ir.learned import Learned
from ditopt.ir.live import decided_by
from ditopt.ir.modules import find_modules, name_of
from ditopt.ir.outline import clone_body
from ditopt.ir.program import (
    Decision,
    Formal,
    Function,
    Interval,
    Predictor,
    Program,
    Region,
    Rule,
    TensorType,
    call_args,
    callee,
    formal,
    is_call,
    owner,
)
from ditopt.ir.reuse import Reuse, Store, dense, dense_type, encode, encoded_types, guess, stored
from ditopt.ir.select import Selection
from ditopt.ir.signals import SIGNALS, Signal, Site
from ditopt.ir.span import Span, latent_like, modulated_input
from ditopt.ops import select

aten = torch.ops.aten


_HOLD = Predictor()


@dataclass(frozen=True)
class Keeping:
    """What is kept of a region and how it is predicted: see the options of the pass ``cache``. ``watch`` forecasts the
    signal "forecast". ``table``: the weights of a learned predictor, whose order it says. ``corrected``: whether a
    correction is of what was kept, or of what stands in for the region."""

    predictor: Predictor
    residual: Literal["auto", "yes", "no"] = "auto"
    store: Store = "full"
    correction: Path | None = None
    signal: str = ""
    watch: Predictor = _HOLD
    table: Path | None = None
    corrected: Literal["kept", "whole"] = "kept"


class Caching:
    """The rewrite of one decision. ``regions``: what it caches; ``refused``: what it could not, in sentences."""

    def __init__(self, program: Program, options: Keeping) -> None:
        self.o = options
        self.before = program
        self.name = f"cache{len(program.decisions)}"
        self.regions: list[str] = []
        self.refused: list[str] = []
        self.binding = bind(program)
        self.functions: dict[str, Function] = {}
        self.e = Editor(program.step, "cache")
        self.learned = Learned(self.e, self.name, options.table) if options.table else None
        self.correction = Correction(self.e, self.name, options.correction) if options.correction else None
        self.tables = self.learned or self.correction
        self.predictor = options.predictor
        if self.learned is not None:
            self.predictor = dataclasses.replace(self.predictor, order=self.learned.window - 1)
        self.reuse = Reuse(self.e, self.name, self.predictor, options.store)
        self._kept: list[tuple[fx.Node, list[list[fx.Node]]]] = []
        self._own: list[int] = []  # which of them belong to the stream of the latent, as far as that is known
        self._base: fx.Node | None = None  # the stream of the latent that enters the region
        self._spare: fx.Node | None = None  # one that depends on the latent, where none is known to be its stream
        self._start: fx.Node | None = None  # the same stream before the first block

    def apply(self, selections: Sequence[Selection]) -> None:
        """Cache what ``selections`` select."""
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

    def program(self, schedule: Interval, rule: Callable[[str, Signal], Rule] | None = None) -> Program:
        """The rewritten Program; ``rule`` says how the signal in a slot is read, where there is one."""
        asked = None
        if self.o.signal and rule is not None:
            found = SIGNALS[self.o.signal](self._site())
            slot = self.reuse.slot("signal", found.node.meta["val"])
            self.reuse.update(slot, found.node, found.when)
            asked = rule(slot.meta["formal"].ref, found)
        gram = inner_products(self.reuse, self._kept) if self.predictor.basis == "dmd" else ""
        earlier = self._guard()
        self.reuse.finish(self.before.step.state_out)
        decision = Decision(
            self.name,
            tuple(self.regions),
            schedule,
            self.predictor,
            tuple(self.reuse.groups),
            self.reuse.weights,
            asked,
            self.tables.row if self.tables else "",
            self.tables.steps if self.tables else 0,
            gram,
            reads=self.learned.reads if self.learned else (),
        )
        step = self.e.function()
        body = {str(n.meta["region"]): callee(n) for n in step.graph.nodes if is_call(n)}
        out = replace_functions(self.before, {**self.functions, self.before.entry: step})
        regions = [dataclasses.replace(r, function=body[r.id]) if r.id in body else r for r in out.regions]
        if "model" in self.regions and not regions:  # a model without repeated blocks still has an output
            regions = [Region("model", "model", "")]
        made = prune(
            out.replace(
                params={**out.params, **(self.tables.params if self.tables else {})},
                state=(*out.state, *self.reuse.types),
                decisions=(*earlier, decision),
                regions=tuple(regions),
            )
        )
        _measurable(made, self.o.signal)
        return made

    def _guard(self) -> list[Decision]:
        """What earlier decisions leave for the next step stays as it was where this one skips what they are made of;
        these decisions, knowing it."""
        step = self.before.step
        held = {formal(p).ref: self.e[p] for p in step.placeholders if formal(p).kind == "state"}
        results = list(self.e.results)
        guarded = set()
        for k, slot in enumerate(step.state_out, step.n_results):
            if "model" in self.regions and slot in held:
                results[k] = self.e.op(select, results[k], held[slot], self.name)
                guarded.add(owner(slot))
        self.e.set_results(results)
        return [
            dataclasses.replace(d, needs=(*d.needs, self.name)) if d.name in guarded else d
            for d in self.before.decisions
        ]

    # -- one value -------------------------------------------------------------------------------------------------

    def _cached(self, value: fx.Node, base: fx.Node | None) -> fx.Node:
        """What readers of ``value`` read from now on; with ``base`` the difference to it is kept."""
        value = dense(self.e, value, value.next)
        at = max([value, *([base] if base is not None else [])], key=list(self.e.graph.nodes).index).next
        kept = value if base is None else self.e.op(aten.sub.Tensor, value, base, at=at)
        slots = self.reuse.slots(kept.meta["val"])
        whole = self.o.corrected == "whole"
        told = self._told(self.e, slots, kept.meta["val"], self.reuse.control(), self._arguments(), at, not whole)
        self._remember(slots, kept, told, at)
        if base is not None:
            told = self.e.op(aten.add.Tensor, base, told, at=at)
        if whole and self.correction is not None:
            told = self.correction.applied(self.e, told, self._arguments(), at)
        return self.e.op(select, value, told, self.name, at=at)

    def _remember(self, slots: list[list[fx.Node]], kept: fx.Node, told: fx.Node, at: fx.Node) -> None:
        chosen = kept
        if self.predictor.window:
            chosen = self.e.op(select, kept, told, self.name, at=at)
        parts = encode(self.e, kept, self.o.store, at)
        moved = parts if chosen is kept else encode(self.e, chosen, self.o.store, at)
        self.reuse.keep(slots, parts, moved)
        self._kept.append((kept, slots))

    def _told(
        self,
        e: Editor,
        slots: list[list[fx.Node]],
        like: Any,
        control: fx.Node | None,
        tables: Sequence[fx.Node],
        at: fx.Node,
        correct: bool = True,
    ) -> fx.Node:
        """What ``slots`` predict, in the entry or in a body; ``correct``: by the tables, where there are any."""
        if self.learned is not None:
            return self.learned.predicted(e, stored(e, slots, like, at), tables, at)
        told = guess(e, slots, like, control, at)
        return told if self.correction is None or not correct else self.correction.applied(e, told, tables, at)

    # -- the signal ------------------------------------------------------------------------------------------------

    def _site(self) -> Site:
        blocks = self.before.blocks()  # others, such as refiners of the text, may be called before them
        first = next((c for c in self.before.calls() if blocks and c.meta["region"] == blocks[0].id), None)
        output = next(
            (r for r in self.before.step.results[: self.before.step.n_results] if self.binding[r] & Binding.LATENT),
            None,
        )
        latent = latent_like(self.before, self.binding, output) if output is not None else None
        computed = self._output_value(output) if output is not None else None
        return Site(
            self.e,
            self.reuse,
            self._base or self._spare,
            self._start,
            lambda: modulated_input(self.before, self.e, first, self.binding) if first is not None else None,
            self.e[latent] if latent is not None else None,
            computed,
            [self._kept[i] for i in self._own] or self._kept,
            self.o.watch,
            len(self.before.blocks()),
        )

    def _output_value(self, output: fx.Node) -> fx.Node:
        """The model's output as this step computes it, whatever the decision."""
        node = self.e.results[self.before.step.results.index(output)]
        return node.args[0] if node.target is select and node.args[2] == self.name else node  # type: ignore[return-value]

    # -- regions ---------------------------------------------------------------------------------------------------

    def _model(self) -> None:
        results = list(self.e.results)
        old = self.before.step.results
        for i in range(self.before.step.n_results):
            if self.binding[old[i]] & Binding.LATENT and old[i].op != "placeholder":
                base = self._input_like(old[i]) if self.o.residual == "yes" else None
                results[i] = self._cached(results[i], base)
        self.e.set_results(results)
        self.regions.append("model")

    def _input_like(self, value: fx.Node) -> fx.Node | None:
        found = latent_like(self.before, self.binding, value)
        if found is None:
            self.refused.append(
                "no latent input has the shape of the output: its value is kept instead of the difference"
            )
        return self.e[found] if found is not None else None

    def _run(self, ids: set[str]) -> None:
        span = Span(self.before, self.binding, ids)
        for value in span.results():
            base = span.entry(value, self.e)
            if self._follow(base, ids):
                self._own.append(len(self._kept))
            if self.o.residual == "no":
                base = None
            elif base is None and self.o.residual == "yes":
                self.refused.append(
                    f"{value.name} continues no input of the run: its value is kept instead of the difference"
                )
            node = self.e[value]
            chosen = self._cached(node, base)
            for reader in [u for u in value.users if u not in span]:
                self.e[reader].replace_input_with(node, chosen) if reader.op != "output" else self._output(node, chosen)
        self.regions.extend(sorted(ids, key=lambda i: int(i.split(".")[1])))

    def _follow(self, base: fx.Node | None, ids: set[str]) -> bool:
        """Note what signals measure: the stream of the latent that enters the first run, and where it began. Whether
        this is it.

        Behind joint attention a stream of text depends on the latent as well; it began without. Where streams are
        joined in front of the run, the one of the latent is taken.
        """
        if base is None or self._base is not None or not self.o.signal:
            return False
        back = {self.e[n]: n for n in self.before.step.graph.nodes if n.op != "output"}
        blocks = [b.id for b in self.before.blocks()]
        front = Span(self.before, self.binding, set(blocks[: min(blocks.index(i) for i in ids)]))
        for stream in map(front.given, _joined(base, back, front)):
            if not self.binding[stream] & Binding.LATENT:
                continue
            computed = stream
            while computed.target in (select, aten.clone.default):
                computed = computed.args[0]  # type: ignore[assignment]
            start = front.entry(computed, self.e) if computed in front else None
            if start is not None and TensorType.of(start.meta["val"]) != TensorType.of(stream.meta["val"]):
                start = None
            began = [] if start is None else _joined(start, back, front)
            if not front.calls or any(self.binding[n] & Binding.LATENT for n in began):
                self._base, self._start = self.e[stream], start
                return True
            self._spare = self._spare or self.e[stream]
        return False

    def _output(self, old: fx.Node, new: fx.Node) -> None:
        n = self.before.step.n_results
        results = self.e.results
        self.e.set_results([*(new if r is old else r for r in results[:n]), *results[n:]])

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
            more = [s for parts in slots for group in parts for s in group]
            more += [c for c in (self.reuse.control(), *self._arguments()) if c is not None]
            old = len(self.before.functions[callee(call)].results)
            types = [*node_types(self.e[call]), *values, *(values if self.predictor.window else [])]
            at = self.e[call].next
            results = self.e.call(name, [*call_args(self.e[call]), *more], types, at, block)
            for user in list(self.e[call].users):
                new: fx.Node = results[user.args[1]]  # type: ignore[index]
                user.replace_all_uses_with(new)
                self._base, self._start = (new if n is user else n for n in (self._base, self._start))
            for k, parts in enumerate(slots):
                kept = results[old + k]
                chosen = results[old + len(values) + k] if self.predictor.window else kept
                encoded = encode(self.e, kept, self.o.store, at)
                moved = encoded if chosen is kept else encode(self.e, chosen, self.o.store, at)
                self.reuse.keep(parts, encoded, moved)
                if kept.meta["val"].shape[:-1] in self._places(call):
                    self._own.append(len(self._kept))
                self._kept.append((kept, parts))
            self.regions.extend(f"{block}.{role}" for role in wanted[block])

    def _places(self, call: fx.Node) -> set[Any]:
        """The shapes, but for the channels, of the streams of a block in which there are tokens of the latent."""
        block = next(r for r in self.before.regions if r.id == call.meta["region"])
        types = {formal(p).ref: p.meta["val"].shape for p in self.before.functions[callee(call)].placeholders}
        return {types[s.formal][:-1] for s in block.streams if s.made_of == "latent"}

    def _arguments(self) -> Sequence[fx.Node]:
        return () if self.tables is None else self.tables.arguments()

    def _cached_body(self, name: str, roles: tuple[str, ...]) -> tuple[str, list[Any]]:
        """A copy of a body whose modules of these roles can be predicted; the types of the values it keeps."""
        body = self.before.functions[name]
        modules = [m for m in find_modules(body, self.binding) if m.role in roles or name_of(m.output) in roles]
        if self.o.residual == "yes":
            raise RecipeError("residual=yes fits runs of blocks; a module's value is added to the stream as it is")
        new = f"{name}_{self.name}" if len(roles) > 1 else f"{name}_{self.name}_{roles[0].replace('.', '_')}"
        with clone_body(body, new, "cache") as e:
            kept: list[fx.Node] = []
            told: list[fx.Node] = []
            types = [dense_type(m.output.meta["val"]) for m in modules]
            values = [encoded_types(e, t, self.o.store) for t in types]
            groups = [
                [
                    [_formal(e, f"{self.name}_{k}_{i}{part}", value) for i in range(self.predictor.size)]
                    for part, value in zip(("", "_scale"), parts, strict=False)
                ]
                for k, parts in enumerate(values)
            ]
            control = _control(e, f"{self.name}_weights", self.predictor) if self.reuse.weights else None
            tables = [_formal(e, f"{self.name}_{t.name}", t.meta["val"]) for t in self._arguments()]
            for module, parts in zip(modules, groups, strict=True):
                node, at = e[module.output], e[module.output].next
                value = dense(e, node, at)
                guessed = self._told(e, parts, value.meta["val"], control, tables, at)
                chosen = e.op(select, value, guessed, self.name, at=at)
                e.replace(node, chosen, keep=[value])
                kept.append(value)
                told.append(chosen)
            e.set_results([*e.results, *kept, *(told if self.predictor.window else [])])
        self.functions[new] = e.function(new)
        return new, types


def _measurable(program: Program, signal: str) -> None:
    """RecipeError where a number that a step measures before it decides would depend on a decision of that step."""
    newest = program.decisions[-1].name
    new = dict(zip(program.step.state_out, program.step.results[program.step.n_results :], strict=True))
    for d in program.decisions:
        found = decided_by(program, new[d.rule.signal]) if d.rule is not None and not d.rule.lag else []
        if not found:
            continue
        behind = found[0]
        if d.name != newest:
            raise RecipeError(
                f"the signal of {d.name} would be measured behind {behind}, another decision of the same step; cache "
                "nothing in front of a region that a signal decides, or decide it by a schedule of its own recipe"
            )
        other = "its own decision" if behind == d.name else f"{behind}, another decision of the same step"
        raise RecipeError(
            f"signal={signal} would be measured behind {other}; "
            "begin that region behind this one, or decide it by a schedule of its own recipe"
        )


def node_types(call: fx.Node) -> list[Any]:
    """The types of a call's results."""
    return list(call.meta["val"])


def _formal(e: Editor, name: str, value: Any) -> fx.Node:
    return e.placeholder(name, Formal("formal", name), value)


def _control(e: Editor, name: str, predictor: Predictor) -> fx.Node:
    with e.mode:
        return _formal(e, name, torch.empty(predictor.size))


def _joined(node: fx.Node, back: Mapping[fx.Node, fx.Node], front: Span) -> list[fx.Node]:
    """The streams, nodes of the Program, that the editable ``node`` joins or is cut from; results of ``front`` are
    streams. ``back``: editable node -> node of the Program; what an edit made joins such nodes."""
    own = back.get(node)
    if own is not None and (own in front or own.target not in (aten.cat.default, aten.slice.Tensor)):
        return [own]
    return [n for a in node.all_input_nodes for n in _joined(a, back, front)]
