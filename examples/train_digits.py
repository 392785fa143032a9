"""Train the shipped digits model: python -m examples.train_digits [--minutes 60].

Data: scikit-learn's handwritten digits (1,797 real images of 8x8 pixels, inside the package), enlarged to 16x16.
Method: flow matching with a class-conditional diffusers DiT; one label in ten is dropped for classifier-free guidance.
The command shows progress, checkpoints every five minutes and resumes from its checkpoint. Then

    python -m examples.train_digits --evaluate      sample from the checkpoint, classify, and judge
    python -m examples.train_digits --ship          the same, and write the model into ditopt/zoo when it passes
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from ditopt.zoo.digits import CLASSES, POOL, assemble, read
from examples import judging, showing
from examples.training import fit, sigmas, trained

CONFIG: dict[str, Any] = {
    "denoiser": {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 10,
        "sample_size": 16,
        "patch_size": 2,
        "num_embeds_ada_norm": CLASSES,
    },
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
    "sampling": {"num_inference_steps": 30, "guidance_scale": 2.0},
    "training": "python -m examples.train_digits",
}
THRESHOLD = 0.95
"""Share of samples that the classifier must recognise."""


def data() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 16, 16) in [-1, 1] and their classes."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    large = F.interpolate(small, size=16, mode="bilinear", align_corners=False)
    return large * 2 - 1, torch.from_numpy(digits.target)


def train_classifier(images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], float]:
    """A logistic regression on real digits, and its accuracy on a fifth that it has not seen."""
    pixels = F.adaptive_avg_pool2d(images / 2 + 0.5, POOL).flatten(1).numpy()
    order = np.random.default_rng(0).permutation(len(labels))
    train, held_out = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    model = LogisticRegression(max_iter=2000, C=1.0).fit(pixels[train], labels.numpy()[train])
    weights = {
        "weight": torch.from_numpy(model.coef_).float().contiguous(),
        "bias": torch.from_numpy(model.intercept_).float(),
    }
    return weights, float(model.score(pixels[held_out], labels.numpy()[held_out]))


def train(minutes: float, size: int, steps: int, checkpoint: Path) -> None:
    """Train until ``steps`` or for ``minutes``, whichever is first; continues from ``checkpoint``."""
    torch.manual_seed(0)
    # eval mode: the blocks would otherwise each drop labels on their own dice; the dropping is done below, once a row
    model = DiTTransformer2DModel.from_config(CONFIG["denoiser"]).eval()
    images, labels = data()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (size,), generator=generator)
        x, y = images[rows], labels[rows].clone()
        y[torch.rand(size, generator=generator) < 0.1] = CLASSES
        noise = torch.randn(x.shape, generator=generator)
        sigma = sigmas(size, generator, CONFIG["scheduler"]["shift"])
        at = sigma[:, None, None, None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity = model((1 - at) * x + at * noise, timestep=sigma * 1000, class_labels=y, return_dict=False)[0]
        return F.mse_loss(velocity.float(), noise - x)

    fit(model, loss, steps=steps, minutes=minutes, checkpoint=checkpoint)


def judge(pipe: Any, classifier: Mapping[str, Tensor], count: int, show: Path | None) -> float:
    """Print what the samples are worth; the share of them that the classifier recognises."""
    classes = [i % CLASSES for i in range(count)]
    samples = pipe(classes, generator=torch.Generator().manual_seed(1234), **CONFIG["sampling"])
    share = float((read(classifier, samples) == torch.tensor(classes)).float().mean())
    print(f"the classifier recognises {share:.1%} of {count} samples")
    judging.print_influence(judging.influence(pipe, classes[:CLASSES]))
    if show is not None:
        showing.write([s.expand(3, -1, -1) for s in samples[:80]], [str(c) for c in classes[:80]], show)
    return share


def main() -> None:
    args = judging.arguments(__doc__, "digits", steps=5_000, batch=64, count=400)
    if not (args.evaluate or args.ship):
        train(args.minutes, args.batch, args.steps, args.checkpoint)
        return
    state, step = trained(args.checkpoint, {"model": ""})
    classifier, accuracy = train_classifier(*data())
    print(f"judging step {step}; the classifier recognises {accuracy:.1%} of held-out real digits")
    share = judge(assemble(CONFIG, state), classifier, args.count, args.show)
    if share < THRESHOLD:
        raise SystemExit(f"below the threshold of {THRESHOLD:.0%}: train longer")
    if args.ship:
        judging.ship("digits", CONFIG, {**state, "classifier": classifier})


if __name__ == "__main__":
    main()
