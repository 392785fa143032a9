"""ECAD: schedules of components by a genetic search, judged by what they do to the samples and by what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np

from ditopt.calibration.estimate import Estimate
from ditopt.calibration.profile import Profile
from ditopt.calibration.search import Genome, nsga2
from ditopt.calibration.sources import with_caches
from ditopt.calibration.trial import Trials
from ditopt.errors import RecipeError
from ditopt.ir.program import Predictor
from ditopt.pipeline import Value, print_call

EXACT = "canonicalize, outline_blocks, hoist_invariants"
REGIONS = ("model", "latent")


def search(trials: Callable[[str], Trials], profile: Profile, parameters: Mapping[str, Value], seconds: float) -> str:
    """The schedule of least error among those found that execute at most ``share`` of the blocks' FLOPs.

    The search itself does not depend on ``share``: with the same number of trials, a higher share finds no worse one.
    """
    steps, most = profile.steps, int(parameters["trials"])
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

        # All components at once: where reusing everything costs least, by estimate, and the paper's fixed intervals.
        hold = Estimate.of(profile, Predictor()).chain(max(2, round(0.8 * steps)))
        counts = sorted({min(max(2, round(part * steps)), max(hold)) for part in (0.2, 0.35, 0.5, 0.65, 0.8)})
        initial = [_whole(hold[n], len(names)) for n in counts]
        initial += [_whole(_interval(steps, n), len(names)) for n in (1, 2, 3, 4, 5)]
        front = nsga2(
            evaluate,
            (steps, len(names)),
            population=int(parameters["population"]),
            generations=10_000,
            initial=initial,
            evaluations=most or None,
            time_limit=None if most else seconds,
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


def _whole(mask: str, count: int) -> Genome:
    """A genome that gives every one of ``count`` components the same mask."""
    return np.repeat(np.array([digit == "1" for digit in mask])[:, None], count, axis=1)


def _interval(steps: int, every: int) -> str:
    return "".join("1" if s % every == 0 else "0" for s in range(steps))
