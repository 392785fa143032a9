"""Sources: what fits a published system to a recording. One file each; the file name is the name that a system's
``calibration`` field gives. Adding one edits no other file.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from ditopt.calibration.profile import Array, Profile
from ditopt.errors import DitoptWarning, RecipeError
from ditopt.pipeline import Value, print_call, suggest
from ditopt.recipe import Recipe

if TYPE_CHECKING:
    from ditopt.calibration.trial import Trials


class Source(Protocol):
    """What a file of this folder offers."""

    REGIONS: Sequence[str]
    """The selectors that it needs recorded."""

    def fit(self, profile: Profile, parameters: Mapping[str, Value]) -> Recipe | str:
        """The recipe for what was recorded: passes with concrete masks and tables. ``parameters``: the system's, all of
        them by name."""
        ...


class Search(Protocol):
    """What a file of this folder offers whose system is found by trying schedules."""

    REGIONS: Sequence[str]
    """What is recorded before, to begin the search with; ``latent`` at least."""

    def search(
        self, trials: Callable[[str], Trials], profile: Profile, parameters: Mapping[str, Value], seconds: float
    ) -> Recipe | str:
        """The recipe of what was found within ``seconds``. ``trials``: recipe text -> Trials of it on the user's model
        and sampler (a context manager). ``profile``: the recording of ``REGIONS``."""
        ...


def names() -> list[str]:
    """The sources that exist. Imports none of them."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def searcher(name: str) -> Search | None:
    """The source of this name where it tries schedules; else None. RecipeError where there is none."""
    module = _module(name)
    return cast("Search", module) if callable(getattr(module, "search", None)) else None


def get(name: str) -> Source:
    """The source of this name; RecipeError where there is none or its file offers something else."""
    module = _module(name)
    regions = getattr(module, "REGIONS", None)
    if not callable(getattr(module, "fit", None)) or isinstance(regions, str) or not regions:
        raise RecipeError(
            f"{name}.py among the sources of calibration must offer REGIONS, a list of selectors, and fit, or search"
        )
    return cast(Source, module)


def by_region(profile: Profile, selector: str) -> dict[str, Array]:
    """The recording of each region that ``selector`` selects, in the order of the blocks: streams of a region that have
    the same number of channels are joined along the tokens, others left out after the first."""
    joined: dict[str, list[Array]] = {}
    for name, values in profile.of(selector).items():
        joined.setdefault(name.partition("/")[0], []).append(values)
    whole = {
        name: np.concatenate([p for p in parts if p.shape[-1] == parts[0].shape[-1]], axis=2)
        for name, parts in joined.items()
    }
    return dict(sorted(whole.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]))


def grouped(masks: Mapping[str, str]) -> dict[str, str]:
    """Masks by region with the regions of equal masks joined, so that they are one decision."""
    regions: dict[str, list[str]] = {}
    for region, mask in masks.items():
        regions.setdefault(mask, []).append(region)
    return {"|".join(names): mask for mask, names in regions.items()}


def _module(name: str) -> Any:
    if name not in names():
        raise RecipeError(f"no calibration is called {name!r}; {suggest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def with_caches(masks: Mapping[str, str], why: str, **options: Value) -> str:
    """Recipe text: the exact passes, and a cache for each region whose mask (1 = compute, one a step) ever reuses.

    ``options`` go to every cache. A DitoptWarning says ``why`` where no step is reused at all.
    """
    steps = ["canonicalize, outline_blocks, hoist_invariants"]
    for region, mask in masks.items():
        if "0" in mask:
            steps.append(print_call("cache", {"region": region, "mask": mask, **options}))
    if len(steps) == 1:
        warnings.warn(f"this recipe reuses nothing: {why}", DitoptWarning, stacklevel=5)
    return ", ".join(steps)
