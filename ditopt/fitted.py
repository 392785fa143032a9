"""What a recipe was fitted to, as a few words by key, and the comparison with what runs.

    model      class and digest: names, shapes, dtypes and a sample of the content of all weights
    steps      model evaluations of a request
    scheduler  class and digest of its configuration
    latent     shape of one sample's latent
    guidance   calls a step, and copies of the latent in one call (guidance by a doubled batch has two)

"unknown" stands for what nobody told, and is compared with nothing. Batch rows are no part of it: a recipe that was
fitted on four samples at a time serves one.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditopt.errors import DitoptWarning
from ditopt.runtime.same import bits
from ditopt.runtime.session import Session

UNKNOWN = "unknown"

_SAMPLES = 64


def model_text(model: nn.Module) -> str:
    """Class of ``model`` and a digest of its weights, equal in every process: names, shapes, dtypes and the integer sum
    of at most 64 elements of each. One host read for each device."""
    named = sorted(model.state_dict().items())
    tensors = [(n, t.detach()) for n, t in named if isinstance(t, Tensor)]
    hashed = hashlib.sha256()
    sums: dict[torch.device, list[Tensor]] = {}
    for name, tensor in tensors:
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel() and not tensor.is_meta:
            sums.setdefault(tensor.device, []).append(bits(_sample(tensor)).to(torch.int64).sum())
    for device in sorted(sums, key=str):
        hashed.update(json.dumps(torch.stack(sums[device]).tolist()).encode())
    return f"{type(model).__name__} {hashed.hexdigest()[:12]}"


def _sample(tensor: Tensor) -> Tensor:
    """At most 64 elements spread over ``tensor``, by their logical order, which no memory format changes."""
    count = tensor.numel()
    places = torch.arange(0, count, -(-count // _SAMPLES), device=tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)] if tensor.ndim else tensor.reshape(1)


def scheduler_text(scheduler: Any) -> str:
    """Class of ``scheduler`` and a digest of its configuration; "unknown" for None."""
    if scheduler is None:
        return UNKNOWN
    config = getattr(scheduler, "config", None)
    items = dict(config) if isinstance(config, Mapping) else {}
    items = {str(k): str(v) for k, v in items.items() if not str(k).startswith("_")}
    digest = hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()[:12]
    return f"{type(scheduler).__name__} {digest}"


def latent_text(latent: Tensor) -> str:
    """Shape of one sample of ``latent`` (batch, ...)."""
    return "x".join(str(int(s)) for s in latent.shape[1:])


def guidance_text(calls: int, latent: Tensor) -> str:
    """How often the model sees each latent in a step: in ``calls`` calls with ``latent`` (batch, ...)."""
    count = copies(latent)
    return f"{calls} call{'s' if calls > 1 else ''} a step, {count} cop{'ies' if count > 1 else 'y'} of the latent"


def copies(latent: Tensor) -> int:
    """How many equal parts the batch has, up to 4. One host read for each number that divides it."""
    rows = latent.shape[0] if latent.ndim else 1
    for parts in (4, 3, 2):
        if rows % parts == 0 and rows >= parts:
            first, *others = latent.chunk(parts)
            if all(torch.equal(first, other) for other in others):
                return parts
    return 1


def unconditional_half(prompts: Sequence[Tensor], rows: int) -> Literal["", "first", "second"]:
    """Which half of a batch of ``rows`` has one prompt, the empty one, for all of its samples where the other half has
    several; "" where that does not tell. Host reads, two for each prompt."""
    told = [p.chunk(2) for p in prompts if p.ndim and p.shape[0] == rows and rows % 2 == 0]
    alike = [all(bool((h[k] == h[k][:1]).all()) for h in told) for k in (0, 1)]
    return "" if not told or alike[0] == alike[1] else "first" if alike[0] else "second"


class Fitted:
    """The key of a recipe beside what runs. A difference is one DitoptWarning, and is not told again."""

    def __init__(self, key: Mapping[str, str]) -> None:
        self.key = dict(key)
        self._judged: int | None = None
        self._told: set[tuple[str, ...]] = set()

    def look(self, session: Session, running: Callable[[int], Mapping[str, str]]) -> None:
        """A call succeeded. Compares once a request, when the second step begins: only then it is known how often the
        model is called in a step. ``running(calls)``: the key of what runs."""
        request = session.clock.running
        if request is None or request == self._judged:
            return
        rows = session.schedule_rows
        if not rows or rows[-1].step < 1:
            return
        self._judged = request
        now = running(sum(row.step == 0 for row in rows))
        said = tuple(
            f"{name} was {self.key[name]} and is {now[name]}"
            for name in self.key
            if name in now and now[name] != self.key[name] and UNKNOWN not in (now[name], self.key[name])
        )
        if said and said not in self._told:
            self._told.add(said)
            warnings.warn(
                f"this recipe was calibrated for something else than what runs: {'; '.join(said)}. Calibrate again "
                "(ditopt.calibrate) for what runs, or expect another quality than it was fitted for",
                DitoptWarning,
                stacklevel=5,
            )
