"""The classifier that reads the attributes of a drawn scene off its pixels."""

from __future__ import annotations

from ditopt.zoo import classifier
from ditopt.zoo.scenes.captions import HEADS


class SceneClassifier(classifier.AttributeClassifier):
    """The attributes of ``captions.HEADS`` of (N, 3, 32, 32) images in [0, 1]."""

    def __init__(self) -> None:
        super().__init__(3, HEADS)
