"""A trained predictor: the next value of a region from a window of earlier ones, by weights that change with the stage
of the request.

The predictor of LESA (arXiv 2602.20497), for the K newest values h0 (newest) .. hK-1, computed or predicted:

    z = mix[s] . (h0 .. hK-1) + up[s] @ down[s] @ concat(h0 .. hK-1) + bias[s]
    predicted = h0 + gate[t] * z

t is the step and s its stage; the product runs over channels, one token at a time. The paper's linear layer over the
window is here the sum of a number for each value and a matrix of low rank. Its network of the gaps between steps gives
the gate; as the steps of a request are known when it is trained, the tables hold its value at each of them.
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

SHAPES = {
    "reads": ("steps",),
    "stage": ("steps",),
    "gate": ("steps",),
    "mix": ("stages", "window"),
    "down": ("stages", "rank", "window x channels"),
    "up": ("stages", "channels", "rank"),
    "bias": ("stages", "channels"),
}
"""What a file holds: float32, and int64 for ``reads`` (how many values of the window a step needs, 0 where it always
computes) and ``stage`` (0, 1, ...)."""

_WHOLE = ("reads", "stage")


def read_predictor(path: Path) -> dict[str, Tensor]:
    """The tables of a file, in the order of ``SHAPES``. RecipeError where it holds something else."""
    found = read_file(path, "predictor")
    if set(found) != set(SHAPES) or any(found[n].ndim != len(shape) for n, shape in SHAPES.items()):
        expected = ", ".join(f"{n} ({', '.join(shape)})" for n, shape in SHAPES.items())
        raise RecipeError(f"the predictor {path} holds {told(found)}; expected {expected}")
    steps, (stages, window), (_, channels, rank) = len(found["reads"]), found["mix"].shape, found["up"].shape
    sizes = {
        "steps": steps,
        "stages": stages,
        "window": window,
        "channels": channels,
        "rank": rank,
        "window x channels": window * channels,
    }
    wrong = [n for n, shape in SHAPES.items() if list(found[n].shape) != [sizes[axis] for axis in shape]]
    if wrong or not min(sizes.values()):
        raise RecipeError(f"the predictor {path} holds {told(found)}, whose sizes do not agree; calibrate again")
    tables = {n: found[n].to(torch.int64 if n in _WHOLE else torch.float32).contiguous() for n in SHAPES}
    ends = {"stage": stages, "reads": window + 1}
    if any(tables[n].min() < 0 or tables[n].max() >= end for n, end in ends.items()):
        raise RecipeError(
            f"the predictor {path} names stages or lengths of its window that it does not have; calibrate again"
        )
    return tables


class Learned(Tables):
    """The tables of the decision ``name``: stage, gate, mix, down, up, bias. ``reads``: see ``SHAPES``; ``window``: the
    length of the window."""

    def __init__(self, e: Editor, name: str, path: Path) -> None:
        tables = read_predictor(path)
        self.reads = tuple(tables.pop("reads").tolist())
        super().__init__(e, name, tables, len(self.reads))
        self.window = tables["mix"].shape[1]
        self._channels, self._rank = tables["up"].shape[1:]

    def predicted(self, e: Editor, window: Sequence[fx.Node], tables: Sequence[fx.Node], at: fx.Node) -> fx.Node:
        """What follows the values of ``window``, newest first, in the entry or in a body; ``tables``: what stands there
        for ``arguments``. In at least float32, cast back."""
        by_step, row = tables[:2], tables[-1]
        stage = e.op(aten.index_select.default, by_step[0], 0, row, at=at)
        gate = e.op(aten.index_select.default, by_step[1], 0, row, at=at)
        value = window[0].meta["val"]
        axis = channel_axis(value, self._channels, "predictor")
        dtype = torch.float64 if value.dtype is torch.float64 else torch.float32
        shapes = [
            [self.window],
            [self._rank, self.window * self._channels],
            [self._channels, self._rank],
            [self._channels],
        ]
        chosen = [row_of(e, t, stage, shape, at) for t, shape in zip(tables[2:-1], shapes, strict=True)]
        mix, down, up, bias = (self._cast(e, c, dtype, at) for c in chosen)
        gate = self._cast(e, gate, dtype, at)

        last = value.ndim - 1
        back = [*range(axis), last, *range(axis, last)]
        ahead = [i for i in range(value.ndim) if i != axis] + [axis]
        values = [self._cast(e, v, dtype, at) for v in window]
        if axis != last:
            values = [e.op(aten.permute.default, v, ahead, at=at) for v in values]
        thin = e.op(aten.linear.default, e.op(aten.cat.default, values, last, at=at), down, at=at)
        z = e.op(aten.linear.default, thin, up, bias, at=at)
        for i, v in enumerate(values):
            part = e.op(aten.mul.Tensor, v, e.op(aten.select.int, mix, 0, i, at=at), at=at)
            z = e.op(aten.add.Tensor, z, part, at=at)
        made = e.op(aten.add.Tensor, values[0], e.op(aten.mul.Tensor, z, gate, at=at), at=at)
        if axis != last:
            made = e.op(aten.permute.default, made, back, at=at)
            made = e.op(aten.clone.default, made, at=at, memory_format=torch.contiguous_format)
        return self._cast(e, made, value.dtype, at)

    @staticmethod
    def _cast(e: Editor, node: fx.Node, dtype: torch.dtype, at: fx.Node) -> fx.Node:
        return node if node.meta["val"].dtype is dtype else e.op(aten._to_copy.default, node, dtype=dtype, at=at)
