"""The chain of ways to capture a model, from the plainest on; each step down says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditopt._torch import is_fake
from ditopt.capture import flex, where
from ditopt.capture.aside import forgetful, quiet
from ditopt.capture.check import check
from ditopt.capture.flat import Flat, Packing, shared_copy
from ditopt.capture.graph import Untraceable, refuse_symbols, to_program
from ditopt.capture.guard import Decided, Guard, split
from ditopt.capture.outside import Outside
from ditopt.capture.replay import Lost, Recorder, Replayer
from ditopt.capture.spec import CallSpec
from ditopt.errors import BadInput, CaptureError
from ditopt.ir.program import Program, Role


@dataclass(frozen=True)
class Captured:
    """A captured signature: the Program, how calls map to it, how its outputs are packed, and what capture did.

    ``guard``: what must hold of the inputs beyond their signature, where anything must. ``put(results, arguments)``
    writes into the arguments of a call what the model writes into them (a cache of keys and values); None where it
    writes nothing. ``written``: dotted names of the tensors among that, which are results after those of the output.
    """

    program: Program
    spec: CallSpec
    pack: Callable[[Sequence[Tensor]], Any]
    structure: str | tuple[str, ...]
    notes: tuple[str, ...] = ()
    guard: Guard | None = None
    put: Callable[[Sequence[Tensor], Any], None] | None = None
    written: tuple[str, ...] = ()

    def refuse_writes(self, action: str) -> None:
        """BadInput where the model writes tensors into its arguments, which a file cannot. ``action``: "exported"."""
        if self.written:
            raise BadInput(
                f"this call cannot be {action}: it writes {self.written[0]} into its arguments, and a file has nothing "
                "to write it into; give example_inputs of a call that only reads them"
            )


@dataclass(frozen=True)
class _Job:
    """What is captured."""

    model: nn.Module
    spec: CallSpec
    tensors: Sequence[Tensor]
    roles: Mapping[str, Role]
    weights: Collection[str]

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def export(self, flat: Flat, more: Callable[[], int] = lambda: 0) -> tuple[Program, int]:
        """The Program of ``flat``, whose last ``more()`` results are not the model's, and how many flex attentions were
        lowered. Untraceable where tracing stops."""
        try:
            with quiet(), forgetful(), torch.no_grad():
                exported = torch.export.export(flat, _distinct(self.tensors), strict=False)
                refuse_symbols(self.name, exported.graph)
                exported = exported.run_decompositions({})
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable(_stopped(self.name, error)) from error
        if flat.packing.changed:
            raise CaptureError(
                f"{self.name} changes its attribute {flat.packing.changed[0]} during forward; a graph would keep one "
                "value for ever. Make it an input of forward."
            )
        if flat.packing.opaque:
            raise CaptureError(
                f"{self.name} returns a {flat.packing.opaque[0]}, in which ditopt does not look for tensors; return "
                "tensors, or tuples, lists, dicts and dataclasses of them"
            )
        if flat.packing.removed:
            raise CaptureError(
                f"{self.name} takes {flat.packing.removed[0]} out of its arguments during forward; a graph can put "
                "something into them, and take nothing away. Set it to None instead."
            )
        lowered = flex.expand(exported.graph_module)
        program = to_program(self.model, exported, self.spec, self.tensors, self.roles, self.weights, more())
        return program, lowered


def capture(
    model: nn.Module,
    spec: CallSpec,
    tensors: Sequence[Tensor],
    roles: Mapping[str, Role] | None = None,
    weights: Collection[str] = (),
    verify: bool = True,
) -> Captured:
    """Capture ``model`` for the signature of ``spec``.

    ``tensors`` are example values in the order of ``spec.names``; those named in ``weights`` become parameters of the
    Program instead of inputs (a graph from Dynamo takes its weights as arguments). A copy is traced that shares the
    weights; the model itself is not touched.

    Three ways are tried: torch.export; the same with the values that Python looks at replayed as constants, under a
    guard (``replay``); and that with the modules that look at the latent as operators (``outside``). Raises
    CaptureError when the model cannot be traced (with the model's own line) or when the graph does not compute what the
    model computes on a derived input.
    """
    job = _Job(model, spec, tensors, roles or {}, weights)
    fake = any(is_fake(t) for t in [*tensors, *model.parameters(), *model.buffers()])
    captured = _plain(job) if fake else _either(job)
    if verify and not fake:
        notes = check(model, spec, captured.program, captured.guard, tensors)
        captured = dataclasses.replace(captured, notes=(*captured.notes, *notes))
    return captured


def _either(job: _Job) -> Captured:
    try:
        return _plain(job)
    except Untraceable as error:
        stopped = error
    outside = Outside({})
    while True:
        twin = shared_copy(job.model)
        recorder = Recorder(twin)
        outside.observe(twin, recorder)
        try:
            with quiet(), torch.no_grad():
                Flat(twin, job.spec, lambda noted=recorder: noted)(*job.tensors)  # type: ignore[misc]
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(_fails(job.name, error)) from error
        if not recorder.reads and not outside.paths:
            raise stopped
        try:
            return _replayed(job, recorder, outside, stopped)
        except Decided as error:
            if outside.paths or any(not r.module for r in error.reads):
                raise  # the model itself looks: nothing would be left for a graph
            outside = Outside({r.module: r.line for r in error.reads})


def _plain(job: _Job) -> Captured:
    """By torch.export alone."""
    flat = Flat(shared_copy(job.model), job.spec)
    program, lowered = job.export(flat)
    return _captured(job, program, flat.packing, ["captured by torch.export"], lowered)


def _replayed(job: _Job, recorder: Recorder, outside: Outside, stopped: Untraceable) -> Captured:
    """By torch.export with the values that Python looks at as constants, and with the modules ``outside`` as operators.
    ``stopped``: why not without."""
    replayer = Replayer(recorder.reads)
    twin = shared_copy(job.model)
    outside.place(twin)
    flat = Flat(twin, job.spec, lambda: replayer, lambda: replayer.observed)
    try:
        program, lowered = job.export(flat, lambda: len(replayer.seen))
    except Untraceable as error:
        raise (stopped if isinstance(error.__cause__, Lost) else error) from error
    program, guard = split(job.name, program, replayer.seen)
    ways = [f"{_values(len(replayer.seen))} that Python reads as constants"] if replayer.seen else []
    ways += [f"{len(outside.paths)} modules that stay Python"] if outside.paths else []
    notes = [f"torch.export alone: {stopped}", f"captured by torch.export with {' and '.join(ways)}"]
    if outside.paths:
        notes.append(
            f"{', '.join(sorted(outside.paths))} stay Python, one operator each, because what Python looks at there "
            f"depends on the latent or the timestep:{', '.join(dict.fromkeys(outside.paths.values()))}; such a model "
            "runs in this process, and cannot be written to a file or as ONNX"
        )
    if not replayer.seen:
        pass
    elif guard is None:
        notes.append("the values are the same in every call, so nothing is guarded")
    else:
        lines = ", ".join(dict.fromkeys(r.line.removeprefix(" at ") for r in guard.reads))
        notes.append(
            f"guarded: {_values(len(guard.reads))}, from {', '.join(guard.inputs) or 'weights'}, read at {lines}; "
            "where another is read the model is captured again"
        )
    return _captured(job, program, flat.packing, notes, lowered, guard)


def _values(count: int) -> str:
    return f"{count} value{'s' * (count != 1)}"


def _captured(
    job: _Job, program: Program, packing: Packing, notes: list[str], lowered: int, guard: Guard | None = None
) -> Captured:
    if lowered:
        notes.append(f"{lowered} flex_attention calls written out as the attention that PyTorch runs uncompiled")
    if packing.written:
        notes.append(f"writes {len(packing.written)} tensors into its arguments, {packing.written[0]} and so on")
    put = packing.put if packing.writes else None
    return Captured(
        program, job.spec, packing.pack, packing.structure, tuple(notes), guard, put, tuple(packing.written)
    )


def _distinct(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``tensors`` with a copy for each that is there already: torch.export would take two arguments for one."""
    first = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
    return tuple(t if first[id(t)] == i else t.clone() for i, t in enumerate(tensors))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [type(error).__name__])[0][:300]}"


def _fails(name: str, error: Exception) -> str:
    return (
        f"{name} itself fails for these inputs{where.of_error(error)}: {_first_line(error)}. Call it as the plain "
        "model can be called."
    )


def _stopped(name: str, error: Exception) -> str:
    return (
        f"{name} cannot be traced{where.of_error(error)}: {_first_line(error)}. Python that looks at tensor values "
        "cannot become part of a graph; compute it outside forward and pass it in, or use torch.where."
    )
