"""Image denoisers with an image and a text stream that meet in joint attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.denoisers.base import BATCH, COLUMNS, ROWS, TEXT, Call, Draw, denoiser, make, positions, prompt_mask

HEIGHT, WIDTH = 2 * ROWS, 2 * COLUMNS
"""Latent pixels for patches of two by two."""

TOKENS = ROWS * COLUMNS

DOUBLE_AND_SINGLE = ("transformer_blocks", "single_transformer_blocks")


# -- Stable Diffusion 3 ------------------------------------------------------------------------------------------------


def _sd3(**config: Any) -> nn.Module:
    return make(
        "SD3Transformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        sample_size=32,
        patch_size=2,
        caption_projection_dim=32,
        joint_attention_dim=20,
        pooled_projection_dim=24,
        pos_embed_max_size=24,
        **config,
    )


def _sd3_call(r: Draw) -> Call:
    return {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "pooled_projections": r.rows(24),
    }


@denoiser(prompt=("encoder_hidden_states", "pooled_projections"))
def sd3(r: Draw) -> tuple[nn.Module, Call]:
    return _sd3(), _sd3_call(r)


@denoiser(prompt=("encoder_hidden_states", "pooled_projections"))
def sd35(r: Draw) -> tuple[nn.Module, Call]:
    """A second, image-only attention in the first blocks."""
    return _sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"), _sd3_call(r)


@denoiser(
    latent=("hidden_states", "block_controlnet_hidden_states"), prompt=("encoder_hidden_states", "pooled_projections")
)
def sd3_control(r: Draw) -> tuple[nn.Module, Call]:
    """Control residuals enter between blocks, one for every two."""
    return _sd3(), {**_sd3_call(r), "block_controlnet_hidden_states": [r.rows(TOKENS, 32), r.rows(TOKENS, 32)]}


# -- Flux and its kin --------------------------------------------------------------------------------------------------


def _flux(cls: str, channels: int = 4, **config: Any) -> nn.Module:
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": channels,
        "num_layers": 3,
        "num_single_layers": 3,
        "patch_size": 1,
        "joint_attention_dim": 20,
        "axes_dims_rope": [4, 4, 8],
    }
    return make(cls, **(shape | config))


def _flux_call(r: Draw, channels: int = 4, axes: int = 3, text: int = 20) -> Call:
    return {
        "hidden_states": r.rows(TOKENS, channels),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, text),
        "img_ids": positions(axes=axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }


def _guidance(value: float = 3.5) -> torch.Tensor:
    return torch.full((BATCH,), value)


@denoiser(prompt=("encoder_hidden_states", "pooled_projections", "guidance"), blocks=DOUBLE_AND_SINGLE)
def flux(r: Draw) -> tuple[nn.Module, Call]:
    model = _flux("FluxTransformer2DModel", pooled_projection_dim=24, guidance_embeds=True)
    return model, {**_flux_call(r), "pooled_projections": r.rows(24), "guidance": _guidance()}


@denoiser(prompt=("encoder_hidden_states", "pooled_projections"), blocks=DOUBLE_AND_SINGLE)
def flux_schnell(r: Draw) -> tuple[nn.Module, Call]:
    model = _flux("FluxTransformer2DModel", pooled_projection_dim=24)
    return model, {**_flux_call(r), "pooled_projections": r.rows(24)}


@denoiser(
    latent=("hidden_states", "controlnet_block_samples", "controlnet_single_block_samples"),
    prompt=("encoder_hidden_states", "pooled_projections"),
    blocks=DOUBLE_AND_SINGLE,
)
def flux_control(r: Draw) -> tuple[nn.Module, Call]:
    """Control residuals for both lists; a tuple comes out."""
    model = _flux("FluxTransformer2DModel", pooled_projection_dim=24)
    return model, {
        **_flux_call(r),
        "pooled_projections": r.rows(24),
        "controlnet_block_samples": [r.rows(TOKENS, 32)],
        "controlnet_single_block_samples": [r.rows(TOKENS, 32)],
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


@denoiser(prompt=("encoder_hidden_states", "guidance"), blocks=DOUBLE_AND_SINGLE)
def flux2(r: Draw) -> tuple[nn.Module, Call]:
    """Modulation shared by all blocks; attention and MLP of the single blocks run side by side."""
    model = _flux("Flux2Transformer2DModel", axes_dims_rope=[4, 4, 4, 4], timestep_guidance_channels=32)
    call = _flux_call(r, axes=4)
    ids = {k: call[k].repeat(BATCH, 1, 1) for k in ("img_ids", "txt_ids")}
    return model, {**call, **ids, "guidance": _guidance()}


@denoiser(blocks=DOUBLE_AND_SINGLE)
def chroma(r: Draw) -> tuple[nn.Module, Call]:
    """All modulation comes from one network outside of the blocks."""
    model = _flux(
        "ChromaTransformer2DModel",
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=2,
    )
    mask = torch.cat([prompt_mask(), torch.ones(BATCH, TOKENS, dtype=torch.bool)], 1)
    return model, {**_flux_call(r), "attention_mask": mask}


@denoiser(blocks=DOUBLE_AND_SINGLE)
def bria(r: Draw) -> tuple[nn.Module, Call]:
    return _flux("BriaTransformer2DModel", pooled_projection_dim=None), _flux_call(r)


@denoiser(prompt=("encoder_hidden_states", "text_encoder_layers"), blocks=DOUBLE_AND_SINGLE)
def bria_fibo(r: Draw) -> tuple[nn.Module, Call]:
    """Each block reads the output of another layer of the text encoder."""
    model = _flux(
        "BriaFiboTransformer2DModel",
        channels=48,
        joint_attention_dim=40,
        text_encoder_dim=20,
        pooled_projection_dim=None,
    )
    layers = [r.rows(TEXT, 20) for _ in range(6)]
    return model, {**_flux_call(r, channels=48, text=40), "text_encoder_layers": layers}


@denoiser(blocks=DOUBLE_AND_SINGLE)
def longcat_image(r: Draw) -> tuple[nn.Module, Call]:
    model = _flux("LongCatImageTransformer2DModel", pooled_projection_dim=24)
    return model, {**_flux_call(r), "guidance": _guidance()}


@denoiser(blocks=DOUBLE_AND_SINGLE)
def ovis_image(r: Draw) -> tuple[nn.Module, Call]:
    return _flux("OvisImageTransformer2DModel", out_channels=4), _flux_call(r)


# -- others ------------------------------------------------------------------------------------------------------------


@denoiser(blocks=("joint_transformer_blocks", "single_transformer_blocks"))
def auraflow(r: Draw) -> tuple[nn.Module, Call]:
    model = make(
        "AuraFlowTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=3,
        num_single_dit_layers=3,
        sample_size=HEIGHT,
        patch_size=2,
        caption_projection_dim=32,
        joint_attention_dim=20,
        pos_embed_max_size=144,
    )
    return model, {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, 20),
    }


SIZES = ("original_size", "target_size", "crop_coords")


def _cogview(cls: str, r: Draw, **config: Any) -> tuple[nn.Module, Call]:
    model = make(
        cls,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=HEIGHT,
        patch_size=2,
        text_embed_dim=20,
        time_embed_dim=24,
        condition_dim=4,
        **config,
    )
    size = torch.tensor([[128.0, 160.0]]).repeat(BATCH, 1)
    return model, {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "original_size": size,
        "target_size": size.clone(),
        "crop_coords": torch.zeros(BATCH, 2),
    }


@denoiser(prompt=("encoder_hidden_states", *SIZES))
def cogview3_plus(r: Draw) -> tuple[nn.Module, Call]:
    return _cogview("CogView3PlusTransformer2DModel", r, pos_embed_max_size=24)


@denoiser(prompt=("encoder_hidden_states", *SIZES))
def cogview4(r: Draw) -> tuple[nn.Module, Call]:
    return _cogview("CogView4Transformer2DModel", r)


@denoiser()
def qwen_image(r: Draw) -> tuple[nn.Module, Call]:
    """The grid of each image is an argument of Python numbers; rotary embedding in complex numbers."""
    model = make(
        "QwenImageTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=2,
        num_layers=3,
        patch_size=2,
        joint_attention_dim=20,
        axes_dims_rope=(8, 4, 4),
    )
    return model, {
        "hidden_states": r.rows(TOKENS, 8),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_hidden_states_mask": prompt_mask(dtype=torch.long),
        "img_shapes": [(1, ROWS, COLUMNS)] * BATCH,
    }


@denoiser(blocks=("double_blocks",))
def joyimage_edit(r: Draw) -> tuple[nn.Module, Call]:
    model = make(
        "JoyImageEditTransformer3DModel",
        num_attention_heads=2,
        hidden_size=32,
        in_channels=8,
        num_layers=3,
        patch_size=[1, 2, 2],
        text_dim=20,
        rope_dim_list=[4, 6, 6],
    )
    return model, {
        "hidden_states": r.rows(8, 1, HEIGHT, WIDTH),
        "timestep": r.steps().float(),
        "encoder_hidden_states": r.rows(TEXT, 20),
    }
