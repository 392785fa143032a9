"""The engine behind every road: captures a signature at its first call, rewrites, builds, and runs it in a Session.

``optimize`` wraps an Engine in a module, the torch.compile backend hands one to Dynamo; both run the same passes and
keep the same reports.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditopt.artifact import Manifest, Plan
from ditopt.capture import CallSpec, Captured, Captures, Off, bind, by_name, watched
from ditopt.codegen.build import build, export
from ditopt.codegen.variants import MOST, choices_of, pick, without_skipped, worth
from ditopt.errors import BadInput, DitoptWarning, SessionError, StaleWeights
from ditopt.fitted import (
    UNKNOWN,
    Fitted,
    copies,
    guidance_text,
    latent_text,
    model_text,
    scheduler_text,
    unconditional_half,
)
from ditopt.ir.cost import step_flops
from ditopt.ir.fold import fold_constants
from ditopt.ir.program import Program, Role
from ditopt.pipeline import Context, Guidance, PassManager, PassResult
from ditopt.recipe import Recipe
from ditopt.release import Release, Shelves
from ditopt.release import check as check_release
from ditopt.runtime.load import load_onnx
from ditopt.runtime.memo import fingerprint
from ditopt.runtime.policy import distinct, table, wanted_sets
from ditopt.runtime.session import Session
from ditopt.target import resolve
from ditopt.valid import Valid, notice

HORIZON = 64
"""Steps by which the combinations of a schedule are found where nobody said how many there will be."""

SIGNATURES = 4
"""Captured signatures that an Engine keeps; the least recently used gives way."""


@dataclass(frozen=True)
class Compiled:
    """One signature of a model, ready to run: what was captured, what each pass did, and the Plan."""

    captured: Captured
    history: tuple[PassResult, ...]
    plan: Plan
    valid: Valid

    @property
    def program(self) -> Program:
        """The final Program."""
        return self.history[-1].program if self.history else self.captured.program


class Engine:
    """Runs ``model`` by ``recipe``. ``weights`` names arguments that are weights (see ``capture``); ``dynamic`` is that
    of ``Captures``. ``scheduler()``: that of the loop around the model, None where nobody told."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | str,
        target: str = "auto",
        steps: int | None = None,
        roles: Mapping[str, Role] | None = None,
        weights: Collection[str] | None = None,
        release: Release = "keep",
        dynamic: bool | None = None,
    ) -> None:
        if steps is not None and (type(steps) is not int or steps < 1):
            raise BadInput(f"steps={steps!r} given; expected the number of denoising steps, 1 or more, or None")
        if not isinstance(roles or {}, Mapping):
            raise BadInput(f"roles is a {type(roles).__name__}; expected a dict of input names to roles")
        self.model = model
        self.recipe = Recipe.parse(recipe)
        self.steps = steps
        self.roles = dict(roles or {})
        self.weights = frozenset(weights or ())
        self.piece = weights is not None  # a graph of Dynamo, of which there may be several
        self.captures = Captures(model, self.roles, self.weights, dynamic)
        self.session = Session()
        self.observed = ""  # which integer kernels ran, when they were asked for (ditopt/kernels.py)
        self.target = resolve(target, _place(model)[1])
        check_release(release, self.target)
        self.shelves = Shelves(model, release)
        self.compiled: OrderedDict[int, Compiled] = OrderedDict()  # the least recently used first
        self._count = 0
        self._given: dict[str, Tensor] = {}
        self._place = _place(model)
        self.rescheduled = False  # whether the session will follow other schedules than those of the recipe
        self._captured: _Snapshot | None = None
        self._seen: int | None = None  # the request in which the model was last compared with what was captured
        self.scheduler: Callable[[], Any] = lambda: None
        self._fitted = Fitted(self.recipe.calibrated) if self.recipe.calibrated else None
        self._model_text = UNKNOWN  # as it was when all of its weights were in place

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One step of the model, by its own calling convention."""
        self._check()
        spec, every = bind(self.model, args, kwargs)
        compiled, tensors = self.prepare(spec, every), every
        if compiled.captured.around is not None:
            return self._call_around(compiled, spec, every, args, kwargs)
        if self.weights:
            self._given = {n: t for n, t in zip(spec.names, tensors, strict=True) if n in self.weights}
            tensors = [t for n, t in zip(spec.names, tensors, strict=True) if n not in self.weights]
        try:
            results = self.session.call(compiled.plan, tensors)
        except StaleWeights:  # the session is as before the call: compile the weights of now and repeat it
            self._drop(next(reversed(self.compiled)))
            compiled = self.prepare(spec, every)
            results = self.session.call(compiled.plan, tensors)
        self._look(compiled, spec, every)
        if compiled.captured.put is not None:
            compiled.captured.put(results, by_name(self.model, args, kwargs))
        return compiled.captured.pack(results)

    def _call_around(
        self,
        compiled: Compiled,
        spec: CallSpec,
        tensors: Sequence[Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """One step of a model of which the blocks are compiled: its own forward, with a step of theirs inside. Where
        forward goes another way, what it does with its blocks there is compiled, too."""
        tried: list[Compiled] = []
        captured = 0  # how often the model was captured for this very call
        while True:
            around = compiled.captured.around
            assert around is not None
            try:
                with self.session.whole():
                    out = around.call(args, kwargs, functools.partial(self._blocks, compiled, tensors))
                break
            except Off as off:
                tried, before = [*tried, compiled], self._count
                if captured:
                    raise SessionError(
                        f"forward of {type(self.model).__name__} goes two ways for one call{off.line}: around its "
                        "blocks it must do the same things for the same inputs"
                    ) from None
                compiled = self.prepare(spec, tensors, tried, off.line)
                captured += self._count - before
        self.session.stats.count_outside(around.flops)
        self._look(compiled, spec, tensors)
        return out

    def _blocks(self, compiled: Compiled, tensors: Sequence[Tensor], read: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs of the blocks for what they ``read`` in a call with these ``tensors``."""
        names = [i.name for i in compiled.captured.program.inputs]
        given = dict(zip(names, [*tensors, *read], strict=True))
        if line := compiled.valid.broken(given):
            raise Off(line)
        return self.session.call(compiled.plan, list(given.values()))

    def _look(self, compiled: Compiled, spec: CallSpec, tensors: Sequence[Tensor]) -> None:
        if self._fitted is not None:
            self._fitted.look(self.session, lambda calls: self._running(calls, compiled, spec, tensors))

    def _running(self, calls: int, compiled: Compiled, spec: CallSpec, tensors: Sequence[Tensor]) -> dict[str, str]:
        """What runs, by the keys of ``ditopt.fitted``."""
        steps = self.session.clock.steps or self.steps
        now = {"steps": str(steps or UNKNOWN), "scheduler": scheduler_text(self.scheduler())}
        if not self.weights:  # Dynamo names the weights otherwise
            now["model"] = self._model_text if self.shelves.mode != "keep" else model_text(self.model)
        latent = latent_of(compiled.captured.program, dict(zip(spec.names, tensors, strict=True)))
        if latent is not None:
            now |= {"latent": latent_text(latent), "guidance": guidance_text(calls, latent)}
        return now

    def prepare(
        self, spec: CallSpec, tensors: Sequence[Tensor], tried: Sequence[Compiled] = (), line: str = ""
    ) -> Compiled:
        """The compiled signature of a call; captured and rewritten the first time, and where Python of the model would
        now read other values than those that the graph holds, or, at ``line``, does other things around its blocks than
        in the ``tried`` ones."""
        given = dict(zip(spec.names, tensors, strict=True))
        alike = [n for n, c in reversed(self.compiled.items()) if c.captured.spec.key == spec.key]
        broken = ""
        for number in alike:
            found = self.compiled[number]
            if any(found is c for c in tried):
                continue
            if found.captured.around is None:
                broken = found.valid.broken(given)
            if not broken:
                self.compiled.move_to_end(number)
                return self.compiled[number]
        notice(spec, [c.captured.spec for c in self.compiled.values()], broken, line if tried else None)
        self.shelves.restore()  # the model runs while it is captured
        try:
            found = self._compile(self.captures.take(spec, tensors), given)
        except BaseException:
            self._put_away()
            raise
        self._captured = self._captured or _Snapshot(self.model)
        if self._fitted is not None and self.shelves.mode != "keep" and not self.shelves.freed:
            self._model_text = model_text(self.model)
        if len(self.compiled) >= SIGNATURES:
            self._drop(next(iter(self.compiled)))
        self._count += 1
        self.compiled[self._count] = found
        if not self._put_away() and self.shelves.mode != "keep":
            warnings.warn(
                f"release={self.shelves.mode!r} has no effect: no weight left the loop under recipe "
                f"{str(self.recipe)!r}",
                DitoptWarning,
                stacklevel=3,
            )
        return found

    @contextmanager
    def home(self) -> Iterator[nn.Module]:
        """The model with all of its weights in place; afterwards those that left the loop are put away again."""
        self.shelves.restore()
        try:
            yield self.model
        finally:
            self._put_away()

    def _put_away(self) -> int:
        """Put away the weights that no compiled step reads; how many."""
        if self.shelves.mode == "keep" or self.last is None:
            return 0
        return self.shelves.put([c.plan.manifest for c in self.compiled.values()], self.last.plan.params())

    def _drop(self, number: int) -> None:
        self.session.forget(self.compiled.pop(number).plan)

    @property
    def last(self) -> Compiled | None:
        """The signature used last."""
        return next(reversed(self.compiled.values()), None)

    def refresh(self) -> None:
        """Forget every signature, memo and state: the next call captures the model again."""
        self.shelves.restore()
        self.session.reset()
        self.session.forget()
        self.compiled.clear()
        self.captures.forget()
        self._captured, self._place = None, _place(self.model)

    def _compile(self, captured: Captured, given: Mapping[str, Tensor]) -> Compiled:
        if captured.around is not None and self.target == "onnxruntime":
            captured.refuse_file("run by onnxruntime")
        if captured.around is not None and self.shelves.mode != "keep":
            raise BadInput(
                f"release={self.shelves.mode!r} given, and of this model only the blocks are compiled: the rest of "
                "forward is its own Python and needs its weights; leave release out"
            )
        history = rewrite(captured, self.recipe, self.target, self.steps, self.piece, given)
        program = history[-1].program if history else captured.program
        captured = watched(captured, program, given)
        more = describe_for(captured, history, self.recipe, self.steps)
        if self.target == "onnxruntime":
            return self._exported(captured, history, program, more)
        rows = None if self.rescheduled else variants(program, self.target, self.steps)
        made = build(program, self.target, rows, **more)
        if self.shelves.mode != "keep":
            made.run.update(self.shelves.executables(program, made.manifest, self.session.unwatch))
        weights = self._weights_of(program.params)
        plan = Plan(made.manifest, made.run, weights, stale=self.shelves.settle, more=made.more)
        return Compiled(captured, history, plan, self._valid(captured))

    def _exported(
        self, captured: Captured, history: tuple[PassResult, ...], program: Program, more: dict[str, Any]
    ) -> Compiled:
        """A signature for onnxruntime. Its files hold copies of the weights, which go stale when a weight changes; they
        live as long as the signature does."""
        weights = self._weights_of(program.params)
        before = fingerprint(weights())
        folder = Path(tempfile.mkdtemp(prefix="ditopt-"))
        try:
            rows = variants(program, self.target, self.steps)
            export(fold_constants(program), folder / "model.onnx", None, rows, **more)
            loaded = load_onnx(folder / "model.onnx", self.session).plan
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        plan = replace(loaded, params=weights, stale=lambda: fingerprint(weights()) != before)
        made = Compiled(captured, history, plan, self._valid(captured))
        weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)
        return made

    def _valid(self, captured: Captured) -> Valid:
        return Valid(captured.guard, self._weights_of(captured.guard.params if captured.guard else {}))

    def _weights_of(self, params: Mapping[str, Tensor]) -> Callable[[], Mapping[str, Tensor]]:
        """The weights by name as they are now: looked up in the live model, so that an exchanged parameter is seen."""
        if self.weights:
            return lambda: {**params, **self._given}
        fixed: dict[str, Tensor] = {}
        live: list[tuple[str, dict[str, Any], str]] = []
        for name, tensor in params.items():
            path, _, leaf = name.rpartition(".")
            try:
                owner = self.model.get_submodule(path)
            except AttributeError:
                owner = None
            home = (
                next((d for d in (owner._parameters, owner._buffers) if d.get(leaf) is tensor), None) if owner else None
            )
            if home is None:
                fixed[name] = tensor
            else:
                live.append((name, home, leaf))
        return lambda: {**fixed, **{name: home[leaf] for name, home, leaf in live}}

    def _check(self) -> None:
        if self.weights:
            return  # Dynamo guards the module it traced
        if self._captured is not None and self._captured.exchanged():
            raise SessionError(
                "the model's modules were exchanged after optimize (an adapter was loaded or unloaded?); call "
                "ditopt.optimize again, or refresh() to capture it as it is now"
            )
        request = self.session.clock.running
        if self._captured is not None and (request is None or request != self._seen):
            changed = self._captured.changed()
            if changed:
                raise SessionError(
                    f"{changed} of the model changed after optimize, and the compiled steps hold its old value (an "
                    "adapter was fused, scaled or switched, or an attention processor set?); call ditopt.optimize "
                    "again, or refresh() to capture the model as it is now"
                )
            self._seen = request
        if self.compiled and _place(self.model) != self._place:
            (old_dtype, old_device), (dtype, device) = self._place, _place(self.model)
            raise SessionError(
                f"the model was optimized as {old_dtype} on {old_device} and is now {dtype} on {device}; call "
                "ditopt.optimize again, or move it back"
            )
        if not self.compiled:
            self._place = _place(self.model)


def latent_of(program: Program, given: Mapping[str, Tensor]) -> Tensor | None:
    """The first latent among the inputs ``given`` by name."""
    names = [i.name for i in program.inputs if i.role == "latent"]
    return next((given[n] for n in names if n in given), None)


def guidance_of(program: Program, given: Mapping[str, Tensor]) -> Guidance:
    """What the inputs ``given`` by name show of guidance by a doubled batch."""
    latent = latent_of(program, given)
    if latent is None:
        return Guidance()
    prompts = [given[i.name] for i in program.inputs if i.role == "prompt" and i.name in given]
    return Guidance(copies(latent), unconditional_half(prompts, len(latent)))


class _Snapshot:
    """A model as it was captured: its modules, and the Python values in them that a graph holds fixed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules())  # held, so that no later module is taken for one that is gone
        self._values = {name: _values(module) for name, module in self._modules.items()}

    def exchanged(self) -> bool:
        """Whether a module came, went or was replaced."""
        now = list(self._model.modules())
        return len(now) != len(self._modules) or any(
            a is not b for a, b in zip(now, self._modules.values(), strict=True)
        )

    def changed(self) -> str:
        """The dotted name of a value that changed, or ""."""
        for path, module in self._modules.items():
            now, before = _values(module), self._values[path]
            if now != before:
                names = [k for k in {**before, **now} if now.get(k) != before.get(k)]
                return f"{path}.{names[0]}".lstrip(".")
        return ""


_SCALARS = (bool, int, float, str)
_UNWATCHED = frozenset(
    # nn.Module's own, offload hooks, and what does not matter without gradients
    [*vars(nn.Module()), "forward", "_old_forward", "_hf_hook", "_diffusers_hook", "gradient_checkpointing"]
)


def _values(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that decide what its forward does: numbers and texts, flat containers of them by
    content, and callables (attention processors) by identity."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name in _UNWATCHED:
            continue
        if isinstance(value, _SCALARS):
            found[name] = repr(value)  # NaN differs from itself
        elif isinstance(value, (list, tuple, dict)):
            inner = value.values() if isinstance(value, dict) else value
            if all(isinstance(v, _SCALARS) for v in inner):
                found[name] = repr(value)
        elif callable(value) and not isinstance(value, (nn.Module, type)):
            found[name] = value
    return found


def _place(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return (first.dtype, first.device) if first is not None else (torch.float32, torch.device("cpu"))


def rewrite(
    captured: Captured,
    recipe: Recipe,
    target: str,
    steps: int | None,
    piece: bool = False,
    given: Mapping[str, Tensor] | None = None,
) -> tuple[PassResult, ...]:
    """What the passes of ``recipe`` did, with a DitoptWarning for each that was asked for and had no effect. A graph
    without a timestep that may be a ``piece`` of a model (another may have the time) gets local passes only. ``given``:
    inputs of the first call by name, where they are known."""
    if not any(i.role == "timestep" for i in captured.program.inputs):
        what = (
            "so nothing can be kept from step to step: only local passes run. Where the graph is a part of a model "
            "that Dynamo broke, use ditopt.optimize"
            if piece
            else "so steps are told apart by the latent, inside `with fast.session(steps=...)` or where a pipeline's "
            "scheduler counts them; in other calls nothing is kept from step to step"
        )
        warnings.warn(
            f"this graph has no timestep input, {what}; where the timestep has another name, pass "
            "roles={'<name>': 'timestep'}",
            DitoptWarning,
            stacklevel=5,
        )
        if piece:
            local = Recipe.parse("canonicalize, outline_blocks")
            return tuple(PassManager(local, Context(target, steps)).run(captured.program))
    context = Context(target, steps, lambda: guidance_of(captured.program, given or {}), given or {})
    history = tuple(PassManager(recipe, context).run(captured.program))
    _complain(history)
    return history


def _complain(history: Sequence[PassResult]) -> None:
    """Warn where something that was asked for has no effect."""
    idle = [r for r in history if r.asked and not r.applied]
    everything = bool(history) and len(idle) == len([r for r in history if r.asked])
    for result in idle:
        from ditopt.pipeline import get

        particular = result.text != result.name  # asked for with options
        if everything or particular or get(result.name).contract == "approximate":
            warnings.warn(f"{result.text} changed nothing: {'; '.join(result.refused)}", DitoptWarning, stacklevel=6)


def variants(program: Program, target: str, steps: int | None) -> list[Mapping[str, str]] | None:
    """The combinations of choices that requests of ``steps`` steps take, each to become a step graph; None where
    ``target`` makes any that come, or all. A DitoptWarning where there are more than ``target`` gets graphs for."""
    decisions = program.decisions
    lengths = {len(d.schedule.mask) for d in decisions if d.schedule.mask}
    known = steps or (lengths.pop() if len(lengths) == 1 else None)
    full: Mapping[str, str] = {d.name: "compute" for d in decisions}
    if known is not None and decisions and not any(d.rule is not None for d in decisions):
        rows = distinct(decisions, known)
        kept = [full, *(r for r in rows if r != full)]
        if target == "eager" or len(kept) <= MOST:
            return kept
    elif target == "eager" or 2 ** len(decisions) <= MOST or (known is None and lengths):
        return None
    if known is None:  # the last steps only compute more
        decisions = tuple(replace(d, schedule=replace(d.schedule, last=0)) for d in decisions)
    sets = wanted_sets(decisions, known or HORIZON)
    count = len({frozenset[str](), *sets})
    if count > MOST:
        warnings.warn(
            f"steps may take {count} combinations of what is computed and what is reused, and target {target!r} gets "
            f"{MOST} compiled ones: the others run one that computes more",
            DitoptWarning,
            stacklevel=6,
        )
    return without_skipped(decisions, choices_of(list(full), pick(sets, worth(program), MOST)))


def describe_for(
    captured: Captured, history: Sequence[PassResult], recipe: Recipe, steps: int | None
) -> dict[str, Any]:
    """Manifest fields that the lowering does not know."""
    plain = next((r.program for r in history if r.program.blocks()), captured.program)
    total, blocks = step_flops(plain)
    final = history[-1].program if history else captured.program
    return {
        "recipe": str(recipe),
        "structure": captured.structure,
        "steps": (steps or 0) if final.decisions else 0,
        "full_flops": total,
        "full_block_flops": blocks,
        "extra": {"signature": list(captured.spec.arguments), "constants": _constants(captured.spec)},
    }


def _constants(spec: CallSpec) -> dict[str, Any]:
    """What the capture saw for arguments that are no tensors, and the defaults of those that were left out, as JSON has
    it. An argument that is None says nothing."""
    return {
        name: str(value) if isinstance(value, (torch.dtype, torch.device)) else value
        for name, value in (*spec.static_items(), *spec.defaults)
        if name != "return_dict" and (value is not None or "." in name)
    }


def schedule_of(
    program: Program, manifest: Manifest, steps: int, timesteps: Sequence[float] | None
) -> list[dict[str, Any]]:
    """The static schedule as data: for each step the graph to run, and the numbers of its control inputs."""
    rows = []
    for row in table(program.decisions, steps, timesteps, manifest.graphs):
        graph = next(g for g in manifest.graphs if dict(g.choices) == dict(row.choices))
        weights: dict[str, list[float]] = {d.weights: list(row.weights[d.name]) for d in program.decisions if d.weights}
        weights |= {d.row: [row.step] for d in program.decisions if d.row}
        rows.append({"graph": graph.name, "weights": weights})
    return rows
