"""Run a Program as it stands, with torch in eager mode: the reference that every pass and backend is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ditopt.errors import BadInput
from ditopt.ir.program import Function, Program, formal


def run_program(
    program: Program,
    inputs: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None = None,
    memo: Mapping[str, Tensor] | None = None,
    control: Mapping[str, Tensor] | None = None,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """One step: the outputs in the order of ``program.outputs``, and the state after it.

    Slots absent from ``state`` are zero, as when a request begins; memo values absent from ``memo`` are computed;
    control inputs absent from ``control`` are zero. Every decision computes. BadInput where an input is missing.
    """
    missing = [i.name for i in program.inputs if i.name not in inputs]
    if missing:
        takes = ", ".join(i.name for i in program.inputs)
        raise BadInput(f"the inputs {', '.join(missing)} are missing; the program takes {takes}")
    values: dict[tuple[str, str], Tensor] = {("input", i.name): i.type.pairs(inputs[i.name]) for i in program.inputs}
    values |= {("param", k): v for k, v in program.params.items()}
    values |= {("memo", k): v for k, v in (memo or {}).items()}
    values |= {("control", k): v for k, v in (control or {}).items()}
    values |= {("state", k): v for k, v in (state or {}).items()}
    for m in program.memos:
        if not all(("memo", v) in values for v in m.values):
            results = _run(program, program.functions[m.function], values)
            values |= {("memo", name): value for name, value in zip(m.values, results, strict=True)}
    results = _run(program, program.step, values)
    n = program.step.n_results
    kept = {s.name: values[("state", s.name)] for s in program.state if ("state", s.name) in values}
    return results[:n], kept | dict(zip(program.step.state_out, results[n:], strict=True))


def _run(program: Program, function: Function, values: dict[tuple[str, str], Tensor]) -> tuple[Tensor, ...]:
    args = []
    for node in function.placeholders:
        what = formal(node)
        key = (what.kind, what.ref)
        if key not in values and what.kind in ("state", "control"):
            val = node.meta["val"]
            values[key] = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device).zero_()
        if key not in values:
            raise BadInput(f"function {function.name}: nothing gives the {what.kind} {what.ref!r}")
        args.append(values[key])
    with torch.no_grad():
        return tuple(fx.Interpreter(program.module(function.name)).run(*args))


def random_inputs(program: Program, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of the right types: normal floats, integers 0 or 1 (they fit every table), masks that are all true."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for i in program.inputs:
        shape, dtype = i.type.shape, i.type.dtype
        if dtype is torch.bool:
            value = torch.ones(shape, dtype=dtype)
        elif dtype.is_floating_point or dtype.is_complex:
            value = torch.randn(shape, generator=generator, dtype=dtype if dtype.is_complex else None).to(dtype)
        else:
            value = torch.randint(0, 2, shape, generator=generator).to(dtype)
        if i.type.stride is not None:
            value = torch.empty_strided(shape, i.type.stride, dtype=dtype).copy_(value)
        out[i.name] = value
    return out
