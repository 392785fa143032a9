"""LESA: on skipped steps a trained predictor, one for each stage of the request, gives what the last layers read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditopt.calibration.learned import train
from ditopt.calibration.profile import Profile
from ditopt.calibration.sources import by_region, with_caches
from ditopt.errors import RecipeError, require
from ditopt.ir.program import Interval
from ditopt.pipeline import Value
from ditopt.runtime.policy import schedule

REGIONS = ("head",)


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """A cache of what leaves the last block, predicted by tables in a file."""
    interval, given, steps = int(parameters["interval"]), str(parameters["table"]), profile.steps
    windows = _windows(str(parameters["windows"]), steps)
    if interval > steps:
        raise RecipeError(f"lesa{{interval={interval}}}: this request has {steps} steps; give fewer")
    if given and not Path(given).absolute().parent.is_dir():
        raise RecipeError(f"lesa{{table={given}}}: there is no folder {Path(given).absolute().parent}; make it first")
    computes = schedule(Interval(interval, int(parameters["first"]), int(parameters["last"])), steps)
    mask = "".join("1" if computes(t) else "0" for t in range(steps))
    options: dict[str, Value] = {"residual": "no", "predictor": "learned"}
    if "0" in mask:
        (values,) = by_region(profile, REGIONS[0]).values()
        rank, iterations, seed = (int(parameters[name]) for name in ("rank", "iterations", "seed"))
        tables = train(values, profile.times, mask, windows, rank, iterations, seed)
        options["table"] = _written(tables, given)
    return with_caches({"blocks": mask}, f"interval={interval} computes every step", **options)


def _windows(text: str, steps: int) -> list[int]:
    """The length of the window of each stage."""
    words = text.split()
    if not words or not all(w.isdecimal() and int(w) > 0 for w in words):
        raise RecipeError(f"lesa{{windows={text}}}: expected a whole number from 1 on for each stage, as in '4 6 8'")
    if len(words) > steps:
        raise RecipeError(
            f"lesa{{windows={text}}}: {len(words)} stages given and this request has {steps} steps; give at most one "
            "window for each step"
        )
    return [int(w) for w in words]


def _written(tables: Mapping[str, Any], given: str) -> str:
    """The file that holds ``tables``; without a name, one made of its content, so that no other fit overwrites it."""
    data = require("safetensors.numpy", None).save(dict(tables))
    path = Path(given or f"lesa-{hashlib.sha256(data).hexdigest()[:12]}.safetensors")
    try:
        path.write_bytes(data)
    except OSError as error:
        raise RecipeError(f"the predictor cannot be written to {path} ({error}); give table= another place") from error
    return str(path)
