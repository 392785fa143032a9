"""One mask, searched by what it does to the samples: which steps to compute, where the others are forecast.

Real runs are dear, so a recording is asked first (``estimate``): it gives good masks of every number of steps at once.
Runs of the sampler then decide among the best of these and their neighbours, best estimate first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from ditopt.calibration.estimate import Estimate, best_orders, grown, moved
from ditopt.calibration.profile import Profile
from ditopt.calibration.search import best_mask
from ditopt.calibration.trial import Trials, Worth
from ditopt.errors import RecipeError
from ditopt.ir.program import Predictor
from ditopt.pipeline import Value, print_call

EXACT = "canonicalize, outline_blocks, hoist_invariants"
REGIONS = ("model", "latent")


def search(trials: Callable[[str], Trials], profile: Profile, parameters: Mapping[str, Value], seconds: float) -> str:
    """The mask of least error among those that compute ``share`` of the steps, and the order that goes with it."""
    steps, region, most = profile.steps, str(parameters["region"]), int(parameters["trials"])
    count = max(2, round(float(parameters["share"]) * steps))
    if count >= steps:
        raise RecipeError(f"share={parameters['share']} of {steps} steps is all of them: nothing would be reused")
    orders = [int(parameters["order"])] if int(parameters["order"]) else [1, 2, 3]
    if region == "model":
        estimates = [Estimate.of(profile, Predictor("lagrange", order, "timestep")) for order in orders]
        return _forecast(trials, best_orders(estimates, count), count, most, seconds)
    found: list[tuple[float, str]] = []
    for order in orders[:2]:
        with trials(_text(region, order)) as trial:
            name = next(iter(trial.decisions))
            mask, error = best_mask(
                lambda m, trial=trial, name=name: trial({name: m}).error,  # type: ignore[misc]
                steps,
                count,
                evaluations=most or None,
                time_limit=seconds / len(orders[:2]),
            )
        found.append((error, _text(region, order, mask)))
    return min(found)[1]


def _forecast(
    trials: Callable[[str], Trials],
    chains: Sequence[tuple[Estimate, dict[int, str]]],
    count: int,
    most: int,
    seconds: float,
) -> str:
    """The best order and mask. Orders whose estimates are close are run once each; high ones with few computed steps
    answer to errors more than an estimate sees."""
    began, used = time.monotonic(), 0
    if len(chains) > 1:
        worth = []
        for i, (estimate, chain) in enumerate(chains):
            with trials(_text("model", estimate.predictor.order)) as trial:
                worth.append((trial({next(iter(trial.decisions)): chain[count]}).error, i))
        used, chains = len(chains), [chains[min(worth)[1]]]
    ((estimate, chain),) = chains
    left = max(1, most - used) if most else 0
    with trials(_text("model", estimate.predictor.order)) as trial:
        seconds = max(0.0, seconds - (time.monotonic() - began))
        mask = refined(trial, estimate, list(chain.values()), count, left, seconds)
    return _text("model", estimate.predictor.order, mask)


def refined(
    trial: Trials, estimate: Estimate, chain: Sequence[str], count: int, most: int = 0, seconds: float = 60.0
) -> str:
    """The best of the masks with at most ``count`` computed steps that runs of the sampler compare: those of ``chain``
    with the best estimates, then the neighbours of the best one so far, in the order of their estimates.

    ``most``: runs (0: as many as ``seconds`` allow). The same ``most`` gives the same mask on every machine.
    """
    name, began = next(iter(trial.decisions)), time.monotonic()
    known: dict[str, Worth] = {}

    def over() -> bool:
        return bool(known) and (len(known) >= most if most else time.monotonic() - began >= seconds)

    best = ""
    for mask in sorted(chain, key=estimate)[:3]:
        if not over():
            known[mask] = trial({name: mask}, known[best] if best else None)
            best = mask if not best or known[mask].error < known[best].error else best
    improved = True
    while improved:
        improved = False
        near = {*moved(best), *(grown(best) if best.count("1") < count else ())}
        for mask in sorted(near - known.keys(), key=lambda m: (estimate(m), m)):
            if over():
                return best
            known[mask] = trial({name: mask}, known[best])
            if known[mask].error < known[best].error:
                best, improved = mask, True
                break
    return best


def _text(region: str, order: int, mask: str = "") -> str:
    options: dict[str, Value] = {"region": region, "predictor": "lagrange", "order": order, "time": "timestep"}
    return f"{EXACT}, {print_call('cache', {**options, **({'mask': mask} if mask else {})})}"
