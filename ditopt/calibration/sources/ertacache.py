"""ERTACache: which steps reuse, by how much they are shortened, and an affine map that takes off their error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ditopt.calibration.correction import erta_mask, erta_threshold, phi, rectify, reused_outputs
from ditopt.calibration.mask import Floats
from ditopt.calibration.profile import Profile
from ditopt.calibration.sources import with_caches
from ditopt.errors import RecipeError, require
from ditopt.ir.pacing import write_factors
from ditopt.pipeline import Value, print_call

REGIONS = ("model", "latent")


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """A cache of what the model's output adds to its input, corrected by tables in a file where one is named, and the
    pace of the steps that reuse."""
    x, v, residual = _trajectory(profile)
    threshold, share = float(parameters["threshold"]), float(parameters["share"])
    if share:
        threshold = erta_threshold(v - x, max(1, round(share * profile.steps)))
    mask = erta_mask(v - x, threshold)
    options: dict[str, Value] = {"residual": "yes" if residual else "no"}
    table, adjust = str(parameters["table"]), bool(parameters["adjust"])
    if adjust:
        _scheduled(profile)
    if table and "0" in mask:
        options |= {"correction": table, "corrected": "whole"}
        scale, shift = rectify(v, reused_outputs(x, v, mask), mask)
        tables = {"scale": scale.astype(np.float32), "shift": shift.astype(np.float32)}
        require("safetensors.numpy", None).save_file(tables, Path(table))
    made = with_caches(
        {"model": mask}, f"no residual is within threshold={threshold:g} of the one before it", **options
    )
    factors = phi(x, v, mask)
    if not adjust or (factors == 1).all():
        return made
    return f"{made}, {print_call('rescale_steps', {'factors': write_factors(factors.tolist())})}"


def _trajectory(profile: Profile) -> tuple[Floats, Floats, bool]:
    """The model's inputs and outputs, and whether the difference of the two can be kept. Where the input holds more
    than the latent, outputs are kept as they are: then the inputs are zeros."""
    x, v = (np.asarray(next(iter(profile.of(name).values())), dtype=np.float64) for name in ("latent", "model"))
    return (x, v, True) if x.shape == v.shape else (np.zeros_like(v), v, False)


def _scheduled(profile: Profile) -> None:
    """RecipeError unless the recording shows sigmas that the times follow: what the pace changes."""
    sigmas, times = profile.sigmas, profile.times
    if sigmas is None:
        raise RecipeError(
            "ertacache changes the steps of a scheduler with one sigma a step, and this recording saw none; calibrate "
            "a pipeline that has one, or give adjust=false"
        )
    unit = np.median(times[sigmas[:-1] != 0] / sigmas[:-1][sigmas[:-1] != 0])
    if not np.allclose(times, unit * sigmas[:-1], rtol=1e-2):
        raise RecipeError(
            "ertacache changes the steps of a scheduler whose timesteps are proportional to its sigmas, and those of "
            "this recording are not; calibrate with an Euler scheduler of flow matching, or give adjust=false"
        )
