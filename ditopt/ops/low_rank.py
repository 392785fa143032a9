"""``ditopt::low_rank``: a weight as a product of two thin ones and a rest that small integers hold.

    low_rank(weight, rank, bits, group=0, rounds=1) -> (down, up, rest)

weight (N, K) -> down (rank, K) and up (N, rank) of the weight's dtype, rest (N, K) float32 (SVDQuant)::

    U, S, V = svd(weight);  down = V[:rank];  up = U[:, :rank] * S[:rank];  rest = weight - up @ down

With ``rounds`` > 1 the directions are found again, of the weight without what ``bits`` in groups of ``group`` hold of
the rest, until that brings weight and reconstruction no closer. Singular vectors are computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditopt.ops.quantize import dequantize_reference, quantize_reference

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define("low_rank(Tensor weight, int rank, int bits, int group=0, int rounds=1) -> (Tensor, Tensor, Tensor)")

low_rank = torch.ops.ditopt.low_rank.default


def types(weight: Tensor, rank: int, bits: int, group: int = 0, rounds: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The results without values; ValueError for a rank that the weight does not have."""
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise ValueError(f"low_rank: a weight {list(weight.shape)} has no {rank} directions")
    rows, width = weight.shape
    down, up = weight.new_empty(rank, width), weight.new_empty(rows, rank)
    return down, up, weight.new_empty(rows, width, dtype=torch.float32)


def reference(weight: Tensor, rank: int, bits: int, group: int = 0, rounds: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """What the formula says."""
    types(weight, rank, bits, group, rounds)
    wide = weight.double()
    held = torch.zeros_like(wide)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = float("inf")
    for _ in range(rounds):
        u, s, v = torch.linalg.svd(wide - held, full_matrices=False)
        down, up = v[:rank].to(weight.dtype), (u[:, :rank] * s[:rank]).to(weight.dtype)
        rest = (wide - up.double() @ down.double()).float()
        held = dequantize_reference(*quantize_reference(rest, bits, group), torch.float32).double()
        error = float((rest - held).norm())
        if error >= least:
            break
        best, least = (down.contiguous(), up.contiguous(), rest), error
    assert best is not None  # the first round is closer than nothing
    return best


_library.impl("low_rank", reference, "CompositeExplicitAutograd")
torch.library.register_fake("ditopt::low_rank", types, lib=_library)
