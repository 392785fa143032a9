"""Image denoisers in the styles of research code: the original DiT, a functional one, linear attention, U-ViT."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign.base import BATCH, Call, Foreign, randn, sinusoid, times

LABELS = torch.tensor([3, 7])


# -- the original research style ---------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Embeds scalar timesteps into vectors."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 32) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size = frequency_embedding_size

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t, self.frequency_embedding_size))


class LabelEmbedder(nn.Module):
    """Embeds class labels; in training some are dropped for classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        if train and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Softmax of QK^T, times V, written out."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))


class DiTBlock(nn.Module):
    """A block with adaptive layer norm zero."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, hidden_size * 4),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden_size * 4, hidden_size),
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        for p in self.adaLN_modulation.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Adaptive norm and projection to the pixels of a patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def sincos_2d(dim: int, size: int) -> Tensor:
    """Fixed position embedding of a square grid, by numpy: (1, size * size, dim)."""
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=0).reshape(2, -1)
    angles = np.einsum("am,d->amd", grid, omega)
    parts = [f(a) for a in angles for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float().unsqueeze(0)


class ResearchDiT(nn.Module):
    """``forward(x, t, y)``; predicts the noise and its variance."""

    def __init__(self, size: int = 12, patch: int = 2, channels: int = 4, hidden: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.out_channels, self.patch_size = channels * 2, patch
        self.x_embedder = nn.Conv2d(channels, hidden, patch, patch)
        self.t_embedder = TimestepEmbedder(hidden)
        self.y_embedder = LabelEmbedder(10, hidden, 0.1)
        self.pos_embed = nn.Parameter(sincos_2d(hidden, size // patch), requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(hidden, 2) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden, patch, self.out_channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        c, p = self.out_channels, self.patch_size
        h = w = int(x.shape[1] ** 0.5)
        assert h * w == x.shape[1]
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(shape=(x.shape[0], h, w, p, p, c)))
        return x.reshape(shape=(x.shape[0], c, h * p, h * p))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x: (N, C, H, W), t: (N,), y: (N,) -> (N, 2C, H, W)."""
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


def research_call(step: int, seed: int) -> Call:
    return {"x": randn(BATCH, 4, 12, 12, seed=seed), "t": times(step, 1000).long(), "y": LABELS}


# -- no modules at all -------------------------------------------------------------------------------------------------


def linear_params(into: int, out: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.randn(out, into) * into**-0.5), nn.Parameter(torch.randn(out) * 0.1)


class Functional(nn.Module):
    """A loop over dicts of parameters; ``c`` is the noise level, one number a row."""

    def __init__(self, width: int = 32, depth: int = 3, channels: int = 6) -> None:
        super().__init__()
        self.width = width
        self.w_in, self.b_in = linear_params(channels, width)
        self.w_time, self.b_time = linear_params(width, width)
        self.w_out, self.b_out = linear_params(width, channels)
        self.layers = nn.ParameterList()
        for _ in range(depth):
            layer = nn.ParameterDict()
            shapes = {"ada": (width, 4 * width), "qkv": (width, 3 * width), "o": (width, width)}
            for key, (into, out) in {**shapes, "up": (width, 4 * width), "down": (4 * width, width)}.items():
                layer[f"w_{key}"], layer[f"b_{key}"] = linear_params(into, out)
            self.layers.append(layer)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        emb = F.silu(F.linear(sinusoid(c * 1000, self.width), self.w_time, self.b_time))
        h = F.linear(x, self.w_in, self.b_in)
        for p in self.layers:
            h = functional_block(p, h, emb)
        return F.linear(F.layer_norm(h, (self.width,)), self.w_out, self.b_out)


def functional_block(p: nn.ParameterDict, h: Tensor, emb: Tensor, heads: int = 4) -> Tensor:
    s1, g1, s2, g2 = F.linear(emb, p["w_ada"], p["b_ada"])[:, None].chunk(4, -1)
    a = F.layer_norm(h, h.shape[-1:]) * (1 + s1)
    q, k, v = (z.unflatten(-1, (heads, -1)) for z in F.linear(a, p["w_qkv"], p["b_qkv"]).chunk(3, -1))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    a = torch.einsum("bhnm,bmhd->bnhd", torch.softmax(scores, -1), v).flatten(-2)
    h = h + g1 * F.linear(a, p["w_o"], p["b_o"])
    a = F.layer_norm(h, h.shape[-1:]) * (1 + s2)
    return h + g2 * F.linear(F.silu(F.linear(a, p["w_up"], p["b_up"])), p["w_down"], p["b_down"])


def functional_call(step: int, seed: int) -> Call:
    return randn(BATCH, 40, 6, seed=seed), times(step)


# -- linear attention --------------------------------------------------------------------------------------------------


class LinearAttention(nn.Module):
    """Attention by the kernel ELU + 1: the keys are summed before they meet the queries."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = 1 / (q @ k.sum(dim=-2, keepdim=True).transpose(-1, -2) + 1e-6)
        return self.to_out((q @ (k.transpose(-1, -2) @ v) * z).transpose(1, 2).flatten(2))


class ConvFeedForward(nn.Module):
    """Inverted bottleneck with a depthwise convolution and a gated unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inverted = nn.Conv2d(width, 4 * width, 1)
        self.depth = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.point = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x.transpose(1, 2).unflatten(-1, grid)
        x, gate = self.depth(F.silu(self.inverted(x))).chunk(2, dim=1)
        return self.point(x * F.silu(gate)).flatten(2).transpose(1, 2)


class LinearBlock(nn.Module):
    """A table of six vectors is shifted by a shared embedding of the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, width) * width**-0.5)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attn, self.ff = LinearAttention(width), ConvFeedForward(width)

    def forward(self, x: Tensor, mod: Tensor, grid: tuple[int, int]) -> Tensor:
        b1, s1, g1, b2, s2, g2 = (self.table[None] + mod.unflatten(-1, (6, -1))).chunk(6, dim=1)
        x = x + g1 * self.attn(self.norm1(x) * (1 + s1) + b1)
        return x + g2 * self.ff(self.norm2(x) * (1 + s2) + b2, grid)


class LinearDiT(nn.Module):
    """Linear attention and convolutional feed-forward, no position embedding."""

    def __init__(self, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Conv2d(4, width, 1)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 6 * width))
        self.layers = nn.ModuleList(LinearBlock(width) for _ in range(depth))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, sample: Tensor, sigma: Tensor) -> Tensor:
        grid = (sample.shape[-2], sample.shape[-1])
        x = self.stem(sample).flatten(2).transpose(1, 2)
        mod = self.time(sinusoid(sigma * 1000, self.width))
        for layer in self.layers:
            x = layer(x, mod, grid)
        return self.head(x.transpose(1, 2).unflatten(-1, grid))


def linear_call(step: int, seed: int) -> Call:
    return {"sample": randn(BATCH, 4, 6, 8, seed=seed), "sigma": times(step)}


# -- long skips --------------------------------------------------------------------------------------------------------


class UBlock(nn.Module):
    """A plain transformer block; in the second half of the U it takes in the tokens of the first half."""

    def __init__(self, width: int, skip: bool = False) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class UViT(nn.Module):
    """Time and class are tokens beside those of the image; long skips join the two halves."""

    def __init__(self, width: int = 32, depth: int = 2, tokens: int = 36) -> None:
        super().__init__()
        self.width, self.tokens = width, tokens
        self.patch_embed = nn.Conv2d(3, width, 2, 2)
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.label_emb = nn.Embedding(10, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 2, width))
        self.in_blocks = nn.ModuleList(UBlock(width) for _ in range(depth))
        self.mid_block = UBlock(width)
        self.out_blocks = nn.ModuleList(UBlock(width, skip=True) for _ in range(depth))
        self.norm, self.decoder_pred = nn.LayerNorm(width), nn.Linear(width, 12)
        self.final_layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        size = x.shape[-1] // 2
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        token = self.time_embed(sinusoid(timesteps, self.width)).unsqueeze(1)
        x = torch.cat((self.label_emb(y).unsqueeze(1), token, x), dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        x = self.decoder_pred(self.norm(x))[:, 2:]
        x = torch.einsum("bhwpqc->bchpwq", x.unflatten(1, (size, size)).unflatten(-1, (2, 2, 3)))
        return self.final_layer(x.flatten(4, 5).flatten(2, 3))


def uvit_call(step: int, seed: int) -> Call:
    return {"x": randn(BATCH, 3, 12, 12, seed=seed), "timesteps": times(step, 1000), "y": LABELS}


MODELS = [
    Foreign("research", ResearchDiT, research_call, 4),
    Foreign("functional", Functional, functional_call, 3),
    Foreign("linear_attention", LinearDiT, linear_call, 3),
    Foreign("uvit", UViT, uvit_call, 5),
]
