"""The classifier that reads the attributes of a drawn scene off its pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditopt.zoo.captions import HEADS


class AttributeClassifier(nn.Module):
    """A small CNN on (N, 3, 32, 32) images in [0, 1] with one head for each attribute of ``captions.HEADS``."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate([(3, 32), (32, 48), (48, 64)]):
            layers += [nn.Conv2d(before, after, 3, 1 + (i > 0), 1), nn.GroupNorm(8, after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU())
        self.heads = nn.Linear(128, sum(map(len, HEADS.values())))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits of each head."""
        out = self.heads(self.features(images.float() * 2 - 1))
        return list(out.split([len(v) for v in HEADS.values()], 1))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The value of each attribute as an index into its head, (N, heads)."""
        return torch.stack([logits.argmax(1) for logits in self(images)], 1)
