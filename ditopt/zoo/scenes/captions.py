"""What the scenes model understands: captions of one or two coloured shapes on a textured ground.

    a SIZE COLOUR SHAPE at the PLACE on GROUND TEXTURE
    a SIZE COLOUR SHAPE left of|right of|above|below a SIZE COLOUR SHAPE on GROUND TEXTURE

The model reads nine words, one for each slot; the words of a missing second shape are "nothing".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditopt.errors import BadInput
from ditopt.zoo.words import NOTHING, check, indices

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLACES = ("left", "right", "top", "bottom", "centre")
RELATIONS = ("left", "right", "above", "below")
GROUNDS = ("red", "green", "blue", "grey")
TEXTURES = ("stripes", "checks", "dots")

FORM = (
    "'a SIZE COLOUR SHAPE at the PLACE on COLOUR TEXTURE' or 'a SIZE COLOUR SHAPE left of a SIZE COLOUR SHAPE on ...'"
)
FILLER = frozenset({"a", "at", "the", "of", "on"})
ITEM = (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES))
GROUND = (("ground", GROUNDS), ("texture", TEXTURES))
ONE = (*ITEM, ("place", PLACES), *GROUND)
TWO = (*ITEM, ("relation", RELATIONS), *ITEM, *GROUND)
SLOTS = len(TWO)

VOCABULARY = tuple(
    dict.fromkeys(
        [NOTHING, *SIZES, *COLOURS, *SHAPES, *RELATIONS, *PLACES, *GROUNDS, *TEXTURES],
    )
)
"""All words of the model. The order is part of its weights."""

_MIRRORED = {"right": "left", "below": "above"}


@dataclass(frozen=True)
class Item:
    """One drawn shape."""

    size: str
    colour: str
    shape: str

    def words(self) -> tuple[str, str, str]:
        return (self.size, self.colour, self.shape)


@dataclass(frozen=True)
class Scene:
    """What a caption says. ``place`` is one of PLACES for one shape, of RELATIONS (first to second) for two."""

    first: Item
    place: str
    second: Item | None
    ground: str
    texture: str

    def __post_init__(self) -> None:
        _check([w for w in self.words() if w != NOTHING], repr(self))

    def words(self) -> tuple[str, ...]:
        """One word for each slot."""
        second = self.second.words() if self.second else (NOTHING,) * len(ITEM)
        return (*self.first.words(), self.place, *second, self.ground, self.texture)

    def caption(self) -> str:
        """The sentence; ``parse(scene.caption()) == scene``."""
        first = "a " + " ".join(self.first.words())
        if self.second is None:
            where = f"at the {self.place}"
        else:
            of = f"{self.place} of" if self.place in ("left", "right") else self.place
            where = f"{of} a " + " ".join(self.second.words())
        return f"{first} {where} on {self.ground} {self.texture}"

    def canonical(self) -> Scene:
        """The same picture told with the left or the upper shape first: "b right of a" is "a left of b"."""
        if self.second is None or self.place not in _MIRRORED:
            return self
        return Scene(self.second, _MIRRORED[self.place], self.first, self.ground, self.texture)


def _check(words: Sequence[str], said: str) -> None:
    slots = {len(ONE): ONE, len(TWO): TWO}.get(len(words))
    if slots is None:
        raise BadInput(f"{said} is not a caption of the form {FORM}")
    check(words, slots, said)


def scene(words: Sequence[str]) -> Scene:
    """The scene of six words (one shape, see ONE) or nine (two shapes, see TWO)."""
    second = Item(*words[4:7]) if len(words) == len(TWO) else None
    return Scene(Item(*words[:3]), words[3], second, *words[-2:])


def parse(caption: str) -> Scene:
    """The scene that ``caption`` describes, or one error that names the word and lists what exists."""
    words = [w for w in caption.lower().replace(",", " ").split() if w not in FILLER]
    _check(words, repr(caption))
    return scene(words)


# -- attributes, as the classifier sees them ---------------------------------------------------------------------------

HEADS: Mapping[str, tuple[str, ...]] = {
    "layout": ("left", "above", *(f"at {p}" for p in PLACES)),
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "second size": (NOTHING, *SIZES),
    "second colour": (NOTHING, *COLOURS),
    "second shape": (NOTHING, *SHAPES),
    "ground": GROUNDS,
    "texture": TEXTURES,
}
"""Attributes of a canonical scene and their values."""


def attributes(scene: Scene) -> dict[str, str]:
    """The value of each head for ``scene``. "first" is the left or upper shape, so that a picture has one answer."""
    c = scene.canonical()
    size, colour, shape, place, size2, colour2, shape2, ground, texture = c.words()
    layout = place if c.second else f"at {place}"
    return dict(zip(HEADS, (layout, size, colour, shape, size2, colour2, shape2, ground, texture), strict=True))


def labels(scenes: Sequence[Scene]) -> Tensor:
    """Indices into HEADS, (N, heads)."""
    rows = [[HEADS[k].index(v) for k, v in attributes(s).items()] for s in scenes]
    return torch.tensor(rows, dtype=torch.long)


def named(scenes: Sequence[Scene]) -> Tensor:
    """Which attributes the captions name, (N, heads): of one shape, the layout says already that there is no other."""
    second = torch.tensor([h.startswith("second") for h in HEADS])
    return torch.tensor([[s.second is not None] for s in scenes]) | ~second


# -- what the denoiser reads -------------------------------------------------------------------------------------------


def tokens(scenes: Sequence[Scene | None]) -> Tensor:
    """Word indices (N, SLOTS); None stands for no caption, all nothing."""
    return indices([s.words() if s is not None else (NOTHING,) * SLOTS for s in scenes], VOCABULARY)
