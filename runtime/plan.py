"""Ready: a Plan with what a Session derives from it once: roles, schedules, memos, slots, control tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ditopt.artifact import Plan, StepGraph
from ditopt.errors import DitoptWarning, SessionError
from ditopt.ir.program import Decision, Interval, Rows, TensorType
from ditopt.runtime.memo import Memos
from ditopt.runtime.policy import Schedule, fit, schedule, schedule_of

_AGAIN = "optimize the model again for these inputs"


class Ready:
    """``decisions``: those of the manifest, or rescheduled; ``names``: input names by role; ``graphs``: step and memo
    graphs by name; ``models``: slots that outlive requests; ``lasting``: their values; ``shared``: slots that the first
    call of a step writes for the others; ``guides``: decisions about guidance; ``reads_time``: whether every
    call has to read the timestep; ``steps``: of the request whose ``rules`` were asked last."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.manifest = plan, plan.manifest
        self.decisions = plan.manifest.decisions
        self.memos = Memos(plan.manifest)
        self.graphs = {g.name: g for g in plan.manifest.every_graph}
        self.names: dict[str, list[str]] = {role: [] for role in ("latent", "timestep", "prompt", "shape")}
        for i in plan.manifest.inputs:
            self.names[i.role].append(i.name)
        self.models = {s.name for s in plan.manifest.state if s.lifetime == "model"}
        self.shared = {s.name for s in plan.manifest.state if s.lifetime == "step"}
        self.guides = [d for d in plan.manifest.decisions if d.guidance]
        self.lasting: dict[str, Tensor] = {}
        self._variants = list(plan.manifest.graphs)
        self.reads_time = self.memos.reads_time() or any(
            p.time == "timestep" and p.basis != "hold"
            for d in plan.manifest.decisions
            for p in (d.predictor, *([d.rule.predictor] if d.rule else []))
        )
        self.reads_time = self.reads_time or any(d.schedule.timed for d in plan.manifest.decisions)
        self._controls = {name: t for d in plan.manifest.decisions for name, t in d.controls.items()}
        self._types = {s.name: s.type for s in plan.manifest.state}
        self._rules: dict[int | None, dict[str, Schedule]] = {}
        self.steps: int | None = None
        self._late = False
        self._device: torch.device | None = None
        self._control: dict[tuple[str, tuple[float, ...], torch.device], Tensor] = {}

    def check_masks(self, masks: Mapping[str, str]) -> None:
        """SessionError where these masks, by decision, cannot be followed."""
        unknown = set(masks) - {d.name for d in self.manifest.decisions}
        if unknown:
            known = ", ".join(d.name for d in self.manifest.decisions) or "none"
            raise SessionError(f"there is no decision {', '.join(sorted(unknown))}; there are: {known}")
        for name, mask in masks.items():
            schedule(Interval(mask=mask), len(mask), name)

    def reschedule(self, masks: Mapping[str, str], fitted: Mapping[str, Rows]) -> None:
        """Follow these masks, by decision, in place of the schedules that the model was compiled with, and these
        coefficients in place of its predictors' own (``Predictor.fitted``)."""
        self.check_masks(masks)

        def other(d: Decision) -> Decision:
            predictor = replace(d.predictor, fitted=fitted.get(d.name, ()))
            return replace(d, schedule=Interval(mask=masks[d.name]), predictor=predictor)

        self.decisions = tuple(other(d) if d.name in masks else d for d in self.manifest.decisions)
        self._rules = {}

    def by_role(self, given: Mapping[str, Tensor], role: str) -> list[Tensor]:
        """The inputs of one role, in the manifest's order."""
        return [given[name] for name in self.names[role]]

    def check(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inputs by name, with the strides that the graphs were compiled for; SessionError where they do not fit."""
        wanted = self.manifest.inputs
        if len(inputs) != len(wanted):
            raise SessionError(
                f"{len(inputs)} inputs given, {len(wanted)} expected ({', '.join(i.name for i in wanted)})"
            )
        given: dict[str, Tensor] = {}
        for spec, value in zip(wanted, inputs, strict=True):
            tensor = spec.type.pairs(value)
            if tensor.dtype != spec.type.dtype or tuple(tensor.shape) != spec.type.shape:
                raise SessionError(
                    f"input {spec.name!r} is {tensor.dtype}{list(tensor.shape)}, this plan was compiled for "
                    f"{spec.type.dtype}{list(spec.type.shape)}; {_AGAIN}"
                )
            given[spec.name] = _strided(tensor, spec.type)
        device = self.device(given)
        self._device = self._device or torch.device(self.manifest.extra.get("device", device))
        if device.type != self._device.type or (self._device.index is not None and device != self._device):
            raise SessionError(f"inputs are on {device}, this plan runs on {self._device}; {_AGAIN}")
        return given

    def device(self, given: Mapping[str, Tensor]) -> torch.device:
        """Where the step runs: the device of the latent."""
        for name in [*self.names["latent"], *given]:
            return given[name].device
        return torch.device("cpu")

    def rules(self, declared: int | None) -> dict[str, Schedule]:
        """The schedule of each decision for a request of ``declared`` steps (None: as many as the manifest says)."""
        planned = self.manifest.steps or max((len(d.schedule.mask) for d in self.decisions), default=0) or None
        self.steps = declared or planned
        if self.steps not in self._rules:
            made = {d.name: schedule_of(d, self.steps) for d in self.decisions}
            if declared and planned and declared != planned and made:
                warnings.warn(
                    f"this request runs {declared} steps and the model was optimized for {planned}: the schedule was "
                    f"made again for {declared}; pass steps={declared} to optimize if that is what you want to run",
                    DitoptWarning,
                    stacklevel=5,
                )
            self._rules[self.steps] = made
        return self._rules[self.steps]

    def variant(self, wanted: Mapping[str, str]) -> StepGraph:
        """The step graph for these choices: one made of them where there is, or can be, one; else ``policy.fit``."""
        found = fit(wanted, self._variants)
        if self.plan.more is not None and dict(found.choices) != dict(wanted):
            made = self.plan.more(wanted)
            if made is not None and made not in self._variants:
                self._variants.append(made)
            return made or found
        return found

    def warn_late(self, step: int) -> None:
        """A DitoptWarning, once, if the step lies beyond the declared ones (where schedules compute)."""
        if self._late or self.steps is None or step < self.steps or not self.manifest.decisions:
            return
        self._late = True
        warnings.warn(
            f"step {step} of a request that was declared to have {self.steps} steps: it and those after it compute "
            "everything; declare the true number of steps",
            DitoptWarning,
            stacklevel=5,
        )

    def param(self, params: Mapping[str, Tensor], name: str) -> Tensor:
        """A weight by name."""
        if name not in params:
            raise SessionError(f"weight {name!r} is missing; restore the model or optimize again")
        return params[name]

    def slot(self, slots: Mapping[str, Tensor], name: str, device: torch.device) -> Tensor:
        """The value of a state slot, zeros of its type where nothing was written yet."""
        value = self.lasting.get(name) if name in self.models else slots.get(name)
        if value is not None:
            return value
        type_ = self._types[name]
        if type_.stride is None:
            return torch.zeros(type_.shape, dtype=type_.dtype, device=device)
        return torch.empty_strided(type_.shape, type_.stride, dtype=type_.dtype, device=device).zero_()

    def control(self, name: str, numbers: Sequence[float], device: torch.device) -> Tensor:
        """A control tensor. Its numbers repeat from request to request, so it is kept."""
        key = (name, tuple(numbers), device)
        if key not in self._control:
            if len(self._control) >= 4096:
                self._control.clear()
            self._control[key] = torch.tensor(list(numbers), dtype=self._controls[name].dtype).to(device)
        return self._control[key]


def _strided(tensor: Tensor, type_: TensorType) -> Tensor:
    if type_.stride is None:
        return tensor if tensor.is_contiguous() else tensor.contiguous()
    if tensor.stride() == type_.stride:
        return tensor
    return torch.empty_strided(type_.shape, type_.stride, dtype=type_.dtype, device=tensor.device).copy_(tensor)
