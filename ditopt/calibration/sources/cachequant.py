"""CacheQuant's cache: a schedule by dynamic programming, and tables that correct what is reused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ditopt.calibration.correction import decoupled
from ditopt.calibration.partition import cachequant
from ditopt.calibration.profile import Profile
from ditopt.calibration.sources import by_region, with_caches
from ditopt.errors import RecipeError, require
from ditopt.pipeline import Value

REGIONS = ("blocks.1:-1",)


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """A cache of what the middle blocks add, corrected by tables in a file where one is named."""
    interval, table = int(parameters["interval"]), str(parameters["table"])
    if interval > profile.steps:
        raise RecipeError(f"cachequant{{interval={interval}}}: this request has {profile.steps} steps; give fewer")
    (values,) = by_region(profile, REGIONS[0]).values()
    mask = cachequant(values, interval)
    options: dict[str, Value] = {"residual": "yes"}
    if table and "0" in mask:
        options["correction"] = table
        scale, shift = decoupled(values, mask)
        tables = {"scale": scale.astype(np.float32), "shift": shift.astype(np.float32)}
        require("safetensors.numpy", None).save_file(tables, Path(table))
    return with_caches({REGIONS[0]: mask}, f"interval={interval} computes every step", **options)
