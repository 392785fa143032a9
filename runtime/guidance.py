"""Whether a request has guidance to skip: which call of a step came first, and whether a batch holds each latent twice."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditopt.runtime.same import Held, bits

ONE_CALL = (
    "the model is called once a step, so there is no second branch of guidance to skip; where guidance doubles the "
    "batch instead, say form=batch"
)
OTHER_LATENT = "the calls of a step have different latents, so they are no branches of one guidance"
UNCONDITIONAL_FIRST = (
    "the unconditional branch is called first, and what is not known yet cannot stand for it; call the conditional "
    "branch first"
)
NOT_DOUBLED = (
    "the two halves of the batch are not the same latent, so they are no branches of one guidance; where these are two "
    "calls a step, say form=calls"
)


@dataclass(frozen=True)
class Lead:
    """The first call of a step: its branch, its cache context, its latents where other calls are compared with them,
    and the slots that it wrote for these."""

    step: int
    branch: Hashable
    context: str | None
    latents: Sequence[Held]
    slots: Mapping[str, Tensor] = field(default_factory=dict)


def unguided(lead: Lead | None, branch: Hashable, latents: Sequence[Tensor]) -> tuple[str, int]:
    """Why a call of ``branch`` is no second branch of guidance beside ``lead``, the first call of its step, or "";
    and how many host reads it took to know."""
    if lead is None or lead.branch == branch:
        return ONE_CALL, 0
    if lead.context is not None and lead.context.lower().startswith(("uncond", "neg")):
        return UNCONDITIONAL_FIRST, 0
    reads = 0
    for held, latent in zip(lead.latents, latents, strict=True):
        verdict = held.identical(latent)
        reads += verdict is None
        if not (held.equal(latent) if verdict is None else verdict):
            return OTHER_LATENT, reads
    return "", reads


def doubled(latents: Sequence[Tensor]) -> bool:
    """Whether each of ``latents``, (batch, ...), holds one half of its batch twice. One host read."""
    halves = [t.chunk(2) for t in latents]
    return all(len(h) == 2 and h[0].shape == h[1].shape and torch.equal(bits(h[0]), bits(h[1])) for h in halves)
