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
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditopt.artifact import Plan
from ditopt.capture import CallSpec, Captured, Captures, Off, bind, by_name, held, watched, writes
from ditopt.codegen.build import build, export
from ditopt.errors import BadInput, DitoptWarning, SessionError, StaleWeights
from ditopt.fitted import UNKNOWN, Fitted, guidance_text, latent_text, model_text, scheduler_text
from ditopt.ir.fold import weights_of_constants
from ditopt.ir.program import Program, Role
from ditopt.pipeline import PassResult
from ditopt.recipe import Recipe
from ditopt.release import Release, Shelves
from ditopt.release import check as check_release
from ditopt.rewriting import describe_for, latent_of, rewrite, variants
from ditopt.runtime.load import load_onnx
from ditopt.runtime.memo import fingerprint
from ditopt.runtime.session import Session
from ditopt.target import resolve
from ditopt.valid import Valid, notice

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
        self._captured.holds(found.captured)
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
            export(weights_of_constants(program), folder / "model.onnx", None, rows, **more)
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


class _Snapshot:
    """A model as it was captured: its modules, and the Python values in them that a graph holds fixed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules())  # held, so that no later module is taken for one that is gone
        self._values = {name: _values(module) for name, module in self._modules.items()}
        self._kept: set[str] = set()
        self._tensors: dict[str, tuple[Tensor, int | None]] = {}

    def holds(self, captured: Captured) -> None:
        """Watch the tensors in plain attributes that this graph holds, and nothing that the model keeps for itself."""
        self._kept.update(captured.kept)
        constants = [t for n, t in captured.program.params.items() if n.startswith("const.")]
        for name, value in held(self._model) if constants else ():
            if isinstance(value, Tensor) and any(_equal(value, t) for t in constants):
                self._tensors[name] = value, writes(value)

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
                # what was not there when the model was captured is in no graph
                known = [k for k in {**before, **now} if k in before or hasattr(type(module), k)]
                names = (f"{path}.{k}".lstrip(".") for k in known if now.get(k) != before.get(k))
                if name := next((n for n in names if not self._keeps(n)), ""):
                    return name
        if not self._tensors:
            return ""
        live = dict(held(self._model))
        return next((n for n, (t, w) in self._tensors.items() if live.get(n) is not t or writes(t) != w), "")

    def _keeps(self, name: str) -> bool:
        return any(kept == name or kept.startswith(f"{name}.") for kept in self._kept)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


_SCALARS = (bool, int, float, str, Enum)
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
