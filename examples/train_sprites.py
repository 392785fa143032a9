"""Train the shipped sprites model: python -m examples.train_sprites [--minutes 240].

Data: clips drawn by examples/sprites.py, new ones at every step. Method: flow matching with a diffusers
WanTransformer3DModel on 1x4x4 patches; one caption in ten is dropped for classifier-free guidance.
The command shows progress, checkpoints every five minutes and resumes from its checkpoint. Then

    python -m examples.train_sprites --evaluate     sample from the checkpoint, classify, and judge
    python -m examples.train_sprites --ship         the same, and write the model into ditopt/zoo when it passes
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ditopt.zoo.sprites import assemble
from ditopt.zoo.sprites.captions import HEADS, SLOTS, VOCABULARY, labels, tokens
from ditopt.zoo.sprites.classifier import ClipClassifier
from ditopt.zoo.sprites.pipeline import SCALE, SHIFT, located
from ditopt.zoo.words import WordTable
from examples import judging, sprites
from examples.training import TrainingAttention, fit, sigmas

WIDTH = 64
CONFIG: dict[str, Any] = {
    "pipeline": "CaptionToVideoPipeline",
    "denoiser": {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 4, 4],
        "num_attention_heads": 3,
        "attention_head_dim": 48,
        "in_channels": 6,
        "out_channels": 3,
        "text_dim": WIDTH,
        "freq_dim": 128,
        "ffn_dim": 576,
        "num_layers": 6,
        "rope_max_seq_len": 32,
    },
    "text_encoder": {"width": WIDTH},
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 2.0},
    "sampling": {"num_inference_steps": 30, "guidance_scale": 3.0},
    "training": "python -m examples.train_sprites",
}
SEED = 30_000_000
"""Seeds of training batches are (SEED, step): no step repeats, and a resumed run sees the same batches."""


class Model(nn.Module):
    """The denoiser and its text table, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = WanTransformer3DModel.from_config(CONFIG["denoiser"])
        self.text_encoder = WordTable(len(VOCABULARY), SLOTS, WIDTH)
        nn.init.normal_(self.text_encoder.slots.weight, std=0.5)
        # Attention and feed-forward begin closed and the output as zero (adaLN-zero), which trains faster.
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        for block in self.transformer.blocks:
            nn.init.zeros_(block.scale_shift_table)

    def forward(self, latents: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        text = self.text_encoder(ids)
        return self.transformer(located(latents), timestep=sigma * 1000, encoder_hidden_states=text, return_dict=False)[
            0
        ]


def train(minutes: float, size: int, steps: int, checkpoint: Path) -> None:
    """Train until ``steps`` or for ``minutes``, whichever is first; continues from ``checkpoint``."""
    torch.manual_seed(0)
    model = Model()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        videos, drawn = sprites.batch((SEED, step), size)
        x = (videos - SHIFT) * SCALE
        dropped = torch.rand(size, generator=generator) < 0.1
        ids = tokens([None if d else c for d, c in zip(dropped, drawn, strict=True)])
        noise = torch.randn(x.shape, generator=generator)
        sigma = sigmas(size, generator, CONFIG["scheduler"]["shift"])
        at = sigma[:, None, None, None, None]
        with torch.autocast("cpu", dtype=torch.bfloat16), TrainingAttention():
            velocity = model((1 - at) * x + at * noise, sigma, ids)
        return F.mse_loss(velocity.float(), noise - x)

    fit(model, loss, steps=steps, minutes=minutes, checkpoint=checkpoint)


SUBJECT = judging.Subject(
    name="sprites",
    config=CONFIG,
    seed=SEED,
    assemble=assemble,
    batch=sprites.batch,
    draw=sprites.draw,
    classifier=ClipClassifier,
    heads=HEADS,
    labels=labels,
    floors=("direction", "colour"),
)


def main() -> None:
    args = judging.arguments(__doc__, "sprites", steps=8_500, batch=8, count=64)
    if args.evaluate or args.ship:
        judging.judge_checkpoint(SUBJECT, args)
    else:
        train(args.minutes, args.batch, args.steps, args.checkpoint)


if __name__ == "__main__":
    main()
