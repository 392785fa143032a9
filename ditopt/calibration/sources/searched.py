"""One mask, searched by what it does to the samples: which steps to compute, where the others are forecast.

Real runs are dear, so a recording is asked first (``estimate``): it gives good masks of every number of steps at once.
Runs of the sampler then decide among the best of these and their neighbours, best estimate first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from ditopt.calibration.coefficients import fitted, text
from ditopt.calibration.estimate import Estimate, best_orders, grown, moved
from ditopt.calibration.profile import Profile
from ditopt.calibration.search import best_mask, spread
from ditopt.calibration.trial import Trials, Worth
from ditopt.errors import RecipeError
from ditopt.ir.program import Predictor, Rows
from ditopt.pipeline import Value, print_call

EXACT = "canonicalize, outline_blocks, hoist_invariants"
REGIONS = ("model", "latent")

LOCAL = 0.3
"""Weight of the errors of single steps where coefficients are fitted. Of 0, 0.03, 0.3 and 3 the best on three shipped
models: without it, coefficients fitted to a recording of the plain run lose 5 to 10 dB, for the model answers."""


def search(trials: Callable[[str], Trials], profile: Profile, parameters: Mapping[str, Value], seconds: float) -> str:
    """The mask of least error among those that compute ``share`` of the steps, and the order that goes with it."""
    steps, region, most = profile.steps, str(parameters["region"]), int(parameters["trials"])
    count = max(2, round(float(parameters["share"]) * steps))
    if count >= steps:
        raise RecipeError(f"share={parameters['share']} of {steps} steps is all of them: nothing would be reused")
    orders = [int(parameters["order"])] if int(parameters["order"]) else [1, 2, 3]
    if region == "model":
        known = Estimate.of(profile, Predictor("lagrange", orders[0], "timestep"))
        estimates = [known.by(Predictor("lagrange", order, "timestep")) for order in orders]
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
    """The best order, coefficients and mask.

    Of orders whose estimates are close, each is run once with its best mask and once with an even one: with few
    computed steps the model answers to errors more than an estimate sees. Then come fitted coefficients for the best of
    these, and the neighbours of its mask.
    """
    began = time.monotonic()
    known: list[dict[str, Worth]] = [{} for _ in chains]

    def best(i: int) -> float:
        return min((w.error for w in known[i].values()), default=math.inf)

    for i, (estimate, chain) in enumerate(chains):
        with trials(_text("model", estimate.predictor.order)) as trial:
            for mask in dict.fromkeys((chain[count], spread(estimate.steps, count, 0.0))):
                if not most or sum(map(len, known)) < most:
                    known[i][mask] = _run(trial, estimate, mask, False)
    i = min(range(len(chains)), key=best)
    (estimate, chain), worth = chains[i], known[i]
    order, mask = estimate.predictor.order, min(worth, key=lambda m: worth[m].error)
    with trials(_text("model", order)) as trial:
        left = max(0, most - sum(map(len, known)) - 1) if most else 0
        other = _run(trial, estimate, mask, True, worth[mask]) if left or not most else worth[mask]
        fit = other.error < worth[mask].error
        worth = {mask: other} if fit else worth
        if left or not most:
            until = max(0.0, seconds - (time.monotonic() - began))
            mask = refined(trial, estimate, list(chain.values()), count, left, until, fit, worth)
    return _text("model", order, mask, fitted(estimate, mask, LOCAL) if fit else ())


def _run(trial: Trials, estimate: Estimate, mask: str, fit: bool, best: Worth | None = None) -> Worth:
    """What ``mask`` is worth on the sampler, with fitted coefficients or those of the polynomial."""
    name = next(iter(trial.decisions))
    return trial({name: mask}, best, {name: fitted(estimate, mask, LOCAL)} if fit else {})


def refined(
    trial: Trials,
    estimate: Estimate,
    chain: Sequence[str],
    count: int,
    most: int = 0,
    seconds: float = 60.0,
    fit: bool = False,
    worth: Mapping[str, Worth] = MappingProxyType({}),
) -> str:
    """The best of the masks with at most ``count`` computed steps that runs of the sampler compare: those of ``chain``
    with the best estimates, then the neighbours of the best one so far, in the order of their estimates.

    ``most``: runs (0: as many as ``seconds`` allow). The same ``most`` gives the same mask on every machine. ``fit``:
    with coefficients fitted to each mask. ``worth``: of masks that were run before.
    """
    began = time.monotonic()
    known = dict(worth)

    def over() -> bool:
        return bool(known) and (len(known) - len(worth) >= most if most else time.monotonic() - began >= seconds)

    best = min(known, key=lambda m: known[m].error, default="")
    least = min(map(estimate, known), default=math.inf)
    for mask in sorted(set(chain) - known.keys(), key=lambda m: (estimate(m), m))[:3]:
        if not over() and estimate(mask) < least:
            known[mask] = _run(trial, estimate, mask, fit, known[best] if best else None)
            best = mask if not best or known[mask].error < known[best].error else best
    improved = True
    while improved:
        improved = False
        near = {*moved(best), *(grown(best) if best.count("1") < count else ())}
        for mask in sorted(near - known.keys(), key=lambda m: (estimate(m), m)):
            if over():
                return best
            known[mask] = _run(trial, estimate, mask, fit, known[best])
            if known[mask].error < known[best].error:
                best, improved = mask, True
                break
    return best


def _text(region: str, order: int, mask: str = "", rows: Rows = ()) -> str:
    options: dict[str, Value] = {"region": region, "predictor": "lagrange", "order": order, "time": "timestep"}
    options |= {"mask": mask} if mask else {}
    options |= {"fitted": text(mask, rows)} if rows else {}
    return f"{EXACT}, {print_call('cache', options)}"
