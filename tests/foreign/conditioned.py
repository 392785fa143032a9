"""Denoisers with tokens of reference images that never attend to the latent: EasyControl, FastFit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign.base import BATCH, Call, Foreign, randn, sinusoid, times
from tests.foreign.video import heads, merged, normed


class ConditionBlock(nn.Module):
    """The latent attends to itself and to the condition, the condition to what ``own`` lets it see of itself.

    Both pass the same layers; those of keys, queries and values are shifted for the condition by a low rank.
    """

    def __init__(self, width: int, rank: int = 4) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.lora = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, 3 * width, bias=False))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.mod = nn.Linear(width, 4 * width)

    def forward(
        self, x: Tensor, c: Tensor, emb: Tensor, still: Tensor, own: Tensor, see: bool = False
    ) -> tuple[Tensor, Tensor]:
        s1, g1, s2, g2 = self.mod(emb)[:, None].chunk(4, dim=-1)
        t1, h1, t2, h2 = self.mod(still)[:, None].chunk(4, dim=-1)
        y, d = normed(x) * (1 + s1), normed(c) * (1 + t1)
        q, k, v = (heads(z) for z in self.qkv(y).chunk(3, dim=-1))
        qc, kc, vc = (heads(z) for z in (self.qkv(d) + self.lora(d)).chunk(3, dim=-1))
        if see:
            c = c + h1 * self.out(
                merged(F.scaled_dot_product_attention(qc, torch.cat([k, kc], 2), torch.cat([v, vc], 2)))
            )
        else:
            c = c + h1 * self.out(merged(F.scaled_dot_product_attention(qc, kc, vc, attn_mask=own)))
        k, v = torch.cat([k, kc], dim=2), torch.cat([v, vc], dim=2)
        x = x + g1 * self.out(merged(F.scaled_dot_product_attention(q, k, v)))
        return x + g2 * self.mlp(normed(x) * (1 + s2)), c + h2 * self.mlp(normed(c) * (1 + t2))


class Conditioned(nn.Module):
    """Latent tokens (B, N, C), two references of four tokens each (B, 8, C), which do not see each other; the time of
    the condition is 0. ``see``: let it see the latent."""

    def __init__(self, width: int = 24, depth: int = 3, see: bool = False) -> None:
        super().__init__()
        self.width, self.see = width, see
        self.embed, self.refer, self.head = nn.Linear(6, width), nn.Linear(6, width), nn.Linear(width, 6)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.stack = nn.ModuleList(ConditionBlock(width) for _ in range(depth))
        self.register_buffer("own", torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool(), persistent=False)

    def forward(self, z: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        emb, still = self.time(sinusoid(t, self.width)), self.time(sinusoid(torch.zeros_like(t), self.width))
        x, c = self.embed(z), self.refer(cond)
        for block in self.stack:
            x, c = block(x, c, emb, still, self.own, self.see)
        return self.head(x)


def condition_call(step: int, seed: int) -> Call:
    return {"z": randn(BATCH, 16, 6, seed=seed), "t": times(step, 1000), "cond": randn(BATCH, 8, 6, seed=99)}


MODELS = [Foreign("conditioned", Conditioned, condition_call, 3)]
