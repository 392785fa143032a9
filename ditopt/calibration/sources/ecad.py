"""ECAD: schedules of components by a genetic search, judged by what they do to the samples and by what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np

from ditopt.calibration.search import Genome, nsga2
from ditopt.calibration.sources import with_caches
from ditopt.calibration.trial import Trials
from ditopt.errors import RecipeError
from ditopt.pipeline import Value, print_call

EXACT = "canonicalize, outline_blocks, hoist_invariants"


def search(trials: Callable[[str], Trials], steps: int, parameters: Mapping[str, Value], seconds: float) -> str:
    """The schedule of least error among those found that execute at most ``share`` of the blocks' FLOPs."""
    regions = components(int(parameters["groups"]))
    text = ", ".join([EXACT, *(print_call("cache", {"region": region}) for region in regions)])
    with trials(text) as trial:
        names = list(trial.decisions)  # a model without MLPs, or with few blocks, has fewer than there are regions
        held = [region for region in regions if any(region in asked for asked in trial.asked)]
        seen: dict[bytes, dict[str, str]] = {}

        def evaluate(genome: Genome) -> tuple[float, float]:
            masks = {n: "".join("1" if bit else "0" for bit in genome[:, k]) for k, n in enumerate(names)}
            seen[genome.tobytes()] = masks
            worth = trial(masks)
            return max(worth.error, -99.0), worth.share

        initial = [_interval(steps, len(names), n) for n in (1, 2, 3, 4, 5)]
        front = nsga2(
            evaluate,
            (steps, len(names)),
            population=int(parameters["population"]),
            generations=10_000,
            initial=initial,
            time_limit=seconds,
        )
        limit = float(parameters["share"])
        inside = [c for c in front if c.objectives[1] <= limit]
        if not inside:
            least = min(c.objectives[1] for c in front)
            raise RecipeError(f"no schedule of at most share={limit:g} was found; the cheapest executes {least:.2f}")
        best = min(inside, key=lambda c: c.objectives)
        masks = list(seen[best.genome.tobytes()].values())
    return with_caches(dict(zip(held, masks, strict=True)), f"no step can be reused at share={limit:g}")


def components(groups: int) -> list[str]:
    """Selectors of the attention, and of the MLPs, of each of ``groups`` runs of blocks."""
    cuts = [f"{round(100 * i / groups)}%" for i in range(groups + 1)]
    return [f"blocks.{a}:{b}.{role}" for a, b in pairwise(cuts) for role in ("attn", "mlp")]


def _interval(steps: int, count: int, every: int) -> Genome:
    return np.repeat((np.arange(steps) % every == 0)[:, None], count, axis=1)
