"""Trained routers of others: a table of scores for each step and module becomes a schedule."""

from __future__ import annotations

from collections.abc import Mapping

from ditopt.calibration.profile import Profile
from ditopt.calibration.sources import grouped, with_caches
from ditopt.calibration.tables import harmonica, learning_to_cache, read_scores
from ditopt.errors import RecipeError
from ditopt.pipeline import Value

REGIONS = ("blocks.*.attn",)  # how many blocks there are


def fit(profile: Profile, parameters: Mapping[str, Value]) -> str:
    """A cache for each set of modules with one schedule."""
    table, kind = str(parameters["table"]), str(parameters["order"])
    if not table:
        raise RecipeError("table= is missing: the file with the router's scores, (steps, 2 * blocks)")
    if kind not in ("sampling", "time"):
        raise RecipeError(f"order={kind}: expected sampling (HarmoniCa) or time (Learning-to-Cache)")
    read = harmonica if kind == "sampling" else learning_to_cache
    masks = read(read_scores(table), float(parameters["threshold"]), bool(parameters["logits"]), profile.steps)
    blocks = {name.split(".")[1] for name in profile.of(REGIONS[0])}
    if {name.split(".")[1] for name in masks} != blocks:
        raise RecipeError(f"{table} is for {len(masks) // 2} blocks, this model has {len(blocks)}")
    return with_caches(grouped(masks), "the router computes everything at every step")
