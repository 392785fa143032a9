"""Train the shipped digits model: python -m examples.train_digits [--minutes 60].

Data: scikit-learn's handwritten digits (1,797 real images of 8x8 pixels, inside the package), enlarged to 16x16.
Method: flow matching with a class-conditional diffusers DiT; one label in ten is dropped for classifier-free guidance.
The command shows progress, checkpoints every five minutes, resumes from its checkpoint, and ends by sampling: it
fails when the logistic regression recognises fewer than 95 % of the samples.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from ditopt import zoo

NO_CLASS = 10
THRESHOLD = 0.95


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (1797, 1, 16, 16) in [-1, 1] and their classes."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    large = torch.nn.functional.interpolate(small, size=16, mode="bilinear", align_corners=False)
    return large * 2 - 1, torch.from_numpy(digits.target)


def train_classifier(images: torch.Tensor, labels: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """A logistic regression on real digits, and its accuracy on a fifth that it has not seen."""
    pixels = torch.nn.functional.adaptive_avg_pool2d(images / 2 + 0.5, 8).flatten(1).numpy()
    order = np.random.default_rng(0).permutation(len(labels))
    train, held_out = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    model = LogisticRegression(max_iter=2000, C=1.0).fit(pixels[train], labels.numpy()[train])
    weights = {
        "weight": torch.from_numpy(model.coef_).float().contiguous(),
        "bias": torch.from_numpy(model.intercept_).float(),
    }
    return weights, float(model.score(pixels[held_out], labels.numpy()[held_out]))


def evaluate(out: str, per_class: int = 40) -> float:
    """Share of samples of the shipped pipeline that the classifier recognises."""
    pipe = zoo.load(out)
    labels = torch.arange(10).repeat_interleave(per_class)
    images = pipe(labels.tolist(), generator=torch.Generator().manual_seed(1234), **zoo.config(out)["sampling"])
    return float((zoo.classify(out, images) == labels).float().mean())


def save(model: torch.nn.Module, averaged: dict[str, torch.Tensor], folder: Path) -> None:
    save_file({k: v.half().contiguous() for k, v in averaged.items()}, folder / "model.safetensors")


def train(minutes: float, batch: int, steps: int, checkpoint: Path) -> None:
    folder = zoo.HERE / "digits"
    torch.manual_seed(0)
    settings = json.loads((folder / "config.json").read_text())["denoiser"]
    # eval mode: the blocks would otherwise each drop labels on their own dice; the dropping is done below, once a row
    model = getattr(diffusers, settings["_class_name"]).from_config(settings).eval()
    images, labels = data()
    weights, accuracy = train_classifier(images, labels)
    save_file(weights, folder / "classifier.safetensors")
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters; classifier recognises {accuracy:.1%} of held-out real digits", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    averaged = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start, spent = 0, 0.0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        averaged, start, spent = saved["averaged"], saved["step"], saved["seconds"]
        print(f"resumed at step {start}", flush=True)
    began = last_saved = time.time()

    def keep(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "averaged": averaged,
            "step": step,
            "seconds": spent + time.time() - began,
        }
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)
        save(model, averaged, folder)

    running = None
    progress = tqdm(range(start, steps), initial=start, total=steps, mininterval=5)
    step = start
    for step in progress:
        generator = torch.Generator().manual_seed(step)  # by step, so that a resumed run sees the same batches
        rows = torch.randint(len(images), (batch,), generator=generator)
        x, y = images[rows], labels[rows].clone()
        y[torch.rand(batch, generator=generator) < 0.1] = NO_CLASS
        noise = torch.randn(x.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(batch, generator=generator)).clamp(1e-3, 1 - 1e-3)
        sigma[: batch // 4] = torch.rand(batch // 4, generator=generator)  # the ends matter to the sampler too
        mixed = (1 - sigma[:, None, None, None]) * x + sigma[:, None, None, None] * noise
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = model(mixed, timestep=sigma * 1000, class_labels=y, return_dict=False)[0]
        loss = ((velocity.float() - (noise - x)) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                averaged[k].lerp_(v, 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        progress.set_postfix(loss=f"{running:.4f}")
        if time.time() - last_saved > 300:
            keep(step + 1)
            last_saved = time.time()
        if time.time() - began > minutes * 60:
            print("time is up")
            break
    keep(step + 1)
    print(
        f"trained {step + 1} steps in {(spent + time.time() - began) / 60:.0f} min on {torch.get_num_threads()} threads"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120, help="stop after this long; a later run resumes")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--checkpoint", type=Path, default=Path("digits.ckpt"))
    parser.add_argument("--evaluate", action="store_true", help="only sample and classify")
    args = parser.parse_args()
    if not args.evaluate:
        train(args.minutes, args.batch, args.steps, args.checkpoint)
    share = evaluate("digits")
    print(f"the classifier recognises {share:.1%} of 400 samples")
    if share < THRESHOLD:
        raise SystemExit(f"below the threshold of {THRESHOLD:.0%}: train longer")


if __name__ == "__main__":
    main()
