"""The diffusers pipeline that samples the shipped class-conditional model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from ditopt.errors import BadInput


class LabelToImagePipeline(DiffusionPipeline):
    """Class-conditional flow matching with classifier-free guidance by a doubled batch.

    The denoiser predicts the velocity ``noise - image`` at ``timestep = 1000 * sigma``; its last
    class index stands for "no class". Images come back in [0, 1].
    """

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """Sample one image for each label.

        Returns a float tensor of shape (len(class_labels), channels, height, width) in [0, 1].
        ``guidance_scale <= 1`` turns guidance off (one row a sample instead of two).
        """
        config = self.transformer.config
        size, channels, no_class = config.sample_size, config.in_channels, config.num_embeds_ada_norm
        bad = [c for c in class_labels if not 0 <= int(c) < no_class]
        if bad:
            raise BadInput(f"class labels {bad} given; this model knows 0 to {no_class - 1}")
        device, dtype = self.transformer.device, self.transformer.dtype
        labels = torch.tensor(list(class_labels), device=device)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, no_class)])
        if latents is None:
            shape = (len(class_labels), channels, size, size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with self.progress_bar(total=num_inference_steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                rows = torch.cat([latents, latents]) if guided else latents
                timestep = t.expand(rows.shape[0])
                velocity = self.transformer(rows, timestep=timestep, class_labels=labels, return_dict=False)[0]
                if guided:
                    cond, free = velocity.chunk(2)
                    velocity = free + guidance_scale * (cond - free)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, i, t, {"latents": latents}).pop("latents", latents)
                bar.update()
        return (latents / 2 + 0.5).clamp(0, 1)
