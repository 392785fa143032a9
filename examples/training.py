"""What the training commands of the shipped models share: one loop that checkpoints, resumes and averages weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

RATE, MUON_RATE = 1e-3, 8e-3
"""Learning rates. Muon's has torch's adjustment ``match_rms_adamw``: an update's size is a fifth of it."""
SAVE_EVERY = 300.0
"""Seconds between checkpoints."""


class TrainingAttention(TorchFunctionMode):
    """Attention of few tokens as two matmuls and a softmax: on a CPU the fused kernel takes longer backward."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attention: Any = F.scaled_dot_product_attention
        if func is not attention or args:
            return func(*args, **(kwargs or {}))
        q, k, v = kwargs["query"], kwargs["key"], kwargs["value"]
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -1) @ v


def sigmas(count: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Noise levels to train on: logit-normal, and a quarter uniform, because the ends matter to the sampler too."""
    out = torch.sigmoid(torch.randn(count, generator=generator)).clamp(1e-3, 1 - 1e-3)
    out[: count // 4] = torch.rand(count // 4, generator=generator)
    return shift * out / (1 + (shift - 1) * out)


def _optimizers(model: nn.Module, matrices: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for ``matrices`` (orthogonalised momentum, arXiv 2502.16982), AdamW for all other parameters."""
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    ]
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["highest"] = group["lr"]
    return made


def fit(
    model: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    minutes: float,
    checkpoint: Path,
    matrices: Sequence[nn.Parameter] = (),
) -> None:
    """Train ``model`` until ``steps`` or for ``minutes``, whichever is first; continues from ``checkpoint``.

    ``loss(step, generator)`` draws the batch of a step, from a generator seeded by the step, so that a resumed run
    sees the same batches as one that was never stopped. Muon for ``matrices`` (2D parameters of the model) and AdamW
    for the rest, cosine decay, and an exponential average of the weights.
    """
    optimizers = _optimizers(model, matrices)
    averaged = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start, spent = 0, 0.0
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        averaged, start, spent = saved["averaged"], saved["step"], saved["seconds"]
        print(f"resumed at step {start}", flush=True)
    began = last_saved = time.time()

    def keep(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "averaged": averaged,
            "step": step,
            "seconds": spent + time.time() - began,
        }
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)

    running, step = None, start - 1
    progress = tqdm(range(start, steps), initial=start, total=steps, mininterval=30, maxinterval=60)
    for step in progress:
        share = min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["highest"] * share
        value = loss(step, torch.Generator().manual_seed(step))
        model.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        for k, v in model.state_dict().items():
            averaged[k].lerp_(v, 1 - decay)
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if time.time() - last_saved > SAVE_EVERY:
            keep(step + 1)
            last_saved = time.time()
        if time.time() - began > minutes * 60:
            print("time is up")
            break
    keep(step + 1)
    took = (spent + time.time() - began) / 60
    print(f"trained {step + 1} steps in {took:.0f} min on {torch.get_num_threads()} threads")


def halves(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state as it ships: float16, contiguous."""
    return {k: v.half().contiguous() for k, v in state.items()}


def trained(checkpoint: Path, parts: Mapping[str, str]) -> tuple[dict[str, dict[str, Tensor]], int]:
    """The averaged weights of a checkpoint by part, each with its prefix in the model, and the step they are of."""
    saved = torch.load(checkpoint, weights_only=True)
    averaged = halves(saved["averaged"])
    weights = {
        part: {k.removeprefix(prefix): v for k, v in averaged.items() if k.startswith(prefix)}
        for part, prefix in parts.items()
    }
    return weights, saved["step"]


def spread(samples: Tensor) -> float:
    """Mean root-mean-square distance between two different samples."""
    return float(torch.pdist(samples.flatten(1)).mean() / samples[0].numel() ** 0.5)
