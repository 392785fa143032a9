"""Small models and samplers that the tests of the roads share.

``sd3()`` is a real two-stream diffusers model, tiny and random: its zero-initialised gates are noise, else every block
would be the identity and any test would pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, TOKENS = 2, 6


class Small(nn.Module):
    """Called like the tiny SD3, and captured in a third of the time: text tokens beside image tokens in one stream."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, width, 2, 2)
        self.context = nn.Linear(24, width)
        self.pooled, self.time = nn.Linear(20, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(SmallBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, 16)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        return_dict: bool = True,
    ) -> Any:
        rows, _, h, w = hidden_states.shape
        angles = timestep[:, None].float() * torch.exp(-torch.arange(16.0))
        c = self.time(torch.cat([angles.sin(), angles.cos()], -1).to(hidden_states.dtype))
        c = c + self.pooled(pooled_projections)
        x = torch.cat([self.context(encoder_hidden_states), self.patch(hidden_states).flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = block(x, c)
        x = self.head(x[:, encoder_hidden_states.shape[1] :]).view(rows, h // 2, w // 2, 4, 2, 2)
        x = x.permute(0, 3, 1, 4, 2, 5).reshape(rows, 4, h, w)
        return {"sample": x} if return_dict else (x,)


class SmallBlock(nn.Module):
    """Attention and MLP with adaptive norm and gates."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mod = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.mod(F.silu(c)).unsqueeze(1).chunk(6, -1)
        q, k, v = self.qkv(self.norm(x) * (1 + s1) + b1).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + g1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + g2 * self.down(F.gelu(self.up(self.norm(x) * (1 + s2) + b2)))


def small(seed: int = 0, depth: int = 3) -> Small:
    """A random ``Small``; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Small(depth=depth).eval().requires_grad_(False)


def shake(model: nn.Module, seed: int = 0, scale: float = 0.15) -> nn.Module:
    """The model with every parameter random: no gate is zero, no norm is the identity."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g).to(p.dtype) * scale)
    return model.eval().requires_grad_(False)


def sd3(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 3) -> Any:
    """A tiny text-conditioned two-stream transformer of diffusers; the last block drops the text stream."""
    from diffusers import SD3Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=20,
            out_channels=4,
            pos_embed_max_size=8,
        )
    return shake(model, seed) if dtype is torch.float32 else shake(model, seed).to(dtype)


def prompt(seed: int, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Text conditions of the tiny SD3, by the names of its arguments."""
    g = torch.Generator().manual_seed(1000 + seed)
    return {
        "encoder_hidden_states": torch.randn(batch, TOKENS, 24, generator=g).to(dtype),
        "pooled_projections": torch.randn(batch, 20, generator=g).to(dtype),
    }


def noise(seed: int, batch: int = BATCH, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, size, size, generator=g).to(dtype)


def example(batch: int = BATCH, size: int = 8, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One call of the tiny SD3."""
    return {
        "hidden_states": noise(99, batch, size, dtype),
        "timestep": torch.full((batch,), 700.0, dtype=dtype),
        **prompt(99, batch, dtype),
        "return_dict": False,
    }


def times(steps: int) -> list[float]:
    return [1000.0 * (1 - k / steps) for k in range(steps)]


@torch.no_grad()
def sample(
    model: Any, seed: int, steps: int = 6, *, size: int = 8, stop: int | None = None, prompts: Any = None
) -> Tensor:
    """One Euler request of the tiny SD3 or of ``Small``, with new noise and a new prompt for each seed; ``stop``:
    cancelled after as many steps."""
    x = noise(seed, size=size)
    given = prompt(seed) if prompts is None else prompts
    for k, t in enumerate(times(steps)):
        if k == stop:
            break
        v = model(hidden_states=x, timestep=torch.full((BATCH,), t), **given, return_dict=False)[0]
        x = x - v / steps
    return x


@functools.cache
def digits_pipe() -> Any:
    """The shipped trained pipeline. Shared: a test that changes it takes a copy."""
    import ditopt

    return ditopt.zoo.load("digits")


@torch.no_grad()
def sample_digits(model: Any, seed: int, steps: int = 8, labels: tuple[int, ...] = (3, 8)) -> Tensor:
    """Guided flow matching with the digits model by a doubled batch; images in [0, 1]."""
    n = len(labels)
    x = torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    classes = torch.tensor([*labels, *[10] * n])
    sigmas = torch.linspace(1, 0, steps + 1)
    for k in range(steps):
        t = (1000 * sigmas[k]).expand(2 * n)
        v = model(torch.cat([x, x]), timestep=t, class_labels=classes, return_dict=False)[0]
        cond, free = v.chunk(2)
        x = x + (sigmas[k + 1] - sigmas[k]) * (free + 2.0 * (cond - free))
    return (x / 2 + 0.5).clamp(0, 1)


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of ``b``."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
