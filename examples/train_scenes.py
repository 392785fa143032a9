"""Train the shipped scenes model: python -m examples.train_scenes [--minutes 240].

Data: scenes drawn by examples/scenes.py, new ones at every step. Method: flow matching with a diffusers
FluxTransformer2DModel on 2x2 patches; one caption in ten is dropped for classifier-free guidance. Muon trains the
matrices of the blocks: with it the loss at high noise, where the caption decides, falls about twice as fast.
The command shows progress, checkpoints every five minutes and resumes from its checkpoint. Then

    python -m examples.train_scenes --evaluate      sample from the checkpoint, classify, and judge
    python -m examples.train_scenes --ship          the same, and write the model into ditopt/zoo when it passes
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt.zoo.scenes import assemble
from ditopt.zoo.scenes.captions import HEADS, SLOTS, VOCABULARY, labels, named, tokens
from ditopt.zoo.scenes.classifier import SceneClassifier
from ditopt.zoo.scenes.pipeline import located, patches, positions, text_arguments
from ditopt.zoo.words import WordTable
from examples import judging, scenes
from examples.training import TrainingAttention, fit, sigmas

WIDTH = 64
CONFIG: dict[str, Any] = {
    "pipeline": "CaptionToImagePipeline",
    "denoiser": {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 14,
        "out_channels": 12,
        "num_layers": 2,
        "num_single_layers": 6,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": SLOTS * WIDTH,
        "guidance_embeds": False,
        "axes_dims_rope": [8, 12, 12],
    },
    "text_encoder": {"width": WIDTH},
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 2.0},
    "sampling": {"num_inference_steps": 30, "guidance_scale": 2.0},
    "training": "python -m examples.train_scenes",
}
SEED = 20_000_000
"""Seeds of training batches are (SEED, step): no step repeats, and a resumed run sees the same batches."""


class Model(nn.Module):
    """The denoiser and its text table, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = FluxTransformer2DModel.from_config(CONFIG["denoiser"])
        self.text_encoder = WordTable(len(VOCABULARY), SLOTS, WIDTH)
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
        position = {"img_ids": self.img_ids, "txt_ids": self.txt_ids}
        text = text_arguments(self.text_encoder(ids))
        return self.transformer(located(latents), timestep=sigma, **text, **position, return_dict=False)[0]


def train(minutes: float, size: int, steps: int, checkpoint: Path) -> None:
    """Train until ``steps`` or for ``minutes``, whichever is first; continues from ``checkpoint``."""
    torch.manual_seed(0)
    model = Model()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        pictures, drawn = scenes.batch((SEED, step), size)
        x = patches(pictures)
        dropped = torch.rand(size, generator=generator) < 0.1
        ids = tokens([None if d else s for d, s in zip(dropped, drawn, strict=True)])
        noise = torch.randn(x.shape, generator=generator)
        sigma = sigmas(size, generator, CONFIG["scheduler"]["shift"])
        at = sigma[:, None, None]
        with torch.autocast("cpu", dtype=torch.bfloat16), TrainingAttention():
            velocity = model((1 - at) * x + at * noise, sigma, ids)
        return F.mse_loss(velocity.float(), noise - x)

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks." in name]
    fit(model, loss, steps=steps, minutes=minutes, checkpoint=checkpoint, matrices=matrices)


SUBJECT = judging.Subject(
    name="scenes",
    config=CONFIG,
    seed=SEED,
    assemble=assemble,
    batch=scenes.batch,
    draw=scenes.draw,
    classifier=SceneClassifier,
    heads=HEADS,
    labels=labels,
    named=named,
)


def main() -> None:
    args = judging.arguments(__doc__, "scenes", steps=4_000, batch=24, count=128)
    if args.evaluate or args.ship:
        judging.judge_checkpoint(SUBJECT, args)
    else:
        train(args.minutes, args.batch, args.steps, args.checkpoint)


if __name__ == "__main__":
    main()
