"""SmoothQuant: the largest magnitude of each channel of what layers read, over all steps, tokens and requests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ditopt.calibration.profile import Array, Profile
from ditopt.errors import RecipeError, require
from ditopt.pipeline import Value
from ditopt.recipe import Recipe, available

REGIONS = ("maxima",)


def fit(profile: Profile, parameters: Mapping[str, Value]) -> Recipe:
    """The recipe of the scheme that smooths by the maxima, which it writes to a file."""
    given = dict(parameters)
    scheme, table = str(given.pop("scheme")), str(given.pop("table"))
    if not table:
        raise RecipeError("smoothquant: table= is missing: the .safetensors file to write the maxima of activations to")
    require("safetensors.numpy", None).save_file(maxima(profile), Path(table))
    return available()[scheme].recipe({**given, "maxima": table})


def maxima(profile: Profile) -> dict[str, Array]:
    """(K,) float32 by the name of each weight."""
    out: dict[str, Array] = {}
    for name, values in profile.of("maxima").items():
        most = values.max(axis=(0, 1, 2)).astype(np.float32)
        for weight in name.split("|"):
            # layers of several inputs: one set of integers, so one set of factors
            out[weight] = np.maximum(out[weight], most) if weight in out and len(out[weight]) == len(most) else most
    return out
