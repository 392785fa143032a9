"""The last way of capture: the blocks are a graph, and the rest of forward stays the model's own Python.

It is the other way round from ``outside``, where a graph holds modules that stay Python: here Python holds a graph.
The blocks that forward calls in a run are a module of their own (``segment.Blocks``), captured as any model is; forward
runs around them in every step (``deferred.Around``). The Program has the inputs of the model, by which requests and
steps are told apart, and what the blocks read: each of these has a role, too, seen by what it does when the inputs of
one role change. A role that is wrong costs speed and no exactness: hoisted values are found by the content of what they
depend on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ditopt import roles as role_rules
from ditopt.capture.aside import quiet
from ditopt.capture.check import compare, derive, results
from ditopt.capture.deferred import Around, Off
from ditopt.capture.flat import Flat, Packing, shared_copy
from ditopt.capture.job import Captured, Job
from ditopt.capture.observe import LEAST, Found, Observer, block_paths
from ditopt.capture.segment import Blocks
from ditopt.capture.spec import bind
from ditopt.errors import CaptureError
from ditopt.ir.cost import step_flops
from ditopt.ir.program import Input, Role, TensorType

Whole = Callable[[Job], Captured]
"""Captures all of a model as one graph."""


def blockwise(job: Job, whole: Whole, why: Sequence[str], verify: bool = True) -> Captured:
    """Capture the blocks of a model that as a whole is no graph. ``why``: what was tried before, and why it failed.
    CaptureError where the blocks are no graph either."""
    groups = block_paths(job)
    if not groups:
        raise CaptureError(f"it calls no two submodules of one class, or such do less than {LEAST:.0%} of its work")
    first: CaptureError | None = None
    for paths in groups:
        try:
            return _captured(job, paths, whole, why, verify)
        except CaptureError as error:
            first = first or error
    assert first is not None
    raise first


def _captured(job: Job, paths: Sequence[str], whole: Whole, why: Sequence[str], verify: bool) -> Captured:
    observer = Observer(shared_copy(job.model, runs=True), paths)
    observed = observer.watch(job)
    found = next(iter(observer.segments()), None)
    if found is None:
        raise CaptureError(f"between any two of its blocks Python looks at values{observer.interrupted}")
    inputs = _inputs(job, observed)
    around = Around(job.model, found.segment, observer.looked, observer.kept)
    depends = _depends(job, inputs, around, found)
    roles: dict[str, Role] = {name: roles[0] if roles else "shape" for name, roles in depends.items()}
    blocks = Blocks.of(shared_copy(job.model), found.segment)
    spec, tensors = bind(blocks, (), dict(zip(found.segment.names, found.tensors, strict=True)))
    inner = whole(Job(blocks, spec, tensors, roles, (), found.segment.paths))
    program = inner.program.replace(inputs=(*inputs, *inner.program.inputs))
    around.flops = max(observer.flops - step_flops(program)[0], 0)
    notes = [*why, _said(found, observer), _read(depends), *(f"the blocks: {n}" for n in inner.notes)]
    kept = (*observer.kept, *inner.kept)
    made = Captured(program, job.spec, _unpacked, "tuple", tuple(notes), inner.guard, kept=kept, around=around)
    return _checked(job, made, inputs) if verify else made


def _inputs(job: Job, outputs: Sequence[Tensor]) -> tuple[Input, ...]:
    named = list(zip(job.spec.names, job.tensors, strict=True))
    found = role_rules.infer(named, outputs, job.roles)
    return tuple(Input(n, r, TensorType.of(t)) for (n, t), r in zip(named, found, strict=True))


def _depends(job: Job, inputs: Sequence[Input], around: Around, found: Found) -> dict[str, list[Role]]:
    """For each tensor that the blocks read, the roles of the inputs that it changes with, the one that changes most
    often first."""
    on: dict[str, list[Role]] = {name: [] for name in found.segment.names}
    derived = derive(inputs, job.tensors)
    before = around.entries(job.spec, job.tensors)
    kinds: tuple[Role, ...] = ("latent", "timestep", "prompt", "shape")
    for role in kinds:
        if role not in (i.role for i in inputs):
            continue
        new = [b if i.role == role else a for i, a, b in zip(inputs, job.tensors, derived, strict=True)]
        now = around.entries(job.spec, new)
        for i, name in enumerate(on):
            if i not in now or not _same(before.get(i), now[i]):
                on[name].append(role)
    return on


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and bool(torch.equal(a, b))


def _checked(job: Job, captured: Captured, inputs: Sequence[Input]) -> Captured:
    """``captured``, compared with the model on its own input and on one derived of it, at the same time if need be."""
    derived = derive(inputs, job.tensors)
    timed = [a if i.role == "timestep" else b for i, a, b in zip(inputs, job.tensors, derived, strict=True)]
    if not _compared(job, captured, job.tensors):
        raise CaptureError("its forward does other things around them when it is called with the same inputs again")
    if _compared(job, captured, derived) or _compared(job, captured, timed):
        return captured
    note = "on a second input forward goes another way, so that only the blocks themselves were compared on one"
    return dataclasses.replace(captured, notes=(*captured.notes, note))


def _compared(job: Job, captured: Captured, tensors: Sequence[Tensor]) -> bool:
    """Whether forward does on ``tensors`` what was captured. CaptureError where its results are not the model's."""
    assert captured.around is not None
    with quiet(), torch.no_grad():
        want = Flat(shared_copy(job.model, runs=True), job.spec)(*tensors)
        try:
            out = captured.around.call_flat(job.spec, tensors, functools.partial(_run, captured))
        except Off:
            return False
    compare(job.name, [f"out{i}" for i in range(len(want))], want, Packing().note(out))
    return True


def _run(captured: Captured, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    assert captured.around is not None
    given = dict(zip(captured.around.segment.names, tensors, strict=True))
    if captured.guard is not None and (line := captured.guard.broken(captured.guard.arguments(given))):
        raise Off(line)
    return results(captured.program, given)


def _unpacked(values: Sequence[Tensor]) -> Sequence[Tensor]:
    return values


def _said(found: Found, observer: Observer) -> str:
    steps = [s for s in found.segment.steps if s.is_block]
    ends = dict.fromkeys(str(s.callee) for s in (steps[0], steps[-1]))
    between = f" and {found.segment.between} functions between them" if found.segment.between else ""
    return (
        f"captured by blocks: {' .. '.join(ends)} ({len(steps)} calls{between}) are a graph, with "
        f"{found.flops / max(observer.flops, 1):.0%} of the FLOPs; the rest of forward stays Python and runs in every "
        "step; such a model runs in this process, and cannot be written to a file or as ONNX"
    )


def _read(depends: Mapping[str, Sequence[Role]]) -> str:
    parts = []
    for kind in dict.fromkeys(tuple(roles) for roles in depends.values()):
        names = ", ".join(n for n in depends if tuple(depends[n]) == kind)
        parts.append(f"{names} on the {' and the '.join(kind) or 'weights and shapes alone'}")
    return f"the blocks read, and what it depends on: {'; '.join(parts)}"
