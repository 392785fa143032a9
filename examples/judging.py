"""What a trained model of captions must show before it ships, and the command line of its training.

The judged samples are read by a classifier that is trained on drawings; diversity and the influence of each block guard
against a model that has learnt one picture a caption, or that does not need its depth.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ditopt import zoo
from ditopt.zoo.classifier import AttributeClassifier, Heads, share
from examples import showing
from examples.showing import T
from examples.training import halves, spread, trained

RIGHT, DIVERSITY, INFLUENCE = 0.90, 0.5, 0.02
"""Floors of a model that may ship: share right, spread of samples of one caption, use of the least used block."""

DRAWINGS, STEPS = 2000, 10
"""Drawings that the classifier itself is judged by, and denoising steps of the samples without a block."""

PARTS = {"model": "transformer.", "text_encoder": "text_encoder."}
"""Parts of a model of captions and their prefix in a checkpoint."""

ATTRIBUTES = "attributes"
"""Row of the adherence that counts all attributes which the captions name."""


@dataclass(frozen=True)
class Subject(Generic[T]):
    """A model of captions: what it is made of, how its data is drawn, and what its samples must get right.

    ``seed``: of the training batches; the judge's data has the seeds after it. ``floors``: rows of ``adherence`` that
    must reach RIGHT.
    """

    name: str
    config: Mapping[str, Any]
    seed: int
    assemble: Callable[..., Any]
    batch: Callable[[int | Sequence[int], int], tuple[Tensor, list[T]]]
    draw: Callable[[T, np.random.Generator], npt.NDArray[np.float32]]
    classifier: Callable[[], AttributeClassifier]
    heads: Heads
    labels: Callable[[Sequence[T]], Tensor]
    named: Callable[[Sequence[T]], Tensor | None] = lambda told: None
    floors: tuple[str, ...] = (ATTRIBUTES,)


def train_classifier(subject: Subject[T], path: Path, steps: int = 2000, size: int = 64) -> AttributeClassifier:
    """The attribute classifier: from ``path`` when it is there, else trained on drawings and kept there."""
    network = subject.classifier()
    if not path.is_file():
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in tqdm(range(steps), desc="classifier", mininterval=10):
            samples, told = subject.batch((subject.seed + 1, step), size)
            noise = torch.rand(size, *[1] * (samples.ndim - 1)) * 0.08  # samples are never as clean as drawings
            logits = network((samples + noise * torch.randn_like(samples)).clamp(0, 1))
            truth = subject.labels(told).unbind(1)
            loss = torch.stack([F.cross_entropy(a, b) for a, b in zip(logits, truth, strict=True)]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        save_file(halves(network.state_dict()), path)
    network.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return network.eval()


def adherence(
    subject: Subject[T], classifier: AttributeClassifier, samples: Tensor, told: Sequence[T]
) -> dict[str, float]:
    """Share of captions whose attributes show in the samples: of all that they name, then head by head."""
    seen, asked = classifier.predict(samples), subject.labels(told)
    by_head = (seen == asked).float().mean(0).tolist()
    return {
        ATTRIBUTES: float(share(seen, asked, subject.named(told)).mean()),
        **dict(zip(subject.heads, by_head, strict=True)),
    }


def diversity(subject: Subject[T], pipe: Any, told: T, count: int = 16) -> float:
    """How much samples of one caption differ, in units of how much drawings of it differ."""
    rng = np.random.default_rng(0)
    drawings = torch.stack([torch.from_numpy(subject.draw(told, rng)) for _ in range(count)])
    generator = torch.Generator().manual_seed(0)
    return spread(pipe([told.caption()] * count, generator=generator, **subject.config["sampling"])) / spread(drawings)


def influence(pipe: Any, prompts: Sequence[Any]) -> dict[str, float]:
    """For each block: root-mean-square change of the samples when it is skipped, over their standard deviation.

    Blocks are what the denoiser holds in lists. A skipped block returns the streams that it got.
    """

    def sampled() -> Tensor:
        return pipe(prompts, generator=torch.Generator().manual_seed(0), num_inference_steps=STEPS, guidance_scale=1.0)

    def skip(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        if isinstance(output, tuple):
            return given["encoder_hidden_states"], given["hidden_states"]
        return given["hidden_states"]

    whole, out = sampled(), {}
    for name, blocks in pipe.transformer.named_children():
        for i, block in enumerate(blocks if isinstance(blocks, nn.ModuleList) else ()):
            with block.register_forward_hook(skip, with_kwargs=True):
                out[f"{name}.{i}"] = float((sampled() - whole).square().mean().sqrt() / whole.std())
    return out


def judge(subject: Subject[T], pipe: Any, classifier: AttributeClassifier, count: int, show: Path | None) -> list[str]:
    """Print what the samples are worth; a sentence for each floor that they miss."""
    drawn, truth = subject.batch(subject.seed + 2, DRAWINGS)
    real = adherence(subject, classifier, drawn, truth)
    _, told = subject.batch(subject.seed + 3, count)
    captions = [t.caption() for t in told]
    generator = torch.Generator().manual_seed(1234)
    chunks = range(0, count, 32)
    samples = torch.cat([pipe(captions[i : i + 32], generator=generator, **subject.config["sampling"]) for i in chunks])
    right = adherence(subject, classifier, samples, told)
    print(f"share that the classifier reads as the caption says, of {count} samples and of {DRAWINGS} drawings:")
    for name, value in right.items():
        print(f"  {name:28} {value:6.1%}  {real[name]:6.1%}")
    different = diversity(subject, pipe, told[0])
    print(f"samples of one caption differ {different:.2f} times as much as drawings of it")
    moved = influence(pipe, captions[:8])
    print_influence(moved)
    if show is not None:
        showing.write(list(samples[:48]), captions[:48], show)
    least = min(moved, key=moved.__getitem__)
    missed = [f"{name} {right[name]:.1%} right, not {RIGHT:.0%}" for name in subject.floors if right[name] < RIGHT]
    missed += [f"diversity {different:.2f}, not {DIVERSITY}"] if different < DIVERSITY else []
    missed += [f"influence of {least} {moved[least]:.3f}, not {INFLUENCE}"] if moved[least] < INFLUENCE else []
    return missed


def print_influence(moved: Mapping[str, float]) -> None:
    """The table of ``influence``."""
    print("change of the samples without a block:")
    for name, change in moved.items():
        print(f"  {name:28} {change:6.3f}")


def ship(name: str, config: Mapping[str, Any], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a model into the package: its configuration, and a file of float16 weights for each part."""
    folder = zoo.HERE / name
    for part, state in weights.items():
        save_file(halves(state), folder / f"{part}.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"shipped in {folder}")


def arguments(doc: str | None, name: str, *, steps: int, batch: int, count: int) -> argparse.Namespace:
    """The options of a training command."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; a later run resumes")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--checkpoint", type=Path, default=Path(f"{name}.ckpt"))
    parser.add_argument("--evaluate", action="store_true", help="only sample from the checkpoint and judge")
    parser.add_argument(
        "--ship", action="store_true", help="the same, and write the model into ditopt/zoo if it passes"
    )
    parser.add_argument("--count", type=int, default=count, help="samples to judge by")
    parser.add_argument("--show", type=Path, metavar="FILE", help="write a contact sheet of the judged samples")
    return parser.parse_args()


def judge_checkpoint(subject: Subject[T], args: argparse.Namespace) -> None:
    """Judge the model of captions in ``args.checkpoint``, and ship it where it passes and that was asked for."""
    weights, step = trained(args.checkpoint, PARTS)
    print(f"judging step {step}")
    classifier = train_classifier(subject, args.checkpoint.with_suffix(".classifier.safetensors"))
    missed = judge(subject, subject.assemble(subject.config, weights), classifier, args.count, args.show)
    if missed:
        raise SystemExit(f"below the floor: {'; '.join(missed)}: train longer")
    if args.ship:
        ship(subject.name, subject.config, {**weights, "classifier": classifier.state_dict()})
