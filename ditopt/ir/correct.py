"""Correction of predicted values: one scale and one shift for each step and channel, from a table that was fitted.

Error rectification in closed form (ERTACache, arXiv 2508.21091; the decoupled correction of CacheQuant, arXiv
2503.01323): ``scale[step] * predicted + shift[step]``. Channels are the last axis, of images and videos the second one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx

from ditopt.errors import RecipeError
from ditopt.ir.edit import Editor
from ditopt.ir.program import Formal, TensorType
from ditopt.ir.words import CONST

aten = torch.ops.aten


def read_table(path: Path) -> dict[str, Tensor]:
    """``scale`` and ``shift`` of a correction file, float32 (steps, channels)."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"the correction {path} cannot be read ({error}); give a .safetensors file") from error
    if set(found) != {"scale", "shift"} or found["scale"].ndim != 2 or found["scale"].shape != found["shift"].shape:
        told = ", ".join(f"{k}{list(v.shape)}" for k, v in found.items())
        raise RecipeError(f"the correction {path} holds {told}; expected scale and shift, both (steps, channels)")
    if not all(v.isfinite().all() for v in found.values()):
        raise RecipeError(f"the correction {path} holds numbers that are not finite; calibrate again")
    return {k: v.float().contiguous() for k, v in found.items()}


class Correction:
    """The tables of the decision ``name`` as constants of the Program. ``steps``: rows of the tables; ``row``: the
    control input that selects one."""

    def __init__(self, e: Editor, name: str, path: Path) -> None:
        tables = read_table(path)
        self.e, self.row, self.steps = e, f"{name}.row", len(tables["scale"])
        self._channels = tables["scale"].shape[1]
        self.params = {f"{CONST}{name}.{k}": v for k, v in tables.items()}
        self._nodes: tuple[fx.Node, ...] = ()

    def arguments(self) -> tuple[fx.Node, ...]:
        """Placeholders in the entry: scale, shift, row."""
        if not self._nodes:
            with self.e.mode:
                values = [torch.empty(p.shape) for p in self.params.values()]
                row = torch.empty(1, dtype=torch.int64)
            made = [
                self.e.placeholder(ref.replace(".", "_"), Formal("param", ref), value)
                for ref, value in zip(self.params, values, strict=True)
            ]
            self._nodes = (*made, self.e.placeholder(self.row.replace(".", "_"), Formal("control", self.row), row))
        return self._nodes

    def apply(self, told: fx.Node, at: fx.Node) -> fx.Node:
        """``told`` corrected, in the entry."""
        return self.applied(self.e, told, self.arguments(), at)

    def applied(self, e: Editor, told: fx.Node, tables: list[fx.Node] | tuple[fx.Node, ...], at: fx.Node) -> fx.Node:
        """``told`` corrected, in the entry or in a body."""
        scale, shift, row = tables
        value = told.meta["val"]
        axis = 1 if value.ndim >= 4 else value.ndim - 1
        if value.shape[axis] != self._channels:
            raise RecipeError(
                f"the correction has {self._channels} channels, the predicted value {TensorType.of(value).shape} has "
                f"{value.shape[axis]}; calibrate again for this region"
            )
        shape = [self._channels if i == axis else 1 for i in range(value.ndim)]
        rows = [
            e.op(aten.view.default, e.op(aten.index_select.default, table, 0, row, at=at), shape, at=at)
            for table in (scale, shift)
        ]
        wide = e.op(aten.mul.Tensor, told, rows[0], at=at)
        fixed = e.op(aten.add.Tensor, wide, rows[1], at=at)
        return fixed if value.dtype is torch.float32 else e.op(aten._to_copy.default, fixed, dtype=value.dtype, at=at)
