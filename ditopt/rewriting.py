"""From a capture and a recipe to Programs, to the step graphs that requests take, and to what a manifest says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ditopt.artifact import Manifest, constant
from ditopt.capture import CallSpec, Captured
from ditopt.codegen.variants import MOST, choices_of, pick, without_skipped, worth
from ditopt.errors import DitoptWarning, RecipeError
from ditopt.fitted import copies, unconditional_half
from ditopt.ir.cost import step_flops
from ditopt.ir.program import Program
from ditopt.pipeline import Context, Guidance, PassManager, PassResult
from ditopt.recipe import Recipe
from ditopt.runtime.policy import distinct, table, wanted_sets

HORIZON = 64
"""Steps by which the combinations of a schedule are found where nobody said how many there will be."""


def latent_of(program: Program, given: Mapping[str, Tensor]) -> Tensor | None:
    """The first latent among the inputs ``given`` by name."""
    names = [i.name for i in program.inputs if i.role == "latent"]
    return next((given[n] for n in names if n in given), None)


def guidance_of(program: Program, given: Mapping[str, Tensor]) -> Guidance:
    """What the inputs ``given`` by name show of guidance by a doubled batch."""
    latent = latent_of(program, given)
    if latent is None:
        return Guidance()
    prompts = [given[i.name] for i in program.inputs if i.role == "prompt" and i.name in given]
    return Guidance(copies(latent), unconditional_half(prompts, len(latent)))


def rewrite(
    captured: Captured,
    recipe: Recipe,
    target: str,
    steps: int | None,
    piece: bool = False,
    given: Mapping[str, Tensor] | None = None,
) -> tuple[PassResult, ...]:
    """What the passes of ``recipe`` did, with a DitoptWarning for each that was asked for and had no effect. A graph
    without a timestep that may be a ``piece`` of a model (another may have the time) gets local passes only. ``given``:
    inputs of the first call by name, where they are known."""
    if not any(i.role == "timestep" for i in captured.program.inputs):
        what = (
            "so nothing can be kept from step to step: only local passes run. Where the graph is a part of a model "
            "that Dynamo broke, use ditopt.optimize"
            if piece
            else "so steps are told apart by the latent, inside `with fast.session(steps=...)` or where a pipeline's "
            "scheduler counts them; in other calls nothing is kept from step to step"
        )
        warnings.warn(
            f"this graph has no timestep input, {what}; where the timestep has another name, pass "
            "roles={'<name>': 'timestep'}",
            DitoptWarning,
            stacklevel=5,
        )
        if piece:
            return _local(captured.program, target, steps)
    context = Context(target, steps, lambda: guidance_of(captured.program, given or {}), given or {})
    try:
        history = tuple(PassManager(recipe, context).run(captured.program))
    except RecipeError as error:
        local = _local(captured.program, target, steps) if piece else ()
        if not local or local[-1].program.blocks():
            raise
        warnings.warn(
            f"this graph has no blocks, so only local passes run ({str(error).splitlines()[0]}). Where it is a part of "
            "a model that Dynamo broke (TORCH_LOGS=graph_breaks says where), use ditopt.optimize",
            DitoptWarning,
            stacklevel=5,
        )
        return local
    _complain(history)
    return history


def _local(program: Program, target: str, steps: int | None) -> tuple[PassResult, ...]:
    """What passes do that keep nothing from step to step."""
    return tuple(PassManager("canonicalize, outline_blocks", Context(target, steps)).run(program))


def _complain(history: Sequence[PassResult]) -> None:
    """Warn where something that was asked for has no effect."""
    idle = [r for r in history if r.asked and not r.applied]
    everything = bool(history) and len(idle) == len([r for r in history if r.asked])
    for result in idle:
        from ditopt.pipeline import get

        particular = result.text != result.name  # asked for with options
        if everything or particular or get(result.name).contract == "approximate":
            warnings.warn(f"{result.text} changed nothing: {'; '.join(result.refused)}", DitoptWarning, stacklevel=6)


def variants(program: Program, target: str, steps: int | None) -> list[Mapping[str, str]] | None:
    """The combinations of choices that requests of ``steps`` steps take, each to become a step graph; None where
    ``target`` makes any that come, or all. A DitoptWarning where there are more than ``target`` gets graphs for."""
    decisions = program.decisions
    lengths = {len(d.schedule.mask) for d in decisions if d.schedule.mask}
    known = steps or (lengths.pop() if len(lengths) == 1 else None)
    full: Mapping[str, str] = {d.name: "compute" for d in decisions}
    if known is not None and decisions and not any(d.rule is not None for d in decisions):
        rows = distinct(decisions, known)
        kept = [full, *(r for r in rows if r != full)]
        if target == "eager" or len(kept) <= MOST:
            return kept
    elif target == "eager" or 2 ** len(decisions) <= MOST or (known is None and lengths):
        return None
    if known is None:  # the last steps only compute more
        decisions = tuple(replace(d, schedule=replace(d.schedule, last=0)) for d in decisions)
    sets = wanted_sets(decisions, known or HORIZON)
    count = len({frozenset[str](), *sets})
    if count > MOST:
        warnings.warn(
            f"steps may take {count} combinations of what is computed and what is reused, and target {target!r} gets "
            f"{MOST} compiled ones: the others run one that computes more",
            DitoptWarning,
            stacklevel=6,
        )
    return without_skipped(decisions, choices_of(list(full), pick(sets, worth(program), MOST)))


def describe_for(
    captured: Captured, history: Sequence[PassResult], recipe: Recipe, steps: int | None
) -> dict[str, Any]:
    """Manifest fields that the lowering does not know."""
    plain = next((r.program for r in history if r.program.blocks()), captured.program)
    total, blocks = step_flops(plain)
    final = history[-1].program if history else captured.program
    return {
        "recipe": str(recipe),
        "structure": captured.structure,
        "steps": (steps or 0) if final.decisions else 0,
        "full_flops": total,
        "full_block_flops": blocks,
        "extra": {"signature": list(captured.spec.arguments), "constants": _constants(captured.spec)},
    }


def _constants(spec: CallSpec) -> dict[str, Any]:
    """What the capture saw for arguments that are no tensors, and the defaults of those that were left out, as JSON has
    it. An argument that is None says nothing."""
    return {
        name: constant(value)
        for name, value in (*spec.static_items(), *spec.defaults)
        if name != "return_dict" and (value is not None or "." in name)
    }


def schedule_of(
    program: Program, manifest: Manifest, steps: int, timesteps: Sequence[float] | None
) -> list[dict[str, Any]]:
    """The static schedule as data: for each step the graph to run, and the numbers of its control inputs."""
    rows = []
    for row in table(program.decisions, steps, timesteps, manifest.graphs):
        graph = next(g for g in manifest.graphs if dict(g.choices) == dict(row.choices))
        weights: dict[str, list[float]] = {d.weights: list(row.weights[d.name]) for d in program.decisions if d.weights}
        weights |= {d.row: [row.step] for d in program.decisions if d.row}
        rows.append({"graph": graph.name, "weights": weights})
    return rows
