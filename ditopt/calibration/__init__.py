"""Calibration: from a published system and the user's own model and sampler to a recipe with concrete tables.

``record`` keeps what chosen regions compute while the sampler runs (a ``Profile``, which can be saved); a *source*
(``sources/<name>.py``) turns a profile into recipe text; ``calibrate`` does both and marks the recipe with what it was
fitted to. The arithmetic of the published schedules (``curves`` and its neighbours) is pure NumPy.

The package is not called ``calibrate`` because that is the name of the function, ``ditopt.calibrate``. The names below
load their modules at first use, so that the arithmetic can be imported without the compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditopt.calibration.fitting import calibrate, fit
    from ditopt.calibration.profile import Profile
    from ditopt.calibration.recording import record

__all__ = ["Profile", "calibrate", "fit", "record"]

_HOME = {"Profile": "profile", "calibrate": "fitting", "fit": "fitting", "record": "recording"}


def _lazy(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


if not TYPE_CHECKING:  # a type checker that saw this would accept every attribute, misspelt ones too
    __getattr__ = _lazy
