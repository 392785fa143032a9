"""What blocks attend to: tokens that move from step to step (the foreground), or those that stay (the background)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ditopt.calibration.mask import Floats, alike, recording
from ditopt.errors import BadInput


def foreground(blocks: Sequence[ArrayLike]) -> Floats:
    """The tokens that move most: attention outputs of some blocks, each (N, T, P, C) -> (N, P) of 1 and 0.

    A token moves by the norm of the difference between its outputs in neighbouring steps, as a share of what all tokens
    of that block move, summed over steps and blocks. The foreground are those above the median of their recording.
    """
    arrays = _recordings(blocks)
    total = np.zeros(arrays[0].shape[::2][:1] + arrays[0].shape[2:3])
    for values in arrays:
        moved = np.linalg.norm(np.diff(values, axis=1), axis=-1).sum(axis=1)
        every = moved.sum(axis=1, keepdims=True)
        total += np.divide(moved, every, out=np.zeros_like(moved), where=every > 0)
    return np.asarray(total > np.median(total, axis=1, keepdims=True), dtype=np.float64)


def focus(blocks: Sequence[ArrayLike]) -> list[float]:
    """How much more attention output each block gives to a token of the foreground than to one of the background: the
    ratio of the mean norms over all steps, 1 where there is no difference. ``blocks``: as in ``foreground``."""
    front = foreground(blocks)
    out = []
    for values in _recordings(blocks):
        size = np.linalg.norm(values, axis=-1).sum(axis=1)
        parts = [(size * part).sum() / part.sum() if part.any() else 0.0 for part in (front, 1 - front)]
        out.append(float(parts[0] / parts[1]) if all(parts) else 1.0)
    return out


def _recordings(blocks: Sequence[ArrayLike]) -> list[Floats]:
    if not len(blocks):
        raise BadInput("no attention was recorded; expected the outputs of at least one block")
    arrays = [recording(values) for values in blocks]
    for other in arrays[1:]:
        alike(arrays[0], other, "attention outputs of two blocks")
    return arrays


def numbers_of(text: str, count: int) -> list[int]:
    """The blocks that a list such as "0 2 4-7" names, ascending. BadInput where one is none of ``count`` blocks."""
    found: set[int] = set()
    for word in text.replace(",", " ").split():
        first, _, last = word.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or word.endswith("-"):
            raise BadInput(f"{word!r} given in {text!r}; expected numbers of blocks and ranges, as in '0 2 4-7'")
        found.update(range(int(first), int(last or first) + 1))
    outside = sorted(n for n in found if n >= count)
    if outside:
        raise BadInput(f"block {outside[0]} given in {text!r}; the model has {count} blocks, 0 to {count - 1}")
    return sorted(found)
