"""Small trained diffusion transformers that ship with ditopt, to measure fidelity on.

Fidelity on random weights means nothing. ``load("digits")`` gives a real ``DiffusionPipeline`` around a real
diffusers denoiser, trained by the command named in ``<model>/config.json``. Loading needs no network.
"""

from __future__ import annotations

import json
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
    diffusers = require("diffusers", "diffusers")
    safetensors = require("safetensors.torch", None)
    from ditopt.zoo.pipeline import LabelToImagePipeline

    denoiser = settings["denoiser"]
    model = getattr(diffusers, denoiser["_class_name"]).from_config(denoiser)
    weights = safetensors.load_file(HERE / name / "model.safetensors")
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    if dtype != torch.float32:
        model = model.to(dtype)
    model = model.eval().requires_grad_(False)
    scheduler = settings["scheduler"]
    pipe = LabelToImagePipeline(model, getattr(diffusers, scheduler["_class_name"]).from_config(scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def classify(name: str, images: torch.Tensor) -> torch.Tensor:
    """Class of each image, (N, C, H, W) in [0, 1] -> (N,), by the logistic regression that ships with the model."""
    safetensors = require("safetensors.torch", None)
    c = safetensors.load_file(HERE / name / "classifier.safetensors")
    pooled = torch.nn.functional.adaptive_avg_pool2d(images.float(), config(name)["classifier"]["pool"])
    return (pooled.flatten(1) @ c["weight"].T + c["bias"]).argmax(1)
