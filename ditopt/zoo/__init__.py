"""Small trained diffusion transformers that ship with ditopt, to measure fidelity on.

Fidelity on random weights means nothing. ``load("digits")`` gives a real ``DiffusionPipeline`` around a real
diffusers denoiser, trained by the command named in ``<model>/config.json``. Loading needs no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ditopt.errors import BadInput, require

HERE = Path(__file__).parent


def names() -> list[str]:
    """The shipped models."""
    return sorted(p.parent.name for p in HERE.glob("*/config.json"))


def config(name: str) -> dict[str, Any]:
    """The configuration of a shipped model: its denoiser, scheduler, sampling defaults and training command."""
    path = HERE / name / "config.json"
    if not path.is_file():
        raise BadInput(f"no shipped model is called {name!r}; there are: {', '.join(names())}")
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def load(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A ready ``DiffusionPipeline`` around the shipped model ``name``, weights up-cast from float16 to ``dtype``."""
    settings = config(name)
    safetensors = require("safetensors.torch", None)
    parts = ["model", *(["text_encoder"] if "text_encoder" in settings else [])]
    return assemble(settings, {p: safetensors.load_file(HERE / name / f"{p}.safetensors") for p in parts}, dtype)


def assemble(
    settings: dict[str, Any], weights: Mapping[str, Mapping[str, torch.Tensor]], dtype: torch.dtype = torch.float32
) -> Any:
    """The pipeline that ``settings`` (the content of a config.json) describes, with ``weights`` by part."""
    diffusers = require("diffusers", "diffusers")

    def ready(part: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        part.load_state_dict({k: v.float() for k, v in state.items()})
        return (part if dtype == torch.float32 else part.to(dtype)).eval().requires_grad_(False)

    denoiser, scheduler = settings["denoiser"], settings["scheduler"]
    model = ready(getattr(diffusers, denoiser["_class_name"]).from_config(denoiser), weights["model"])
    sampler = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    if "text_encoder" in settings:
        from ditopt.zoo.caption_pipeline import CaptionToImagePipeline
        from ditopt.zoo.captions import CaptionTable

        table = ready(CaptionTable(settings["text_encoder"]["width"]), weights["text_encoder"])
        pipe: Any = CaptionToImagePipeline(model, table, sampler)
    else:
        from ditopt.zoo.pipeline import LabelToImagePipeline

        pipe = LabelToImagePipeline(model, sampler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def classify(name: str, images: torch.Tensor) -> torch.Tensor:
    """What the classifier that ships with the model sees in each image, (N, C, H, W) in [0, 1].

    (N,) classes; for a model of captions (N, attributes), indices into ``captions.HEADS``.
    """
    safetensors = require("safetensors.torch", None)
    c = safetensors.load_file(HERE / name / "classifier.safetensors")
    settings = config(name)
    if "text_encoder" in settings:
        from ditopt.zoo.classifier import AttributeClassifier

        network = AttributeClassifier()
        network.load_state_dict({k: v.float() for k, v in c.items()})
        return network.eval().predict(images)
    pooled = torch.nn.functional.adaptive_avg_pool2d(images.float(), settings["classifier"]["pool"])
    return (pooled.flatten(1) @ c["weight"].T + c["bias"]).argmax(1)
