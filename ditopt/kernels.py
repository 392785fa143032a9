"""Which kernels run a quantized model: one step under the profiler of the engine that runs it.

That a program multiplies integers says nothing about the machine: an engine may compute in floating point what it has
no kernel for. ``ditopt.kernels.observe`` asks the engine: torch's profiler on eager and Inductor, the profile that
onnxruntime writes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ditopt.errors import BadInput
from ditopt.explanation import count
from ditopt.ir.cost import flops
from ditopt.ir.quantizing import quantized_nodes
from ditopt.optimized import OptimizedModule

INTEGER = ("aten::_int_mm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
"""Kernels that multiply 8 bit integers."""


@dataclass(frozen=True)
class Observed:
    """``quantized``: FLOPs of the layers of a step whose weights are quantized, by the program. ``integer``: of the
    integer products that the engine ran, by its profile; ``kernels``: how often it ran each of them."""

    target: str
    quantized: int
    integer: int
    kernels: Mapping[str, int]

    @property
    def share(self) -> float:
        """Part of the quantized layers' FLOPs that ran in integer kernels."""
        return self.integer / self.quantized if self.quantized else 0.0

    def __str__(self) -> str:
        ran = ", ".join(f"{n} x {name}" for name, n in self.kernels.items()) or "none"
        return (
            f"integer kernels on {self.target}: {self.share:.1%} of the {count(self.quantized)}FLOP of quantized "
            f"layers ({ran})"
        )


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
    made, work = Counter(name for name, _ in ran), sum(w for _, w in ran)
    return Observed(fast.engine.target, sum(map(flops, quantized_nodes(fast.program))), work, dict(made))


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
