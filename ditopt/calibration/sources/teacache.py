"""TeaCache: the polynomial from a change of the first block's modulated input to one of what the blocks add."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ditopt.calibration.profile import Profile
from ditopt.calibration.signals import fit_rescale, relative_changes
from ditopt.errors import RecipeError
from ditopt.pipeline import Value
from ditopt.recipe import Recipe, available

REGIONS = ("modulated", "blocks")


def fit(profile: Profile, parameters: Mapping[str, Value]) -> Recipe:
    """The recipe ``teacache`` with the coefficients, and their range, of a fit over all steps and recordings."""
    return fitted("teacache", profile, parameters)


def fitted(name: str, profile: Profile, parameters: Mapping[str, Value]) -> Recipe:
    """The recipe ``name``, which reads the same signal, with them."""
    if parameters["coefficients"] != "1 0" or parameters["domain"]:
        raise RecipeError(f"{name}: coefficients and domain are what a calibration finds; leave them out")
    (signal,) = list(profile.of("modulated").values())[:1]
    changes = [relative_changes(values) for values in profile.of("blocks").values()]  # of each stream
    found = fit_rescale(relative_changes(signal), np.mean(changes, axis=0), int(parameters["degree"]))
    return available()[name].recipe(
        {
            **{name: value for name, value in parameters.items() if name != "degree"},
            "coefficients": " ".join(f"{c:.9g}" for c in found.coefficients),
            "domain": f"{found.low:.9g} {found.high:.9g}",
        }
    )
