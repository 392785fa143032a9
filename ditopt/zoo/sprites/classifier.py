"""The classifier that reads what moves, and where to, off the pixels of a clip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditopt.zoo.sprites.captions import HEADS


class ClipClassifier(nn.Module):
    """A small CNN on (N, 3, 8, 32, 32) clips in [0, 1] with one head for each attribute of ``captions.HEADS``.

    It sees three frames (first, middle, last) as nine channels: enough to tell where a sprite is and where it goes.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate([(9, 32), (32, 48), (48, 64)]):
            layers += [nn.Conv2d(before, after, 3, 1 + (i > 0), 1), nn.GroupNorm(8, after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU())
        self.heads = nn.Linear(128, sum(map(len, HEADS.values())))

    def forward(self, clips: Tensor) -> list[Tensor]:
        """Logits of each head."""
        frames = clips[:, :, [0, clips.shape[2] // 2, -1]].flatten(1, 2)
        out = self.heads(self.features(frames.float() * 2 - 1))
        return list(out.split([len(v) for v in HEADS.values()], 1))

    @torch.no_grad()
    def predict(self, clips: Tensor) -> Tensor:
        """The value of each attribute as an index into its head, (N, heads)."""
        return torch.stack([logits.argmax(1) for logits in self(clips)], 1)
