"""The class-conditional model: handwritten digits of 16x16 pixels, a ``DiTTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt import zoo
from ditopt.zoo import parts

CLASSES = 10
POOL = 8
"""The classifier sees images averaged down to this side."""
REQUEST = 2 * CLASSES


def assemble(settings: Mapping[str, Any], weights: zoo.Weights, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline that ``settings`` (the content of a config.json) describes, with ``weights`` by part."""
    from ditopt.zoo.digits.pipeline import LabelToImagePipeline

    model = parts.denoiser(settings, weights["model"], dtype)
    return parts.quiet(LabelToImagePipeline(model, parts.scheduler(settings)))


def prompts(count: int, seed: int) -> list[int]:
    """``count`` classes, each equally often, in an order that the seed decides."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [int(i) % CLASSES for i in order]


def score(samples: Tensor, prompts: Sequence[int]) -> Tensor:
    """1 for each sample (N, 1, H, W) in [0, 1] in which the shipped classifier sees its class, else 0."""
    return (read(zoo.state("digits", "classifier"), samples) == torch.tensor(prompts)).float()


def read(classifier: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The class that a logistic regression ("weight", "bias") sees in each image (N, 1, H, W) in [0, 1], (N,)."""
    pixels = F.adaptive_avg_pool2d(images.float(), POOL).flatten(1)
    return (pixels @ classifier["weight"].T + classifier["bias"]).argmax(1)
