"""Denoisers that differ in what their tokens are: packed sequences, windows, text beside an image, speech."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign.base import BATCH, Call, Foreign, randn, sinusoid, times


def split_heads(x: Tensor, heads: int = 2) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class MLP(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))


# -- sequences of several lengths in one row ---------------------------------------------------------------------------


class PackedBlock(nn.Module):
    """Attention within each sequence, in a Python loop over where they begin: what a varlen kernel does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), MLP(width)

    def forward(self, x: Tensor, emb: Tensor, cu_seqlens: Tensor) -> Tensor:
        s1, g1, s2, g2 = self.ada(F.silu(emb)).chunk(4, -1)
        qkv = self.qkv(self.norm(x) * (1 + s1))
        starts = cu_seqlens.tolist()
        parts = []
        for a, b in itertools.pairwise(starts):
            parts.append(attend(*(split_heads(z[None]) for z in qkv[a:b].chunk(3, -1)))[0])
        x = x + g1 * self.out(torch.cat(parts))
        return x + g2 * self.mlp(self.norm(x) * (1 + s2))


class PackedDiT(nn.Module):
    """No batch dimension: tokens (N, C) of all images one after the other; each token gets the time of its image."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.width = width
        self.embed, self.time = nn.Linear(8, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(PackedBlock(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 8)

    def forward(self, packed: Tensor, t: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        emb = torch.repeat_interleave(self.time(sinusoid(t, self.width)), lengths, dim=0)
        x = self.embed(packed)
        for layer in self.layers:
            x = layer(x, emb, cu_seqlens)
        return self.head(self.norm(x))


def packed_call(step: int, seed: int) -> Call:
    return {"packed": randn(50, 8, seed=seed), "t": times(step, 1000), "cu_seqlens": torch.tensor([0, 20, 50])}


# -- windows, written out ----------------------------------------------------------------------------------------------


class WindowedBlock(nn.Module):
    """Attention in windows of 4 x 4 tokens with a learned bias for each distance, every second time shifted."""

    def __init__(self, width: int, shift: int, size: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.shift, self.size, self.heads = shift, size, heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), MLP(width)
        self.ada = nn.Linear(width, 2 * width)
        self.bias = nn.Parameter(torch.randn((2 * size - 1) ** 2, heads))
        place = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        far = place[:, None] - place[None] + size - 1
        self.register_buffer("distance", far[..., 0] * (2 * size - 1) + far[..., 1], persistent=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        b, h, w, c = x.shape
        n = self.size
        scale, gate = self.ada(emb)[:, None, None].chunk(2, -1)
        y = torch.roll(self.norm1(x) * (1 + scale), (-self.shift, -self.shift), (1, 2))
        y = y.view(b, h // n, n, w // n, n, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, n * n, c)
        q, k, v = self.qkv(y).reshape(-1, n * n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.distance.flatten()].view(n * n, n * n, self.heads).permute(2, 0, 1)
        scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1) + bias[None]
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, n * n, c))
        y = y.view(b, h // n, w // n, n, n, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + gate * torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class WindowedDiT(nn.Module):
    """Tokens stay an image, channels last."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.width = width
        self.stem, self.head = nn.Conv2d(4, width, 1), nn.Conv2d(width, 4, 1)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.stages = nn.ModuleList(WindowedBlock(width, 2 * (i % 2)) for i in range(depth))

    def forward(self, x: Tensor, noise_labels: Tensor) -> Tensor:
        emb = self.time(sinusoid(noise_labels, self.width))
        h = self.stem(x).permute(0, 2, 3, 1)
        for block in self.stages:
            h = block(h, emb)
        return self.head(h.permute(0, 3, 1, 2))


def windowed_call(step: int, seed: int) -> Call:
    return {"x": randn(BATCH, 4, 8, 12, seed=seed), "noise_labels": times(step, 1000)}


# -- text and image in one attention, then in one stream ---------------------------------------------------------------


def rotations(ids: Tensor, widths: tuple[int, ...] = (4, 6, 6)) -> Tensor:
    """2 x 2 rotations for the positions (B, N, 3); the rates are float64."""
    parts = []
    for i, width in enumerate(widths):
        rates = 1.0 / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.einsum("...n,d->...nd", ids[..., i], rates)
        parts.append(
            torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2)).float()
        )
    return torch.cat(parts, -3).unsqueeze(1)


def rotate(x: Tensor, by: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (by[..., 0] * pairs[..., 0] + by[..., 1] * pairs[..., 1]).reshape(x.shape).type_as(x)


class Side(nn.Module):
    """The layers of one stream of a double block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mod, self.qkv = nn.Linear(width, 6 * width), nn.Linear(width, 3 * width)
        self.proj, self.mlp = nn.Linear(width, width), MLP(width)
        self.query_norm, self.key_norm = nn.RMSNorm(width // 2), nn.RMSNorm(width // 2)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def heads(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(z) for z in self.qkv((1 + scale) * self.norm(x) + shift).chunk(3, -1))
        return self.query_norm(q), self.key_norm(k), v

    def close(self, x: Tensor, attended: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, gate2: Tensor) -> Tensor:
        x = x + gate * self.proj(attended)
        return x + gate2 * self.mlp((1 + scale) * self.norm(x) + shift)


class Double(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.img, self.txt = Side(width), Side(width)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        i, t = (side.mod(F.silu(vec))[:, None].chunk(6, -1) for side in (self.img, self.txt))
        both = zip(self.txt.heads(txt, *t[:2]), self.img.heads(img, *i[:2]), strict=True)
        q, k, v = (torch.cat(pair, 2) for pair in both)
        attended = attend(rotate(q, pe), rotate(k, pe), v)
        a, b = attended[:, : txt.shape[1]], attended[:, txt.shape[1] :]
        return self.img.close(img, b, i[2], *i[3:]), self.txt.close(txt, a, t[2], *t[3:])


class Single(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mod, self.width = nn.Linear(width, 3 * width), width
        self.linear1, self.linear2 = nn.Linear(width, 5 * width), nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        shift, scale, gate = self.mod(F.silu(vec))[:, None].chunk(3, -1)
        qkv, mlp = torch.split(self.linear1((1 + scale) * self.norm(x) + shift), [3 * self.width, 2 * self.width], -1)
        q, k, v = (split_heads(z) for z in qkv.chunk(3, -1))
        attended = attend(rotate(q, pe), rotate(k, pe), v)
        return x + gate * self.linear2(torch.cat((attended, F.gelu(mlp, approximate="tanh")), 2))


class JointDiT(nn.Module):
    """Two streams, then one; positions come with the call."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.img_in, self.txt_in, self.final = nn.Linear(16, width), nn.Linear(12, width), nn.Linear(width, 16)
        self.time_in, self.guidance_in, self.vector_in = (nn.Linear(n, width) for n in (width, width, 8))
        self.double_blocks = nn.ModuleList(Double(width) for _ in range(2))
        self.single_blocks = nn.ModuleList(Single(width) for _ in range(2))

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor, guidance: Tensor
    ) -> Tensor:
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError("img and txt must have three dimensions")
        vec = self.time_in(sinusoid(timesteps, self.width)) + self.guidance_in(sinusoid(guidance, self.width))
        vec = vec + self.vector_in(y)
        img, txt, pe = self.img_in(img), self.txt_in(txt), rotations(torch.cat((txt_ids, img_ids), 1))
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        x = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            x = block(x, vec, pe)
        return self.final(x[:, txt.shape[1] :, ...])


def joint_call(step: int, seed: int) -> Call:
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(5.0), torch.arange(6.0)).expand(BATCH, -1, -1)
    return {
        "img": randn(BATCH, 30, 16, seed=seed),
        "img_ids": grid,
        "txt": randn(BATCH, 5, 12, seed=90),
        "txt_ids": torch.zeros(BATCH, 5, 3),
        "timesteps": times(step, 1000),
        "y": randn(BATCH, 8, seed=91),
        "guidance": torch.full((BATCH,), 3.5),
    }


# -- speech ------------------------------------------------------------------------------------------------------------


class SpeechBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada, self.norm = nn.Linear(width, 6 * width), nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), MLP(width)

    def forward(self, x: Tensor, emb: Tensor, mask: Tensor) -> Tensor:
        b1, s1, g1, b2, s2, g2 = self.ada(F.silu(emb))[:, None].chunk(6, -1)
        q, k, v = (split_heads(z) for z in self.qkv(self.norm(x) * (1 + s1) + b1).chunk(3, -1))
        y = self.out(attend(q, k, v, mask[:, None, None].expand(-1, 2, mask.shape[1], -1)))
        x = x + g1 * y.masked_fill(~mask[..., None], 0.0)
        return x + g2 * self.mlp(self.norm(x) * (1 + s2) + b2)


class SpeechDiT(nn.Module):
    """Frames of sound beside a reference and characters; one time for all rows, a length for each."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.width = width
        self.text_embed, self.proj = nn.Embedding(30, 16), nn.Linear(8 + 8 + 16, width)
        self.near = nn.Conv1d(width, width, 7, padding=3, groups=4)
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.transformer_blocks = nn.ModuleList(SpeechBlock(width) for _ in range(depth))
        self.skip, self.to_mel = nn.Linear(2 * width, width), nn.Linear(width, 8)

    def forward(
        self, x: Tensor, cond: Tensor, text: Tensor, time: Tensor, lens: Tensor, drop_text: bool = False
    ) -> Tensor:
        batch, frames, _ = x.shape
        if time.ndim == 0:
            time = time.repeat(batch)
        text = F.pad(text + 1, (0, frames - text.shape[1]), value=0)
        text = torch.zeros_like(text) if drop_text else text
        mask = torch.arange(frames, device=x.device)[None] < lens[:, None]
        h = self.proj(torch.cat([x, cond, self.text_embed(text)], -1)).masked_fill(~mask[..., None], 0.0)
        h = start = h + F.mish(self.near(h.transpose(1, 2))).transpose(1, 2)
        emb = self.time_embed(sinusoid(time, self.width))
        for block in self.transformer_blocks:
            h = block(h, emb, mask)
        return self.to_mel(self.skip(torch.cat([h, start], -1)))


def speech_call(step: int, seed: int) -> Call:
    return {
        "x": randn(BATCH, 40, 8, seed=seed),
        "cond": randn(BATCH, 40, 8, seed=80),
        "text": torch.arange(20).view(BATCH, 10),
        "time": times(step, 1000)[0],
        "lens": torch.tensor([40, 30]),
    }


MODELS = [
    Foreign("packed", PackedDiT, packed_call, 3),
    Foreign("windowed", WindowedDiT, windowed_call, 4),
    Foreign("joint_positions", JointDiT, joint_call, 4),
    Foreign("speech", SpeechDiT, speech_call, 3),
]
