"""An untrained denoiser and a sampling loop of a few milliseconds: the machinery of measuring, not the fidelity."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, TOKENS, ROWS = 16, 8, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mod = nn.Linear(WIDTH, 2 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, gate = self.mod(cond)[:, None].chunk(2, -1)
        y = nn.functional.layer_norm(x, [WIDTH]) * (1 + scale)
        q, k, v = (h.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for h in self.qkv(y).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.out(y)
        return x + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(x, [WIDTH]))))


class TinyDiT(nn.Module):
    """Three blocks of attention and MLP; latent (N, TOKENS, WIDTH), timestep (N,), labels (N,) of 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Linear(1, WIDTH)
        self.label = nn.Embedding(4, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        cond = nn.functional.silu(self.time(timestep[:, None] / 1000) + self.label(class_labels))
        for block in self.blocks:
            hidden_states = block(hidden_states, cond)
        return self.head(nn.functional.layer_norm(hidden_states, [WIDTH]))


def model() -> TinyDiT:
    return TinyDiT().eval().requires_grad_(False)


def example() -> dict[str, Tensor]:
    labels = torch.arange(ROWS) % 4
    return {
        "hidden_states": torch.zeros(ROWS, TOKENS, WIDTH),
        "timestep": torch.full((ROWS,), 1000.0),
        "class_labels": labels,
    }


def made() -> tuple[nn.Module, dict[str, Tensor]]:
    """For the command line: ``tests.tiny_sampler:made``."""
    return model(), example()


@torch.no_grad()
def sample(denoiser: Any, seed: int, steps: int) -> Tensor:
    """Euler steps of a flow; (ROWS, 1, TOKENS, WIDTH) in [0, 1]. Announces the request to an optimized model."""
    from contextlib import nullcontext

    session = denoiser.session(steps=steps) if hasattr(denoiser, "session") else nullcontext()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, TOKENS, WIDTH, generator=generator)
    labels = torch.randint(4, (ROWS,), generator=generator)
    sigmas = torch.linspace(1, 0, steps + 1)
    with session:
        for now, after in itertools.pairwise(sigmas):
            velocity = denoiser(hidden_states=x, timestep=torch.full((ROWS,), float(now) * 1000), class_labels=labels)
            x = x + (after - now) * velocity
    return torch.sigmoid(x)[:, None]
