"""From a published system and a recording to a recipe for one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ditopt.calibration import sources
from ditopt.calibration.profile import Profile
from ditopt.calibration.recording import MEMORY, Sampler, record
from ditopt.errors import RecipeError
from ditopt.ir.program import Role
from ditopt.pipeline import Value
from ditopt.recipe import Recipe, System, available, named


def calibrate(
    model: Any,
    recipe: str | Path,
    sampler: Sampler | None = None,
    *,
    steps: int,
    seeds: Iterable[int] = range(4),
    tokens: int = 256,
    memory: int = MEMORY,
    roles: Mapping[str, Role] | None = None,
    progress: bool = True,
) -> Recipe:
    """Fit a published system to ``model`` (an nn.Module or a diffusers pipeline) and the way it is sampled.

    recipe: a system that declares a calibration, with its parameters (``"smoothcache{alpha=0.1}"``), or the path of its
        .toml file. sampler: ``sampler(model, seed)`` or ``sampler(model, seed, steps)`` runs one request.
    steps: model evaluations of a request; the result fits this number only. seeds: one request is recorded for each.
    Other arguments: see ``ditopt.calibration.record``.

    The recipe says what it was fitted to (``calibrated``); the first request that differs gets a DitoptWarning. To try
    several parameters on one recording, use ``ditopt.calibration.record`` and ``fit``.
    """
    system, values = _system(recipe)
    source = sources.get(system.calibration)
    profile = record(
        model,
        sampler,
        regions=source.REGIONS,
        steps=steps,
        seeds=seeds,
        tokens=tokens,
        memory=memory,
        roles=roles,
        progress=progress,
    )
    return _fitted(system, values, source, profile)


def fit(recipe: str | Path, profile: Profile) -> Recipe:
    """The recipe that a system gives for a recording. RecipeError where that lacks a region the system looks at."""
    system, values = _system(recipe)
    source = sources.get(system.calibration)
    for region in source.REGIONS:
        profile.of(region)
    return _fitted(system, values, source, profile)


def _system(recipe: str | Path) -> tuple[System, dict[str, Value]]:
    system, values = named(recipe)
    if not system.calibration:
        fitted = [name for name, other in available().items() if other.calibration]
        raise RecipeError(
            f"{system.name} is not fitted to a model: pass it to ditopt.optimize as it is (systems that are: "
            f"{', '.join(fitted)})"
        )
    return system, values


def _fitted(system: System, values: Mapping[str, Value], source: sources.Source, profile: Profile) -> Recipe:
    made = Recipe.parse(source.fit(profile, values))
    return Recipe(made.steps, system.name, profile.key)
