"""Tables beside a decision: fitted numbers that are constants of the Program, with a row for each step of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def read_file(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. RecipeError, which calls it ``what``, where it cannot be read or holds
    numbers that are not finite."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"the {what} {path} cannot be read ({error}); give a .safetensors file") from error
    if not all(v.isfinite().all() for v in found.values()):
        raise RecipeError(f"the {what} {path} holds numbers that are not finite; calibrate again")
    return found


def told(found: Mapping[str, Tensor]) -> str:
    """The names and shapes in a file, for an error."""
    return ", ".join(f"{k}{list(v.shape)}" for k, v in found.items())


class Tables:
    """Tables of the decision ``name``. ``row``: the control input that selects the row of a step; ``steps``: how many
    rows there are; ``params``: the tables as constants of the Program."""

    def __init__(self, e: Editor, name: str, tables: Mapping[str, Tensor], steps: int) -> None:
        self.e, self.row, self.steps = e, f"{name}.row", steps
        self.params = {f"{CONST}{name}.{k}": v for k, v in tables.items()}
        self._nodes: tuple[fx.Node, ...] = ()

    def arguments(self) -> tuple[fx.Node, ...]:
        """Placeholders in the entry: the tables, then the row."""
        if not self._nodes:
            with self.e.mode:
                values = [torch.empty(p.shape, dtype=p.dtype) for p in self.params.values()]
                row = torch.empty(1, dtype=torch.int64)
            made = [
                self.e.placeholder(ref.replace(".", "_"), Formal("param", ref), value)
                for ref, value in zip(self.params, values, strict=True)
            ]
            self._nodes = (*made, self.e.placeholder(self.row.replace(".", "_"), Formal("control", self.row), row))
        return self._nodes


def channel_axis(value: Tensor, channels: int, what: str) -> int:
    """The axis of the channels of a (fake) value: the last one, of images and videos the second. RecipeError where it
    has another size than ``what`` was fitted to."""
    axis = 1 if value.ndim >= 4 else value.ndim - 1
    if value.shape[axis] != channels:
        raise RecipeError(
            f"the {what} has {channels} channels, the predicted value {TensorType.of(value).shape} has "
            f"{value.shape[axis]}; calibrate again for this region"
        )
    return axis


def row_of(e: Editor, table: fx.Node, row: fx.Node, shape: Sequence[int], at: fx.Node) -> fx.Node:
    """The row ``row`` (int64, (1,)) of a table, in this shape."""
    return e.op(aten.view.default, e.op(aten.index_select.default, table, 0, row, at=at), list(shape), at=at)
