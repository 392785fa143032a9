"""What the sprites model understands: captions of a coloured shape that moves over a textured ground.

    a SIZE COLOUR SHAPE moving DIRECTION SPEED at the LANE on GROUND TEXTURE

The lane of a sprite that moves left or right is the top, the centre or the bottom; of one that moves up or down it is
the left, the centre or the right. The model reads eight words, one for each slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ditopt.errors import BadInput
from ditopt.zoo.words import NOTHING, check, indices

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "quickly")
LANES = {"left": ("top", "centre", "bottom"), "up": ("left", "centre", "right")}
LANES = {**LANES, "right": LANES["left"], "down": LANES["up"]}
GROUNDS = ("red", "green", "blue", "grey")
TEXTURES = ("stripes", "checks", "dots")

FORM = "'a SIZE COLOUR SHAPE moving DIRECTION SPEED at the LANE on COLOUR TEXTURE'"
FILLER = frozenset({"a", "moving", "at", "the", "on"})

HEADS: Mapping[str, tuple[str, ...]] = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
    "lane": ("top", "centre", "bottom", "left", "right"),
    "ground": GROUNDS,
    "texture": TEXTURES,
}
"""Attributes of a clip and their values: what the classifier reads off its pixels, and the slots of a caption."""

SLOTS = len(HEADS)
VOCABULARY = tuple(dict.fromkeys([NOTHING, *(w for words in HEADS.values() for w in words)]))
"""All words of the model. The order is part of its weights."""


@dataclass(frozen=True)
class Clip:
    """What a caption says, one word for each slot."""

    size: str
    colour: str
    shape: str
    direction: str
    speed: str
    lane: str
    ground: str
    texture: str

    def __post_init__(self) -> None:
        _check(self.words(), repr(self))

    def words(self) -> tuple[str, ...]:
        """One word for each slot."""
        return astuple(self)

    def caption(self) -> str:
        """The sentence; ``parse(clip.caption()) == clip``."""
        what = f"a {self.size} {self.colour} {self.shape} moving {self.direction} {self.speed}"
        return f"{what} at the {self.lane} on {self.ground} {self.texture}"


def _check(words: Sequence[str], said: str) -> None:
    if len(words) != SLOTS:
        raise BadInput(f"{said} is not a caption of the form {FORM}")
    slots = {**HEADS, "lane": LANES.get(words[3], HEADS["lane"])}
    check(words, [(f"lane of a sprite that moves {words[3]}" if k == "lane" else k, v) for k, v in slots.items()], said)


def parse(caption: str) -> Clip:
    """The clip that ``caption`` describes, or one error that names the word and lists what exists."""
    words = [w for w in caption.lower().replace(",", " ").split() if w not in FILLER]
    _check(words, repr(caption))
    return Clip(*words)


def labels(clips: Sequence[Clip]) -> Tensor:
    """Indices into HEADS, (N, heads)."""
    rows = [[known.index(w) for known, w in zip(HEADS.values(), c.words(), strict=True)] for c in clips]
    return torch.tensor(rows, dtype=torch.long)


def tokens(clips: Sequence[Clip | None]) -> Tensor:
    """Word indices (N, SLOTS); None stands for no caption, all nothing."""
    return indices([c.words() if c is not None else (NOTHING,) * SLOTS for c in clips], VOCABULARY)
