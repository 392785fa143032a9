"""Which kernels run a quantized model: one step under the profiler of the engine that runs it.

That a program multiplies integers says nothing about the machine: an engine may compute in floating point what it has
no kernel for. ``fast.integer_share(**kwargs)`` (``observe`` here) asks the engine: torch's profiler on eager and
Inductor, the profile that onnxruntime writes. What is planned, without running anything, is in ``explain``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ditopt.codegen.claims import products
from ditopt.errors import BadInput
from ditopt.explanation import count
from ditopt.optimized import OptimizedModule

INTEGER = ("aten::_int_mm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
"""Kernels that multiply 8 bit integers."""


@dataclass(frozen=True)
class Observed:
    """``quantized``: FLOPs of the layers of a step whose weights are quantized, by the program. ``integer``: of the
    integer products that the engine ran, by its profile; ``kernels``: how often it ran each of them. ``why``: a
    sentence on each kind of quantized layer that is no integer product."""

    target: str
    quantized: int
    integer: int
    kernels: Mapping[str, int]
    why: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Part of the quantized layers' FLOPs that ran in integer kernels."""
        return self.integer / self.quantized if self.quantized else 0.0

    def __str__(self) -> str:
        if not self.quantized:
            return f"integer kernels on {self.target}: no layer is quantized"
        ran = ", ".join(f"{n} x {name}" for name, n in self.kernels.items()) or "none"
        said = (
            f"integer kernels on {self.target}: {self.share:.1%} of the {count(self.quantized)}FLOP of quantized "
            f"layers, by its own profile ({ran})"
        )
        return "; ".join((said, *self.why))


def observe(fast: OptimizedModule, *args: Any, **kwargs: Any) -> Observed:
    """Call ``fast`` once, as the first step of a request, and say which integer kernels its engine ran. BadInput where
    ``fast`` is no optimized model. The request that was running is forgotten."""
    if not isinstance(fast, OptimizedModule):
        raise BadInput(f"a {type(fast).__name__} was given; observe takes what ditopt.optimize returned for a module")
    with torch.no_grad():
        fast(*args, **kwargs)  # compiles, and fills what is hoisted
        fast.reset()
        if fast.engine.target == "onnxruntime":
            ran = _of_onnxruntime(fast, args, kwargs)
        else:
            ran = _of_torch(fast, args, kwargs)
    fast.reset()
    made, work, target = Counter(name for name, _ in ran), sum(w for _, w in ran), fast.engine.target
    planned = products(fast.program, target)
    total = sum(p.flops for p in planned)
    why = [f"{p.flops / total:.1%}: {p.reason}" for p in planned if not p.integer]
    if work < sum(p.flops for p in planned if p.integer):
        why.append("the engine ran fewer integer products than were planned for it")
    found = Observed(target, total, work, dict(made), tuple(why))
    fast.engine.observed = str(found)
    return found


def _of_torch(fast: OptimizedModule, args: Any, kwargs: Any) -> list[tuple[str, int]]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
        fast(*args, **kwargs)
    found = [(e.name, e.input_shapes) for e in run.events() if e.name in INTEGER]
    return [(name, 2 * math.prod(left) * right[-1]) for name, (left, right, *_) in found]


def _of_onnxruntime(fast: OptimizedModule, args: Any, kwargs: Any) -> list[tuple[str, int]]:
    from ditopt.runtime.ort import profiled

    with profiled() as events:
        fast(*args, **kwargs)
    return [(name, 2 * math.prod(out) * left[-1]) for name, left, out in events if name in INTEGER]
