"""Train the shipped scenes model: python -m examples.train_scenes [--minutes 240].

Data: scenes drawn by examples/scenes.py, new ones at every step. Method: flow matching with a diffusers
FluxTransformer2DModel on 2x2 patches; one caption in ten is dropped for classifier-free guidance.
The command shows progress, checkpoints every five minutes and resumes from its checkpoint. Then

    python -m examples.train_scenes --evaluate      sample from the checkpoint, classify, and judge
    python -m examples.train_scenes --ship          the same, and write the model into ditopt/zoo when it passes
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ditopt import zoo
from ditopt.zoo.caption_pipeline import patches, positions
from ditopt.zoo.captions import HEADS, SLOTS, CaptionTable, labels, parse, right, tokens
from ditopt.zoo.classifier import AttributeClassifier
from examples import scenes

WIDTH = 64
CONFIG: dict[str, Any] = {
    "pipeline": "CaptionToImagePipeline",
    "denoiser": {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 12,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": SLOTS * WIDTH,
        "guidance_embeds": False,
        "axes_dims_rope": [8, 12, 12],
    },
    "text_encoder": {"_class_name": "CaptionTable", "width": WIDTH},
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
    "sampling": {"num_inference_steps": 30, "guidance_scale": 2.0},
    "training": "python -m examples.train_scenes",
}
THRESHOLD, DIVERSITY, INFLUENCE = 0.90, 0.5, 0.02
"""Floors of a model that may ship: attributes right, spread of samples of one caption, use of the least used block."""
RATE = 1e-3
SEED = 20_000_000
"""Seeds of training batches are (SEED, step): no step repeats, and a resumed run sees the same batches."""


class Model(nn.Module):
    """The denoiser and its text table, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = FluxTransformer2DModel.from_config(CONFIG["denoiser"])
        self.text_encoder = CaptionTable(WIDTH)
        # Blocks begin as the identity and the output as zero (adaLN-zero), which trains faster than diffusers' default.
        zero = [self.transformer.proj_out, self.transformer.norm_out.linear]
        for block in self.transformer.transformer_blocks:
            zero += [block.norm1.linear, block.norm1_context.linear]
        zero += [block.norm.linear for block in self.transformer.single_transformer_blocks]
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.text_encoder.slots.weight, std=0.5)
        self.img_ids, self.txt_ids = positions()
        self._timestep = torch.zeros(0)
        self.transformer.time_text_embed.register_forward_pre_hook(lambda _, args: (self._timestep * 1000, args[1]))

    def forward(self, latents: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        # The denoiser would round the timestep to bfloat16, in steps of 4 near 1000; the hook hands it the exact one.
        self._timestep = sigma
        rows, pooled = self.text_encoder(ids)
        position = {"img_ids": self.img_ids, "txt_ids": self.txt_ids}
        text = {"encoder_hidden_states": rows, "pooled_projections": pooled}
        return self.transformer(latents, timestep=sigma, **text, **position, return_dict=False)[0]


class FloatAttention(TorchFunctionMode):
    """Attention in float32 under bfloat16 autocast: on a CPU the backward of its bfloat16 kernel is half as fast."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attention: Any = F.scaled_dot_product_attention
        if func is not attention or args:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(**{k: v.float() if isinstance(v, Tensor) else v for k, v in kwargs.items()}).bfloat16()


def sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels to train on: logit-normal, and a quarter uniform, because the ends matter to the sampler too."""
    out = torch.sigmoid(torch.randn(count, generator=generator)).clamp(1e-3, 1 - 1e-3)
    out[: count // 4] = torch.rand(count // 4, generator=generator)
    return out


def train(minutes: float, size: int, steps: int, checkpoint: Path) -> None:
    """Train until ``steps`` or for ``minutes``, whichever is first; continues from ``checkpoint``."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    averaged = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start, spent = 0, 0.0
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
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

    running, step = None, start - 1
    progress = tqdm(range(start, steps), initial=start, total=steps, mininterval=30, maxinterval=60)
    for step in progress:
        pictures, drawn = scenes.batch((SEED, step), size)
        generator = torch.Generator().manual_seed(step)
        x = patches(pictures)
        dropped = torch.rand(size, generator=generator) < 0.1
        ids = tokens([None if d else s for d, s in zip(dropped, drawn, strict=True)])
        noise = torch.randn(x.shape, generator=generator)
        sigma = sigmas(size, generator)
        at = sigma[:, None, None]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.autocast("cpu", dtype=torch.bfloat16), FloatAttention():
            velocity = model((1 - at) * x + at * noise, sigma, ids)
        loss = F.mse_loss(velocity.float(), noise - x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        for k, v in model.state_dict().items():
            averaged[k].lerp_(v, 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if time.time() - last_saved > 300:
            keep(step + 1)
            last_saved = time.time()
        if time.time() - began > minutes * 60:
            print("time is up")
            break
    keep(step + 1)
    print(f"trained {step + 1} steps in {(spent + time.time() - began) / 60:.0f} min")


# -- judging -----------------------------------------------------------------------------------------------------------


def train_classifier(path: Path, steps: int = 2000, size: int = 64) -> AttributeClassifier:
    """The attribute classifier: from ``path`` when it is there, else trained on drawn scenes and kept there."""
    network = AttributeClassifier()
    if not path.is_file():
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in tqdm(range(steps), desc="classifier", mininterval=10):
            pictures, drawn = scenes.batch((SEED + 1, step), size)
            blur = torch.rand(size, 1, 1, 1) * 0.08  # samples are never as clean as drawings
            logits = network((pictures + blur * torch.randn_like(pictures)).clamp(0, 1))
            truth = labels(drawn).unbind(1)
            loss = torch.stack([F.cross_entropy(a, b) for a, b in zip(logits, truth, strict=True)]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        save_file(halves(network.state_dict()), path)
    network.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return network.eval()


def halves(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.half().contiguous() for k, v in state.items()}


def trained(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], int]:
    """The averaged weights of a checkpoint by part, in float16 as they ship, and the step they were kept at."""
    saved = torch.load(checkpoint, weights_only=True)
    parts = {"model": "transformer.", "text_encoder": "text_encoder."}
    averaged = halves(saved["averaged"])
    weights = {
        part: {k.removeprefix(prefix): v for k, v in averaged.items() if k.startswith(prefix)}
        for part, prefix in parts.items()
    }
    return weights, saved["step"]


def spread(pictures: Tensor) -> float:
    """Mean root-mean-square distance between two different pictures."""
    return float(torch.pdist(pictures.flatten(1)).mean() / pictures[0].numel() ** 0.5)


def diversity(pipe: Any, caption: str, count: int = 16) -> float:
    """How much samples of one caption differ, in units of how much drawings of it differ."""
    rng = np.random.default_rng(0)
    drawings = torch.stack([torch.from_numpy(scenes.draw(parse(caption), rng)) for _ in range(count)])
    samples = pipe([caption] * count, generator=torch.Generator().manual_seed(0), **CONFIG["sampling"])
    return spread(samples) / spread(drawings)


def influence(pipe: Any, captions: Sequence[str]) -> dict[str, float]:
    """For each block: root-mean-square change of the samples when it is skipped, over their standard deviation."""

    def sampled() -> Tensor:
        return pipe(captions, generator=torch.Generator().manual_seed(0), num_inference_steps=10, guidance_scale=1.0)

    def skip(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return kwargs["encoder_hidden_states"], kwargs["hidden_states"]

    whole, out = sampled(), {}
    for stack in ("transformer_blocks", "single_transformer_blocks"):
        for i, block in enumerate(getattr(pipe.transformer, stack)):
            with block.register_forward_hook(skip, with_kwargs=True):
                out[f"{stack}.{i}"] = float((sampled() - whole).square().mean().sqrt() / whole.std())
    return out


def evaluate(pipe: Any, classifier: AttributeClassifier, count: int, show: Path | None) -> bool:
    """Print what the samples are worth; whether they pass: adherence, diversity, and a use for every block."""
    pictures, drawn = scenes.batch(SEED + 2, 2000)
    print(f"the classifier reads {right(classifier.predict(pictures), drawn).mean():.2%} of real attributes right")
    _, asked = scenes.batch(SEED + 3, count)
    generator = torch.Generator().manual_seed(1234)
    captions = [s.caption() for s in asked]
    parts = [pipe(captions[i : i + 32], generator=generator, **CONFIG["sampling"]) for i in range(0, count, 32)]
    samples = torch.cat(parts)
    seen = classifier.predict(samples)
    share = float(right(seen, asked).mean())
    by_head = (seen == labels(asked)).float().mean(0)
    print(f"{share:.1%} of the attributes of {count} captions are right in the samples")
    print("  " + ", ".join(f"{name} {value:.0%}" for name, value in zip(HEADS, by_head, strict=True)))
    different = diversity(pipe, captions[0])
    print(f"samples of one caption differ {different:.2f} times as much as drawings of it")
    moved = influence(pipe, captions[:8])
    print("change of the samples without a block:")
    for name, change in moved.items():
        print(f"  {name:28} {change:.3f}")
    if show is not None:
        scenes.sheet(list(samples[:48]), captions[:48]).save(show)
    return share >= THRESHOLD and different >= DIVERSITY and min(moved.values()) >= INFLUENCE


def ship(weights: Mapping[str, dict[str, Tensor]], classifier: AttributeClassifier) -> None:
    """Write the model into the package."""
    folder = zoo.HERE / "scenes"
    folder.mkdir(exist_ok=True)
    for part, state in {**weights, "classifier": halves(classifier.state_dict())}.items():
        save_file(state, folder / f"{part}.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    print(f"shipped in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; a later run resumes")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--checkpoint", type=Path, default=Path("scenes.ckpt"))
    parser.add_argument("--evaluate", action="store_true", help="only sample from the checkpoint and judge")
    parser.add_argument(
        "--ship", action="store_true", help="the same, and write the model into ditopt/zoo if it passes"
    )
    parser.add_argument("--count", type=int, default=128, help="captions to judge by")
    parser.add_argument("--show", type=Path, metavar="PNG", help="write a contact sheet of the judged samples")
    args = parser.parse_args()
    if not (args.evaluate or args.ship):
        train(args.minutes, args.batch, args.steps, args.checkpoint)
        return
    weights, step = trained(args.checkpoint)
    print(f"judging step {step}")
    classifier = train_classifier(args.checkpoint.with_suffix(".classifier.safetensors"))
    if not evaluate(zoo.assemble(CONFIG, weights), classifier, args.count, args.show):
        raise SystemExit(
            f"below the floor of {THRESHOLD:.0%} right, diversity {DIVERSITY}, influence {INFLUENCE}: train longer"
        )
    if args.ship:
        ship(weights, classifier)


if __name__ == "__main__":
    main()
