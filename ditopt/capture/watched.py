"""Positions whose grid a Program was made for, under the guard of its capture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ditopt.capture.guard import Guard
from ditopt.capture.job import Captured
from ditopt.capture.replay import Read
from ditopt.ir.edit import Editor
from ditopt.ir.program import Program, Raster, formal

aten = torch.ops.aten


@dataclass(frozen=True)
class _Positions(Read):
    """What an input held that showed a grid."""

    source: str = ""
    grid: str = ""

    @property
    def held(self) -> str:
        return f"is made for the grid {self.grid} that the positions in {self.source} show"

    @property
    def differs(self) -> str:
        return f"{self.source} holds other positions than those that show the grid {self.grid} it is made for"


def watched(captured: Captured, program: Program, given: Mapping[str, Tensor]) -> Captured:
    """``captured``, of which passes made ``program``, under a guard over the positions among the inputs ``given`` that
    it relies on; the notes say so."""
    rasters = [r for r in program.relies if r.source in given]
    if not rasters:
        return captured
    own = _guard(captured.program, rasters, given)
    shown = ", ".join(f"{_grid(r)} in {r.source}" for r in rasters)
    note = f"guarded: the positions that show the grid {shown}; where others come the model is captured again"
    guard = own if captured.guard is None else captured.guard.beside(own)
    return dataclasses.replace(captured, guard=guard, notes=(*captured.notes, note))


def _guard(program: Program, rasters: list[Raster], given: Mapping[str, Tensor]) -> Guard:
    reads, nodes = [], list[fx.Node]()
    with Editor(program.step, "capture") as e:
        there = {formal(p).ref: p for p in program.step.placeholders if formal(p).kind == "input"}
        for r in rasters:
            end = r.start + r.tokens
            value = given[r.source].detach().narrow(r.axis, r.start, r.tokens).clone().cpu()
            reads.append(_Positions("", value, value, source=r.source, grid=_grid(r)))
            nodes.append(e.op(aten.slice.Tensor, e[there[r.source]], r.axis, r.start, end))
        e.set_results(nodes)
        e.drop_dead()
    function = e.function()
    formals = tuple(formal(p) for p in function.placeholders)
    return Guard(fx.GraphModule(torch.nn.Module(), function.graph, "guard"), formals, {}, tuple(reads))


def _grid(raster: Raster) -> str:
    return " x ".join(map(str, raster.grid))
