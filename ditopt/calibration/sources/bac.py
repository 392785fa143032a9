"""BAC: a schedule of its own for every module, by dynamic programming, and fresh MLPs where staleness would spread."""

from __future__ import annotations

from collections.abc import Mapping

from ditopt.calibration.partition import bac
from ditopt.calibration.profile import Profile
from ditopt.calibration.sources import by_region, grouped, with_caches
from ditopt.errors import RecipeError
from ditopt.pipeline import Value

REGIONS = ("blocks.*.attn", "blocks.*.mlp")


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """A cache for each set of modules that refresh at the same steps."""
    refreshes = int(parameters["refreshes"])
    if refreshes > profile.steps:
        raise RecipeError(f"bac{{refreshes={refreshes}}}: this request has {profile.steps} steps; give fewer")
    attention, mlps = (by_region(profile, region) for region in REGIONS)
    order: dict[str, None] = {}
    for block in dict.fromkeys(name.rpartition(".")[0] for name in (*attention, *mlps)):
        order |= {n: None for n in (f"{block}.attn", f"{block}.mlp") if n in attention or n in mlps}
    both = {**attention, **mlps}
    masks = bac({name: both[name] for name in order}, refreshes, tuple(mlps), int(parameters["volatile"]))
    return with_caches(grouped(masks), f"refreshes={refreshes} computes every step")
