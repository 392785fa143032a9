"""Trials: what schedules are worth on the user's own sampler, one after another, with nothing compiled in between."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from ditopt import api
from ditopt.errors import BadInput, DitoptWarning
from ditopt.ir.program import Rows
from ditopt.measure import optimized
from ditopt.optimized import OptimizedModule

Run = Callable[[Any, int], Tensor]
"""``run(model, seed)``: one request, the same for the same seed; samples (N, ...)."""


@dataclass(frozen=True)
class Worth:
    """``error``: mean over samples of log10 of the mean squared error to the plain samples (-inf where they are equal);
    a tenth of a PSNR; inf where the trial was given up. ``share``: FLOPs executed inside blocks / those of the plain
    model. ``each``: the error by seed, in order, of those that ran."""

    error: float
    share: float
    each: tuple[float, ...] = ()


LAG = 0.1
"""A trial is given up where its error so far is this much above that of the best one on the same seeds: 1 dB."""


class Trials:
    """``with Trials(model, recipe, run, seeds=..., steps=...) as trials:`` optimizes ``model`` (a module or a pipeline)
    by ``recipe`` for as long as the block lasts, and ``trials(masks)`` runs all seeds under other masks.

    ``plain``: the plain samples by seed, where they are known.

    ``decisions``: names of what the masks are for, with the regions that each stands for.
    """

    def __init__(
        self,
        model: Any,
        recipe: str,
        run: Run,
        *,
        seeds: Sequence[int],
        steps: int,
        plain: Mapping[int, Tensor] | None = None,
    ) -> None:
        if not seeds or steps < 2:
            raise BadInput(f"{len(seeds)} seeds and {steps} steps given; expected at least one seed and 2 steps")
        self._model, self._recipe, self._run, self._seeds, self._steps = model, recipe, run, list(seeds), steps
        self.count = 0
        self._known = plain or {}
        self._exit = ExitStack()

    def __enter__(self) -> Trials:
        with torch.no_grad():
            known = [self._known[s] if s in self._known else self._run(self._model, s) for s in self._seeds]
        self._plain = [samples.detach().double() for samples in known]
        self._fast = api.optimize(self._model, self._recipe, steps=self._steps, target="eager")
        self._exit.callback(api.restore, self._fast)
        self.module.engine.rescheduled = True
        try:
            with _quiet():
                self._run(self._fast, self._seeds[0])  # captures
            if not self.decisions:
                raise BadInput(f"recipe {self._recipe!r} decides nothing on this model: there is nothing to search")
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @property
    def module(self) -> OptimizedModule:
        """The optimized denoiser."""
        found = optimized(self._fast)
        assert found is not None
        return found

    @property
    def asked(self) -> list[str]:
        """The passes that had an effect, as text."""
        return [result.text for result in self.module.history if result.applied]

    @property
    def decisions(self) -> dict[str, tuple[str, ...]]:
        """Decision names and their regions."""
        return {d.name: d.regions for d in self.module.compiled.plan.manifest.decisions}

    def __call__(
        self,
        masks: Mapping[str, str],
        best: Worth | None = None,
        fitted: Mapping[str, Rows] = MappingProxyType({}),
    ) -> Worth:
        """What these masks (one digit a step, by decision) are worth. ``best``: given up, seed by seed, where it is
        clearly worse than that. ``fitted``: coefficients that go with the masks."""
        module, stats = self.module, self.module.stats
        module.engine.session.reschedule(masks, fitted)
        before = stats.block_flops, stats.full_block_flops
        each: list[float] = []
        with torch.no_grad(), _quiet():
            for seed, plain in zip(self._seeds, self._plain, strict=True):
                made = self._run(self._fast, seed).detach().double()
                squared = (made - plain).square().flatten(1).mean(1).tolist()
                each.append(sum(math.log10(e) if e > 0 else -math.inf for e in squared) / len(squared))
                if best is not None and sum(each) > sum(best.each[: len(each)]) + LAG * len(each):
                    break
        self.count += 1
        executed, full = stats.block_flops - before[0], stats.full_block_flops - before[1]
        module.engine.session.close_request()
        error = sum(each) / len(each) if len(each) == len(self._plain) else math.inf
        return Worth(error, executed / full if full else 1.0, tuple(each))


@contextmanager
def _quiet() -> Iterator[None]:
    """A trial may well reuse nothing; that is for the search to see, not for the user to be warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was never reused", DitoptWarning)
        yield
