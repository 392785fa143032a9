"""Procedural scenes: one or two coloured shapes on a textured ground, 32x32 RGB, drawn from a caption.

    python -m examples.scenes --show scenes.png            real scenes, and samples of the shipped model beside them
    python -m examples.scenes --show one.png --caption "a large red circle left of a small blue square on green dots"

A caption fixes words only; exact places, sizes, tints and the phase of the texture are drawn at random within them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ditopt.zoo.scenes.captions import COLOURS, GROUNDS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES, Item, Scene, parse
from examples import showing

Array = npt.NDArray[np.float32]

SIZE = 32
RGB = {
    "red": (0.95, 0.12, 0.12),
    "green": (0.15, 0.90, 0.25),
    "blue": (0.25, 0.45, 1.00),
    "yellow": (1.00, 0.90, 0.10),
    "purple": (0.85, 0.25, 0.95),
    "white": (1.00, 1.00, 1.00),
}
DIM = {
    "red": (0.36, 0.06, 0.08),
    "green": (0.05, 0.27, 0.10),
    "blue": (0.06, 0.10, 0.36),
    "grey": (0.25, 0.25, 0.25),
}
"""Grounds are dark and shapes bright, so that a blue shape shows on a blue ground."""
RADIUS = {"small": (3.8, 4.4), "large": (6.3, 6.9)}
TONES = (0.6, 1.4)
"""Brightness of the dark and the light part of a texture."""

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + np.float32(0.5)
_LOW, _HIGH, _MIDDLE = 8.5, SIZE - 8.5, SIZE / 2
_AT = {
    "left": (_LOW, _MIDDLE),
    "right": (_HIGH, _MIDDLE),
    "top": (_MIDDLE, _LOW),
    "bottom": (_MIDDLE, _HIGH),
    "centre": (_MIDDLE, _MIDDLE),
}
_OTHER = {"left": "right", "right": "left", "above": "below", "below": "above"}
_RELATED = {"left": "left", "right": "right", "above": "top", "below": "bottom"}


def _inside(distance: Array) -> Array:
    """Coverage of pixels by a region from the signed distance of their centres to its edge (negative inside)."""
    return np.clip(0.5 - distance, 0, 1)


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    """Exact coverage of pixels by an axis-aligned box around the origin."""

    def side(v: Array, half: float) -> Array:
        return np.clip(np.minimum(v + 0.5, half) - np.maximum(v - 0.5, -half), 0, 1)

    return side(x, half_width) * side(y, half_height)


def coverage(shape: str, x: float, y: float, radius: float) -> Array:
    """How much of each pixel (SIZE, SIZE) ``shape`` covers, 0 to 1; it fits into a square of side 2 * radius."""
    dx, dy = _X - np.float32(x), _Y - np.float32(y)
    if shape == "circle":
        return _inside(np.hypot(dx, dy) - radius)
    if shape == "ring":
        return _inside(np.abs(np.hypot(dx, dy) - 0.75 * radius) - 0.25 * radius)
    if shape == "square":
        return _box(dx, dy, 0.88 * radius, 0.88 * radius)
    if shape == "cross":
        arm = 0.34 * radius
        return _box(dx, dy, radius, arm) + _box(dx, dy, arm, radius) - _box(dx, dy, arm, arm)
    if shape == "triangle":  # base 2r at the bottom, apex at the top, height 1.8r
        slope = np.hypot(1.8, 1.0)
        side = (1.8 * np.abs(dx) - (dy + 0.9 * radius)) / slope
        return _inside(np.maximum(side, dy - 0.9 * radius))
    raise ValueError(f"no drawing for {shape!r}")


def texture(kind: str, shift_x: float, shift_y: float) -> Array:
    """Share of the light tone in each pixel, period 8."""
    x, y = (_X + np.float32(shift_x)) % 8 - 4, (_Y + np.float32(shift_y)) % 8 - 4
    if kind == "stripes":
        along = (_X + _Y + np.float32(shift_x)) % 8 - 4
        return _inside((np.abs(along) - 2) / np.sqrt(2))
    if kind == "dots":
        return _inside(np.hypot(x, y) - 2.2)
    if kind == "checks":
        column, row = _inside(np.abs(x) - 2), _inside(np.abs(y) - 2)
        return column * row + (1 - column) * (1 - row)
    raise ValueError(f"no drawing for {kind!r}")


def column(rgb: tuple[float, float, float]) -> Array:
    """A colour that broadcasts over (3, SIZE, SIZE)."""
    return np.array(rgb, dtype=np.float32)[:, None, None]


def draw(scene: Scene, rng: np.random.Generator) -> Array:
    """A picture of ``scene``, (3, SIZE, SIZE) in [0, 1]; ``rng`` decides what the caption leaves open."""
    light = texture(scene.texture, *rng.uniform(0, 8, 2))
    tone = TONES[0] + (TONES[1] - TONES[0]) * light
    picture = column(DIM[scene.ground]) * tone * rng.uniform(0.9, 1.1)

    def put(item: Item, place: str, along: float, across: float) -> None:
        nonlocal picture
        x, y = _AT[place]
        free = (across, along) if place in ("top", "bottom") else (along, across)
        x, y = x + rng.uniform(-free[0], free[0]), y + rng.uniform(-free[1], free[1])
        mask = coverage(item.shape, x, y, rng.uniform(*RADIUS[item.size]))
        colour = column(RGB[item.colour]) * rng.uniform(0.92, 1.0)
        picture = picture * (1 - mask) + colour * mask

    if scene.second is None:
        put(scene.first, scene.place, 1.5 if scene.place == "centre" else 1.0, 1.5 if scene.place == "centre" else 3.0)
    else:  # across stays well below the distance along, so that "left of" never looks like "above"
        put(scene.first, _RELATED[scene.place], 0.75, 4.0)
        put(scene.second, _RELATED[_OTHER[scene.place]], 0.75, 4.0)
    return picture.astype(np.float32)


def sample(rng: np.random.Generator) -> Scene:
    """A random scene; two in three have two shapes."""

    def one(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    def item() -> Item:
        return Item(one(SIZES), one(COLOURS), one(SHAPES))

    if rng.random() < 2 / 3:
        return Scene(item(), one(RELATIONS), item(), one(GROUNDS), one(TEXTURES))
    return Scene(item(), one(PLACES), None, one(GROUNDS), one(TEXTURES))


def batch(seed: int | Sequence[int], count: int) -> tuple[torch.Tensor, list[Scene]]:
    """``count`` random scenes and their pictures (count, 3, SIZE, SIZE) in [0, 1]; the same for the same seed."""
    rng = np.random.default_rng(seed)
    scenes = [sample(rng) for _ in range(count)]
    return torch.from_numpy(np.stack([draw(s, rng) for s in scenes])), scenes


if __name__ == "__main__":
    showing.main("scenes", __doc__, parse, sample, draw)
