"""A graph is compared with its model on a second input, which differs from the first in everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditopt.capture.aside import quiet
from ditopt.capture.flat import Flat, Packing, shared_copy
from ditopt.capture.guard import Guard
from ditopt.capture.spec import CallSpec
from ditopt.errors import CaptureError
from ditopt.ir.program import Input, Program, formal


def derive(inputs: Sequence[Input], tensors: Sequence[Tensor]) -> list[Tensor]:
    """A second input of the same signature: floats perturbed, integers resampled, masks changed by one in each row,
    what depends on the shape only (positions, rotary tables) in reverse order."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for item, tensor in zip(inputs, tensors, strict=True):
        cpu = tensor.detach().to("cpu")
        if cpu.numel() == 0:
            new = cpu.clone()
        elif item.role == "shape":
            new = cpu.flip(max(range(cpu.ndim), key=lambda d: cpu.shape[d])) if cpu.ndim else cpu.clone()
        elif item.role == "timestep":
            new = cpu * 0.75 if cpu.is_floating_point() else (cpu * 3) // 4
        elif cpu.dtype is torch.bool or (cpu.ndim >= 2 and bool(((cpu == 0) | (cpu == 1)).all())):
            new = _masked(cpu)
        elif cpu.is_floating_point():
            scale = (cpu.float().std(correction=0) or cpu.float().abs().mean() or torch.ones(())).item()
            new = (cpu.float() + 0.5 * scale * torch.randn(cpu.shape, generator=generator)).to(cpu.dtype)
        else:
            order = torch.randint(cpu.numel(), cpu.shape, generator=generator)
            new = cpu.flatten()[order]
            new = cpu.flatten().roll(1).view(cpu.shape) if torch.equal(new, cpu) else new
        out.append(new.to(tensor.device))
    return out


def _masked(mask: Tensor) -> Tensor:
    """Each row of a mask one shorter, or one longer where it has one entry at most (an empty row is no softmax)."""
    rows = mask.reshape(-1, mask.shape[-1]).clone() if mask.ndim else mask.reshape(1, 1).clone()
    for row in rows:
        found = row.nonzero().flatten()
        if len(found) > 1:
            row[found[-1]] = 0
        elif len(row) > len(found):
            row[(row == 0).nonzero()[-1]] = 1
    return rows.reshape(mask.shape)


def differing(program: Program, guard: Guard | None, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Derived inputs by name for which ``guard`` holds: what it reads stays as it is where it must."""
    names = [i.name for i in program.inputs]
    new = dict(zip(names, derive(program.inputs, [given[n] for n in names]), strict=True))
    if guard is None or not guard.broken(guard.arguments(new)):
        return new
    rolled = new | {n: given[n].roll(1, -1) for n in guard.inputs if given[n].ndim}
    return rolled if not guard.broken(guard.arguments(rolled)) else new | {n: given[n] for n in guard.inputs}


@dataclass(frozen=True)
class Checked:
    """A graph that computes what its model computes: up to ``rounding`` (relative; 0 is bit for bit, else ``cause``
    says why), and how the model packed its output."""

    rounding: float
    packing: Packing
    cause: str = ""

    @property
    def notes(self) -> list[str]:
        """A note where bits differ."""
        if not self.rounding:
            return []
        return [
            f"on a second input the graph equals the model within rounding ({self.rounding:.1e} relative), not bit for "
            f"bit: {self.cause}"
        ]


def check(
    model: nn.Module,
    spec: CallSpec,
    program: Program,
    guard: Guard | None,
    tensors: Sequence[Tensor],
    written: Sequence[str] = (),
) -> Checked:
    """Raise CaptureError where the graph and the model differ on a derived input. ``written``: the weights that forward
    writes into, by dotted name."""
    by_name = dict(zip(spec.names, tensors, strict=True))
    by_name |= differing(program, guard, by_name)
    flat = Flat(shared_copy(model, runs=True, written=written), spec)
    with quiet(), torch.no_grad():
        want = flat(*(by_name[n] for n in spec.names))
        got = results(program, by_name)
        rounding = compare(type(model).__name__, program.outputs, want, got)
        cause = _cause(lambda: flat(*(by_name[n] for n in spec.names)), got) if rounding else ""
    return Checked(rounding, flat.packing, cause)


def _cause(run: Callable[[], Sequence[Tensor]], got: Sequence[Tensor]) -> str:
    """Why ``run``, the model, differs from ``got`` by rounding: the first thing without which it does not."""

    def alike() -> bool:
        return all(torch.equal(a, b) for a, b in zip(run(), got, strict=True))

    with torch.compiler.set_stance("force_eager"):
        if alike():
            return "a part of the model is under torch.compile and rounds otherwise than what it is written in"
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if fused and alike():
            return "on this device eager takes a fused kernel of nn.MultiheadAttention, which no graph can name"
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return (
        "eager takes other kernels there, as nn.TransformerEncoder does, which packs tokens by their mask, or a model "
        "that sets torch.nn.attention.sdpa_kernel"
    )


def results(program: Program, given: Mapping[str, Tensor]) -> list[Tensor]:
    """What ``program`` gives for inputs by name."""
    formals = [formal(p) for p in program.step.placeholders]
    return list(program.module()(*(given[f.ref] if f.kind == "input" else program.params[f.ref] for f in formals)))


def compare(name: str, outputs: Sequence[str], want: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest relative difference of the outputs of a graph from those that the model (a ``name``) gives for a
    second input. CaptureError where it is more than rounding."""
    rounding = 0.0
    for output, a, b in zip(outputs, want, got, strict=True):
        if a.shape != b.shape:
            raise CaptureError(
                f"on a second input the graph of {name} gives {output} the shape {list(b.shape)}, "
                f"the model {list(a.shape)}"
            )
        if not torch.isfinite(a.float()).all():
            continue  # the derived input left the model's domain: it says nothing about the graph
        error = _error(a, b)
        if not error <= _limit(a):
            raise CaptureError(
                f"the graph of {name} differs from the model by {float(error):.1e} (relative) on a second input; the "
                "model's Python depends on tensor values, or it is not deterministic"
            )
        rounding = max(rounding, float(error))
    return rounding


def differ(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two runs of a model gave more than roundings of one result."""
    if [t.shape for t in first] != [t.shape for t in second]:
        return True
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if torch.isfinite(a.float()).all()]
    return not all(_error(a, b) <= _limit(a) for a, b in pairs)


def _error(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-12)


def _limit(a: Tensor) -> float:
    return 1e-5 if a.dtype in (torch.float32, torch.float64) else 2e-2
