"""The classifier that reads attributes off pixels, and how its readings are counted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Heads = Mapping[str, tuple[str, ...]]
"""Attributes and the values that each may have."""


class AttributeClassifier(nn.Module):
    """A small CNN on (N, channels, 32, 32) pictures in [0, 1] with one head for each attribute."""

    def __init__(self, channels: int, heads: Heads) -> None:
        super().__init__()
        self.sizes = [len(values) for values in heads.values()]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate([(channels, 32), (32, 48), (48, 64)]):
            layers += [nn.Conv2d(before, after, 3, 1 + (i > 0), 1), nn.GroupNorm(8, after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU())
        self.heads = nn.Linear(128, sum(self.sizes))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Logits of each head."""
        return list(self.heads(self.features(pictures.float() * 2 - 1)).split(self.sizes, 1))

    @torch.no_grad()
    def predict(self, samples: Tensor) -> Tensor:
        """The value of each attribute as an index into its head, (N, heads)."""
        return torch.stack([logits.argmax(1) for logits in self(samples)], 1)


def share(predicted: Tensor, asked: Tensor, named: Tensor | None = None) -> Tensor:
    """Share of each sample's attributes that are as asked, (N,). All are (N, heads); ``named``: which ones count."""
    named = torch.ones_like(asked, dtype=torch.bool) if named is None else named
    return ((predicted == asked) & named).sum(1) / named.sum(1)
