"""What users call: optimize, restore, explain, export_onnx (and save and load, in saved.py)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditopt.artifact import Manifest
from ditopt.capture import Captures, arguments_of, bind, capture, seal, watched
from ditopt.codegen.build import describe, export
from ditopt.codegen.lower import lower, lower_memos
from ditopt.engine import Engine
from ditopt.errors import BadInput, DitoptWarning
from ditopt.ir.fold import weights_of_constants
from ditopt.ir.program import Role
from ditopt.offload import loaded
from ditopt.optimized import OptimizedModule
from ditopt.pacing import refuse_bare, refuse_file
from ditopt.pipeline import Context, PassManager, legalize
from ditopt.recipe import Recipe
from ditopt.release import Release
from ditopt.rewriting import describe_for, rewrite, schedule_of, variants
from ditopt.target import resolve

Examples = Mapping[str, Any] | Sequence[Any]


def optimize(
    model: Any,
    recipe: Recipe | str = "lossless",
    *,
    example_inputs: Examples | None = None,
    steps: int | None = None,
    target: str = "auto",
    roles: Mapping[str, Role] | None = None,
    release: Release = "keep",
    dynamic: bool | None = None,
) -> Any:
    """A faster drop-in for a denoiser, or a diffusers pipeline with its denoiser replaced.

    model: an ``nn.Module`` (returns an ``OptimizedModule``) or a diffusers pipeline (returned itself, changed in place;
        ``restore`` undoes it).
    recipe: a name from ``ditopt recipes``, a line such as ``"taylorseer{interval=4,order=2}"``, a ``Recipe``, a path.
    example_inputs: a dict of keyword arguments or a tuple; left out, capture happens at the first call.
    steps: denoising steps of a request, for recipes that schedule by them; a pipeline knows its own.
    target: "auto" (Inductor where it can run, else eager), "eager", "inductor" or "onnxruntime".
    roles: what inputs are to the loop, by name ("latent", "timestep", "prompt", "shape"), where the names mislead.
    release: "keep", or what happens to weights that left the loop: "offload" puts them away (on the host, for a model
        on the CPU into a memory-mapped file) and brings them in to fill tables; "free" gives up for good those whose
        table no request changes. With either the original cannot run until ``restore``, and says so.
    dynamic: whether calls that differ in shape share one capture: from the first call on (True), from the third shape
        on (None), or never (False). A shape for which the model's code takes another way is captured on its own.

    The model is otherwise not modified. Raises RecipeError, CaptureError or BadInput; after an error it is as it was.
    """
    if isinstance(model, OptimizedModule):
        raise BadInput("this model is optimized already; ditopt.restore(model) gives the original to start from")
    if _is_pipeline(model):
        from ditopt.diffusers import optimize_pipeline

        return optimize_pipeline(
            model,
            recipe,
            example_inputs=example_inputs,
            steps=steps,
            target=target,
            roles=roles,
            release=release,
            dynamic=dynamic,
        )
    if not isinstance(model, nn.Module):
        raise BadInput(f"a {type(model).__name__} was given; ditopt optimizes an nn.Module or a diffusers pipeline")
    refuse_bare(Recipe.parse(recipe))
    with loaded(model):
        engine = Engine(model, recipe, target, steps, roles, release=release, dynamic=dynamic)
        if example_inputs is not None:
            args, kwargs = arguments_of(example_inputs)
            engine.prepare(*bind(model, args, kwargs))
    return OptimizedModule(engine)


def restore(optimized: Any) -> Any:
    """The original model of an optimized one; a pipeline gets its denoiser and its scheduler's own methods back."""
    if isinstance(optimized, OptimizedModule):
        optimized.engine.shelves.restore()
        return optimized.original
    if _is_pipeline(optimized):
        from ditopt.diffusers import restore_pipeline

        return restore_pipeline(optimized)
    raise BadInput(f"a {type(optimized).__name__} was given; expected what ditopt.optimize returned")


def explain(
    model: nn.Module,
    recipe: Recipe | str = "lossless",
    *,
    example_inputs: Examples,
    steps: int | None = None,
    target: str = "auto",
    roles: Mapping[str, Role] | None = None,
    dynamic: bool | None = None,
) -> str:
    """How a model is captured, its structure, binding times and costs, and what each pass of ``recipe`` would do and
    why not. ``dynamic`` is that of ``optimize``; an optimized model tells how it is captured itself."""
    if isinstance(model, OptimizedModule):
        captures = model.engine.captures if roles is None and dynamic is None else None
        with model.engine.home() as original:
            return _explained(
                original, captures or Captures(original, roles, dynamic=dynamic), recipe, example_inputs, steps, target
            )
    if not isinstance(model, nn.Module):
        raise BadInput(f"a {type(model).__name__} was given; explain takes an nn.Module, such as a pipeline's denoiser")
    return _explained(model, Captures(model, roles, dynamic=dynamic), recipe, example_inputs, steps, target)


def _explained(
    model: nn.Module, captures: Captures, recipe: Recipe | str, example: Examples, steps: int | None, target: str
) -> str:
    from ditopt.explanation import explanation

    args, kwargs = arguments_of(example)
    spec, tensors = bind(model, args, kwargs)
    captured, given = captures.take(spec, tensors), dict(zip(spec.names, tensors, strict=True))
    name = resolve(target, next((p.device for p in model.parameters()), torch.device("cpu")))
    history = PassManager(recipe, Context(name, steps, given=given)).run(captured.program)
    final = history[-1].program if history else captured.program
    captured = watched(captured, final, given)
    with warnings.catch_warnings():  # of graphs that a target does not get: optimize says so
        warnings.simplefilter("ignore", DitoptWarning)
        rows = variants(final, name, steps)
    return explanation(captured.program, history, name, captured.notes, steps, rows)


def export_onnx(
    model: Any,
    path: str | Path,
    recipe: Recipe | str = "lossless",
    *,
    example_inputs: Examples | None = None,
    steps: int | None = None,
    timesteps: Sequence[float] | Tensor | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Manifest:
    """Write the optimized model as ONNX files beside ``path`` (which ends in .onnx) and a manifest; returns the latter.

    Caches are inputs and outputs of the graphs; the manifest holds the schedule, so a recipe that caches needs
    ``steps`` (or ``timesteps``, which a predictor in the model's time needs). An OptimizedModule exports what it runs.
    """
    captured, history, used = _programs(model, recipe, example_inputs, steps, roles)
    captured.refuse_file("exported")
    program = weights_of_constants(seal(history[-1].program if history else captured.program, captured.guard))
    times = [float(t) for t in timesteps] if timesteps is not None else None
    if times is not None and steps is not None and len(times) != steps:
        raise BadInput(f"steps={steps} and {len(times)} timesteps given; they must agree")
    count = (
        steps or (len(times) if times else None) or (model.engine.steps if isinstance(model, OptimizedModule) else None)
    )
    if program.decisions and count is None:
        raise BadInput(f"recipe {str(used)!r} schedules steps, so the export must know how many: pass steps=")
    more = describe_for(captured, history, used, count)
    rows = variants(program, "onnxruntime", count)
    lowered = describe(program, lower(program, rows), lower_memos(program), **more)
    # what a call does that may be skipped as a branch of guidance depends on the calls before it, too
    measures = any(d.rule is not None or d.gram or d.guidance == "calls" for d in program.decisions)
    schedule = schedule_of(program, lowered, count, times) if program.decisions and count and not measures else None
    return export(program, Path(path), schedule, rows, **more)


def _programs(
    model: Any, recipe: Recipe | str, example: Examples | None, steps: int | None, roles: Mapping[str, Role] | None
) -> Any:
    if isinstance(model, OptimizedModule):
        model.release.require_all("exported")
        refuse_file(model.program, "exported")
        legal = legalize(model.program, "onnxruntime")
        return model.compiled.captured, (*model.history, *legal), model.engine.recipe
    if not isinstance(model, nn.Module):
        raise BadInput(
            f"a {type(model).__name__} was given; export takes an nn.Module, such as the pipeline's denoiser"
        )
    if example is None:
        raise BadInput("export needs example_inputs: a dict of keyword arguments or a tuple, as the model is called")
    args, kwargs = arguments_of(example)
    spec, tensors = bind(model, args, kwargs)
    refuse_bare(used := Recipe.parse(recipe), "an exported file has none")
    captured, given = capture(model, spec, tensors, roles), dict(zip(spec.names, tensors, strict=True))
    history = rewrite(captured, used, "onnxruntime", steps, given=given)
    return watched(captured, history[-1].program if history else captured.program, given), history, used


def _is_pipeline(model: object) -> bool:
    return not isinstance(model, nn.Module) and hasattr(model, "components") and hasattr(model, "scheduler")
