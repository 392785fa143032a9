"""The chain of ways to capture one signature, from the plainest on; each step down says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ditopt.capture import where
from ditopt.capture.aside import as_written, quiet
from ditopt.capture.blockwise import blockwise
from ditopt.capture.check import check
from ditopt.capture.flat import Flat, Packing, shared_copy
from ditopt.capture.graph import Untraceable, written
from ditopt.capture.guard import Decided, Guard, split
from ditopt.capture.job import Captured, Job, first_line, refuse_packing
from ditopt.capture.observe import block_paths
from ditopt.capture.outside import Outside
from ditopt.capture.replay import Lost, Recorder, Replayer
from ditopt.capture.spec import CallSpec
from ditopt.capture.tracer import record
from ditopt.errors import CaptureError
from ditopt.ir.program import Program, Role


class _Unseen(Untraceable):
    """A run was seen to look at no value."""


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

    Five ways are tried: torch.export; the same with the values that Python looks at replayed as constants, under a
    guard (``replay``); that with the modules that look at the latent as operators (``outside``); a record of a real
    run, with the same guard (``tracer``); all of these for the blocks alone, with the rest of forward left to Python
    (``blockwise``). The notes say why each step down was taken. Raises CaptureError when the model cannot be captured
    (with the model's own line) or when the graph does not compute what the model computes on a derived input.
    """
    job = Job(model, spec, tensors, roles or {}, weights)
    if job.fake:
        return _plain(job)
    why: list[str] = []
    try:
        return _whole(job, why, verify)
    except Untraceable as error:
        if job.weights:
            raise  # a graph of Dynamo has no modules
        stopped = error
    try:
        return blockwise(job, lambda blocks: _whole(blocks, [], verify), why, verify)
    except CaptureError as error:
        raise CaptureError(f"{stopped} Nor can its blocks be captured alone: {error}") from stopped


def _whole(job: Job, why: list[str], verify: bool) -> Captured:
    """All of the model as one graph."""
    captured = _stepwise(job, why)
    if not verify:
        return captured
    checked = check(job.model, job.spec, captured.program, captured.guard, job.tensors, captured.state)
    return dataclasses.replace(captured, notes=(*captured.notes, *checked.notes))


def _stepwise(job: Job, why: list[str]) -> Captured:
    """By the plainest way that serves; the notes, and ``why``, say why those before it did not."""
    try:
        return _plain(job)
    except Untraceable as error:
        stopped = error
    why.append(f"torch.export alone: {stopped}")
    try:
        return _watched(job, why)
    except Decided as error:
        why.append(f"torch.export with values as constants: {error}")
        why.append(
            "a module that stays Python, or a recording of a run: no help, because forward looks around its blocks and "
            "a recording would hold the same values"
        )
        raise
    except Untraceable as error:
        lost = isinstance(error.__cause__, Lost)
        last = stopped if lost or isinstance(error, _Unseen) else error
        why.append(f"torch.export with values as constants: {error.__cause__ if lost else error}")
    try:
        return _recorded(job, why)
    except Untraceable as error:
        why.append(f"a recording of a run: {error}")
        if isinstance(error, Decided):
            raise
        raise last from error


def _plain(job: Job) -> Captured:
    """By torch.export alone."""
    flat = Flat(shared_copy(job.model), job.spec)
    program, lowered = job.export(flat)
    return _captured(job, program, flat.packing, ["captured by torch.export"], lowered)


def _watched(job: Job, why: Sequence[str]) -> Captured:
    """By torch.export with what a run was seen to look at: values as constants, and the modules that look at the latent
    as operators. ``why``: not without."""
    outside = Outside({})
    while True:
        twin = shared_copy(job.model, runs=True)
        recorder = Recorder(twin)
        outside.observe(twin, recorder)
        try:
            with quiet(), as_written(), torch.no_grad():
                Flat(twin, job.spec, lambda noted=recorder: noted)(*job.tensors)  # type: ignore[misc]
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(_fails(job.name, error)) from error
        if not recorder.reads and not outside.paths:
            raise _Unseen("no function of torch hands Python one outside of tracing")
        try:
            return _replayed(job, recorder, outside, why)
        except Decided as error:
            if outside.paths or not _around(job).isdisjoint(r.module for r in error.reads):
                raise  # too little would be left for a graph
            outside = Outside({r.module: r.line for r in error.reads})


def _around(job: Job) -> set[str]:
    """Paths of the modules that hold all of the model's blocks, and of blocks that are no use outside of the graph."""
    groups = [job.blocks] if job.blocks else block_paths(job)
    return {"", *job.blocks, *(path[:i] for path in chain(*groups[:1]) for i, c in enumerate(path) if c == ".")}


def _replayed(job: Job, recorder: Recorder, outside: Outside, why: Sequence[str]) -> Captured:
    """By torch.export with the values that Python looks at as constants, and with the modules ``outside`` as operators.
    ``why``: not without."""
    replayer = Replayer(recorder.reads)
    twin = shared_copy(job.model)
    outside.place(twin)
    flat = Flat(twin, job.spec, lambda: replayer, lambda: replayer.observed)
    program, lowered = job.export(flat, lambda: len(replayer.seen))
    program, guard = split(job.name, program, replayer.seen)
    ways = [f"{_values(len(replayer.seen))} that Python reads as constants"] if replayer.seen else []
    ways += [f"{len(outside.paths)} modules that stay Python"] if outside.paths else []
    notes = [*why, f"captured by torch.export with {' and '.join(ways)}"]
    if outside.paths:
        notes.append(
            f"{', '.join(sorted(outside.paths))} stay Python, one operator each, because what Python looks at there "
            f"depends on the latent or the timestep:{', '.join(dict.fromkeys(outside.paths.values()))}; such a model "
            "runs in this process, and cannot be written to a file or as ONNX"
        )
    if replayer.seen:
        notes.append(_guarded(guard))
    return _captured(job, program, flat.packing, notes, lowered, guard)


def _recorded(job: Job, why: Sequence[str]) -> Captured:
    """From a record of what a real run does at the dispatcher. ``why``: not otherwise."""
    try:
        run = record(job.model, job.spec, job.tensors)
    except Exception as error:
        raise Untraceable(f"{job.name} cannot be recorded{where.of_error(error)}: {first_line(error)}") from error
    refuse_packing(job, run.packing)
    exported = job.exported(run)
    run.packing.state = tuple(written(exported))
    program, guard = split(job.name, job.program(exported, len(run.reads)), run.reads)
    read = f"{_values(len(run.reads))} that Python reads as constants"
    said = f"captured by recording a run at the dispatcher, with {read}"
    notes = [*why, said, *([_guarded(guard)] if run.reads else [])]
    return _captured(job, program, run.packing, notes, 0, guard)


def _guarded(guard: Guard | None) -> str:
    if guard is None:
        return "the values are the same in every call, so nothing is guarded"
    lines = ", ".join(dict.fromkeys(r.line.removeprefix(" at ") for r in guard.reads))
    return (
        f"guarded: {_values(len(guard.reads))}, from {', '.join(guard.inputs) or 'weights'}, read at {lines}; "
        "where another is read the model is captured again"
    )


def _values(count: int) -> str:
    return f"{count} value{'s' * (count != 1)}"


def _captured(
    job: Job, program: Program, packing: Packing, notes: list[str], lowered: int, guard: Guard | None = None
) -> Captured:
    if lowered:
        notes.append(f"{lowered} flex_attention calls written out as the attention that PyTorch runs uncompiled")
    if packing.written:
        notes.append(f"writes {len(packing.written)} tensors into its arguments, {packing.written[0]} and so on")
    if packing.kept:
        notes.append(f"keeps {', '.join(packing.kept[:3])} from call to call; the graph makes it anew")
    put = packing.put if packing.writes else None
    return Captured(
        program,
        job.spec,
        packing.pack,
        packing.structure,
        tuple(notes),
        guard,
        put,
        tuple(packing.written),
        packing.kept,
        state=packing.state,
    )


def _fails(name: str, error: Exception) -> str:
    return (
        f"{name} itself fails for these inputs{where.of_error(error)}: {first_line(error)}. Call it as the plain "
        "model can be called."
    )
