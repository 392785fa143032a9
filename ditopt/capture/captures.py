"""The signatures of one model, captured one after another: each on its own, or from one graph with dynamic sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ditopt.capture.chain import capture
from ditopt.capture.check import check
from ditopt.capture.dynamic import Axes, Mismatch, Template, all_axes, for_export
from ditopt.capture.flat import Flat, shared_copy
from ditopt.capture.graph import written
from ditopt.capture.job import Captured, Job, refuse_packing
from ditopt.capture.spec import CallSpec
from ditopt.errors import BadInput, CaptureError
from ditopt.ir.program import Role

SHAPES = 3
"""Unless it is asked for or forbidden, a graph with dynamic sizes is made when so many shapes of a model were seen."""

TEMPLATES = 3
"""Graphs with dynamic sizes that are tried for calls that differ in sizes only."""


Sizes = tuple[tuple[int, ...], ...]
"""The shape of each tensor of a call."""


class Captures:
    """Captures the signatures of ``model``. ``roles`` and ``weights`` are those of ``capture``.

    ``dynamic``: whether a graph with dynamic sizes is made at the first call (True), never (False), or when the third
    shape comes (None). What does not fit it is captured on its own, and the notes say why. BadInput for anything else.
    """

    def __init__(
        self,
        model: nn.Module,
        roles: Mapping[str, Role] | None = None,
        weights: Collection[str] = (),
        dynamic: bool | None = None,
    ) -> None:
        if dynamic not in (True, False, None):
            raise BadInput(
                f"dynamic={dynamic!r} given; expected True (one graph for all shapes, from the first call on), False "
                "(a graph for each shape) or None (one graph from the third shape on)"
            )
        self.model, self.roles, self.weights, self.dynamic = model, dict(roles or {}), weights, dynamic
        self._families: dict[tuple[object, ...], _Family] = {}

    def take(self, spec: CallSpec, tensors: Sequence[Tensor]) -> Captured:
        """The signature of ``spec``, as ``capture`` gives it."""
        family = self._families.setdefault(spec.family, _Family())
        family.shapes[spec.sizes] = None
        job = Job(self.model, spec, tensors, self.roles, self.weights)
        why: list[str] = []
        if not job.fake and (self.dynamic or (self.dynamic is None and len(family.shapes) >= SHAPES)):
            found = self._from_template(job, family, why)
            if found is not None:
                return dataclasses.replace(found, notes=(*why, *found.notes))
        captured = capture(self.model, spec, tensors, self.roles, self.weights)
        family.exact &= not any("within rounding" in n for n in captured.notes)
        return dataclasses.replace(captured, notes=(*why, *captured.notes))

    def forget(self) -> None:
        """Start anew: the model is another one."""
        self._families.clear()

    def _from_template(self, job: Job, family: _Family, why: list[str]) -> Captured | None:
        """From a graph with dynamic sizes that is there, else from a new one; None, with the reasons in ``why``, where
        neither fits."""
        for template in family.templates:
            try:
                return _specialised(job, template, family.exact)
            except (Mismatch, CaptureError) as error:
                why.append(f"graph with dynamic sizes ({template.words()}): {error}")
        example, axes = family.example(job)
        if failed := family.failure(example, axes):
            why += failed
            return None
        if len(family.tried) >= TEMPLATES:
            last = f" (the last: {family.tried[-1].why})" if family.tried[-1].why else ""
            why.append(f"{TEMPLATES} graphs with dynamic sizes were tried for calls like this; no more are made{last}")
            return None
        said = ""
        try:
            template = _exported(job, example, axes)
            family.templates.append(template)
            return _specialised(job, template, family.exact)
        except (Mismatch, CaptureError) as error:
            said = f"no graph with dynamic sizes: {error}"
            why.append(said)
            return None
        finally:
            family.tried.append(_Try(example, axes, said))


@dataclass(frozen=True)
class _Try:
    """A graph with dynamic sizes that was made, or was not: ``why``."""

    sizes: Sizes
    axes: Axes
    why: str


@dataclass
class _Family:
    """Calls of one model that differ in the sizes of their tensors only.

    ``exact``: all that was captured so far equals the model bit for bit.
    """

    shapes: dict[Sizes, None] = field(default_factory=dict)
    templates: list[Template] = field(default_factory=list)
    tried: list[_Try] = field(default_factory=list)
    exact: bool = True

    def failure(self, sizes: Sizes, axes: Axes) -> list[str]:
        """Why another graph from an example of these ``sizes`` would not help, where it would not."""
        for one in self.tried:
            if one.sizes == sizes and (one.axes == axes or (not one.why and _covers(one.axes, axes))):
                return [one.why or "another one from the same example would be no other"]
        return []

    def example(self, job: Job) -> tuple[Sizes, Axes]:
        """The shapes to make a graph from, and which of their sizes shall be symbols: those that varied so far, of one
        call all. A size of one is a constant for torch.export, so shapes are preferred in which no such size is one."""
        spec = job.spec
        axes = {
            i: found
            for i, size in enumerate(spec.sizes)
            if (found := tuple(d for d in range(len(size)) if len({s[i][d] for s in self.shapes}) > 1))
        }
        if not axes:
            return spec.sizes, all_axes(spec, job.weights)
        usable = [s for s in self.shapes if all(s[i][d] > 1 for i, found in axes.items() for d in found)]
        return (spec.sizes if not usable or spec.sizes in usable else usable[-1]), axes


def _covers(axes: Axes, others: Axes) -> bool:
    return all(set(found) <= set(axes.get(i, ())) for i, found in others.items())


def _exported(job: Job, sizes: Sizes, axes: Axes) -> Template:
    """A graph with dynamic sizes, of an example with these ``sizes``."""
    # The values do not matter: nothing but types is traced. New tensors all the same, because torch.export marks those
    # that it gets as dynamic, and a later static export would find the marks.
    made = [
        t.detach() if t.shape == torch.Size(size) else torch.zeros(size, dtype=t.dtype, device=t.device)
        for size, t in zip(sizes, job.tensors, strict=True)
    ]
    job = dataclasses.replace(job, tensors=made)
    flat = Flat(shared_copy(job.model), job.spec)
    exported = job.exported(flat, for_export(job.spec, axes))
    if written(exported):
        raise CaptureError(f"{job.name} writes into its own weights during forward")
    refuse_packing(job, flat.packing)
    return Template.of(job.model, exported, job.spec, axes)


def _specialised(job: Job, template: Template, exact: bool) -> Captured:
    """The signature of ``job`` from ``template``. Mismatch or CaptureError where it is not the model's graph, or, for a
    model that is otherwise captured ``exact``, not bit for bit."""
    program = job.program(template.at(job.model, job.spec, job.tensors, job.weights))
    checked = check(job.model, job.spec, program, None, job.tensors)
    if checked.rounding and exact:
        raise Mismatch(
            f"for this shape it equals the model within rounding ({checked.rounding:.1e} relative), not bit for bit"
        )
    notes = (
        f"captured by torch.export with dynamic sizes, once for all shapes: {template.words()}",
        "the sizes of this call are put in as numbers, and the result is checked against the model",
        *checked.notes,
    )
    packing = checked.packing
    return Captured(program, job.spec, packing.pack, packing.structure, notes, kept=packing.kept)
