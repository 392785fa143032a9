"""Which rows enumerate a grid: ids, rotary tables, in every scale; and what is no grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditopt.ir.raster import enumerated


def ids(*sizes: int) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(float(n)) for n in sizes)).reshape(-1, len(sizes))


def table(*sizes: int) -> Tensor:
    """Cosines and sines at 16 rates an axis, most of them so slow that float32 rounds neighbours to one number."""
    angles = (ids(*sizes)[..., None] * 1e-4 ** (torch.arange(16) / 16)).flatten(1)
    return torch.cat([angles.cos(), angles.sin()], 1)


GRIDS = {
    "rows and columns": (ids(5, 6), (5, 6)),
    "a constant beside": (ids(1, 5, 6), (5, 6)),
    "frames": (ids(2, 3, 4), (2, 3, 4)),
    "integers from elsewhere on, in steps of two": ((ids(2, 3, 4) * 2 + 100).long(), (2, 3, 4)),
    "columns first": (ids(5, 6).flip(1), (5, 6)),
    "around a centre": (ids(4, 4) - 1.5, (4, 4)),
    "positions that do not rise": (torch.tensor([2, 0, 1, 3])[ids(2, 3, 4).long()], (2, 3, 4)),
    "rotary table": (table(8, 12), (8, 12)),
    "rotary table of a video": (table(3, 20, 32), (3, 20, 32)),
    "twice the same columns": (torch.cat([ids(5, 6), ids(5, 6)], 1), (5, 6)),
}


@pytest.mark.parametrize("name", list(GRIDS))
def test_a_grid_is_found(name):
    rows, grid = GRIDS[name]
    assert enumerated(rows) == grid


NONE = {
    "a sequence": torch.arange(30.0)[:, None],
    "a sequence in each column": torch.arange(30.0)[:, None].expand(-1, 3),
    "one position": torch.zeros(30, 3),
    "noise": torch.randn(30, 4, generator=torch.Generator().manual_seed(0)),
    "another order": ids(5, 6)[torch.randperm(30, generator=torch.Generator().manual_seed(0))],
    "every second row turned round": torch.stack(
        [ids(4, 6)[:, 0], (ids(4, 6)[:, 1] - 5 * (ids(4, 6)[:, 0] % 2)).abs()], 1
    ),
    "a row that is missing": ids(5, 6)[:-3],
    "two images": torch.cat([ids(4, 6), ids(4, 5)]),
    "text in front": torch.cat([torch.zeros(6, 2), ids(4, 6)]),
    "rows alone": ids(5, 6)[:, :1],
    "columns alone": ids(5, 6)[:, 1:],
    "two rows alike": ids(5, 6).clamp(max=3),
    "too few": ids(1, 3),
}


@pytest.mark.parametrize("name", list(NONE))
def test_there_is_none(name):
    assert enumerated(NONE[name]) == ()
