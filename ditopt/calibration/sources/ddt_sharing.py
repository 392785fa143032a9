"""DDT's encoder sharing: the deep blocks are computed at the steps that represent the others best."""

from __future__ import annotations

from collections.abc import Mapping

from ditopt.calibration.partition import ddt_sharing
from ditopt.calibration.profile import Profile
from ditopt.calibration.sources import by_region, with_caches
from ditopt.errors import RecipeError
from ditopt.pipeline import Value

REGIONS = ("blocks.:-1",)


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """A cache of what the encoder, all blocks but the last, adds."""
    rate = float(parameters["rate"])
    if rate > profile.steps:
        raise RecipeError(f"ddt_sharing{{rate={rate:g}}}: this request has {profile.steps} steps; give less")
    (values,) = by_region(profile, REGIONS[0]).values()
    return with_caches({REGIONS[0]: ddt_sharing(values, rate)}, f"rate={rate:g} computes every step", residual="yes")
