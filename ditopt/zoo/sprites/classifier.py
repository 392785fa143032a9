"""The classifier that reads what moves, and where to, off the pixels of a clip."""

from __future__ import annotations

from torch import Tensor

from ditopt.zoo import classifier
from ditopt.zoo.sprites.captions import HEADS


class ClipClassifier(classifier.AttributeClassifier):
    """The attributes of ``captions.HEADS`` of (N, 3, 8, 32, 32) clips in [0, 1].

    It sees three frames (first, middle, last) as nine channels: enough to tell where a sprite is and where it goes.
    """

    def __init__(self) -> None:
        super().__init__(9, HEADS)

    def forward(self, clips: Tensor) -> list[Tensor]:
        """Logits of each head."""
        return super().forward(clips[:, :, [0, clips.shape[2] // 2, -1]].flatten(1, 2))
