"""The text-to-image model: coloured shapes on a textured ground, 32x32 pixels, a ``FluxTransformer2DModel``."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ditopt import zoo
from ditopt.zoo import parts
from ditopt.zoo.classifier import share
from ditopt.zoo.scenes import captions
from ditopt.zoo.scenes.classifier import SceneClassifier
from ditopt.zoo.words import WordTable

REQUEST = 8


def assemble(settings: Mapping[str, Any], weights: zoo.Weights, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline that ``settings`` (the content of a config.json) describes, with ``weights`` by part."""
    from ditopt.zoo.scenes.pipeline import CaptionToImagePipeline

    table = WordTable(len(captions.VOCABULARY), captions.SLOTS, settings["text_encoder"]["width"])
    model = parts.denoiser(settings, weights["model"], dtype)
    encoder = parts.ready(table, weights["text_encoder"], dtype)
    return parts.quiet(CaptionToImagePipeline(model, encoder, parts.scheduler(settings)))


def prompts(count: int, seed: int) -> list[str]:
    """``count`` random captions, in turns of two shapes and of one."""
    rng = random.Random(seed)
    forms = (captions.TWO, captions.ONE)
    return [captions.scene([rng.choice(known) for _, known in forms[i % 2]]).caption() for i in range(count)]


def score(samples: Tensor, prompts: Sequence[str]) -> Tensor:
    """Share of the attributes named in each caption that the shipped classifier sees in (N, 3, 32, 32), (N,)."""
    network = parts.ready(SceneClassifier(), zoo.state("scenes", "classifier"), torch.float32)
    scenes = [captions.parse(p) for p in prompts]
    return share(network.predict(samples), captions.labels(scenes), captions.named(scenes))
