"""Small models whose blocks are wired in ways that discovery has to see through."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.tiny_models import Joint, Plain


class LongSkip(Plain):
    """Half a U: the second half of the blocks reads the results of the first half again, by a layer of its own."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__(depth=depth)
        self.skips = nn.ModuleList(nn.Linear(2 * self.width, self.width) for _ in range(depth // 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = t[:, None].expand(-1, self.width) * 1e-3 + self.label(y)
        x = self.patch(x).flatten(2).transpose(1, 2)
        kept: list[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= len(self.blocks) // 2:
                x = self.skips[i - len(self.blocks) // 2](torch.cat([x, kept.pop(0)], -1))
            x = block(x, c)
            kept.append(x)
        return self.head(x)


class Alternating(Plain):
    """Blocks that attend in space and in time by turns."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = t[:, None].expand(-1, self.width) * 1e-3 + self.label(y)
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x = block(x.transpose(0, 1), c[:1]).transpose(0, 1) if i % 2 else block(x, c)
        return self.head(x)


class Refined(nn.Module):
    """A joint model whose text passes blocks of its own before it meets the latent."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, 32, batch_first=True) for _ in range(2))
        self.joint = Joint(depth=2)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        for layer in self.refiner:
            prompt_embeds = layer(prompt_embeds)
        return self.joint(latents, sigma, prompt_embeds)["sample"]


class GlobalSkip(Plain):
    """A model that predicts a difference to its input: an addition around all blocks is no module."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x, t, y)


class Tables(Plain):
    """Each block adds its own slice of one table to the modulation, and feeds forward what it thinks most of."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        self.tables = nn.Parameter(torch.randn(1, 3, self.width))
        self.router = nn.Linear(self.width, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = t[:, None, None] * 1e-3 + self.label(y)[:, None] + self.tables
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x = block(x, c[:, i])
            values, chosen = self.router(x).topk(2, -1)  # two results, of which each block reads its own
            x = x + values.sum(-1, keepdim=True) * F.one_hot(chosen[..., 0], self.width)
        return self.head(x)


class Parallel(nn.Module):
    """Attention and MLP side by side, added one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(16, n) for n in (48, 16, 32)) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x + timestep[:, None, None]
        for block, down in zip(self.blocks, self.downs, strict=True):
            qkv, out, up = block.children()
            h = F.layer_norm(x, (16,))
            q, k, v = qkv(h).chunk(3, -1)
            x = x + out(F.scaled_dot_product_attention(q, k, v)) + down(F.gelu(up(h)))
        return x


class FeedFirst(nn.Module):
    """Blocks that feed forward and then attend twice; ``bare``: the first of them has no feed-forward."""

    bare = False

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(3))
        self.qkvs = nn.ModuleList(nn.Linear(16, 48) for _ in range(6))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.stem(x + timestep[:, None, None])
        for i, mlp in enumerate(self.mlps):
            x = x if self.bare and not i else x + mlp(F.layer_norm(x, (16,)))
            for qkv in (self.qkvs[2 * i], self.qkvs[2 * i + 1]):
                q, k, v = qkv(F.layer_norm(x, (16,))).chunk(3, -1)
                x = x + F.scaled_dot_product_attention(q, k, v)
        return x

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return x


class AttendLast(FeedFirst):
    """The last block lacks what it would feed forward by."""

    bare = True


class Stemmed(AttendLast):
    """The same behind a residual stem, which feeds forward too."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.wide(x)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.scaled_dot_product_attention(*self.qkv(F.layer_norm(x, (16,))).chunk(3, -1))


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.convs[0](F.layer_norm(x, (16,)).transpose(1, 2)))
        return x + self.convs[1](h).transpose(1, 2)


class Listed(nn.Module):
    """A list of modules, one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x + timestep[:, None, None]
        for layer in self.layers:
            x = layer(x)
        return x


def parts(*kinds: type[nn.Module]) -> list[nn.Module]:
    return [kind() for kind in kinds]


class Reattending(nn.Module):
    """Blocks that attend again to what they attended to, before all of it is added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(16, n) for n in (48, 48, 16, 32)) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(32, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x + timestep[:, None, None]
        for block, down in zip(self.blocks, self.downs, strict=True):
            qkv, again, out, up = block.children()
            a = F.scaled_dot_product_attention(*qkv(F.layer_norm(x, (16,))).chunk(3, -1))
            x = x + out(a + F.scaled_dot_product_attention(*again(a).chunk(3, -1)))
            x = x + down(F.gelu(up(F.layer_norm(x, (16,)))))
        return x
