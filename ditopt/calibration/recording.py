"""Recording: the user's sampler on the plain computation, with the value of every chosen region kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ditopt.calibration.profile import Array, Profile
from ditopt.calibration.recorder import Work
from ditopt.calibration.tape import Tape, stacked
from ditopt.diffusers import denoisers, optimize_pipeline, restore_pipeline
from ditopt.errors import BadInput, require
from ditopt.fitted import UNKNOWN, guidance_text, latent_text, scheduler_text
from ditopt.ir.program import Role
from ditopt.optimized import OptimizedModule

Sampler = Callable[..., Any]
"""``sampler(model, seed)`` or ``sampler(model, seed, steps)`` runs one request (``measure.Sampler`` is of the second
kind). The same seed gives the same request. What it returns is not looked at."""

MEMORY = 2 << 30
"""Bytes of values that a recording may hold."""


def record(
    model: Any,
    sampler: Sampler | None = None,
    *,
    regions: Sequence[str],
    steps: int,
    seeds: Iterable[int] = range(4),
    tokens: int = 256,
    memory: int = MEMORY,
    roles: Mapping[str, Role] | None = None,
    progress: bool = True,
) -> Profile:
    """Run ``sampler`` on the plain ``model`` (an nn.Module or a diffusers pipeline) once a seed, and keep values.

    regions: selectors (ir/select.py): modules before their gate (``blocks.*.attn``), runs of blocks as the difference
        that they add (``blocks.1:-1``), ``model`` (its output), ``latent`` (what the denoiser is given); also
        ``streams``, what runs behind each block, ``head``, what runs behind the last one, ``modulated``, what the first
        layer of the first block reads, and ``maxima``, one row: the largest magnitude of each channel of each input of
        the linear layers of the blocks.
    steps: model evaluations of a request. tokens: positions kept of each value, over all batch rows. memory: bytes of
    values; fewer positions are kept where they would exceed it (a DitoptWarning says so).
    roles: as in ``ditopt.optimize``. progress: a bar on stderr.

    Regions that overlap are recorded one after another, each time with all seeds. The model is as before afterwards,
    also after an error or an interrupt. BadInput or RecipeError where something does not fit.
    """
    listed = _checked(model, sampler, regions, steps, seeds, tokens)
    assert sampler is not None
    given = steps_given(sampler)
    open_, passes = list(dict.fromkeys(regions)), []
    with require("tqdm", None).tqdm(
        total=steps * len(listed), disable=not progress, leave=False, unit="step", desc="calibrating"
    ) as bar:
        while open_:
            work = Work(Tape(tokens, memory, steps, len(listed), bar.update), open_, roles)
            with _installed(model, work) as (running, sessions):
                for seed in listed:
                    work.tape.seed = seed
                    with sessions(), torch.no_grad():
                        sampler(running, seed, steps) if given else sampler(running, seed)
            passes.append((work, work.tape.complete(exact=not given)))
            open_ = [r for r in open_ if r not in work.names]
            if open_:
                bar.total += steps * len(listed)
    return _profile(model, regions, passes, _scheduler(model))


# -- what is given -----------------------------------------------------------------------------------------------------


def _checked(
    model: Any, sampler: Sampler | None, regions: Sequence[str], steps: int, seeds: Iterable[int], tokens: int
) -> list[int]:
    """The seeds. BadInput where an argument cannot be used."""
    if isinstance(model, OptimizedModule):
        raise BadInput("this model is optimized already; ditopt.restore(model) gives the original to calibrate on")
    pipeline = _is_pipeline(model)
    if not pipeline and not isinstance(model, nn.Module):
        raise BadInput(f"a {type(model).__name__} was given; calibration takes an nn.Module or a diffusers pipeline")
    if sampler is None or not callable(sampler):
        kind = "pipe" if pipeline else "model"
        raise BadInput(
            f"calibration needs a sampler, a function that runs one request: sampler({kind}, seed), such as "
            + ("lambda pipe, seed: pipe('a fox', generator=torch.manual_seed(seed))" if pipeline else "your loop")
            + ("" if sampler is None else f"; a {type(sampler).__name__} was given")
        )
    if type(steps) is not int or steps < 2:
        raise BadInput(f"steps={steps!r} given; expected the number of denoising steps of a request, at least 2")
    if type(tokens) is not int or tokens < 1:
        raise BadInput(f"tokens={tokens!r} given; expected the number of token positions to keep, at least 1")
    if isinstance(regions, str) or not regions:
        raise BadInput(f"regions={regions!r} given; expected a list of selectors such as ['blocks.*.attn']")
    listed = list(seeds)
    if not listed or len(set(listed)) != len(listed) or not all(type(s) is int for s in listed):
        raise BadInput(f"seeds={listed!r} given; expected at least one whole number, each once")
    if pipeline and len(found := denoisers(model)) > 1:
        raise BadInput(
            f"this {type(model).__name__} has {len(found)} denoisers ({', '.join(found)}), which share the steps of a "
            "request; calibration takes pipelines with one"
        )
    return listed


def steps_given(sampler: Sampler) -> bool:
    """Whether the sampler takes the number of steps as its third argument. BadInput where it does not take two."""
    try:
        signature = inspect.signature(sampler)
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in signature.parameters.values() if p.kind in kinds]
    third = positional[2] if len(positional) > 2 else None
    # an optional third argument may be anything; by its name it is known
    given = third is not None and (third.default is inspect.Parameter.empty or "steps" in third.name)
    try:
        signature.bind(*range(3 if given else 2))
    except TypeError as error:
        raise BadInput(
            f"the sampler takes {signature}; expected sampler(model, seed) or sampler(model, seed, steps) ({error})"
        ) from None
    return given


def _is_pipeline(model: object) -> bool:
    return not isinstance(model, nn.Module) and hasattr(model, "components") and hasattr(model, "scheduler")


# -- running -----------------------------------------------------------------------------------------------------------


@contextmanager
def _installed(model: Any, work: Work) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """What the sampler is to run, and what opens a request of it. The model is as before after the block."""
    if _is_pipeline(model):
        try:
            optimize_pipeline(model, target="eager", make=work.engine)
            yield model, nullcontext  # the scheduler announces its requests
        finally:
            restore_pipeline(model)
    else:
        wrapped = OptimizedModule(work.engine(model))
        yield wrapped, wrapped.session


# -- the profile -------------------------------------------------------------------------------------------------------


def _scheduler(model: Any) -> Any:
    return getattr(model, "scheduler", None) if _is_pipeline(model) else None


def _profile(
    model: Any, regions: Sequence[str], passes: Sequence[tuple[Work, Sequence[Any]]], scheduler: Any
) -> Profile:
    values: dict[str, Array] = {}
    names: dict[str, tuple[str, ...]] = {}
    flops: dict[str, int] = {}
    for work, recordings in passes:
        if [name for name, _ in recordings] != [name for name, _ in passes[0][1]]:
            raise BadInput(
                "the sampler ran other requests when it ran again for regions that overlap; the same seed must give "
                "the same request"
            )
        values |= stacked([calls for _, calls in recordings], [n for listed in work.names.values() for n in listed])
        names |= work.names
        flops |= work.flops
    work, recordings = passes[0]
    times = np.array([kept.time for kept in recordings[0][1]], dtype=np.float64)
    sigmas = getattr(scheduler, "sigmas", None)
    known = sigmas is not None and len(sigmas) == len(times) + 1
    branches = len(next(iter(work.tape.calls.values())))
    latent = work.tape.latent
    key = {
        "model": work.model,
        "steps": str(len(times)),
        "scheduler": scheduler_text(scheduler),
        "latent": UNKNOWN if latent is None else latent_text(latent),
        "guidance": UNKNOWN if latent is None else guidance_text(branches, latent),
    }
    return Profile(
        key=key,
        times=times,
        values={n: values[n] for r in dict.fromkeys(regions) for n in names[r]},
        regions={r: names[r] for r in dict.fromkeys(regions)},
        flops=flops,
        sigmas=np.array([float(s) for s in sigmas]) if known and sigmas is not None else None,
        recordings=tuple(name for name, _ in recordings),
    )
