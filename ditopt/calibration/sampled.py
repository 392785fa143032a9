"""What the sampler makes of the model's outputs, read off a recording of its latents.

Every step of a sampler is close to ``x[s+1] = a x[s] + sum_j b_j v_j[s]``, v_j being the outputs of the branches of
guidance: of several calls a step, or of the two halves of a doubled batch. The coefficients follow by least squares; so
nothing has to be known about the scheduler, or about the scale of guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditopt.calibration.mask import Floats
from ditopt.calibration.profile import Profile

_EXPLAINED = 0.9
"""Branches are joined where this share of what a step changes is explained by them; elsewhere each stands alone."""


@dataclass(frozen=True)
class Sampled:
    """``outputs``: what moved the latent, (requests, T, values). ``worth``: what a change of it at each step is worth
    in the sample, up to one common factor, (T,)."""

    outputs: Floats
    worth: Floats


def sampled(profile: Profile) -> Sampled:
    """From a recording with the regions ``model`` and ``latent``.

    Where the latents do not tell (another number of values than the outputs, or samplers far from the form above), each
    branch of each request is taken for one of its own, and worth is the distance of timesteps.
    """
    output = np.asarray(next(iter(profile.of("model").values())), dtype=np.float64)
    latent = np.asarray(next(iter(profile.of("latent").values())), dtype=np.float64)
    plain = _distances(profile)
    latent = latent[..., : output.shape[3]]  # what a condition adds to the channels comes behind those of the latent
    alone = output.reshape(*output.shape[:2], -1)
    if output.shape != latent.shape:
        return Sampled(alone, plain)
    states, branches = _requests(latent, output)
    joined = _solved(states, branches, plain)
    if joined is None:
        joined = _solved(latent.reshape(alone.shape), alone[:, None], plain, least=-np.inf)
    return joined or Sampled(alone, plain)


def _distances(profile: Profile) -> Floats:
    """How far each step goes in the model's time, the last one to the end."""
    step = np.abs(np.diff(profile.times))
    last = float(step[-1])
    if profile.sigmas is not None and profile.sigmas[-3] != profile.sigmas[-2]:
        before, own = np.abs(np.diff(profile.sigmas[-3:]))
        last *= float(own / before)
    return np.append(step, last)


def _requests(latent: Floats, output: Floats) -> tuple[Floats, Floats]:
    """The latents of each request (R, T, D), and the outputs of its branches (R, B, T, D): recordings of the same
    latent belong to one request, and so do the halves of a batch that is the same latent twice."""
    half = latent.shape[2] // 2
    if latent.shape[2] == 2 * half and np.array_equal(latent[:, :, :half], latent[:, :, half:]):
        latent, output = latent[:, :, :half], np.stack([output[:, :, :half], output[:, :, half:]], 1)
    else:
        output = output[:, None]
    flat, parts = latent.reshape(*latent.shape[:2], -1), output.reshape(*output.shape[:3], -1)
    groups: list[list[int]] = []
    for i, x in enumerate(flat):
        same = next((g for g in groups if np.array_equal(flat[g[0]], x)), None)
        groups.append([i]) if same is None else same.append(i)
    if len({len(g) for g in groups}) > 1:
        groups = [[i] for i in range(len(flat))]
    return flat[[g[0] for g in groups]], np.stack([np.concatenate([parts[i] for i in g]) for g in groups])


def _solved(states: Floats, branches: Floats, plain: Floats, least: float = _EXPLAINED) -> Sampled | None:
    """``states`` (R, T, D), ``branches`` (R, B, T, D); None where the step's form explains less than ``least``."""
    steps = states.shape[1]
    carried, gained = np.ones(steps), np.zeros((steps, branches.shape[1]))
    for s in range(steps - 1):
        columns = [states[:, s].ravel(), *branches[:, :, s].swapaxes(0, 1).reshape(branches.shape[1], -1)]
        new, known = states[:, s + 1].ravel(), np.stack(columns, 1)
        (carried[s], *gained[s]), *_ = np.linalg.lstsq(known, new, rcond=None)
        moved = np.square(new - columns[0]).sum()
        left = np.square(new - known @ [carried[s], *gained[s]]).sum()
        total = gained[s].sum()
        if left > (1 - least) * moved or not (total and np.isfinite(total)):
            return None
    gained[-1] = gained[-2] * plain[-1] / plain[-2]
    total = gained.sum(1)
    outputs = np.einsum("sb,rbsd->rsd", gained / total[:, None], branches)
    behind = np.append(np.cumprod(carried[::-1])[::-1][1:], 1.0)
    return Sampled(outputs, total * np.sign(total.sum()) * behind)
