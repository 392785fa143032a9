"""Block influence: a block that hardly turns its stream is one that can be left out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from ditopt.calibration.profile import Profile
from ditopt.calibration.sources import by_region
from ditopt.errors import RecipeError
from ditopt.pipeline import Value, print_call

REGIONS = ("streams",)


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """The ``share`` of the blocks of least influence is left out."""
    found = influence(profile)
    blocks = list(found)
    protect, share = max(int(parameters["protect"]), 1), float(parameters["share"])
    count = max(round(share * len(blocks)), 1)
    open_ = [b for b in blocks[protect : len(blocks) - protect] if math.isfinite(found[b])]
    if len(open_) < count:
        raise RecipeError(
            f"share={share:g} of {len(blocks)} blocks is {count}, and {len(open_)} can be left out with "
            f"protect={protect}; give a smaller share"
        )
    least = sorted(open_, key=lambda b: found[b])[:count]
    region = "|".join(b for b in blocks if b in least)
    return f"canonicalize, outline_blocks, hoist_invariants, {print_call('skip_blocks', {'region': region})}"


def influence(profile: Profile) -> dict[str, float]:
    """1 - the cosine of each block's stream with that behind the block before, mean over positions, steps and
    recordings (ShortGPT, arXiv 2403.03853); inf where these differ in shape, as they do for the first block."""
    streams = by_region(profile, "streams")
    out: dict[str, float] = {}
    before, last = None, ""
    for block, values in streams.items():
        if before is None or before.shape != values.shape or not _next(last, block):
            out[block] = math.inf
        else:
            norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(values, axis=-1)
            out[block] = float(1 - np.mean((before * values).sum(-1) / np.maximum(norms, 1e-30)))
        before, last = values, block
    return out


def _next(one: str, other: str) -> bool:
    """Whether ``other`` is the block behind ``one``."""
    a, b = (int(re.findall(r"\d+", name)[0]) for name in (one, other))
    return b == a + 1
