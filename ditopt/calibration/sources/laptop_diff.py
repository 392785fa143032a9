"""LAPTOP-Diff's criterion: the blocks without which the samples change least, each tried alone; a knapsack picks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ditopt.calibration.profile import Profile
from ditopt.calibration.trial import Trials
from ditopt.errors import RecipeError
from ditopt.pipeline import Value, print_call

EXACT = "canonicalize, outline_blocks, hoist_invariants"

REGIONS = ("latent",)


def search(trials: Callable[[str], Trials], profile: Profile, parameters: Mapping[str, Value], seconds: float) -> str:
    """The blocks to leave out: together at least ``share`` of the blocks' FLOPs, at the least sum of the errors that
    leaving each of them out alone makes. ``seconds`` bounds nothing: there is one trial for each block."""
    steps = profile.steps
    with trials(f"{EXACT}, {print_call('skip_blocks', {'region': 'blocks', 'mask': '1' * steps})}") as whole:
        blocks = [region for regions in whole.decisions.values() for region in regions]
    protect = int(parameters["protect"])
    open_ = blocks[protect : len(blocks) - protect]
    share = float(parameters["share"])
    if not open_:
        raise RecipeError(f"the model has {len(blocks)} blocks and protect={protect} keeps them all; give fewer")
    text = ", ".join([EXACT, *(print_call("skip_blocks", {"region": b, "mask": "1" * steps}) for b in open_)])
    with trials(text) as trial:
        ran = dict.fromkeys(trial.decisions, "1" * steps)
        everything = trial(ran).share
        found: dict[str, tuple[float, float]] = {}
        for name, (region,) in trial.decisions.items():
            worth = trial({**ran, name: "0" * steps})
            found[region] = (10**worth.error, 1 - worth.share / everything)
    chosen = knapsack(list(found.values()), share)
    if chosen is None:
        most = sum(saved for _, saved in found.values())
        raise RecipeError(
            f"share={share:g}: the blocks that can be left out, {len(found)} of {len(blocks)}, are {most:.2f} of the "
            "FLOPs; give a smaller share or protect fewer"
        )
    names = list(found)
    return f"{EXACT}, {print_call('skip_blocks', {'region': '|'.join(names[i] for i in chosen)})}"


def knapsack(items: Sequence[tuple[float, float]], least: float, grain: int = 1000) -> list[int] | None:
    """The items (cost, size) of least total cost whose sizes sum to at least ``least``; None where all are too small.
    Sizes are rounded up to multiples of 1 / ``grain``."""
    want = math.ceil(least * grain - 1e-6)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for i, (cost, size) in enumerate(items):
        for held, (total, chosen) in list(best.items()):
            at = min(held + math.ceil(size * grain - 1e-6), want)
            if at not in best or total + cost < best[at][0]:
                best[at] = (total + cost, (*chosen, i))
    return list(best[want][1]) if want in best else None
