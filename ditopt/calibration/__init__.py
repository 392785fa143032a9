"""Calibration: from a published system and the user's own model and sampler to a recipe with concrete tables.

``record`` keeps what chosen regions compute while the sampler runs (a ``Profile``, which can be saved); a *source*
(``sources/<name>.py``) turns a profile into recipe text; ``calibrate`` does both and marks the recipe with what it was
fitted to. The package is not called ``calibrate`` because that is the name of the function, ``ditopt.calibrate``.
"""

from __future__ import annotations

from ditopt.calibration.fit import calibrate, fit
from ditopt.calibration.profile import Profile
from ditopt.calibration.record import record

__all__ = ["Profile", "calibrate", "fit", "record"]
