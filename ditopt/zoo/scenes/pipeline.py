"""The diffusers pipeline that samples the shipped scenes model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ditopt.errors import BadInput
from ditopt.zoo.scenes.captions import SLOTS, Scene, parse, tokens

SIDE = 32
PATCH = 2
SHIFT, SCALE = 0.25, 4.0
"""Latents are (image - SHIFT) * SCALE: about unit variance, as the noise has."""


def patches(images: Tensor) -> Tensor:
    """Images (N, 3, 32, 32) in [0, 1] -> latents (N, 256, 12), one token for each 2x2 pixels, row by row."""
    n, c, h, w = images.shape
    cut = images.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return (cut.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * PATCH * PATCH) - SHIFT) * SCALE


def images(latents: Tensor) -> Tensor:
    """The inverse of ``patches``, clamped to [0, 1]."""
    side = SIDE // PATCH
    cut = (latents / SCALE + SHIFT).reshape(len(latents), side, side, -1, PATCH, PATCH)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), -1, SIDE, SIDE).clamp(0, 1)


def positions(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """``img_ids`` (256, 3) and ``txt_ids`` (SLOTS, 3) for the rotary positions: text sits at 0, images at (0, y, x)."""
    side = SIDE // PATCH
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()
    return ids.to(device), torch.zeros(SLOTS, 3, device=device)


def located(latents: Tensor) -> Tensor:
    """Latents (N, 256, 12) with their places beside them, (N, 256, 14): row and column from -1 to 1.

    The rotary positions of the denoiser tell how far apart two tokens are; where in the picture "the left" is they tell
    only by way of the text tokens.
    """
    axis = torch.linspace(-1, 1, SIDE // PATCH, dtype=latents.dtype, device=latents.device)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(1, -1, 2)
    return torch.cat([latents, places.expand(len(latents), -1, -1)], -1)


def text_arguments(rows: Tensor) -> dict[str, Tensor]:
    """The denoiser's text arguments from text tokens (N, SLOTS, width): the pooled vector is all of them."""
    return {"encoder_hidden_states": rows, "pooled_projections": rows.flatten(1)}


class CaptionToImagePipeline(DiffusionPipeline):
    """Flow matching conditioned on captions, with classifier-free guidance by two calls of the denoiser a step.

    The denoiser reads latents and their places (``located``) and predicts the velocity ``noise - latent`` at
    ``timestep = sigma``; a caption of "nothing" words stands for no caption. Images come back in [0, 1].
    """

    def __init__(self, transformer: Any, text_encoder: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)

    def encode(self, scenes: Sequence[Scene | None]) -> dict[str, Tensor]:
        """The denoiser's text arguments for ``scenes``; None stands for no caption."""
        rows = self.text_encoder(tokens(scenes).to(self.transformer.device)).to(self.transformer.dtype)
        return text_arguments(rows)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        height: int = SIDE,
        width: int = SIDE,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Sample one image for each caption.

        Returns a float tensor of shape (captions, 3, 32, 32) in [0, 1]. ``guidance_scale <= 1`` turns guidance off
        (one call a step instead of two). A caption with a word it does not know, or another size, is one error.
        """
        if (height, width) != (SIDE, SIDE):
            raise BadInput(f"this model was trained on {SIDE}x{SIDE} pixels; got {height}x{width}")
        captions = [prompt] if isinstance(prompt, str) else list(prompt)
        scenes = [parse(c) for c in captions]
        device, dtype = self.transformer.device, self.transformer.dtype
        told = self.encode(scenes)
        free = self.encode([None] * len(scenes)) if guidance_scale > 1 else None
        img_ids, txt_ids = positions(device)
        if latents is None:
            shape = (len(scenes), len(img_ids), self.transformer.config.out_channels)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)

        def velocity(rows: Tensor, text: dict[str, Tensor], t: Tensor) -> Tensor:
            timestep = (t / 1000).to(dtype).expand(len(scenes))  # the denoiser multiplies by 1000 itself
            ids = {"img_ids": img_ids, "txt_ids": txt_ids}
            return self.transformer(rows, timestep=timestep, **text, **ids, return_dict=False)[0]

        with self.progress_bar(total=num_inference_steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                rows = located(latents)
                step = velocity(rows, told, t)
                if free is not None:
                    plain = velocity(rows, free, t)
                    step = plain + guidance_scale * (step - plain)
                latents = self.scheduler.step(step, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, i, t, {"latents": latents}).pop("latents", latents)
                bar.update()
        return images(latents.float())
