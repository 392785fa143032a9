"""Video denoisers: shifted 3D windows, causal blocks over a KV input, audio beside video, a keyword-only one, and one
that attends inside frames, along frames and to a text by turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign.base import BATCH, Call, Foreign, randn, sinusoid, time, times


def heads(x: Tensor, count: int = 2) -> Tensor:
    """(..., N, D) -> (..., count, N, D / count)."""
    return x.unflatten(-1, (count, -1)).transpose(-2, -3)


def merged(x: Tensor) -> Tensor:
    """The inverse of ``heads``."""
    return x.transpose(-2, -3).flatten(-2)


# -- 3D windows --------------------------------------------------------------------------------------------------------

WINDOW = (2, 2, 4)


def partition(x: Tensor) -> Tensor:
    """(B, F, H, W, C) -> (B * windows, tokens of a window, C)."""
    b, f, h, w, c = x.shape
    x = x.view(b, f // WINDOW[0], WINDOW[0], h // WINDOW[1], WINDOW[1], w // WINDOW[2], WINDOW[2], c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, WINDOW[0] * WINDOW[1] * WINDOW[2], c)


def reverse(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The inverse of ``partition`` for ``shape`` = (B, F, H, W)."""
    b, f, h, w = shape
    x = x.view(b, f // WINDOW[0], h // WINDOW[1], w // WINDOW[2], *WINDOW, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, f, h, w, -1)


def shift_mask(f: int, h: int, w: int) -> Tensor:
    """What a token of a shifted window may see, as numbers to add: (windows, tokens, tokens)."""
    region = torch.zeros(1, f, h, w, 1)
    for axis, (size, window) in enumerate(zip((f, h, w), WINDOW, strict=True)):
        index = torch.arange(size)
        part = (index >= size - window).long() + (index >= size - window // 2).long()
        region = region * 3 + part.view([-1 if i == axis + 1 else 1 for i in range(5)])
    groups = partition(region).squeeze(-1)
    return torch.where(groups[:, None] == groups[:, :, None], 0.0, -100.0)


class WindowBlock(nn.Module):
    """Attention inside windows, which every second block shifts by half; positions by a learned bias."""

    def __init__(self, width: int, shifted: bool) -> None:
        super().__init__()
        self.shift = tuple(s // 2 for s in WINDOW) if shifted else None
        self.bias = nn.Parameter(torch.zeros(2, 16, 16))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.mod = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, emb: Tensor, mask: Tensor) -> Tensor:
        scale, gate = self.mod(emb)[:, None, None, None].chunk(2, -1)
        h = self.norm1(x) * (1 + scale)
        if self.shift is not None:
            h = torch.roll(h, [-s for s in self.shift], dims=(1, 2, 3))
        q, k, v = (heads(z) for z in self.qkv(partition(h)).chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + self.bias
        if self.shift is not None:
            windows = mask.shape[0]
            scores = (scores.unflatten(0, (-1, windows)) + mask[None, :, None]).flatten(0, 1)
        h = reverse(self.out(merged(scores.softmax(dim=-1) @ v)), (x.shape[0], x.shape[1], x.shape[2], x.shape[3]))
        if self.shift is not None:
            h = torch.roll(h, self.shift, dims=(1, 2, 3))
        x = x + gate * h
        return x + self.mlp(self.norm2(x))


class WindowDiT(nn.Module):
    """(B, C, F, H, W) in and out; patches of 1 x 2 x 2."""

    def __init__(self, width: int = 24, depth: int = 4) -> None:
        super().__init__()
        self.width = width
        self.patchify = nn.Conv3d(4, width, (1, 2, 2), (1, 2, 2))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.register_buffer("mask", shift_mask(4, 4, 4), persistent=False)
        self.blocks = nn.ModuleList(WindowBlock(width, shifted=i % 2 == 1) for i in range(depth))
        self.head = nn.ConvTranspose3d(width, 4, (1, 2, 2), (1, 2, 2))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        x = self.patchify(z).permute(0, 2, 3, 4, 1)
        emb = self.time(sinusoid(t, self.width))
        for block in self.blocks:
            x = block(x, emb, self.mask)
        return self.head(x.permute(0, 4, 1, 2, 3))


def window_call(step: int, seed: int) -> Call:
    return {"z": randn(BATCH, 4, 4, 8, 8, seed=seed), "t": times(step, 1000)}


# -- causal blocks -----------------------------------------------------------------------------------------------------


class CausalBlock(nn.Module):
    """A frame sees itself, the frames before it and those in the cache."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.kv, self.o = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.gate, self.up, self.down = (nn.Linear(*io, bias=False) for io in ((width, 64), (width, 64), (64, width)))
        self.mod = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, emb: Tensor, past: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        b1, s1, g1, b2, s2, g2 = self.mod(emb).unsqueeze(1).chunk(6, dim=-1)
        h = self.norm1(x) * (1 + s1) + b1
        new = torch.stack(self.kv(h).chunk(2, dim=-1))
        k, v = torch.cat([past, new], dim=-2)
        h = F.scaled_dot_product_attention(heads(self.q(h)), heads(k), heads(v), attn_mask=mask)
        x = x + g1 * self.o(merged(h))
        h = self.norm2(x) * (1 + s2) + b2
        return x + g2 * self.down(F.silu(self.gate(h)) * self.up(h)), new


class CausalDiT(nn.Module):
    """``past`` are keys and values of earlier frames, (layers, 2, B, N, D); those of these frames come out."""

    def __init__(self, width: int = 32, depth: int = 3, frame: int = 16) -> None:
        super().__init__()
        self.width, self.frame = width, frame
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 8)
        self.time = nn.Linear(width, width)
        self.layers = nn.ModuleList(CausalBlock(width) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        before, here = past.shape[-2], x.shape[1]
        frame = torch.arange(before + here) // self.frame
        mask = frame[before:, None] >= frame[None]
        emb = F.silu(self.time(sinusoid(t, self.width)))
        h, kept = self.embed(x), []
        for layer, cache in zip(self.layers, past, strict=True):
            h, new = layer(h, emb, cache, mask)
            kept.append(new)
        return self.head(h), torch.stack(kept)


def causal_call(step: int, seed: int) -> Call:
    return {"x": randn(BATCH, 32, 8, seed=seed), "t": times(step, 1000), "past": randn(3, 2, BATCH, 16, 32, seed=99)}


# -- audio and video ---------------------------------------------------------------------------------------------------


class Cross(nn.Module):
    """Attention of ``x`` to ``y``; without it, to itself."""

    def __init__(self, width: int, other: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.v, self.o = nn.Linear(width, width), nn.Linear(other, width), nn.Linear(width, width)
        self.k = nn.Linear(other, width, bias=False)  # softmax would not see a bias

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        y = x if y is None else y
        return self.o(merged(F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(y)), heads(self.v(y)))))


class AudioVideoBlock(nn.Module):
    """Each stream attends to itself, then to the other, then is fed forward."""

    def __init__(self, video: int, audio: int) -> None:
        super().__init__()
        self.own_v, self.own_a = Cross(video, video), Cross(audio, audio)
        self.from_a, self.from_v = Cross(video, audio), Cross(audio, video)
        self.mlp_v = nn.Sequential(nn.LayerNorm(video), nn.Linear(video, 64), nn.GELU(), nn.Linear(64, video))
        self.mlp_a = nn.Sequential(nn.LayerNorm(audio), nn.Linear(audio, 64), nn.GELU(), nn.Linear(64, audio))
        self.gates_v, self.gates_a = nn.Linear(16, 3 * video), nn.Linear(16, 3 * audio)

    def forward(self, v: Tensor, a: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        gv, ga = self.gates_v(emb)[:, None].chunk(3, -1), self.gates_a(emb)[:, None].chunk(3, -1)
        v, a = v + gv[0] * self.own_v(v), a + ga[0] * self.own_a(a)
        v, a = v + gv[1] * self.from_a(v, a), a + ga[1] * self.from_v(a, v)
        return v + gv[2] * self.mlp_v(v), a + ga[2] * self.mlp_a(a)


class AudioVideo(nn.Module):
    """Two latents of different width and rate, denoised together; both come out."""

    def __init__(self, depth: int = 3, video: int = 32, audio: int = 24) -> None:
        super().__init__()
        self.in_v, self.in_a, self.text = nn.Linear(8, video), nn.Linear(6, audio), nn.Linear(12, 16)
        self.time = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))
        self.joint = nn.ModuleList(AudioVideoBlock(video, audio) for _ in range(depth))
        self.out_v, self.out_a = nn.Linear(video, 8), nn.Linear(audio, 6)

    def forward(self, video: Tensor, audio: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        emb = F.silu(self.time(sinusoid(t, 16)) + self.text(text).mean(dim=1))
        v, a = self.in_v(video.flatten(1, 2)), self.in_a(audio)
        for block in self.joint:
            v, a = block(v, a, emb)
        return self.out_v(v).view_as(video), self.out_a(a)


def audio_video_call(step: int, seed: int) -> Call:
    latents = {"video": randn(BATCH, 4, 12, 8, seed=seed), "audio": randn(BATCH, 32, 6, seed=50 + seed)}
    return {**latents, "t": times(step, 1000), "text": randn(BATCH, 5, 12, seed=99)}


# -- keywords and numbers ----------------------------------------------------------------------------------------------


@dataclass
class Prediction:
    """What ``KeywordDiT`` returns."""

    sample: Tensor
    extra: dict[str, Any]


class KeywordDiT(nn.Module):
    """Nothing is positional, the timestep is a Python number and the result a dataclass."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.width = width
        self.embed, self.time, self.head = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 4)
        layer: dict[str, Any] = {
            "nhead": 2,
            "dim_feedforward": 64,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(width, dropout=0.0, **layer) for _ in range(depth))

    def forward(self, *, sample: Tensor, timestep: float | Tensor, scale: float = 1.0, dim: int = 1) -> Prediction:
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1)
        emb = F.silu(self.time(sinusoid(t, self.width))) * scale
        x = self.embed(sample.flatten(2).transpose(1, 2)) + emb[:, None]
        for layer in self.encoder:
            x = layer(x)
        out = self.head(x).transpose(1, 2).view_as(sample)
        return Prediction(out, {"mean": x.mean(dim=dim), "tokens": x.shape[1]})


def keyword_call(step: int, seed: int) -> Call:
    return {"sample": randn(BATCH, 4, 6, 6, seed=seed), "timestep": time(step) * 1000, "scale": 0.5}


# -- space and time by turns -------------------------------------------------------------------------------------------


class SpaceTimeBlock(nn.Module):
    """Attention inside each frame, then along the frames, then to the text; every branch has a gate of the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside, self.along = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.ask, self.told = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.outs = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.mod = nn.Linear(width, 8 * width)

    def parameters_of(self, emb: Tensor) -> list[Tensor]:
        """Scale and gate of each of the four branches."""
        return list(self.mod(emb)[:, None, None].chunk(8, dim=-1))

    def spatial(self, x: Tensor, scale: Tensor) -> Tensor:
        """(B, F, N, D) -> the same, before its gate."""
        q, k, v = (heads(z) for z in self.inside(normed(x) * (1 + scale)).chunk(3, dim=-1))
        scores = torch.einsum("bfhnd,bfhmd->bfhnm", q, k) * q.shape[-1] ** -0.5
        return self.outs[0](merged(torch.einsum("bfhnm,bfhmd->bfhnd", scores.softmax(-1), v)))

    def temporal(self, x: Tensor, scale: Tensor) -> Tensor:
        """(B, F, N, D) -> the same, before its gate."""
        h = (normed(x) * (1 + scale)).transpose(1, 2).flatten(0, 1)
        q, k, v = (heads(z) for z in self.along(h).chunk(3, dim=-1))
        h = self.outs[1](merged(F.scaled_dot_product_attention(q, k, v)))
        return h.unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    def cross(self, x: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        """(B, F, N, D) and the text (B, T, D) -> the first, before its gate."""
        q = heads(self.ask(normed(x) * (1 + scale)).flatten(1, 2))
        k, v = (heads(z) for z in self.told(text).chunk(2, dim=-1))
        return self.outs[2](merged(F.scaled_dot_product_attention(q, k, v))).view(x.shape)

    def feed(self, x: Tensor, scale: Tensor) -> Tensor:
        """(B, F, N, D) -> the same, before its gate."""
        return self.down(F.gelu(self.up(normed(x) * (1 + scale))))

    def forward(self, x: Tensor, text: Tensor, emb: Tensor) -> Tensor:
        s1, g1, s2, g2, s3, g3, s4, g4 = self.parameters_of(emb)
        x = x + g1 * self.spatial(x, s1)
        x = x + g2 * self.temporal(x, s2)
        x = x + g3 * self.cross(x, text, s3)
        return x + g4 * self.feed(x, s4)


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class SpaceTime(nn.Module):
    """(B, F, H, W, C) in and out; patches of 1 x 2 x 2."""

    def __init__(self, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.width = width
        self.embed, self.head = nn.Linear(16, width), nn.Linear(width, 16)
        self.time, self.words = nn.Sequential(nn.Linear(width, width), nn.SiLU()), nn.Linear(12, width)
        self.trunk = nn.ModuleList(SpaceTimeBlock(width) for _ in range(depth))

    def tokens(self, a: Tensor) -> Tensor:
        """(B, F, H, W, C) -> (B, F, N, D)."""
        a = a.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4)
        return self.embed(a.flatten(4).flatten(2, 3))

    def video(self, x: Tensor, a: Tensor) -> Tensor:
        """The inverse, in the shape of ``a``."""
        x = self.head(x).view(*a.shape[:2], a.shape[2] // 2, a.shape[3] // 2, 2, 2, -1)
        return x.transpose(3, 4).reshape(a.shape)

    def forward(self, a: Tensor, t: Tensor, text: Tensor) -> Tensor:
        emb, text, x = self.time(sinusoid(t, self.width)), self.words(text), self.tokens(a)
        for block in self.trunk:
            x = block(x, text, emb)
        return self.video(x, a)


def spacetime_call(step: int, seed: int) -> Call:
    return {"a": randn(BATCH, 3, 4, 6, 4, seed=seed), "t": times(step, 1000), "text": randn(BATCH, 5, 12, seed=99)}


# -- blocks of frames and blocks of rows -------------------------------------------------------------------------------


class TurnBlock(nn.Module):
    """Attention and MLP along whatever axis comes second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.mod = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        s1, g1, s2, g2 = self.mod(emb)[:, None].chunk(4, dim=-1)
        q, k, v = (heads(z) for z in self.qkv(normed(x) * (1 + s1)).chunk(3, dim=-1))
        x = x + g1 * self.out(merged(F.scaled_dot_product_attention(q, k, v)))
        return x + g2 * self.down(F.gelu(self.up(normed(x) * (1 + s2))))


class Turns(nn.Module):
    """(B, F, H, W, C) in and out. Every second block attends along the frames: between any two the stream is laid out
    anew, and before the first of these it gets the positions of frames."""

    def __init__(self, width: int = 24, depth: int = 6, frames: int = 3) -> None:
        super().__init__()
        self.width = width
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.frame = nn.Parameter(torch.randn(frames, width))
        self.blocks = nn.ModuleList(TurnBlock(width) for _ in range(depth))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        emb = self.time(sinusoid(t, self.width))
        rows, frames = z.shape[:2]
        x = self.embed(z).flatten(2, 3).flatten(0, 1)
        for i in range(0, len(self.blocks), 2):
            inside, along = self.blocks[i], self.blocks[i + 1]
            x = inside(x, emb.repeat_interleave(frames, 0))
            x = x.unflatten(0, (rows, frames)).transpose(1, 2).flatten(0, 1)
            x = x + self.frame if i == 0 else x
            x = along(x, emb.repeat_interleave(x.shape[0] // rows, 0))
            x = x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(0, 1)
        return self.head(x).view(z.shape)


def turns_call(step: int, seed: int) -> Call:
    return {"z": randn(BATCH, 3, 4, 4, 4, seed=seed), "t": times(step, 1000)}


MODELS = [
    Foreign("window", WindowDiT, window_call, 4),
    Foreign("causal", CausalDiT, causal_call, 3),
    Foreign("audio_video", AudioVideo, audio_video_call, 3),
    Foreign("keywords", KeywordDiT, keyword_call, 3),
    Foreign("spacetime", SpaceTime, spacetime_call, 3),
    Foreign("turns", Turns, turns_call, 6),
]
