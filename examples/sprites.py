"""Procedural clips: a coloured shape moving over a textured ground, 8 frames of 32x32 RGB, drawn from a caption.

    python -m examples.sprites --show sprites.gif           real clips, and samples of the shipped model beside them
    python -m examples.sprites --show sprites.png           the same, frames side by side

A caption fixes words only; exact places, speeds, sizes, tints and the phase of the texture are drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ditopt.zoo.sprites.captions import (
    COLOURS,
    DIRECTIONS,
    GROUNDS,
    LANES,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURES,
    Clip,
    parse,
)
from ditopt.zoo.sprites.pipeline import FRAMES
from examples import showing
from examples.scenes import DIM, RGB, SIZE, TONES, Array, column, coverage, texture

RADIUS = {"small": (3.6, 4.2), "large": (5.6, 6.2)}
TRAVEL = {"slowly": (5.5, 7.0), "quickly": (14.0, 16.0)}
"""Pixels between the first and the last place of a sprite."""
JITTER = 1.0
_MIDDLE = SIZE / 2
_LANE = {"top": 8.5, "left": 8.5, "centre": _MIDDLE, "bottom": SIZE - 8.5, "right": SIZE - 8.5}
_SIGN = {"left": -1, "up": -1, "right": 1, "down": 1}


def path(clip: Clip, rng: np.random.Generator) -> Array:
    """The centre (x, y) of the sprite in each frame, (FRAMES, 2) in pixels: a straight line at one speed."""
    middle, lane = _MIDDLE + rng.uniform(-JITTER, JITTER), _LANE[clip.lane] + rng.uniform(-JITTER, JITTER)
    travel = _SIGN[clip.direction] * rng.uniform(*TRAVEL[clip.speed])
    along = middle + travel * (np.linspace(0, 1, FRAMES) - 0.5)
    across = np.full(FRAMES, lane)
    places = (along, across) if clip.direction in ("left", "right") else (across, along)
    return np.stack(places, 1).astype(np.float32)


def draw(clip: Clip, rng: np.random.Generator) -> Array:
    """A video of ``clip``, (3, FRAMES, SIZE, SIZE) in [0, 1]; ``rng`` decides what the caption leaves open."""
    tone = TONES[0] + (TONES[1] - TONES[0]) * texture(clip.texture, *rng.uniform(0, 8, 2))
    ground = column(DIM[clip.ground]) * tone * rng.uniform(0.9, 1.1)
    radius, colour = rng.uniform(*RADIUS[clip.size]), column(RGB[clip.colour]) * rng.uniform(0.92, 1.0)
    frames = []
    for x, y in path(clip, rng):
        mask = coverage(clip.shape, float(x), float(y), radius)
        frames.append(ground * (1 - mask) + colour * mask)
    return np.stack(frames, 1).astype(np.float32)


def sample(rng: np.random.Generator) -> Clip:
    """A random clip."""

    def one(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    direction = one(DIRECTIONS)
    what = (one(SIZES), one(COLOURS), one(SHAPES))
    return Clip(*what, direction, one(SPEEDS), one(LANES[direction]), one(GROUNDS), one(TEXTURES))


def batch(seed: int | Sequence[int], count: int) -> tuple[torch.Tensor, list[Clip]]:
    """``count`` random clips and their videos (count, 3, FRAMES, SIZE, SIZE) in [0, 1]; the same for the same seed."""
    rng = np.random.default_rng(seed)
    clips = [sample(rng) for _ in range(count)]
    return torch.from_numpy(np.stack([draw(c, rng) for c in clips])), clips


if __name__ == "__main__":
    showing.main("sprites", __doc__, parse, sample, draw)
