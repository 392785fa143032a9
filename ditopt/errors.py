"""The one exception tree. A message says what was given, what was expected, and what to do."""

from __future__ import annotations

import importlib
from typing import Any


class DitoptError(Exception):
    """Base of every error that ditopt raises on purpose."""


class BadInput(DitoptError, ValueError):
    """An argument that ditopt cannot use."""


class CaptureError(DitoptError):
    """The model could not be turned into a graph, or the graph does not compute what the model computes."""


class RecipeError(BadInput):
    """A recipe that cannot be read, or that names something unknown."""


class PassError(DitoptError):
    """A pass failed; ``program`` is the last good program and ``earlier`` names the passes before it."""

    def __init__(self, message: str, program: Any = None, earlier: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.program = program
        self.earlier = earlier


class VerifyError(DitoptError):
    """A Program that breaks a rule of well-formedness."""


class TextError(BadInput):
    """Program text that cannot be parsed; the message carries the line."""


class SessionError(DitoptError):
    """A call that does not fit the running request, schedule, dtype or device."""


class StaleWeights(SessionError):
    """The graphs carry copies of weights that have changed since."""


class ArtifactError(BadInput):
    """A saved artifact that is missing, damaged, or of another version."""


class MissingExtra(DitoptError, ImportError):
    """An optional package is not installed; the message names the install line."""


class DitoptWarning(UserWarning):
    """Something the user asked for has no effect, or has less effect than asked."""


def require(module: str, extra: str | None) -> Any:
    """Import an optional module, or say which install line brings it.

    ``extra`` is the name of ditopt's extra, or None for a plain dependency.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        line = f"pip install 'ditopt[{extra}]'" if extra else f"pip install {module.split('.')[0]}"
        raise MissingExtra(
            f"{module.split('.')[0]} is needed here and is not installed ({error}); run: {line}"
        ) from error
