"""Correction of predicted values: one scale and one shift for each step and channel, from a table that was fitted.

Error rectification in closed form (ERTACache, arXiv 2508.21091; the decoupled correction of CacheQuant, arXiv
2503.01323): ``scale[step] * predicted + shift[step]``. Channels are the last axis, of images and videos the second one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from ditopt.errors import RecipeError
from ditopt.ir.edit import Editor
from ditopt.ir.tables import Tables, channel_axis, read_file, row_of, told

aten = torch.ops.aten


def read_table(path: Path) -> dict[str, Tensor]:
    """``scale`` and ``shift`` of a correction file, float32 (steps, channels)."""
    found = read_file(path, "correction")
    if set(found) != {"scale", "shift"} or found["scale"].ndim != 2 or found["scale"].shape != found["shift"].shape:
        raise RecipeError(
            f"the correction {path} holds {told(found)}; expected scale and shift, both (steps, channels)"
        )
    return {k: v.float().contiguous() for k, v in found.items()}


class Correction(Tables):
    """The tables of the decision ``name``: scale, shift."""

    def __init__(self, e: Editor, name: str, path: Path) -> None:
        tables = read_table(path)
        super().__init__(e, name, tables, len(tables["scale"]))
        self._channels = tables["scale"].shape[1]

    def applied(self, e: Editor, told: fx.Node, tables: Sequence[fx.Node], at: fx.Node) -> fx.Node:
        """``told`` corrected, in the entry or in a body; ``tables``: what stands there for ``arguments``."""
        scale, shift, row = tables
        value = told.meta["val"]
        axis = channel_axis(value, self._channels, "correction")
        shape = [self._channels if i == axis else 1 for i in range(value.ndim)]
        rows = [row_of(e, table, row, shape, at) for table in (scale, shift)]
        wide = e.op(aten.mul.Tensor, told, rows[0], at=at)
        fixed = e.op(aten.add.Tensor, wide, rows[1], at=at)
        return fixed if value.dtype is torch.float32 else e.op(aten._to_copy.default, fixed, dtype=value.dtype, at=at)
