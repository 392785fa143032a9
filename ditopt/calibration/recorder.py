"""The engine of a recording: the plain computation, with what caches would keep among its results.

The values are those that ``cache`` would keep: the pass is applied at its neutral setting, and of what it lowers to
only the graph that computes everything is run. That graph returns the model's results and behind them what the slots
would take, so for the Session it is a model without caches, and nothing but the thinned values is kept.
"""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from ditopt.artifact import Executable, Plan
from ditopt.calibration.tape import Tape
from ditopt.capture import Captured
from ditopt.codegen.build import describe, eager
from ditopt.codegen.lower import Lowered, Lowering
from ditopt.engine import Compiled, Engine
from ditopt.errors import BadInput, DitoptWarning, RecipeError
from ditopt.fitted import UNKNOWN, model_text
from ditopt.ir.binding import Binding, bind
from ditopt.ir.cost import step_flops
from ditopt.ir.edit import Editor, replace_functions
from ditopt.ir.program import Program, Role, is_call
from ditopt.ir.select import Selection, select_regions
from ditopt.ir.smoothing import measured
from ditopt.ir.span import modulated_input
from ditopt.pipeline import Context, PassManager, PassResult
from ditopt.recipe import Recipe, Step
from ditopt.rewriting import describe_for, latent_of
from ditopt.runtime.session import Session

MODULATED, MAXIMA = "modulated", "maxima"
WHOLE = ("model", "latent", MODULATED, MAXIMA)
"""Regions that no cache has to find: what the model returns, what it is given, the normed and modulated input of the
first block (TeaCache's signal), and of each input of the linear layers of the blocks the largest magnitude of each
channel over all tokens (SmoothQuant's statistic; ir/smoothing.py names them)."""

STREAMS = "streams"
"""The streams behind each block, as they are: no selector says so, for a cache keeps what a block adds."""

HEAD = "head"
"""The streams behind the last block, as the layers that follow read them."""


class Work:
    """One run over the seeds. ``regions``: what is still to be recorded. ``names``: the selectors recorded in it ->
    names of their values; ``flops`` of them; ``model``: the model's text (ditopt/fitted.py); ``given``: the inputs of
    the model in the running call, where its blocks alone are a graph, which may not read them."""

    def __init__(self, tape: Tape, regions: Sequence[str], roles: Mapping[str, Role] | None) -> None:
        self.tape, self.regions, self.roles = tape, regions, roles
        self.names: dict[str, tuple[str, ...]] = {}
        self.flops: dict[str, int] = {}
        self.model = UNKNOWN
        self.given: dict[str, Tensor] = {}

    def engine(self, model: nn.Module, *_: Any, **__: Any) -> Engine:
        """In the place of ``Engine``; everything else that an engine is told is fixed here."""
        return Recorder(model, self)


class Recorder(Engine):
    """Runs the plain model and hands the values of regions to a tape."""

    def __init__(self, model: nn.Module, work: Work) -> None:
        super().__init__(model, "canonicalize, outline_blocks", "eager", None, work.roles)
        self.session = Session(work.tape.event)
        self._work = work

    def _blocks(self, compiled: Compiled, tensors: Sequence[Tensor], read: Sequence[Tensor]) -> Sequence[Tensor]:
        self._work.given = dict(zip(compiled.captured.spec.names, tensors, strict=True))
        return super()._blocks(compiled, tensors, read)

    def _compile(self, captured: Captured, given: Mapping[str, Tensor]) -> Compiled:
        if not any(i.role == "timestep" for i in captured.program.inputs):
            raise BadInput(
                "this model has no timestep input, so its steps cannot be told apart; pass "
                "roles={'<name>': 'timestep'} where the timestep has another name"
            )
        work = self._work
        if "latent" in work.regions and not any(i.role == "latent" for i in captured.program.inputs):
            raise BadInput("this model has no latent input; pass roles={'<name>': 'latent'} where it has another name")
        context = Context("eager", given=given)
        history = PassManager(self.recipe, context).run(captured.program)
        outlined = history[-1].program
        chosen = _together(outlined, work.regions)
        caches = Recipe(tuple(step for r, s in chosen.items() if r not in WHOLE for step in _neutral(outlined, r, s)))
        for result in PassManager(caches, context).iterate(outlined):
            if not result.applied:
                raise BadInput(f"nothing of {result.text} can be recorded: {'; '.join(result.refused)}")
            if result.refused:
                warnings.warn(f"recording {result.text}: {'; '.join(result.refused)}", DitoptWarning, stacklevel=2)
            history.append(result)
        program, more = _measured(history[-1].program, chosen)
        # all slots count, whichever graphs a target would be given
        full = Lowering(program, None).variant({d.name: "compute" for d in program.decisions})
        results = full.graph.results - len(more)  # the model's own
        values, names = _values(history, full, chosen, results)
        for k, (selector, name) in enumerate(more):
            values[name] = results + k
            names[selector] = (*names[selector], name)
        _told(names)
        work.names = names
        work.flops = _flops(outlined, chosen, names)
        work.model = model_text(self.model)
        manifest = describe(
            full.program,
            [dataclasses.replace(full, graph=dataclasses.replace(full.graph, choices={}, updates=(), results=results))],
            [],
            target="eager",
            **describe_for(captured, history, self.recipe, None),
        )
        run = {full.graph.name: _tapped(eager(full), full, values, work)}
        plan = Plan(manifest, run, self._weights_of(full.program.params), stale=self.shelves.settle)
        return Compiled(captured, tuple(history), plan, self._valid(captured))


def _measured(program: Program, chosen: Collection[str]) -> tuple[Program, list[tuple[str, str]]]:
    """``program`` with further values behind its results, and the selector and the name of each."""
    more: list[tuple[str, str]] = []
    if MAXIMA in chosen:
        program, names = measured(program)
        more += [(MAXIMA, name) for name in names]
    if MODULATED in chosen:
        e, call = Editor(program.step, "record"), next(iter(program.calls()), None)
        found = modulated_input(program, e, call, bind(program)) if call is not None else None
        if found is None:
            raise BadInput("this model has no first block that norms or modulates its input: there is no such value")
        count = program.step.n_results
        e.set_results([*e.results[:count], found, *e.results[count:]])
        program = replace_functions(program, {**program.functions, program.entry: e.function()})
        more.append((MODULATED, MODULATED))
    return program, more


def _together(program: Program, regions: Sequence[str]) -> dict[str, Selection | None]:
    """As many of ``regions`` as do not overlap, in order, each with its selection."""
    chosen: dict[str, Selection | None] = {}
    taken: set[str] = set()
    for region in regions:
        if region in WHOLE:
            chosen[region] = None
            continue
        if "|" in region:
            raise RecipeError(f"region {region!r}: record alternatives as regions of their own")
        (selection,) = select_regions(program, "blocks" if region in (STREAMS, HEAD) else region)
        if not any(a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.") for a in selection.ids for b in taken):
            chosen[region] = selection
            taken.update(selection.ids)
    return chosen


def _neutral(program: Program, region: str, selection: Selection | None) -> list[Step]:
    """The caches whose slots would take the values of ``region`` while every step computes."""
    if region == STREAMS:
        return [Step("cache", {"region": b.id, "every": 1, "residual": "no"}) for b in program.blocks()]
    if region == HEAD:
        return [Step("cache", {"region": "blocks", "every": 1, "residual": "no"})]
    run = selection is not None and selection.kind == "run"
    return [Step("cache", {"region": region, "every": 1, **({"residual": "yes"} if run else {})})]


def _values(
    history: Sequence[PassResult], full: Lowered, chosen: Mapping[str, Selection | None], count: int
) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    """By name of a value the result of ``full`` that is it, and the names by selector. ``count``: results of the
    model itself."""
    program = history[-1].program
    selectors = iter(r for r in chosen if r not in WHOLE for _ in _neutral(program, r, chosen[r]))
    owner = {group[0]: s for d, s in zip(program.decisions, selectors, strict=True) for group in d.slots}
    found: dict[str, int] = {}
    names: dict[str, list[str]] = {r: [] for r in chosen}

    def add(selector: str, name: str, output: int) -> None:
        again = sum(n == name or n.startswith(f"{name}/") for n in found)
        name = f"{name}/{again}" if again else name
        found[name] = output
        names[selector].append(name)

    results = full.program.step.results
    for update in full.graph.updates:
        if update.slot in owner and update.output >= 0:
            selector = owner[update.slot]
            selection = chosen[selector]
            assert selection is not None
            block = _block(results[update.output])
            inside = f"{block}.{selection.role}" if selection.kind == "modules" else selector
            add(selector, block if selector == STREAMS else inside, update.output)
    if "model" in chosen:
        binding = bind(full.program)
        for i, value in enumerate(results[:count]):
            if binding[value] & Binding.LATENT and value.meta["val"].is_floating_point():
                add("model", "model", i)
    if "latent" in chosen:
        names["latent"].append("latent")
    return found, {selector: tuple(listed) for selector, listed in names.items()}


def _told(names: Mapping[str, Sequence[str]]) -> None:
    missing = [selector for selector, listed in names.items() if not listed]
    if missing:
        raise BadInput(f"region {missing[0]!r} has no value that depends on the latent and reaches the model's output")


def _block(node: fx.Node) -> str:
    """The block whose call gives this value."""
    source = node.args[0] if node.target is operator.getitem else None
    return str(source.meta["region"]) if isinstance(source, fx.Node) and is_call(source) else ""


def _flops(
    program: Program, chosen: Mapping[str, Selection | None], names: Mapping[str, tuple[str, ...]]
) -> dict[str, int]:
    known = {r.id: r.flops for r in program.regions} | {"model": step_flops(program)[0], "latent": 0, MODULATED: 0}
    known |= dict.fromkeys(names.get(MAXIMA, ()), 0)
    flops: dict[str, int] = {}
    for selector, selection in chosen.items():
        if selection is not None and selection.kind == "run" and selector != STREAMS:
            known[selector] = sum(known[i] for i in selection.ids)
        flops |= {name: known[name] for name in names[selector] if "/" not in name}
    return flops


def _tapped(run: Executable, full: Lowered, values: Mapping[str, int], work: Work) -> Executable:
    """``run`` that hands what it computes to the tape. Its further results are nothing to the Session."""
    program, keeps_latent = full.program, "latent" in work.names
    times = [i.name for i in program.inputs if i.role == "timestep"]

    def tapped(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs = run(inputs)
        given = work.given | {f.ref: v for f, v in zip(full.graph.inputs, inputs, strict=True) if f.kind == "input"}
        latent = latent_of(program, given)
        time = next((float(given[n].detach().double().max()) for n in times if n in given), float("nan"))
        kept = {name: outputs[i] for name, i in values.items()}
        if keeps_latent and latent is not None:
            kept["latent"] = latent
        work.tape.hold(kept, latent, time)
        return outputs

    return tapped
