"""The diffusers pipeline that samples the shipped sprites model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ditopt.errors import BadInput
from ditopt.zoo.sprites.captions import parse, tokens

FRAMES, SIDE = 8, 32
SHIFT, SCALE = 0.25, 4.0
"""Latents are (video - SHIFT) * SCALE: about unit variance, as the noise has."""


def located(latents: Tensor) -> Tensor:
    """Latents (N, 3, F, H, W) with their places beside them, (N, 6, F, H, W): frame, row and column from -1 to 1.

    The rotary positions of the denoiser tell how far apart two tokens are; where in the picture "the top" is, and
    which frame is the first, they do not.
    """
    axes = [torch.linspace(-1, 1, n, dtype=latents.dtype, device=latents.device) for n in latents.shape[2:]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return torch.cat([latents, places.expand(len(latents), -1, -1, -1, -1)], 1)


class CaptionToVideoPipeline(DiffusionPipeline):
    """Flow matching conditioned on captions of moving sprites, with classifier-free guidance by a doubled batch.

    The denoiser reads latents and their places (``located``) and predicts the velocity ``noise - latent`` at
    ``timestep = 1000 * sigma``; a caption of "nothing" words
    stands for no caption. Videos come back in [0, 1].
    """

    def __init__(self, transformer: Any, text_encoder: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        num_frames: int = FRAMES,
        height: int = SIDE,
        width: int = SIDE,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Sample one video for each caption.

        Returns a float tensor of shape (captions, 3, 8, 32, 32) in [0, 1]: colours, frames, rows, columns.
        ``guidance_scale <= 1`` turns guidance off (one row a sample instead of two). A caption with a word it does not
        know, another number of frames or another size is one error.
        """
        if (num_frames, height, width) != (FRAMES, SIDE, SIDE):
            raise BadInput(
                f"this model was trained on {FRAMES} frames of {SIDE}x{SIDE} pixels; "
                f"got {num_frames} frames of {height}x{width}"
            )
        clips = [parse(c) for c in ([prompt] if isinstance(prompt, str) else prompt)]
        device, dtype = self.transformer.device, self.transformer.dtype
        guided = guidance_scale > 1
        text = self.text_encoder(tokens([*clips, *([None] * len(clips) if guided else [])]).to(device)).to(dtype)
        if latents is None:
            shape = (len(clips), 3, FRAMES, SIDE, SIDE)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with self.progress_bar(total=num_inference_steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                rows = located(torch.cat([latents, latents]) if guided else latents)
                velocity = self.transformer(
                    rows, timestep=t.expand(len(rows)), encoder_hidden_states=text, return_dict=False
                )[0]
                if guided:
                    told, free = velocity.chunk(2)
                    velocity = free + guidance_scale * (told - free)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, i, t, {"latents": latents}).pop("latents", latents)
                bar.update()
        return (latents.float() / SCALE + SHIFT).clamp(0, 1)
