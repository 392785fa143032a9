"""One mask, searched by what it does to the samples: which steps to compute, where the others are forecast.

Real runs are dear, so a recording is asked first (``estimate``): it gives good masks of every number of steps at once.
Runs of the sampler then decide among the best of these and their neighbours, best estimate first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from ditopt.calibration.coefficients import fitted, text
from ditopt.calibration.estimate import Estimate, Response, best_orders, grown, moved
from ditopt.calibration.profile import Profile
from ditopt.calibration.search import best_mask, spread
from ditopt.calibration.trial import Trials, Worth
from ditopt.errors import RecipeError
from ditopt.ir.program import Predictor, Rows
from ditopt.pipeline import Value, print_call

EXACT = "canonicalize, outline_blocks, hoist_invariants"
REGIONS = ("model", "latent")

RESPONSES = (Response(1, 12), Response(3, 12))
"""How a sampler may answer to errors, which a recording of the plain run does not say: masks and coefficients of both
are run. On a shipped model, forecasts of single steps arrived 4.6 times (the third step) to 0.6 times (the last ones)
as large as they were made, and the early ones hardly like themselves."""

ANCHORS = 3
"""Computed values that fitted coefficients read. Of 2, 3 and 4 the best on most masks tried on two models."""


@dataclass(frozen=True)
class Candidate:
    """A mask to run; ``fit``: with coefficients fitted to it by the estimate, not those of the polynomial."""

    estimate: Estimate
    mask: str
    fit: bool

    @property
    def anchors(self) -> int:
        """Computed values that a step reads at most."""
        least = self.estimate.predictor.anchors
        return max(least, ANCHORS) if self.fit else least

    def rows(self, anchors: int) -> Rows:
        """The coefficients of each reused step, of ``anchors`` values at most; those that it does not read have 0."""
        if not self.fit:
            told = self.estimate.rows(self.mask, anchors)
            return tuple(tuple(told[s][1].tolist()) if s in told else () for s in range(len(self.mask)))
        rows = fitted(self.estimate, self.mask, self.anchors)
        seen = np.cumsum([digit == "1" for digit in self.mask])
        return tuple(
            (*row, *[0.0] * (min(int(n), anchors) - len(row))) if row else () for row, n in zip(rows, seen, strict=True)
        )


def search(trials: Callable[[str], Trials], profile: Profile, parameters: Mapping[str, Value], seconds: float) -> str:
    """The mask of least error among those that compute ``share`` of the steps, and the order that goes with it."""
    steps, region, most = profile.steps, str(parameters["region"]), int(parameters["trials"])
    count = max(2, round(float(parameters["share"]) * steps))
    if count >= steps:
        raise RecipeError(f"share={parameters['share']} of {steps} steps is all of them: nothing would be reused")
    orders = [int(parameters["order"])] if int(parameters["order"]) else [1, 2, 3]
    if region == "model":
        known = Estimate.of(profile, Predictor("lagrange", orders[0], "timestep"))
        best = _forecast(trials, known, orders, count, most, seconds)
        return _text("model", best.anchors - 1, best.mask, best.rows(best.anchors) if best.fit else ())
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
    known: Estimate,
    orders: Sequence[int],
    count: int,
    most: int,
    seconds: float,
) -> Candidate:
    """The best candidate that runs of the sampler find: first the best masks of each response and order, and an even
    one, with fitted coefficients and with the polynomial's; then the neighbours of the best of these."""
    began = time.monotonic()
    chains = [
        best_orders([known.by(Predictor("lagrange", order, "timestep"), response) for order in orders], count)
        for response in RESPONSES
    ]
    first = _first(chains, count)
    anchors = max(candidate.anchors for candidate in first)
    worth: dict[Candidate, Worth] = {}
    best = first[0]
    with trials(_text("model", anchors - 1)) as trial:  # one for all: a polynomial is a row of coefficients as well
        name = next(iter(trial.decisions))

        def run(candidate: Candidate, least: Worth | None) -> Worth:
            return trial({name: candidate.mask}, least, {name: candidate.rows(anchors)})

        for candidate in first:
            if not worth or (len(worth) < most if most else time.monotonic() - began < seconds):
                worth[candidate] = run(candidate, worth.get(best))
                best = min(worth, key=lambda c: worth[c].error)
        left = most - len(worth) if most else 0
        if left or not most:
            leader = best
            mask = refined(
                lambda mask, least: run(replace(leader, mask=mask), least),
                leader.estimate,
                next(list(chain.values()) for found in chains for e, chain in found if e is leader.estimate),
                count,
                left,
                max(0.0, seconds - (time.monotonic() - began)),
                {best.mask: worth[best]},
            )
            best = replace(best, mask=mask)
    return best


def _first(chains: Sequence[Sequence[tuple[Estimate, dict[int, str]]]], count: int) -> list[Candidate]:
    """What is run before neighbours are, those that more is expected of first; of each response, orders with chains."""
    leaders = [found[0] for found in chains]
    others = [pair for found in chains for pair in found[1:]]
    estimate = leaders[0][0]
    even = spread(estimate.steps, count, 0.0)
    made = [Candidate(e, chain[count], True) for e, chain in leaders]
    made += [Candidate(estimate, leaders[0][1][count], False), Candidate(estimate, even, True)]
    made += [Candidate(e, chain[count], True) for e, chain in others]
    made += [Candidate(e, chain[count], False) for e, chain in leaders[1:]]
    made += [Candidate(estimate, even, False)]
    distinct: dict[Any, Candidate] = {}
    for c in made:
        distinct.setdefault((c.mask, c.fit and c.estimate.response, c.estimate.predictor), c)
    return list(distinct.values())


def refined(
    run: Callable[[str, Worth | None], Worth],
    estimate: Estimate,
    chain: Sequence[str],
    count: int,
    most: int = 0,
    seconds: float = 60.0,
    worth: Mapping[str, Worth] = MappingProxyType({}),
) -> str:
    """The best of the masks with at most ``count`` computed steps that runs of the sampler compare: those of ``chain``
    with the best estimates, then the neighbours of the best one so far, in the order of their estimates.

    run: what a mask is worth; its second argument is the best one so far. most: runs (0: as many as ``seconds`` allow).
    The same ``most`` gives the same mask on every machine. worth: of masks that were run before.
    """
    began = time.monotonic()
    known = dict(worth)

    def over() -> bool:
        return bool(known) and (len(known) - len(worth) >= most if most else time.monotonic() - began >= seconds)

    best = min(known, key=lambda m: known[m].error, default="")
    least = min(map(estimate, known), default=math.inf)
    for mask in sorted(set(chain) - known.keys(), key=lambda m: (estimate(m), m))[:3]:
        if not over() and estimate(mask) < least:
            known[mask] = run(mask, known[best] if best else None)
            best = mask if not best or known[mask].error < known[best].error else best
    improved = True
    while improved:
        improved = False
        near = {*moved(best), *(grown(best) if best.count("1") < count else ())}
        for mask in sorted(near - known.keys(), key=lambda m: (estimate(m), m)):
            if over():
                return best
            known[mask] = run(mask, known[best])
            if known[mask].error < known[best].error:
                best, improved = mask, True
                break
    return best


def _text(region: str, order: int, mask: str = "", rows: Rows = ()) -> str:
    options: dict[str, Value] = {"region": region, "predictor": "lagrange", "order": order, "time": "timestep"}
    options |= {"mask": mask} if mask else {}
    options |= {"fitted": text(mask, rows)} if rows else {}
    return f"{EXACT}, {print_call('cache', options)}"
