"""Feed-forward by experts: one that all tokens share, and those that each token chooses; in three spellings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign.base import BATCH, Call, Foreign, randn, sinusoid, times


class Experts(nn.Module):
    """Weights of all experts in two tensors, a shared expert, and the choice of each token."""

    def __init__(self, width: int, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.experts, self.chosen = experts, chosen
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) * (2 * width) ** -0.5)
        self.shared = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of the experts of each token: both (..., chosen)."""
        weights, index = self.router(x).softmax(dim=-1).topk(self.chosen, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), index

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) + self.routed(x)

    def routed(self, x: Tensor) -> Tensor:
        """Every expert computes every token, and what was not chosen weighs nothing."""
        weights, index = self.choose(x)
        dense = torch.zeros(*x.shape[:-1], self.experts).scatter(-1, index, weights)
        hidden = F.silu(torch.einsum("bnd,edh->bneh", x, self.up))
        return torch.einsum("bneh,ehd,bne->bnd", hidden, self.down, dense)


class Capacity(Experts):
    """Each expert has as many places; who comes too late is passed by."""

    def routed(self, x: Tensor) -> Tensor:
        weights, index = self.choose(x)
        places = x.shape[1] * self.chosen // self.experts
        wants = F.one_hot(index, self.experts).flatten(1, 2)  # (B, N * chosen, E)
        place = wants.cumsum(dim=1) * wants - 1
        seat = F.one_hot(place.clamp(min=0, max=places - 1), places) * ((place >= 0) & (place < places)).unsqueeze(-1)
        combine = (seat.unflatten(1, index.shape[1:]) * weights[..., None, None]).sum(dim=2)  # (B, N, E, places)
        inside = torch.einsum("bnec,bnd->becd", (combine > 0).to(x.dtype), x)
        hidden = F.silu(torch.einsum("becd,edh->bech", inside, self.up))
        return torch.einsum("bnec,becd->bnd", combine, torch.einsum("bech,ehd->becd", hidden, self.down))


class Gathered(Experts):
    """Each expert computes the tokens that chose it: how many these are depends on the latent."""

    def routed(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, index = self.choose(tokens)
        out = torch.zeros_like(tokens)
        for e in range(self.experts):
            row, place = torch.where(index == e)
            hidden = F.silu(tokens[row] @ self.up[e]) @ self.down[e]
            out.index_add_(0, row, hidden * weights[row, place, None])
        return out.view_as(x)


class Masked(Experts):
    """The same, and an expert that nobody chose is left out: Python looks at the latent."""

    def routed(self, x: Tensor) -> Tensor:
        weights, index = self.choose(x)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            chose = (index == e).any(dim=-1)
            if chose.any():
                weight = (weights * (index == e)).sum(dim=-1, keepdim=True)[chose]
                out[chose] = out[chose] + F.silu(x[chose] @ self.up[e]) @ self.down[e] * weight
        return out


class RoutedBlock(nn.Module):
    """Attention by torch's own module, then experts."""

    def __init__(self, width: int, experts: type[Experts]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.moe = experts(width)
        self.ada = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        s1, g1, s2, g2 = self.ada(F.silu(emb)).unsqueeze(1).chunk(4, dim=-1)
        h = self.norm1(x) * (1 + s1)
        x = x + g1 * self.attention(h, h, h, need_weights=False)[0]
        return x + g2 * self.moe(self.norm2(x) * (1 + s2))


class RoutedDiT(nn.Module):
    """Tokens in, tokens out; the pooled text is added to the time."""

    def __init__(self, experts: type[Experts], width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.width = width
        self.proj_in, self.proj_out = nn.Linear(8, width), nn.Linear(width, 8)
        self.time, self.text = nn.Linear(width, width), nn.Linear(16, width)
        self.decoder = nn.ModuleList(RoutedBlock(width, experts) for _ in range(depth))

    def forward(self, latents: Tensor, timestep: Tensor, pooled: Tensor) -> Tensor:
        emb = self.time(sinusoid(timestep, self.width)) + self.text(pooled)
        x = self.proj_in(latents)
        for block in self.decoder:
            x = block(x, emb)
        return self.proj_out(x)


def routed_call(step: int, seed: int) -> Call:
    return {
        "latents": randn(BATCH, 32, 8, seed=seed),
        "timestep": times(step, 1000),
        "pooled": randn(BATCH, 16, seed=99),
    }


MODELS = [
    Foreign("moe_dense", lambda: RoutedDiT(Experts), routed_call, 3),
    Foreign("moe_capacity", lambda: RoutedDiT(Capacity), routed_call, 3),
]

ROUTED = [
    Foreign("moe_gathered", lambda: RoutedDiT(Gathered, depth=1), routed_call, 1),
    Foreign("moe_masked", lambda: RoutedDiT(Masked, depth=1), routed_call, 1),
]
"""Models whose experts look at the latent: shapes or branches that it decides."""
