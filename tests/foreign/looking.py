"""Denoisers whose own forward looks at values of the latent or the timestep, around blocks that look at none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign.base import BATCH, Call, Foreign, randn, sinusoid, times

WIDTH, TOKENS = 32, 16


class Block(nn.Module):
    """Attention and MLP, modulated by a vector."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.ada = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, g1, s2, g2 = self.ada(F.silu(c)).unsqueeze(1).chunk(4, dim=-1)
        q, k, v = (self.qkv(self.norm1(x) * (1 + s1))).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + g1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + g2 * self.down(F.gelu(self.up(self.norm2(x) * (1 + s2))))


class Halves(nn.Module):
    """One projection of the latent for early times, another for late ones."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.head = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.time, self.label = nn.Linear(WIDTH, WIDTH), nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        c = self.time(sinusoid(t * 1000, WIDTH)) + self.label(label)
        h = x + 0.1
        if float(t[0]) > 0.5:
            h = self.early(h)
            c = c * 1.5
        else:
            h = self.late(h)
        for block in self.blocks:
            h = block(h, c)
        return self.head(h)


def halves_call(step: int, seed: int) -> Call:
    return randn(BATCH, TOKENS, 8, seed=seed), times(step), torch.tensor([3, 7])


class Crossed(nn.Module):
    """Attention to itself and to a text, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor, *, emb: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = rope
        q = self.query(x) * cos + self.query(x).roll(1, -1) * sin
        x = x + F.scaled_dot_product_attention(q, self.key(text), self.value(text))
        return self.inner(x, emb)


class Ordered(nn.Module):
    """Tokens come in the order of their energy, which NumPy sorts; their places make the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.proj_out, self.text = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(12, WIDTH)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleDict({f"layer{i}": Crossed() for i in range(3)})

    def forward(self, latents: Tensor, timestep: Tensor, caption: Tensor) -> dict[str, Tensor]:
        energy = np.linalg.norm(latents.numpy(), axis=-1)
        order = torch.from_numpy(np.argsort(energy, axis=1))
        x = self.proj_in(latents.gather(1, order.unsqueeze(-1).expand_as(latents)))
        angles = torch.arange(TOKENS)[:, None] / 10 * torch.ones(WIDTH)
        rope = angles.cos(), angles.sin()
        emb, text = self.time(sinusoid(timestep, WIDTH)), self.text(caption)
        for layer in self.layers.values():
            x = layer(x, text, emb=emb, rope=rope)
        back = order.argsort(1).unsqueeze(-1)
        return {"sample": self.proj_out(x).gather(1, back.expand(-1, -1, 8))}


def ordered_call(step: int, seed: int) -> Call:
    return {
        "latents": randn(BATCH, TOKENS, 8, seed=seed),
        "timestep": times(step, 1000),
        "caption": randn(BATCH, 5, 12, seed=99),
    }


class Merge(nn.Module):
    """Two streams become one."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.both(torch.cat([x, skip], dim=-1))


class Skipping(nn.Module):
    """Long skips, joined between the blocks; the number of the step picks an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.steps = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8), nn.Embedding(16, WIDTH)
        self.down = nn.ModuleList(Block() for _ in range(2))
        self.middle = Block()
        self.merge = nn.ModuleList(Merge() for _ in range(2))
        self.up = nn.ModuleList(Block() for _ in range(2))
        self.gain = nn.Parameter(torch.full((WIDTH,), 0.9))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        step = int((sigma[0] * 15).round().item())
        c = self.steps.weight[step].expand(x.shape[0], -1)
        h, skips = self.embed(x), []
        for block in self.down:
            h = block(h, c)
            skips.append(h)
        h = self.middle(h, c)
        for merge, block in zip(self.merge, self.up, strict=True):
            h = h * self.gain
            h = block(merge(h, skips.pop()), c)
        return self.head(h)


def skipping_call(step: int, seed: int) -> Call:
    return {"x": randn(BATCH, TOKENS, 8, seed=seed), "sigma": times(step)}


class Joint(nn.Module):
    """Text and image attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.ff_image, self.ff_text = (
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(2)
        )
        self.ada = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, streams: dict[str, Tensor], c: Tensor) -> dict[str, Tensor]:
        scale, gate = self.ada(c).unsqueeze(1).chunk(2, dim=-1)
        image, text = streams["image"], streams["text"]
        q, k, v = torch.cat([self.image(image * (1 + scale)), self.text(text)], dim=1).chunk(3, dim=-1)
        seen = F.scaled_dot_product_attention(q, k, v)
        image, text = image + gate * seen[:, : image.shape[1]], text + seen[:, image.shape[1] :]
        return {"image": image + self.ff_image(image), "text": text + self.ff_text(text)}


@dataclass
class Predicted:
    sample: Tensor
    spread: float


class Whitened(nn.Module):
    """What is not an outlier of the latent sets its scale; two kinds of blocks, of one stream and of two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.words = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(12, WIDTH)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.joint = nn.ModuleList(Joint() for _ in range(2))
        self.single = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Predicted:
        spread = x[x.abs() < 2].std()
        c = self.time(sinusoid(t * 1000, WIDTH))
        streams = {"image": self.embed(x / spread), "text": self.words(context)}
        for block in self.joint:
            streams = block(streams, c)
        h = torch.cat([streams["text"], streams["image"]], dim=1)
        for block in self.single:
            h = block(h, c=c)
        return Predicted(self.head(h[:, context.shape[1] :]) * spread, float(spread))


def whitened_call(step: int, seed: int) -> Call:
    return {"x": randn(BATCH, TOKENS, 8, seed=seed), "t": times(step), "context": randn(BATCH, 4, 12, seed=99)}


def wrapped() -> Any:
    """The blocks are called by a module of the model's, which looks."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Halves()

        def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            return self.net(sample * 0.5, timestep, label) + sample

    return Wrapper()


LOOKING = [
    Foreign("halves", Halves, halves_call, 3),
    Foreign("ordered", Ordered, ordered_call, 3),
    Foreign("skipping", Skipping, skipping_call, 5),
    Foreign("whitened", Whitened, whitened_call, 4),
    Foreign("wrapped", wrapped, halves_call, 3),
]
"""Models that are captured by blocks."""
