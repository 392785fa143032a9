"""MagCache: one mask for the stack of blocks, from the ratio of its residual's magnitude in neighbouring steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ditopt.calibration.curves import magcache, magnitude_ratios
from ditopt.calibration.profile import Profile
from ditopt.calibration.sources import with_caches
from ditopt.pipeline import Value

REGIONS = ("blocks",)


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """A cache of what the blocks add to their input; where they add to several streams, from the mean of the ratios."""
    threshold, longest = float(parameters["threshold"]), int(parameters["max_skip_steps"])
    ratios = np.mean([magnitude_ratios(residual) for residual in profile.of("blocks").values()], axis=0)
    mask = magcache(ratios, threshold, longest, float(parameters["retention_ratio"]))
    why = f"the magnitudes of what the blocks add differ by more than threshold={threshold:g} in each step"
    return with_caches({"blocks": mask}, why, residual="yes")
