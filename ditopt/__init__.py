"""ditopt: a graph optimizer for diffusion transformers.

    fast = ditopt.optimize(model, recipe="lossless", example_inputs=kwargs)

The names below load their modules at first use, so that ``import ditopt`` costs nothing that a program does not use:
no torch, no compiler, no exporter, no diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditopt import calibration, errors, measure, zoo
    from ditopt.api import explain, export_onnx, optimize, restore
    from ditopt.calibration import calibrate
    from ditopt.errors import (
        ArtifactError,
        BadInput,
        CaptureError,
        DitoptError,
        DitoptWarning,
        MissingExtra,
        PassError,
        RecipeError,
        SessionError,
        TextError,
        VerifyError,
    )
    from ditopt.recipe import Recipe
    from ditopt.saved import load, save

    __version__: str

__all__ = [
    "ArtifactError",
    "BadInput",
    "CaptureError",
    "DitoptError",
    "DitoptWarning",
    "MissingExtra",
    "PassError",
    "Recipe",
    "RecipeError",
    "SessionError",
    "TextError",
    "VerifyError",
    "__version__",
    "calibrate",
    "calibration",
    "errors",
    "explain",
    "export_onnx",
    "load",
    "measure",
    "optimize",
    "restore",
    "save",
    "zoo",
]

# The module that each lazy name is loaded from.
_HOME = {
    "ArtifactError": "ditopt.errors",
    "BadInput": "ditopt.errors",
    "CaptureError": "ditopt.errors",
    "DitoptError": "ditopt.errors",
    "DitoptWarning": "ditopt.errors",
    "MissingExtra": "ditopt.errors",
    "PassError": "ditopt.errors",
    "Recipe": "ditopt.recipe",
    "RecipeError": "ditopt.errors",
    "SessionError": "ditopt.errors",
    "TextError": "ditopt.errors",
    "VerifyError": "ditopt.errors",
    "calibrate": "ditopt.calibration",
    "explain": "ditopt.api",
    "export_onnx": "ditopt.api",
    "load": "ditopt.saved",
    "optimize": "ditopt.api",
    "restore": "ditopt.api",
    "save": "ditopt.saved",
}
_MODULES = ("calibration", "errors", "measure", "zoo")


def _lazy(name: str) -> Any:
    """A public name, imported from its module when it is first asked for."""
    value: Any
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"ditopt.{name}")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'ditopt' has no attribute {name!r}")
    globals()[name] = value  # the next access does not come here
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ditopt")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


if not TYPE_CHECKING:  # a type checker that saw this would accept every attribute, misspelt ones too
    __getattr__ = _lazy


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
