"""A pipeline of our own around the tiny denoiser, and what its modules compute, taken by hooks."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny_sampler import ROWS, TOKENS, WIDTH, TinyDiT, model

ALL = ROWS * TOKENS
"""Positions of a value of the tiny denoiser over all rows."""


class Scheduler:
    """Euler steps of a flow, announced as schedulers of diffusers announce them."""

    def __init__(self, shift: float = 1.0) -> None:
        self.config: dict[str, Any] = {"shift": shift, "_note": "not part of it"}

    def set_timesteps(self, count: int) -> None:
        line = torch.linspace(1, 0, count + 1)
        self.sigmas = line * self.config["shift"] / (1 + (self.config["shift"] - 1) * line)
        self.timesteps = self.sigmas[:-1] * 1000
        self.step_index = 0

    def step(self, velocity: Tensor, time: Tensor, sample: Tensor) -> Tensor:
        self.step_index += 1
        return sample + (self.sigmas[self.step_index] - self.sigmas[self.step_index - 1]) * velocity


class Pipe:
    """``guidance``: "none", "batch" (a doubled one) or "calls" (two a step; ``late``: the second from there on)."""

    def __init__(self, guidance: str = "none", late: int = 0, denoiser: TinyDiT | None = None) -> None:
        self.transformer: Any = denoiser or model()
        self.scheduler = Scheduler()
        self.guidance, self.late = guidance, late

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(
        self, seed: int, steps: int, rows: int = ROWS, tokens: int = TOKENS, stop: type | None = None
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, tokens, WIDTH, generator=generator)
        labels = torch.randint(3, (rows,), generator=generator)
        self.scheduler.set_timesteps(steps)
        for k, t in enumerate(self.scheduler.timesteps):
            if stop is not None and k == 1:
                raise stop("in the middle of a request")
            v = self._velocity(x, t, labels, k)
            x = self.scheduler.step(v, t, x)
        return torch.sigmoid(x)[:, None]

    def _velocity(self, x: Tensor, t: Tensor, labels: Tensor, k: int) -> Tensor:
        none = torch.full_like(labels, 3)
        if self.guidance == "batch":
            pair = torch.cat([labels, none])
            cond, free = self.transformer(torch.cat([x, x]), t.expand(2 * len(x)), pair).chunk(2)
            return free + 2 * (cond - free)
        cond = self.transformer(x, t.expand(len(x)), labels)
        if self.guidance == "calls" and k >= self.late:
            free = self.transformer(x, t.expand(len(x)), none)
            return free + 2 * (cond - free)
        return cond


def sampler(pipe: Any, seed: int, steps: int) -> Tensor:
    """A sampler of the kind that is told the steps."""
    return pipe(seed, steps)


@contextmanager
def hooked(denoiser: Any):
    """What modules give, call by call: attention and MLP before their gates, input and output of blocks, the output."""
    taken: list[dict[str, Tensor]] = []
    handles = []

    def keep(name: str):
        def hook(module, args, output):
            taken[-1][name] = output.detach().clone()

        return hook

    def start(module, args, kwargs):
        taken.append({"latent": (args[0] if args else kwargs["hidden_states"]).clone()})

    handles.append(denoiser.register_forward_pre_hook(start, with_kwargs=True))
    handles.append(denoiser.register_forward_hook(keep("model")))
    for i, block in enumerate(denoiser.blocks):
        handles.append(block.out.register_forward_hook(keep(f"blocks.{i}.attn")))
        handles.append(block.down.register_forward_hook(keep(f"blocks.{i}.mlp")))
        handles.append(block.register_forward_hook(keep(f"block {i}")))
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def seen(denoiser: nn.Module, pipe: Any = None) -> dict[str, Any]:
    """What could have changed of a model and of the pipeline around it."""
    state = {name: dict(vars(m)) for name, m in denoiser.named_modules()}
    around = {} if pipe is None else {**vars(pipe), "scheduler's": dict(vars(pipe.scheduler))}
    return {"modules": state, "pipe": around, "weights": copy.deepcopy(denoiser.state_dict())}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two of ``seen`` are alike."""
    weights = all(torch.equal(a["weights"][k], b["weights"][k]) for k in {*a["weights"], *b["weights"]})
    mine, other = ({k: v for k, v in s["pipe"].items() if k != "scheduler's"} for s in (a, b))
    names = [set(s["pipe"].get("scheduler's", {})) - {"sigmas", "timesteps", "step_index"} for s in (a, b)]
    held = {n: {k: id(v) for k, v in d.items()} for n, d in a["modules"].items()}
    return (
        weights
        and names[0] == names[1]
        and {k: id(v) for k, v in mine.items()} == {k: id(v) for k, v in other.items()}
        and held == {n: {k: id(v) for k, v in d.items()} for n, d in b["modules"].items()}
    )
