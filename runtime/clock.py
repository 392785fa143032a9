"""The clock: which request, which step and which guidance branch a call of the model belongs to.

Evidence, strongest first:

1. *hook*: the scheduler announces a request (``begin``) and the end of each step (``advance``). The index is the
   scheduler's; what repeats inside one step is told apart by context, prompt and order of calls, without reading a
   tensor. Until the first ``advance`` a moving time moves the index too (a loop that never calls ``scheduler.step``).
2. *caller*: ``open`` says where a request begins and ``close`` where it ends; the index is guessed inside it.
3. *guess*: nobody says anything. A break of the time's direction, a new latent shape or a new prompt opens a request.

Limits of the guess, all of which hooks remove: several windows with one prompt at one time look like the stages of a
solver; a request that is cancelled and followed by one with the same prompts that begins further along looks like
its continuation. Limit of the hooks: where the timestep is not in host memory, a cancelled request goes on in calls
that nobody announces; ``close`` it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ditopt.errors import SessionError
from ditopt.runtime.same import Held, Known

BRANCHES = 8
"""Guidance branches told apart in one request: more prompts, or more calls with one latent, are no guidance."""

Kind = Literal["hook", "caller", "guess"]


@dataclass(frozen=True)
class Tick:
    """Where a call belongs. ``request`` counts from 1, ``step`` from 0; ``branch`` is equal for equal branches within a
    request; ``time`` is None where it was not read. ``opened``: why this call opened its request, else ""."""

    request: int
    step: int
    branch: Hashable
    time: float | None
    opened: str = ""


@dataclass
class _Request:
    kind: Kind
    steps: int | None = None
    counted: bool = False  # the scheduler's own list of times gave ``steps``
    step: int = 0
    offset: int | None = None  # scheduler index of step 0 (image to image starts in the middle); None: not yet known
    time: float | None = None
    direction: int = 0
    monotone: bool = False  # the scheduler's times were seen to keep one direction
    shape: object = None
    called: bool = False
    prompts: Known = field(default_factory=lambda: Known(BRANCHES))
    seen: dict[Hashable, list[Held | None]] = field(default_factory=dict)  # latents by branch, in this step

    def copy(self) -> _Request:
        return dataclasses.replace(self, prompts=self.prompts.copy(), seen={k: list(v) for k, v in self.seen.items()})

    def move(self, step: int) -> None:
        self.step, self.seen = step, {}


class Clock:
    """See the module. ``context``: name of the running cache context, or None. ``reads``: comparisons of tensor
    contents so far, each one host read. Not safe for concurrent use."""

    def __init__(self) -> None:
        self.context: str | None = None
        self.reads = 0
        self._request: _Request | None = None
        self._undo: _Request | None = None
        self._number = 0
        self._why = "it is the first call"

    @property
    def steps(self) -> int | None:
        """Number of steps of the running request where somebody declared it."""
        return self._request.steps if self._request else None

    @property
    def running(self) -> int | None:
        """Number of the running request; None where none runs."""
        return self._number if self._request else None

    @property
    def kind(self) -> Kind:
        """The evidence that the running request rests on; "guess" where none runs."""
        return self._request.kind if self._request else "guess"

    @property
    def needs_time(self) -> bool:
        """Whether the next ``tick`` must be told the time; False where the scheduler counts."""
        r = self._request
        return r is None or r.kind != "hook" or r.offset is None or self._finished(r)

    def begin(
        self, steps: int | None = None, timesteps: Sequence[float] | Tensor | None = None, kind: Kind = "hook"
    ) -> None:
        """A request begins. ``timesteps``, the times of all its model evaluations, count the steps better than
        ``steps`` does (Heun evaluates nearly twice a step); their values are read only where that is free."""
        count = len(timesteps) if timesteps is not None else steps
        if count is not None and count < 1:
            raise SessionError(f"a request of {count} steps given; at least 1 expected")
        self._new(_Request(kind, count, timesteps is not None, monotone=_monotone(timesteps)))

    def advance(self, index: int | None = None) -> None:
        """The scheduler finished its step ``index`` (None: the running one); what follows belongs to the next one.

        Without an announced request this says nothing: it cannot tell where one begins.
        """
        r = self._request
        if r is None or r.kind == "guess":
            return
        if r.offset is None:
            if r.kind == "hook":  # the first step that ends is where the loop began, whatever was guessed before
                r.offset = index or 0
                r.steps = None if r.steps is None else max(r.steps - r.offset, 1)
            else:
                r.kind, r.offset = "hook", (r.step if index is None else index) - r.step
        r.move(r.step + 1 if index is None else index + 1 - r.offset)

    def close(self) -> None:
        """The running request is over; the next call opens one."""
        self._request, self._undo, self._why = None, None, "the request before it was closed"

    def tick(self, time: float | None, latent: Tensor | None, prompts: Sequence[Tensor] = ()) -> Tick:
        """Place one call. ``time``: the model's time as one number, None only where ``needs_time`` is False or the
        model has no such input. SessionError where it is not finite. ``rollback`` undoes it."""
        if time is not None and not math.isfinite(time):
            raise SessionError(f"the timestep is {time}; a finite number expected: look at the sampler")
        self._undo = self._request.copy() if self._request else None
        r, opened = self._request, ""
        if r is None:
            opened = self._why
        elif self._finished(r):
            opened = "it came after the scheduler's last step"
        elif r.kind == "guess":
            opened = self._broken(r, time, latent, prompts)
        elif r.kind == "hook":
            opened = self._left(r, time)
        if opened:
            r = self._new(_Request("guess"))
            self._undo = None  # should the call fail, the request that ended stays ended
        assert r is not None
        if not r.called:
            r.called, r.shape, r.time = True, _shape(latent), time
        elif time is not None and time != r.time:
            if r.time is not None:
                r.direction = r.direction or (1 if time > r.time else -1)
            if r.kind != "hook" or r.offset is None:
                r.move(r.step + 1)
            r.time = time
        branch = self._branch(r, latent, prompts)
        if branch is None:  # more repetitions of one call than guidance has branches
            opened = f"its inputs came more than {BRANCHES} times"
            return self._restart(opened, time, latent, prompts)
        if branch == "restart":
            return self._restart("its first time came again with a new latent", time, latent, prompts)
        return Tick(self._number, r.step, branch, time, opened)

    def rollback(self) -> None:
        """The call of the last ``tick`` failed: be as before it. A request that it opened is closed again."""
        if self._undo is None:
            self.close()
            self._why = "the call that opened a request failed"
        self._request, self._undo = self._undo, None

    def _restart(self, why: str, time: float | None, latent: Tensor | None, prompts: Sequence[Tensor]) -> Tick:
        self._request, self._why = None, why
        return self.tick(time, latent, prompts)

    def _new(self, request: _Request) -> _Request:
        self._number += 1
        self._request = request
        return request

    def _finished(self, r: _Request) -> bool:
        return r.kind == "hook" and r.counted and r.steps is not None and r.step >= r.steps

    def _left(self, r: _Request, time: float | None) -> str:
        """Why a call cannot belong to the running announced request, or "". Free evidence only: a pipeline that was
        cancelled announces nothing, and the module may be called by somebody else next."""
        if time is None or r.time is None or time == r.time:
            return ""
        if r.monotone and r.direction and (time > r.time) != (r.direction > 0):
            return "the time went against the scheduler's"
        if r.offset is None and any(len(calls) > 1 for calls in r.seen.values()):
            return "the time moved before the scheduler's first step ended"
        return ""

    def _broken(self, r: _Request, time: float | None, latent: Tensor | None, prompts: Sequence[Tensor]) -> str:
        """Why a call cannot belong to the running guessed request, or ""."""
        if _shape(latent) != r.shape:
            return "the latent has a new shape, dtype or device"
        if time is None or r.time is None:
            return "the model has no timestep to tell steps by"
        if time == r.time:
            return ""
        if r.direction and (time > r.time) != (r.direction > 0):
            return "the time broke its direction"
        # A step whose first call has an unknown prompt is not the next step of this request.
        return "" if self._find(r, prompts) is not None else "the prompt changed"

    def _find(self, r: _Request, prompts: Sequence[Tensor]) -> int | None:
        if not prompts:
            return -1
        before = r.prompts.reads
        number = r.prompts.find(prompts)
        self.reads += r.prompts.reads - before
        return number

    def _branch(self, r: _Request, latent: Tensor | None, prompts: Sequence[Tensor]) -> Hashable:
        """The branch; None or "restart" where the call does not belong to this guessed request."""
        if r.kind == "hook":
            # The hook vouches for the request, so a context is the branch whatever its prompt does meanwhile.
            key: Hashable = self.context if self.context is not None else self._prompt(r, prompts)
            r.seen.setdefault(key, []).append(None)
            return (key, len(r.seen[key]) - 1)
        key = (self.context, self._prompt(r, prompts))
        earlier = r.seen.get(key, [])
        if earlier and not self._same(earlier[0], latent):
            if r.kind == "guess" and r.step == 0:
                return "restart"  # no solver repeats its first time: the request before was cancelled
            r.move(r.step + 1)  # the solver's next stage
            earlier = []
        if len(earlier) >= BRANCHES and r.kind == "guess":
            return None
        r.seen.setdefault(key, []).append(None if latent is None else Held(latent))
        return (key, len(earlier))

    def _prompt(self, r: _Request, prompts: Sequence[Tensor]) -> int:
        number = self._find(r, prompts)
        return r.prompts.add(prompts) if number is None else number

    def _same(self, held: Held | None, latent: Tensor | None) -> bool:
        if held is None or latent is None:
            return held is None and latent is None
        verdict = held.identical(latent)
        if verdict is None:
            self.reads += 1
            verdict = held.equal(latent)
        return verdict


def _shape(latent: Tensor | None) -> object:
    return None if latent is None else (latent.shape, latent.dtype, latent.device)


def _monotone(timesteps: Sequence[float] | Tensor | None) -> bool:
    if timesteps is None or (isinstance(timesteps, Tensor) and timesteps.device.type != "cpu"):
        return False
    times = [float(t) for t in timesteps]
    return times in (sorted(times), sorted(times, reverse=True))
