"""Attention along some axes of a video at a time: which axes of the latent the keys of each attention run along.

A latent with three axes along which the attention of the model mixes, all blocks together, is a video. Its frames are
the axis that some attention mixes alone while another mixes the other two; where none does (axial attention), the first
of the three, as everywhere in ditopt frames stand before rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import fx

from ditopt.ir.attention import Operand
from ditopt.ir.axes import follow, source
from ditopt.ir.dims import Known
from ditopt.ir.program import Program, call_args, callee, formal

Along = tuple[frozenset[int], ...]
"""For each latent that may be a video: its axes along which the keys of an attention run."""


class Factors:
    """The attention of ``program`` by the axes it mixes: ask ``of`` for all of it, then ``kind``."""

    def __init__(self, program: Program) -> None:
        self._program = program
        latent = {i.name for i in program.inputs if i.role == "latent"}
        self._entries: list[Known] = []
        for p in program.step.placeholders:
            value = p.meta["val"]
            named = formal(p).kind == "input" and formal(p).ref in latent
            if named and isinstance(value, torch.Tensor) and value.ndim > 4:  # batch, channels, and three axes
                self._entries.append(follow(program, program.step, {p: source(value.shape)}))
        self._calls = {str(n.meta["region"]): n for n in program.calls()} if self._entries else {}
        self._inside: dict[object, Known] = {}
        self._mixed: list[set[frozenset[int]]] = [set() for _ in self._entries]

    def of(self, region: str, keys: Sequence[Operand]) -> list[Along]:
        """The axes of each of ``keys``, operands in the body of the block ``region`` ("": in the entry)."""
        out = [tuple(_axes(k, self._known(region, i)) for i in range(len(self._entries))) for k in keys]
        for along in out:
            for mixed, axes in zip(self._mixed, along, strict=True):
                mixed.add(axes)
        return out

    def kind(self, along: Along) -> Literal["temporal", "spatial", ""]:
        """What self attention along these axes is; "" where it mixes all axes, or the latent is no video."""
        for mixed, axes in zip(self._mixed, along, strict=True):
            every = frozenset[int]().union(*mixed)
            if len(every) == 3 and axes and axes != every:
                alone = [a for a in mixed if len(a) == 1 and every - a in mixed]
                frames = alone[0] if len(alone) == 1 else frozenset({min(every)})
                if not axes & frames or axes == frames:
                    return "temporal" if axes == frames else "spatial"
        return ""

    def _known(self, region: str, i: int) -> Known:
        if not region:
            return self._entries[i]
        call = self._calls.get(region)
        if call is None:
            return {}
        given = tuple(self._entries[i].get(a, ()) for a in call_args(call))
        key = (callee(call), given)
        if key not in self._inside:
            body = self._program.functions[callee(call)]
            self._inside[key] = follow(self._program, body, dict(zip(body.placeholders, given, strict=True)))
        return self._inside[key]


def _axes(operand: Operand, known: Known) -> frozenset[int]:
    node: fx.Node = operand.node
    dims = known.get(node)
    return dims[operand.order[-2]].axes if dims else frozenset()
