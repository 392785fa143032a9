"""Low and high frequencies of an image, by products with small constant matrices.

FasterCache (arXiv 2410.19355) splits by a mask on the shifted two-dimensional Fourier transform: low is what lies within
a fifth of the shorter side around frequency 0. Only these few frequencies are computed, so that no complex numbers and
no transform are needed, which not every backend has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from ditopt.ir.edit import Editor
from ditopt.ir.program import Formal
from ditopt.ir.words import CONST

aten = torch.ops.aten

SHARE = 5
"""Low frequencies lie within 1 / SHARE of the shorter side."""


def waves(size: int, radius: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the frequencies -radius to radius on ``size`` points, float32 (2 radius + 1, size)."""
    frequencies = torch.arange(-radius, radius + 1, dtype=torch.float64)
    angles = 2 * math.pi / size * torch.outer(frequencies, torch.arange(size, dtype=torch.float64))
    return angles.cos().float(), angles.sin().float()


def disc(radius: int, rows: int, columns: int) -> Tensor:
    """1 / (rows columns) at the frequencies within ``radius``, else 0, float32 (2 radius + 1, 2 radius + 1)."""
    k = torch.arange(-radius, radius + 1)
    return (k[:, None] ** 2 + k**2 <= radius**2).float() / (rows * columns)


class Bands:
    """Splits values of the decision ``name``. ``params``: its constants by name."""

    def __init__(self, e: Editor, name: str) -> None:
        self.e, self.name = e, name
        self.params: dict[str, Tensor] = {}
        self._nodes: dict[str, fx.Node] = {}

    def split(self, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The low frequencies of (..., rows, columns), and the rest of it."""
        rows, columns = (int(n) for n in value.meta["val"].shape[-2:])
        radius = min(rows, columns) // SHARE
        (rc, rs), (cc, cs) = waves(rows, radius), waves(columns, radius)
        names = {"rows_cos": rc, "rows_sin": rs, "columns_cos": cc, "columns_sin": cs}
        row_cos, row_sin, col_cos, col_sin = (self._constant(n, t, value) for n, t in names.items())
        mask = self._constant("low", disc(radius, rows, columns), value)
        dtype = value.meta["val"].dtype
        op, mul = self.e.op, aten.matmul.default
        wide = value if dtype is torch.float32 else op(aten._to_copy.default, value, dtype=torch.float32)
        back = [op(aten.transpose.int, m, 0, 1) for m in (row_cos, row_sin, col_cos, col_sin)]
        cos, sin = op(mul, row_cos, wide), op(mul, row_sin, wide)  # along rows
        real = op(aten.sub.Tensor, op(mul, cos, back[2]), op(mul, sin, back[3]))
        other = op(aten.add.Tensor, op(mul, sin, back[2]), op(mul, cos, back[3]))  # minus the imaginary part
        real, other = op(aten.mul.Tensor, real, mask), op(aten.mul.Tensor, other, mask)
        even = op(aten.add.Tensor, op(mul, real, col_cos), op(mul, other, col_sin))
        odd = op(aten.sub.Tensor, op(mul, other, col_cos), op(mul, real, col_sin))
        low = op(aten.add.Tensor, op(mul, back[0], even), op(mul, back[1], odd))
        high = op(aten.sub.Tensor, wide, low)
        if dtype is torch.float32:
            return low, high
        return op(aten._to_copy.default, low, dtype=dtype), op(aten._to_copy.default, high, dtype=dtype)

    def _constant(self, name: str, tensor: Tensor, like: fx.Node) -> fx.Node:
        size = "x".join(map(str, tensor.shape))
        ref = f"{CONST}{self.name}.{name}_{size}"
        if ref not in self._nodes:
            device = like.meta["val"].device
            self.params[ref] = tensor.to(device)
            with self.e.mode:
                value = torch.empty(tensor.shape, device=device)
            placed = ref.removeprefix(CONST).replace(".", "_")
            self._nodes[ref] = self.e.placeholder(placed, Formal("param", ref), value)
        return self._nodes[ref]
