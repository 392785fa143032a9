"""How the foreign models are made and called: one registry, seeded weights of which none is constant, six steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny_models import noise

BATCH, STEPS = 2, 6

Call = tuple[Any, ...] | dict[str, Any]
"""Arguments of one call, as ``example_inputs`` takes them: a tuple is positional, a dict is keywords."""


@dataclass(frozen=True)
class Foreign:
    """A model written for the tests and the calls of one request.

    ``call``: the arguments at step 0..STEPS-1 of a request with latents of a seed; times fall, the prompt stays.
    ``blocks``: how many the model has on its main path.
    """

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[int, int], Call]
    blocks: int

    def model(self) -> Any:
        """A new model; the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return noise(self.build())


def randn(*shape: int, seed: int) -> Tensor:
    """float32 noise, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(model: Callable[..., Any], call: Call) -> Any:
    """The model's output for these arguments."""
    return model(*call) if isinstance(call, tuple) else model(**call)


def time(step: int) -> float:
    """The time of a step: 0.95, 0.8 ... 0.2."""
    return 0.95 - 0.15 * step


def times(step: int, scale: float = 1.0) -> Tensor:
    """The same, one a row: float32 (BATCH,)."""
    return torch.full((BATCH,), time(step) * scale)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Sine and cosine of times (B,) at geometric rates: (B, width)."""
    half = width // 2
    rates = torch.exp(-torch.arange(half, dtype=torch.float32, device=t.device) * (9.21 / half))
    angles = t[:, None].float() * rates[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
