"""What a recording keeps while the sampler runs: a few token positions of every value, at every step and branch.

Values are thinned out as soon as they exist. When the second step of the first request begins, the number of guidance
branches is known, and with it the size of the whole recording; where that exceeds the memory allowed, fewer positions
are kept from then on (they are in random order, so a beginning of them is a sample as well).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.calibration.profile import Array
from ditopt.errors import BadInput, DitoptWarning

FEWEST = 8
"""Token positions that are kept whatever memory they take."""


@dataclass(frozen=True)
class Kept:
    """One call: the thinned values by name, (P, C) float32 each, and the model's time."""

    values: Mapping[str, Tensor]
    time: float


@dataclass
class Tape:
    """``tokens``, ``memory``: positions of each value and bytes in all, at most. ``requests``: how many will come.
    ``moved``: called at every new step."""

    tokens: int
    memory: int
    steps: int
    requests: int
    moved: Callable[[], None]
    seed: int = 0
    latent: Tensor | None = None
    calls: dict[tuple[int, int], dict[int, dict[int, Kept]]] = field(default_factory=dict)
    _pending: Kept | None = None
    _sized: bool = False

    def hold(self, values: Mapping[str, Tensor], latent: Tensor | None, time: float) -> None:
        """A call computed these values; they count when ``event`` says that it succeeded. BadInput where the latent has
        another shape than before."""
        if latent is not None:
            if self.latent is None:
                self.latent = latent.detach().clone()
            elif self.latent.shape != latent.shape:
                raise BadInput(
                    f"the latent is {tuple(latent.shape)} in one call and {tuple(self.latent.shape)} in another one; "
                    "a recording has one resolution and one batch size: let the sampler give every seed the same"
                )
        self._pending = Kept({name: self._thinned(name, value) for name, value in values.items()}, time)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """What the Session tells (``runtime.session.Event``)."""
        if kind != "step" or self._pending is None:
            return
        step, branch = int(fields["step"]), int(fields["branch"])
        branches = self.calls.setdefault((self.seed, int(fields["request"])), {})
        if step and not self._sized:
            self._fit(len(branches))
        if not any(step in calls for calls in branches.values()):
            self.moved()
        kept, self._pending = self._pending, None
        branches.setdefault(branch, {})[step] = kept if not self._sized else self._cut(kept)

    def _thinned(self, name: str, value: Tensor) -> Tensor:
        # A latent and what is predicted for it have their channels behind the batch, everything inside has them last.
        outside = name.partition("/")[0] in ("latent", "model") and value.ndim > 3
        flat = value.detach().movedim(1 if outside else -1, -1)
        flat = flat.reshape(-1, flat.shape[-1]) if flat.ndim else flat.reshape(1, 1)
        return flat[_positions(len(flat), self.tokens).to(flat.device)].to(torch.float32).cpu()

    def _fit(self, branches: int) -> None:
        """Choose the number of positions so that the whole recording stays within the memory allowed."""
        self._sized = True
        one = next(iter(next(iter(self.calls.values())).values()))[0]
        size = sum(4 * v.shape[1] for v in one.values.values()) * self.steps * self.requests * branches
        wanted = max((len(v) for v in one.values.values()), default=0)
        fits = max(self.memory // max(size, 1), FEWEST)
        if fits >= wanted:
            return
        self.tokens = fits
        for request in self.calls.values():
            for calls in request.values():
                calls.update({step: self._cut(kept) for step, kept in calls.items()})
        warnings.warn(
            f"{fits} token positions of each value are recorded instead of {wanted}, to stay within "
            f"{self.memory / 2**30:.3g} GiB; pass memory= (bytes), fewer regions or fewer seeds to change that",
            DitoptWarning,
            stacklevel=2,
        )

    def _cut(self, kept: Kept) -> Kept:
        return Kept({name: v[: self.tokens].clone() for name, v in kept.values.items()}, kept.time)

    # -- afterwards ------------------------------------------------------------------------------------------------

    def complete(self, exact: bool) -> list[tuple[str, list[Kept]]]:
        """The recordings, each with a name and its calls in order of the steps. ``exact``: whether a request must have
        ``steps`` steps. BadInput where there are none or their numbers of steps differ."""
        if not self.calls:
            raise BadInput(
                "the sampler ran and never called the model that it was given; it is called as sampler(model, seed), "
                "and must run that model (or pipeline), not another reference to it"
            )
        lengths = {key: 1 + max(step for calls in r.values() for step in calls) for key, r in self.calls.items()}
        total = max(lengths.values())
        if min(lengths.values()) != total:
            told = ", ".join(f"{n} (seed {seed})" for (seed, _), n in lengths.items())
            raise BadInput(f"requests of different numbers of steps were recorded: {told}; they must be equal")
        if exact and total != self.steps:
            raise BadInput(
                f"the sampler ran {total} model evaluations a request and steps={self.steps} was given; pass "
                f"steps={total}, or let the sampler run as many"
            )
        if total < 2:
            raise BadInput("the sampler ran 1 step a request; calibration compares steps and needs at least 2")
        found, lost = [], 0
        for (seed, request), branches in self.calls.items():
            several = sum(s == seed for s, _ in self.calls) > 1
            for branch, calls in branches.items():
                name = f"seed {seed}{f', request {request}' if several else ''}, branch {branch}"
                if len(calls) == total:
                    found.append((name, [calls[step] for step in range(total)]))
                else:
                    lost += 1
        if not found:
            raise BadInput("no guidance branch was called at every step, so no value has a course over all of them")
        if lost:
            warnings.warn(
                f"{lost} guidance branches were not called at every step and are left out of the recording",
                DitoptWarning,
                stacklevel=4,
            )
        return found


def stacked(recordings: Sequence[Sequence[Kept]], names: Sequence[str]) -> dict[str, Array]:
    """By name (N, T, P, C) arrays of the recordings. BadInput where calls differ in shape."""
    arrays: dict[str, Array] = {}
    for name in names:
        values = [[kept.values[name] for kept in calls] for calls in recordings]
        shapes = {tuple(v.shape) for calls in values for v in calls}
        if len(shapes) > 1:
            raise BadInput(
                f"the value of {name} has different sizes in different calls ({', '.join(map(str, sorted(shapes)))}, "
                "positions x channels); give every seed inputs of the same size"
            )
        arrays[name] = np.stack([np.stack([v.numpy() for v in calls]) for calls in values])
    return arrays


def _positions(count: int, wanted: int) -> Tensor:
    """At most ``wanted`` of ``count`` positions, in random order; always the same ones for the same ``count``."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted]
