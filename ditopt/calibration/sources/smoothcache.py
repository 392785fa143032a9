"""SmoothCache: one mask for each type of layer, from how far its outputs move within a few steps."""

from __future__ import annotations

from collections.abc import Mapping

from ditopt.calibration.curves import smoothcache_by_type
from ditopt.calibration.profile import Profile
from ditopt.calibration.sources import with_caches
from ditopt.pipeline import Value

REGIONS = ("blocks.*.attn", "blocks.*.mlp")


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """A cache for each type of layer."""
    alpha, lookahead = float(parameters["alpha"]), int(parameters["lookahead"])
    masks = smoothcache_by_type({r: list(profile.of(r).values()) for r in REGIONS}, alpha, lookahead)
    return with_caches(masks, f"the outputs of every layer type move by more than alpha={alpha:g} in each step")
