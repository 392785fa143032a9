"""Which backend runs the result: an explicit choice wins, else the device of the parameters decides."""

from __future__ import annotations

import os
import shutil
import sys
import warnings

import torch

from ditopt.errors import BadInput, DitoptWarning
from ditopt.pipeline import suggest

TARGETS = ("auto", "eager", "inductor", "onnxruntime")
_PLANNED = ("triton", "openvino")


def resolve(target: str, device: torch.device) -> str:
    """One of eager, inductor, onnxruntime, for the user's ``target`` and the device of the parameters.

    "auto" is Inductor on a GPU, and on a CPU with a C++ compiler; elsewhere it is eager, with a DitoptWarning.
    BadInput for a target that does not exist, or cannot run here.
    """
    if target in _PLANNED:
        raise BadInput(f"target {target!r} is not built yet; use one of {', '.join(TARGETS)}")
    if target not in TARGETS:
        raise BadInput(f"no target is called {target!r}; {suggest(str(target), TARGETS)}")
    if target in ("eager", "onnxruntime"):
        return target
    why_not = _why_not_inductor(device)
    if why_not is None:
        return "inductor"
    if target == "inductor":
        raise BadInput(f"target 'inductor' cannot run here: {why_not}, or use target='eager'")
    warnings.warn(f"running eager, which is slower: {why_not}", DitoptWarning, stacklevel=2)
    return "eager"


def _why_not_inductor(device: torch.device) -> str | None:
    if device.type in ("cuda", "xpu"):
        return None
    if device.type != "cpu":
        return f"Inductor is not used on device {device.type!r}; move the model to cpu or cuda"
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default)
    if shutil.which(compiler) is None:
        return f"no C++ compiler was found ({compiler}); install one or set CXX to its path"
    return None
