"""HetCache: TeaCache's polynomial, from a change of the first block's modulated input to one of what the blocks add."""

from __future__ import annotations

from collections.abc import Mapping

from ditopt.calibration.profile import Profile
from ditopt.calibration.sources.teacache import REGIONS, fitted
from ditopt.pipeline import Value
from ditopt.recipe import Recipe

__all__ = ["REGIONS", "fit"]


def fit(profile: Profile, parameters: Mapping[str, Value]) -> Recipe:
    """The recipe ``hetcache`` with the coefficients, and their range, of a fit over all steps and recordings."""
    return fitted("hetcache", profile, parameters)
