"""How the tiny denoisers are made: one registry, seeded inputs, and weights of which none is zero or one by accident.

A denoiser fresh from its constructor is often the identity (adaLN-Zero's gates are zero), and then any test of its
blocks passes. So every parameter is drawn anew, by what it is: a matrix by its fan-in, a bias small, a norm near one.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, ROWS, COLUMNS, TEXT = 2, 8, 10, 7
"""Requests of a call, latent tokens down and across (where the class allows it not square), tokens of a prompt."""

Call = dict[str, Any]
Builder = Callable[["Draw"], tuple[nn.Module, Call]]


class Draw:
    """Seeded values for the arguments of one call."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        """float32 noise."""
        return torch.randn(shape, generator=self._generator)

    def rows(self, *shape: int) -> Tensor:
        """float32 noise with the batch in front: (BATCH, *shape)."""
        return self.randn(BATCH, *shape)

    def steps(self) -> Tensor:
        """Integer timesteps between 400 and 999, one a row: int64 (BATCH,)."""
        return torch.randint(400, 1000, (BATCH,), generator=self._generator)

    def sigmas(self) -> Tensor:
        """Times between 0.4 and 1, one a row: float32 (BATCH,)."""
        return torch.rand(BATCH, generator=self._generator) * 0.6 + 0.4

    def labels(self, classes: int) -> Tensor:
        """Class labels: int64 (BATCH,)."""
        return torch.randint(classes, (BATCH,), generator=self._generator)


def prompt_mask(length: int = TEXT, dtype: torch.dtype = torch.bool) -> Tensor:
    """The mask of prompts of which the last one is two tokens shorter: (BATCH, length)."""
    mask = torch.ones(BATCH, length, dtype=dtype)
    mask[-1, -2:] = 0
    return mask


def positions(rows: int = ROWS, columns: int = COLUMNS, axes: int = 3) -> Tensor:
    """Position ids of a grid of tokens: float32 (rows * columns, axes); the last two axes are row and column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ids = torch.zeros(rows * columns, axes)
    ids[:, -2], ids[:, -1] = row.flatten(), column.flatten()
    return ids


def make(cls: str, **config: Any) -> nn.Module:
    """A model of a diffusers class in eval mode, every parameter drawn at random; the same weights each time."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: nn.Module = getattr(importlib.import_module("diffusers"), cls)(**config)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                _redraw(module, name, parameter)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _redraw(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point() or not parameter.numel():
        return
    if parameter.ndim <= 1:
        centre = 0.0 if "bias" in name else 1.0
        parameter.normal_(centre, 0.15)
        return
    weighs = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    fan_in = parameter[0].numel() if weighs else parameter.shape[-1]
    parameter.normal_(0.0, fan_in**-0.5)


@dataclass(frozen=True)
class Denoiser:
    """A tiny model and how it is called.

    ``latent``, ``time``, ``prompt``: names of the arguments that are these. ``blocks``: dotted paths of the block lists
    that the latent passes through.
    """

    name: str
    builder: Builder
    latent: tuple[str, ...]
    time: tuple[str, ...]
    prompt: tuple[str, ...]
    blocks: tuple[str, ...]

    def build(self, seed: int = 0) -> tuple[nn.Module, Call]:
        """The model, the same weights for every seed, and the keyword arguments of a call."""
        return self.builder(Draw(seed))

    def block_modules(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of the main path, list by list."""
        return [block for path in self.blocks for block in model.get_submodule(path).children()]


REGISTRY: dict[str, Denoiser] = {}
"""Every denoiser by name. Filled by importing the families: use ``tests.denoisers.REGISTRY``."""


def denoiser(
    *,
    latent: tuple[str, ...] = ("hidden_states",),
    time: tuple[str, ...] = ("timestep",),
    prompt: tuple[str, ...] = ("encoder_hidden_states",),
    blocks: tuple[str, ...] = ("transformer_blocks",),
) -> Callable[[Builder], Builder]:
    """Register a builder under its function's name."""

    def register(builder: Builder) -> Builder:
        name = builder.__name__
        REGISTRY[name] = Denoiser(name, builder, latent, time, prompt, blocks)
        return builder

    return register
