"""The timesteps that a sampler will pass after this one, from the times that its scheduler announced.

Samplers pass the scheduler's time itself, or a simple function of it (a share of 1000, counted down or up). Which one
it is shows in the step at hand: the function must give its timestep bit for bit. A sampler that does something else is
not guessed at; its table is filled row by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ditopt.runtime.same import bits

LONG = 1024
"""Bytes of a timestep input that a table keeps as they are."""

_PASSED: tuple[Callable[[Tensor, torch.dtype], Tensor], ...] = (
    lambda t, dtype: t.to(dtype),
    lambda t, dtype: (t / 1000).to(dtype),
    lambda t, dtype: t.to(dtype) / 1000,
    lambda t, dtype: ((1000 - t) / 1000).to(dtype),
    lambda t, dtype: (1 - t / 1000).to(dtype),
    lambda t, dtype: (1000 - t).to(dtype),
)


def ahead(times: Sequence[float] | Tensor | None, now: Tensor) -> list[Tensor]:
    """The timestep inputs of the steps after the one whose timestep input is ``now``, alike in shape, dtype and device.

    Empty where ``times`` (the scheduler's, in order) are unknown, or no known function of them gives ``now``.
    """
    if times is None or now.numel() == 0:
        return []
    known = torch.as_tensor(times).detach().to(now.device)
    first = now.reshape(-1)[:1]
    if not torch.equal(bits(now), bits(first.expand(now.shape).contiguous())):
        return []  # a time for each row or token
    for passed in _PASSED:
        made = passed(known, now.dtype)
        found = (bits(made) == bits(first)).nonzero()
        if len(found):
            later = made[int(found[0]) + 1 :]
            return [t.reshape(1).expand(now.shape).contiguous() for t in later]
    return []


def clock_bits(timestep: Tensor) -> bytes:
    """The content of a timestep input: the key of its row in a table. Of a long one (an embedding of the time) it is
    the hash."""
    host = timestep.detach().cpu().contiguous()
    # one expanded number counts as contiguous whatever its stride is, and would not view as bytes
    dense = host.as_strided((host.numel(),), (1,))
    content = dense.view(torch.uint8).numpy().tobytes()
    return content if len(content) <= LONG else hashlib.sha256(content).digest()
