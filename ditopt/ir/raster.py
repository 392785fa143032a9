"""Whether rows of numbers enumerate a grid in order: position ids (row, column), or the rotary tables made of them.

On a grid of positions each column of such numbers changes along one axis and no other (its own coordinate), and no two
positions of an axis are alike. Of the grids that fit the finest is meant: two axes taken for one fit as well, but one
axis taken for two does not.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

_STRIDES = 8
"""Lengths for which columns hold a value, of which so many are tried."""

_AXES = 3
"""Most axes besides the fastest one."""


def enumerated(rows: Tensor) -> tuple[int, ...]:
    """The sizes of the grid, the fastest axis last, whose positions ``rows`` (positions, columns) enumerate; () where
    there is none of two axes or more."""
    count = len(rows)
    change = rows[1:] != rows[:-1]
    moving = change.any(0)
    if count < 4 or not moving.any():
        return ()
    values = rows[:, moving]
    held = {math.gcd(count, *(at + 1).tolist()) for at in _places(change[:, moving])}
    between = sorted(held - {1})[:_STRIDES]
    if 1 not in held:
        return ()
    for number in reversed(range(1, min(len(between), _AXES) + 1)):
        for chosen in itertools.combinations(between, number):
            ends = (1, *chosen, count)
            if any(b % a for a, b in itertools.pairwise(ends)):
                continue
            grid = tuple(b // a for a, b in itertools.pairwise(ends))[::-1]
            if _fits(values, grid):
                return grid
    return ()


def _places(change: Tensor) -> list[Tensor]:
    """For each column where it changes."""
    return [column.nonzero().flatten() for column in change.unbind(1)]


def _fits(values: Tensor, grid: tuple[int, ...]) -> bool:
    cells = values.reshape(*grid, -1)
    free = torch.ones(values.shape[1], dtype=torch.bool)
    for axis, size in enumerate(grid):
        line = cells
        for other in reversed(range(len(grid))):
            line = line if other == axis else line.select(other, 0)  # (size, columns), at the start of other axes
        shape = [size if other == axis else 1 for other in range(len(grid))]
        own = (cells == line.reshape(*shape, -1)).flatten(0, -2).all(0)  # changes along this axis alone
        if not own.any() or len(torch.unique(line[:, own], dim=0)) < size:
            return False
        free &= ~own
    return not free.any()
