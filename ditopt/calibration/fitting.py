"""From a published system and a recording to a recipe for one model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ditopt.calibration import sources
from ditopt.calibration.profile import Profile
from ditopt.calibration.recording import MEMORY, Sampler, record, steps_given
from ditopt.calibration.trial import Trials
from ditopt.errors import BadInput, RecipeError
from ditopt.ir.program import Role
from ditopt.pipeline import Value
from ditopt.recipe import Recipe, System, available, named

_WHOLE = 1024
"""Token positions that a search records at least: it looks at outputs of the model, whose channels are few."""


def calibrate(
    model: Any,
    recipe: str | Path,
    sampler: Sampler | None = None,
    *,
    steps: int,
    seeds: Iterable[int] = range(4),
    tokens: int = 256,
    memory: int = MEMORY,
    seconds: float = 60.0,
    roles: Mapping[str, Role] | None = None,
    progress: bool = True,
) -> Recipe:
    """Fit a published system to ``model`` (an nn.Module or a diffusers pipeline) and the way it is sampled.

    recipe: a system that declares a calibration, with its parameters (``"smoothcache{alpha=0.1}"``), or the path of its
        .toml file. sampler: ``sampler(model, seed)`` or ``sampler(model, seed, steps)`` runs one request.
    steps: model evaluations of a request; the result fits this number only. seeds: one request is recorded (or tried,
        by systems that search) for each. seconds: how long systems that search may take.
    Other arguments: see ``ditopt.calibration.record``.

    The recipe says what it was fitted to (``calibrated``); the first request that differs gets a DitoptWarning. To try
    several parameters on one recording, use ``ditopt.calibration.record`` and ``fit``.
    """
    system, values = _system(recipe)
    listed, search = list(seeds), sources.searcher(system.calibration)
    source = sources.get(system.calibration) if search is None else None
    regions = (source or search).REGIONS  # type: ignore[union-attr]
    made: dict[int, Tensor] = {}
    profile = record(
        model,
        _kept(sampler, made) if search and callable(sampler) else sampler,
        regions=regions,
        steps=steps,
        seeds=listed if source or "model" in regions else listed[:1],
        tokens=max(tokens, _WHOLE) if search else tokens,
        memory=memory,
        roles=roles,
        progress=progress,
    )
    if source is not None:
        return _fitted(system, values, source, profile)
    assert search is not None
    assert sampler is not None
    found = search.search(_trials(model, sampler, steps, listed, made), profile, values, seconds)
    return Recipe(Recipe.parse(found).steps, system.name, profile.key)


def _kept(sampler: Sampler, made: dict[int, Tensor]) -> Sampler:
    """``sampler``, of which ``made`` keeps by seed what it returns: a recording runs the plain model."""

    @functools.wraps(sampler)
    def run(running: Any, seed: int, *steps: int) -> Any:
        out = sampler(running, seed, *steps)
        if isinstance(out, Tensor):
            made[seed] = out
        return out

    return run


def _trials(
    model: Any, sampler: Sampler, steps: int, seeds: Sequence[int], plain: Mapping[int, Tensor]
) -> Callable[[str], Trials]:
    given = steps_given(sampler)

    def run(running: Any, seed: int) -> Tensor:
        made = sampler(running, seed, steps) if given else sampler(running, seed)
        if not isinstance(made, Tensor):
            raise BadInput(
                f"the sampler returned a {type(made).__name__}; a search compares samples: return them as one tensor"
            )
        return made

    return lambda recipe: Trials(model, recipe, run, seeds=seeds, steps=steps, plain=plain)


def fit(recipe: str | Path, profile: Profile) -> Recipe:
    """The recipe that a system gives for a recording. RecipeError where that lacks a region the system looks at."""
    system, values = _system(recipe)
    if sources.searcher(system.calibration) is not None:
        raise RecipeError(f"{system.name} is found by trying schedules, not from a recording: use ditopt.calibrate")
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
