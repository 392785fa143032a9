"""Small trained diffusion transformers that ship with ditopt, to measure fidelity on.

Fidelity on random weights means nothing. ``load("digits")`` gives a real ``DiffusionPipeline`` around a real diffusers
denoiser, trained by the command named in ``<model>/config.json``. Loading needs no network. Each folder is a package
that holds all of one model and offers what ``Package`` says; it ships once its config.json and weights are there.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ditopt.errors import BadInput, require
from ditopt.pipeline import suggest

HERE = Path(__file__).parent

Weights = Mapping[str, Mapping[str, Tensor]]
"""State dicts by part of the pipeline: "model", and "text_encoder" where the model has one."""


class Package(Protocol):
    """What the package of one model offers."""

    REQUEST: int
    """Samples of a request that the demo measures on: some seconds on two cores."""

    def assemble(self, settings: Mapping[str, Any], weights: Weights, dtype: torch.dtype = ...) -> Any:
        """The pipeline that ``settings`` (the content of a config.json) describes, ready to sample."""
        ...

    def prompts(self, count: int, seed: int) -> Sequence[Any]:
        """``count`` prompts for the pipeline, others for another seed."""
        ...

    def score(self, samples: Tensor, prompts: Sequence[Any]) -> Tensor:
        """Share of what each prompt says that the shipped classifier sees in its sample, (N,) in [0, 1]."""
        ...


def names() -> list[str]:
    """The shipped models."""
    return sorted(p.parent.name for p in HERE.glob("*/config.json"))


def package(name: str) -> Package:
    """The package of a shipped model."""
    _folder(name)
    return cast(Package, importlib.import_module(f"{__name__}.{name}"))


def config(name: str) -> dict[str, Any]:
    """The configuration of a shipped model: its denoiser, scheduler, sampling defaults and training command."""
    data: dict[str, Any] = json.loads((_folder(name) / "config.json").read_text())
    return data


def load(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A ready ``DiffusionPipeline`` around the shipped model ``name``, weights up-cast from float16 to ``dtype``."""
    settings = config(name)
    require("diffusers", "diffusers")
    parts = ["model", *(["text_encoder"] if "text_encoder" in settings else [])]
    return package(name).assemble(settings, {part: state(name, part) for part in parts}, dtype)


def state(name: str, part: str) -> dict[str, Tensor]:
    """The shipped weights of one part of a model, in float32."""
    stored = require("safetensors.torch", None).load_file(_folder(name) / f"{part}.safetensors")
    return {k: v.float() for k, v in stored.items()}


def _folder(name: str) -> Path:
    if name not in names():
        raise BadInput(f"no shipped model is called {name!r}; {suggest(name, names())}")
    return HERE / name
