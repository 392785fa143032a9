"""The text-to-video model: sprites that move over a textured ground, 8 frames, a ``WanTransformer3DModel``."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ditopt import zoo
from ditopt.zoo import parts
from ditopt.zoo.classifier import share
from ditopt.zoo.sprites import captions
from ditopt.zoo.sprites.classifier import ClipClassifier
from ditopt.zoo.words import WordTable

REQUEST = 4


def assemble(settings: Mapping[str, Any], weights: zoo.Weights, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline that ``settings`` (the content of a config.json) describes, with ``weights`` by part."""
    from ditopt.zoo.sprites.pipeline import CaptionToVideoPipeline

    table = WordTable(len(captions.VOCABULARY), captions.SLOTS, settings["text_encoder"]["width"])
    model = parts.denoiser(settings, weights["model"], dtype)
    encoder = parts.ready(table, weights["text_encoder"], dtype)
    return parts.quiet(CaptionToVideoPipeline(model, encoder, parts.scheduler(settings)))


def prompts(count: int, seed: int) -> list[str]:
    """``count`` random captions, the four directions in turns."""
    rng = random.Random(seed)
    directions = rng.sample(captions.DIRECTIONS, len(captions.DIRECTIONS))
    out = []
    for i in range(count):
        direction = directions[i % len(directions)]
        fixed = {"direction": (direction,), "lane": captions.LANES[direction]}
        words = [rng.choice(fixed.get(head, known)) for head, known in captions.HEADS.items()]
        out.append(captions.Clip(*words).caption())
    return out


def score(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    """Share of the attributes of each caption that the shipped classifier sees in (N, 3, 8, 32, 32), (N,)."""
    network = parts.ready(ClipClassifier(), zoo.state("sprites", "classifier"), torch.float32)
    clips = [captions.parse(p) for p in prompts]
    return share(network.predict(samples), captions.labels(clips))
