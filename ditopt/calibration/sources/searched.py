"""One mask, searched by what it does to the samples: which steps to compute, where the others are forecast."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ditopt.calibration.search import best_mask
from ditopt.calibration.trial import Trials
from ditopt.errors import RecipeError
from ditopt.pipeline import Value, print_call

EXACT = "canonicalize, outline_blocks, hoist_invariants"


def search(trials: Callable[[str], Trials], steps: int, parameters: Mapping[str, Value], seconds: float) -> str:
    """The mask of least error among those that compute ``share`` of the steps, and the order that goes with it."""
    count = max(2, round(float(parameters["share"]) * steps))
    if count >= steps:
        raise RecipeError(f"share={parameters['share']} of {steps} steps is all of them: nothing would be reused")
    orders = [int(parameters["order"])] if int(parameters["order"]) else [1, 2]
    found: list[tuple[float, str]] = []
    for order in orders:
        options: dict[str, Value] = {"region": parameters["region"], "predictor": "lagrange", "order": order}
        options["time"] = "timestep"
        with trials(f"{EXACT}, {print_call('cache', options)}") as trial:
            name = next(iter(trial.decisions))
            warm = "1" * min(order + 1, count)
            start = warm + _evenly(steps - len(warm), count - len(warm))
            mask, error = best_mask(
                lambda m, trial=trial, name=name: trial({name: m}).error,  # type: ignore[misc]
                steps,
                count,
                starts=[start],
                time_limit=seconds / len(orders),
            )
        found.append((error, f"{EXACT}, {print_call('cache', {**options, 'mask': mask})}"))
    return min(found)[1]


def _evenly(steps: int, count: int) -> str:
    """``count`` ones spread over ``steps`` digits, behind what is reused first."""
    ones = {round((i + 1) * steps / (count + 1)) for i in range(count)} if count else set[int]()
    left = [i for i in range(steps - 1, -1, -1) if i not in ones]
    ones |= set(left[: count - len(ones)])
    return "".join("1" if i in ones else "0" for i in range(steps))
