"""The parts of a pipeline, made from a config.json and state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ditopt.errors import require

M = TypeVar("M", bound=nn.Module)


def ready(part: M, state: Mapping[str, Tensor], dtype: torch.dtype) -> M:
    """``part`` with the weights ``state``, in ``dtype``, for inference."""
    part.load_state_dict({k: v.float() for k, v in state.items()})
    return (part if dtype == torch.float32 else part.to(dtype)).eval().requires_grad_(False)


def denoiser(settings: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """The diffusers model that ``settings["denoiser"]`` describes."""
    return ready(_made(settings["denoiser"]), state, dtype)


def scheduler(settings: Mapping[str, Any]) -> Any:
    """The diffusers scheduler that ``settings["scheduler"]`` describes."""
    return _made(settings["scheduler"])


def _made(described: Mapping[str, Any]) -> Any:
    """An object of diffusers, as its class's ``from_config`` makes it."""
    return getattr(require("diffusers", "diffusers"), described["_class_name"]).from_config(dict(described))


def quiet(pipe: Any) -> Any:
    """``pipe`` without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
