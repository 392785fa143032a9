"""Denoisers that guide themselves: both prompts in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.foreign.base import BATCH, Call, Foreign, randn, sinusoid, times
from tests.foreign.looking import WIDTH, Block


class Prefixed(nn.Module):
    """The prompt stands before the image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.words, self.head = nn.Linear(6, WIDTH), nn.Linear(12, WIDTH), nn.Linear(WIDTH, 6)
        self.time = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.time(sinusoid(t * 1000, WIDTH))
        h = torch.cat([self.words(text), self.embed(x)], dim=1)
        for layer in self.layers:
            h = layer(h, c)
        return self.head(h[:, text.shape[1] :])


class Twice(nn.Module):
    """One pass for each prompt of a list; they have other lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Prefixed()

    def forward(self, x: Tensor, t: Tensor, prompts: list[Tensor], scale: float) -> Tensor:
        cond, uncond = (self.net(x, t, prompt) for prompt in prompts)
        return uncond + scale * (cond - uncond)


def twice_call(step: int, seed: int) -> Call:
    prompts = [randn(BATCH, 5, 12, seed=98), randn(BATCH, 2, 12, seed=99)]
    return randn(BATCH, 16, 6, seed=seed), times(step), prompts, 3.0


MODELS = [Foreign("twice", Twice, twice_call, 3)]
