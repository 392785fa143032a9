"""The pace of a recipe (ir/pacing.py) on the user's own scheduler: its times exchanged, and put back.

Which schedulers can be served is tried, not looked up: on a copy, each step has to be the Euler step between two of its
sigmas. Multistep solvers, which mix what they were given at earlier times, and samplers that add noise are not.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ditopt import pipeline
from ditopt.errors import BadInput, RecipeError, SessionError
from ditopt.ir.pacing import paced
from ditopt.ir.program import Program
from ditopt.recipe import Recipe

Times = tuple[Tensor, Tensor]
"""Sigmas (T + 1,) and timesteps (T,) of a scheduler."""


def pace_of(recipe: Recipe) -> tuple[float, ...]:
    """The factors that the recipe asks of a pipeline's scheduler; () where it leaves the scheduler alone. RecipeError
    where two of its passes ask."""
    asked = [(s.name, pace) for s in recipe.steps if (pace := pipeline.get(s.name).make(s.options).pace)]
    if len(asked) > 1:
        raise RecipeError(
            f"this recipe changes the pace of the sampler {len(asked)} times ({', '.join(n for n, _ in asked)}); join "
            "the factors of these passes in one"
        )
    return asked[0][1] if asked else ()


def refuse_bare(recipe: Recipe, what: str = "a model alone has none") -> None:
    """BadInput where the recipe needs a pipeline's scheduler. ``what`` says why there is none."""
    if pace_of(recipe):
        raise BadInput(
            f"this recipe changes the steps of a pipeline's scheduler (rescale_steps), and {what}: give "
            "ditopt.optimize the diffusers pipeline, or take rescale_steps out of the recipe"
        )


def refuse_file(program: Program, done: str) -> None:
    """BadInput where what is ``done`` would lose the pace of the Program."""
    if program.pace:
        raise BadInput(
            f"this model runs with a scheduler whose steps its recipe changes (rescale_steps), which cannot be {done} "
            "with it; optimize with a recipe without rescale_steps"
        )


class Pacer:
    """The times of one scheduler: its own, and those of the pace."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._own: Times | None = None
        self._new: Times | None = None

    def begin(self, pace: tuple[float, ...]) -> None:
        """The scheduler has new times of its own: exchange them for those of ``pace``, () leaves them. BadInput or
        SessionError where that cannot be; the scheduler then keeps its own."""
        self._own = self._new = None
        if pace:
            new = rescaled(self._scheduler, pace)
            self._own, self._new = (self._scheduler.sigmas, self._scheduler.timesteps), new
            self.resume()

    def suspend(self) -> None:
        """The scheduler has its own times again, where nobody exchanged them meanwhile."""
        self._exchange(self._new, self._own)

    def resume(self) -> None:
        """The request goes on: the reverse of ``suspend``."""
        self._exchange(self._own, self._new)

    def end(self) -> None:
        """The request is over."""
        self.suspend()
        self._own = self._new = None

    def _exchange(self, old: Times | None, new: Times | None) -> None:
        s = self._scheduler
        if old is not None and new is not None and s.sigmas is old[0] and s.timesteps is old[1]:
            s.sigmas, s.timesteps = new


def early(scheduler: Any, pace: tuple[float, ...]) -> None:
    """BadInput where it is known before the first request that ``scheduler`` cannot run at ``pace``."""
    if not pace:
        return
    if not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "__dict__"):
        raise _unserved(scheduler, "it has no set_timesteps")
    trial, steps = copy.deepcopy(scheduler), len(pace) if len(pace) > 1 else 4
    try:
        trial.set_timesteps(steps)
    except Exception:  # it wants arguments that only the pipeline knows: asked again when a request begins
        return
    rescaled(trial, pace if _count(trial) == steps else pace[:1])


def rescaled(scheduler: Any, pace: tuple[float, ...]) -> Times:
    """The sigmas and timesteps at ``pace``. BadInput where this scheduler cannot be served, SessionError where it has
    another number of steps."""
    sigmas, times = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    if not isinstance(sigmas, Tensor) or not isinstance(times, Tensor) or sigmas.ndim != 1 or times.ndim != 1:
        raise _unserved(scheduler, "it has no sigmas and timesteps")
    if len(sigmas) != len(times) + 1:
        raise _unserved(scheduler, f"it has {len(sigmas)} sigmas for {len(times)} calls of the model")
    if len(pace) not in (1, len(times)):
        raise SessionError(
            f"the recipe's rescale_steps has {len(pace)} factors and this request runs {len(times)} steps; run "
            f"{len(pace)}, or calibrate for {len(times)}"
        )
    own = sigmas.detach().double().cpu()
    turns = own.diff().sign()
    if not turns.all() or (turns != turns[0]).any():
        raise _unserved(scheduler, "its sigmas do not fall at each step")
    unit = (times.detach().double().cpu() / own[:-1].where(own[:-1] != 0, torch.nan)).nanmedian()
    rounded = 0.0 if times.is_floating_point() else 1.0
    if not torch.allclose(own[:-1] * unit, times.detach().double().cpu(), rtol=1e-4, atol=rounded):
        raise _unserved(scheduler, "its timesteps are not proportional to its sigmas")
    values = torch.tensor(paced(own.tolist(), pace), dtype=torch.float64)
    same = values == own
    new = torch.where(same.to(sigmas.device), sigmas, values.to(sigmas.device, sigmas.dtype))
    told = (values[:-1] * unit).to(times.device, times.dtype)
    found = new, torch.where(same[:-1].to(times.device), times, told)
    _try(scheduler, found)
    return found


def _try(scheduler: Any, times: Times) -> None:
    """BadInput unless each step of a copy, at these times, is the Euler step between two sigmas."""
    trial = copy.deepcopy(scheduler)
    trial.sigmas, trial.timesteps = times
    sigmas, where = times[0], times[0].device
    devices = [where] if where.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        x, *velocities = torch.randn(1 + len(times[1]), 1, 4, 4, 4, generator=generator).to(where)
        for i, (time, v) in enumerate(zip(times[1], velocities, strict=True)):
            try:
                out = trial.step(v, time, x)
                out = out if isinstance(out, Tensor) else out[0]
            except Exception as error:
                raise _unserved(scheduler, f"its step could not be tried ({type(error).__name__}: {error})") from error
            if not torch.allclose(out, x + (sigmas[i + 1] - sigmas[i]) * v, rtol=1e-3, atol=1e-4):
                raise _unserved(scheduler, f"its step {i} is no Euler step from one sigma to the next")
            x = out


def _count(scheduler: Any) -> int:
    times = getattr(scheduler, "timesteps", None)
    return len(times) if times is not None else 0


def _unserved(scheduler: Any, why: str) -> BadInput:
    return BadInput(
        f"the recipe's rescale_steps needs a scheduler of single Euler steps whose timesteps follow its sigmas, and "
        f"this {type(scheduler).__name__} is none: {why}; give the pipeline an Euler scheduler of flow matching, or "
        "take rescale_steps out of the recipe"
    )
