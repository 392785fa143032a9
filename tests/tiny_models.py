"""Tiny denoisers for tests: five classes of diffusers, and two foreign models written here.

Weights that are zero or constant at initialisation (adaLN-Zero's gates, norms) are replaced by noise, else every block
would be the identity and any test would pass. Nothing here is read by name in ditopt.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt.capture import Captured, bind, capture
from ditopt.ir.program import Role
from ditopt.recipe import Recipe


def noise(model: nn.Module, seed: int = 1, scale: float = 0.15) -> nn.Module:
    """``model`` in eval mode, with noise on every weight that is constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() == 1 or float(p.float().std()) == 0:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * scale)
    return model.eval()


@dataclass(frozen=True)
class Tiny:
    """A model and its calls. ``lists``: paths of its block lists, in order. ``roles``: for names that say nothing."""

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[Callable[..., Tensor]], dict[str, Any]]
    lists: tuple[str, ...]
    roles: tuple[tuple[str, Role], ...] = ()

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """A new model; the same weights each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return noise(self.build().to(dtype))

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of a call."""
        generator = torch.Generator().manual_seed(seed)
        return {
            k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in self.call(lambda *shape: torch.randn(shape, generator=generator)).items()
        }

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The block modules of ``model``, in order."""
        return [block for path in self.lists for block in model.get_submodule(path).children()]


def _diffusers(cls: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module("diffusers"), cls)(**config)


def _times(randn: Callable[..., Tensor], rows: int) -> Tensor:
    return (randn(rows).abs() * 400).long().clamp(1, 999)


def _flux(r: Callable[..., Tensor]) -> dict[str, Any]:
    ids = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], -1).float()
    return {
        "hidden_states": r(2, 16, 4),
        "timestep": r(2).abs().clamp(0.05, 0.95),
        "encoder_hidden_states": r(2, 6, 32),
        "pooled_projections": r(2, 16),
        "guidance": torch.full((2,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(6, 3),
    }


class Plain(nn.Module):
    """A single-stream DiT that owes nothing to diffusers: ``forward(x, t, y)``."""

    def __init__(self, width: int = 32, depth: int = 4, skip: Callable[[int], bool] = lambda i: False) -> None:
        super().__init__()
        self.width = width
        self.patch = nn.Conv2d(4, width, 2, 2)
        self.label = nn.Embedding(10, width)
        self.time = nn.Linear(width, width)
        self.blocks = nn.ModuleList(PlainBlock(width, wide=skip(i)) for i in range(depth))
        self.head = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows, _, h, w = x.shape
        rates = torch.exp(-torch.arange(self.width // 2, device=x.device) * 0.5)
        angles = t.reshape(-1, 1).float() * rates
        c = self.time(torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype)) + self.label(y)
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, c)
        x = self.head(x).view(rows, h // 2, w // 2, 4, 2, 2)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(rows, 4, h, w)


class PlainBlock(nn.Module):
    """Attention and MLP with adaptive norm and gates; ``wide`` makes it another kind of block."""

    def __init__(self, width: int, wide: bool = False) -> None:
        super().__init__()
        self.mod = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.up = nn.Linear(width, (6 if wide else 4) * width)
        self.down = nn.Linear((6 if wide else 4) * width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.mod(F.silu(c)).unsqueeze(1).chunk(6, -1)
        h = self.norm1(x) * (1 + s1) + b1
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + g1 * self.out(h)
        h = self.norm2(x) * (1 + s2) + b2
        return x + g2 * self.down(F.gelu(self.up(h)))


class Joint(nn.Module):
    """Two streams with joint attention, written with their own manual softmax; a dict comes out."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.image = nn.Linear(8, width)
        self.text = nn.Linear(24, width)
        self.time = nn.Linear(1, width)
        self.layers = nn.ModuleList(JointBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, 8)

    def forward(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> dict[str, Tensor]:
        c = self.time(sigma[:, None] * 0.1)
        x, y = self.image(latents), self.text(prompt_embeds)
        for layer in self.layers:
            x, y = layer(x, y, c)
        return {"sample": self.head(x), "text_norm": y.norm(dim=-1)}


class JointBlock(nn.Module):
    """One block of ``Joint``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mod = nn.Linear(width, 4 * width)
        self.norm = nn.RMSNorm(width)
        self.qkv_x, self.qkv_y = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.out_x, self.out_y = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp_x = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.mlp_y = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gate_x, gate_y, scale, shift = self.mod(c)[:, None].chunk(4, -1)
        tokens = torch.cat([self.qkv_x(self.norm(x) * (1 + scale) + shift), self.qkv_y(self.norm(y))], 1)
        q, k, v = tokens.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        a = (scores @ v).transpose(1, 2).flatten(2)
        ax, ay = a.split([x.shape[1], y.shape[1]], 1)
        x, y = x + gate_x * self.out_x(ax), y + gate_y * self.out_y(ay)
        return x + gate_x * self.mlp_x(self.norm(x)), y + gate_y * self.mlp_y(self.norm(y))


ZOO = {
    t.name: t
    for t in (
        Tiny(
            "dit",
            _diffusers(
                "DiTTransformer2DModel",
                in_channels=4,
                out_channels=8,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=4,
                sample_size=8,
                patch_size=2,
                num_embeds_ada_norm=10,
            ),
            lambda r: {
                "hidden_states": r(2, 4, 8, 8),
                "timestep": _times(r, 2),
                "class_labels": torch.tensor([3, 7]),
            },
            ("transformer_blocks",),
        ),
        Tiny(
            "sd3",
            _diffusers(
                "SD3Transformer2DModel",
                sample_size=8,
                patch_size=2,
                in_channels=4,
                num_layers=4,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_projection_dim=16,
                joint_attention_dim=24,
                pooled_projection_dim=32,
                out_channels=4,
                pos_embed_max_size=8,
            ),
            lambda r: {
                "hidden_states": r(2, 4, 8, 8),
                "timestep": _times(r, 2),
                "encoder_hidden_states": r(2, 6, 24),
                "pooled_projections": r(2, 32),
            },
            ("transformer_blocks",),
        ),
        Tiny(
            "flux",
            _diffusers(
                "FluxTransformer2DModel",
                patch_size=1,
                in_channels=4,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=16,
                axes_dims_rope=[4, 2, 2],
                guidance_embeds=True,
            ),
            _flux,
            ("transformer_blocks", "single_transformer_blocks"),
        ),
        Tiny(
            "wan",
            _diffusers(
                "WanTransformer3DModel",
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=16,
                freq_dim=32,
                ffn_dim=32,
                num_layers=3,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=32,
            ),
            lambda r: {
                "hidden_states": r(2, 4, 2, 4, 4),
                "timestep": _times(r, 2),
                "encoder_hidden_states": r(2, 6, 16),
            },
            ("blocks",),
        ),
        Tiny(
            "pixart",
            _diffusers(
                "PixArtTransformer2DModel",
                sample_size=8,
                num_layers=3,
                patch_size=2,
                attention_head_dim=8,
                num_attention_heads=2,
                in_channels=4,
                cross_attention_dim=16,
                out_channels=8,
                caption_channels=24,
                use_additional_conditions=False,
            ),
            lambda r: {
                "hidden_states": r(2, 4, 8, 8),
                "timestep": _times(r, 2),
                "encoder_hidden_states": r(2, 6, 24),
                "encoder_attention_mask": torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2]),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
            ("transformer_blocks",),
        ),
        Tiny(
            "plain",
            Plain,
            lambda r: {"x": r(2, 4, 8, 8), "t": r(2).abs() * 500, "y": torch.tensor([3, 7])},
            ("blocks",),
        ),
        Tiny(
            "joint",
            Joint,
            lambda r: {"latents": r(2, 9, 8), "sigma": r(2).abs() * 5, "prompt_embeds": r(2, 6, 24)},
            ("layers",),
        ),
    )
}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that can be seen of a model: attributes by identity and value, tensors by identity, version and content."""

    def value(v: Any) -> Any:
        if isinstance(v, Tensor):
            return id(v), v._version, v.detach().clone(), v.requires_grad, v.grad
        if isinstance(v, (int, float, str, bool, type(None))):
            return v
        if isinstance(v, (list, tuple)):
            return type(v), [value(x) for x in v]
        if isinstance(v, dict):
            return type(v), id(v), {k: value(x) for k, x in v.items()}
        return id(v)

    return {name: {k: value(v) for k, v in vars(module).items()} for name, module in model.named_modules()}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


snapshots: dict[str, tuple[Any, Any]] = {}
"""What ``captured`` saw of each model before and after its capture."""


@functools.cache
def captured(name: str) -> tuple[Any, Captured]:
    """A tiny model and its capture, made once for all tests: treat both as read-only."""
    tiny = ZOO[name]
    model = tiny.model().train()
    before = snapshot(model)
    spec, tensors = bind(model, (), tiny.inputs())
    result = capture(model, spec, tensors)
    snapshots[name] = before, snapshot(model)
    return model.eval(), result


@functools.cache
def optimized(name: str, recipe: str) -> Any:
    """The Program of a tiny model after a recipe."""
    from ditopt.pipeline import PassManager

    return PassManager(Recipe.parse(recipe)).run(captured(name)[1].program)[-1].program


def flat(captured: Captured, inputs: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a call by input name, as ``run_program`` takes them."""
    spec, tensors = bind(model, (), inputs)
    return dict(zip(spec.names, tensors, strict=True))


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a model's output, in order."""
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]
