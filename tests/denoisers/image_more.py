"""Further image denoisers: text that grows with the prompt, reference images, tokens as latents, experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.denoisers.base import BATCH, COLUMNS, ROWS, TEXT, Call, Draw, denoiser, make, positions, prompt_mask
from tests.denoisers.cross_attention import z_image
from tests.denoisers.joint_attention import qwen_image

HEIGHT, WIDTH = 2 * ROWS, 2 * COLUMNS
"""Latent pixels for patches of two by two."""

TOKENS = ROWS * COLUMNS


def _bria_fibo2(r: Draw) -> tuple[nn.Module, Call]:
    model = make(
        "BriaFibo2Transformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=2,
        n_heads=2,
        cap_feat_dim=20,
        injection_layer_ids=(1, 3),
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=2,
        gist_max_text_len=8,
        axes_dims=(4, 6, 6),
        axes_lens=(32, 16, 16),
    )
    return model, {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(3, TEXT, 20),
    }


@denoiser(blocks=("noise_refiner", "layers"))
def bria_fibo2(r: Draw) -> tuple[nn.Module, Call]:
    """The prompt's length decides how many tokens stand for it; every second block also reads the prompt itself."""
    model, call = _bria_fibo2(r)
    return model, {**call, "encoder_attention_mask": prompt_mask()}


@denoiser(prompt=("encoder_hidden_states", "context_latents"), blocks=("noise_refiner", "layers"))
def bria_fibo2_edit(r: Draw) -> tuple[nn.Module, Call]:
    """Two images to edit, of two sizes, whose tokens are clean."""
    model, call = _bria_fibo2(r)
    return model, {**call, "context_latents": [r.rows(4, 8, 8), r.rows(4, 4, 8)]}


@denoiser(prompt=("text_bth", "text_lens"), blocks=("layers",))
def ernie_image(r: Draw) -> tuple[nn.Module, Call]:
    """The sequence is in front of the batch; the lengths of the prompts are numbers in a tensor."""
    model = make(
        "ErnieImageTransformer2DModel",
        hidden_size=32,
        num_attention_heads=2,
        num_layers=3,
        ffn_hidden_size=48,
        in_channels=4,
        out_channels=4,
        text_in_dim=20,
        rope_axes_dim=(4, 6, 6),
    )
    return model, {
        "hidden_states": r.rows(4, ROWS, COLUMNS),
        "timestep": r.steps().float(),
        "text_bth": r.rows(TEXT, 20),
        "text_lens": torch.tensor([TEXT, TEXT - 2]),
    }


def _flux3(r: Draw, **config: Any) -> tuple[nn.Module, Call]:
    model = make(
        "Flux3Transformer2DModel",
        in_channels=4,
        cond_in_channels=4,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **config,
    )
    return model, {
        "hidden_states": r.rows(TOKENS, 4),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "img_ids": positions(axes=4),
        "txt_ids": positions(1, TEXT, axes=4),
    }


@denoiser(blocks=("mode_blocks.image", "single_transformer_blocks"))
def flux3(r: Draw) -> tuple[nn.Module, Call]:
    """Blocks for the text alone, for the image alone, and for both."""
    return _flux3(r)


@denoiser(
    time=("timestep", "target_timestep"),
    prompt=("encoder_hidden_states", "image_cond_hidden_states"),
    blocks=("mode_blocks.image", "single_transformer_blocks"),
)
def flux3_edit(r: Draw) -> tuple[nn.Module, Call]:
    """A reference image with blocks of its own, and the time that the step goes to."""
    model, call = _flux3(r, flow_map=True)
    return model, {
        **call,
        "target_timestep": call["timestep"] / 2,
        "image_cond_hidden_states": r.rows(16, 4),
        "image_cond_ids": positions(4, 4, axes=4) + torch.tensor([1, 0, 0, 0]),
    }


@denoiser(prompt=("encoder_hidden_states", "prior_token_id", "target_size", "crop_coords"))
def glm_image(r: Draw) -> tuple[nn.Module, Call]:
    """A token of another model for each patch, dropped where a mask says so."""
    model = make(
        "GlmImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=20,
        time_embed_dim=24,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=50,
    )
    return model, {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "prior_token_id": torch.stack([r.labels(50) for _ in range(TOKENS)], 1),
        "prior_token_drop": torch.zeros(BATCH, TOKENS, dtype=torch.bool),
        "timestep": r.steps(),
        "target_size": torch.tensor([[128.0, 160.0]]).repeat(BATCH, 1),
        "crop_coords": torch.zeros(BATCH, 2),
        "return_dict": False,
    }


def _hidream(r: Draw, **config: Any) -> tuple[nn.Module, Call]:
    model = make(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[20, 24],
        text_emb_dim=12,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(18, 20),
        llama_layers=[0, 1, 1, 2, 2],
        **config,
    )
    return model, {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "timesteps": r.steps(),
        "encoder_hidden_states_t5": r.rows(5, 20),
        "encoder_hidden_states_llama3": r.randn(3, BATCH, TEXT, 24),
        "pooled_embeds": r.rows(12),
        "return_dict": False,
    }


HIDREAM = {
    "time": ("timesteps",),
    "prompt": ("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds"),
    "blocks": ("double_stream_blocks", "single_stream_blocks"),
}


@denoiser(**HIDREAM)
def hidream(r: Draw) -> tuple[nn.Module, Call]:
    """Each token chooses two experts of four; latents that are not square are padded, under a mask."""
    return _hidream(r)


@denoiser(**HIDREAM)
def hidream_dense(r: Draw) -> tuple[nn.Module, Call]:
    """The same without experts."""
    return _hidream(r, num_routed_experts=0)


def _hunyuan_image(r: Draw, **config: Any) -> tuple[nn.Module, Call]:
    model = make(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_single_layers=3,
        text_embed_dim=20,
        text_embed_2_dim=12,
        rope_axes_dim=(8, 8),
        **config,
    )
    return model, {
        "hidden_states": r.rows(4, ROWS, COLUMNS),
        "timestep": r.steps().float(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_attention_mask": prompt_mask(dtype=torch.long),
        "encoder_hidden_states_2": r.rows(5, 12),
        "encoder_attention_mask_2": prompt_mask(5, torch.long),
        "return_dict": False,
    }


@denoiser(
    prompt=("encoder_hidden_states", "encoder_hidden_states_2"),
    blocks=("transformer_blocks", "single_transformer_blocks"),
)
def hunyuan_image(r: Draw) -> tuple[nn.Module, Call]:
    """Two prompts, of which the valid tokens are put in front by their masks."""
    return _hunyuan_image(r)


@denoiser(
    time=("timestep", "timestep_r"),
    prompt=("encoder_hidden_states", "encoder_hidden_states_2", "guidance"),
    blocks=("transformer_blocks", "single_transformer_blocks"),
)
def hunyuan_image_distilled(r: Draw) -> tuple[nn.Module, Call]:
    """Guidance and the time of the next step are inputs."""
    model, call = _hunyuan_image(r, guidance_embeds=True, use_meanflow=True)
    more = {"timestep_r": call["timestep"] / 2, "guidance": torch.full((BATCH,), 3250.0)}
    return model, {**call, **more}


@denoiser(blocks=("layers",))
def lumina_next(r: Draw) -> tuple[nn.Module, Call]:
    """Attention to itself and to the prompt side by side; a table of complex numbers is an argument."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = make(
        "LuminaNextDiT2DModel",
        sample_size=HEIGHT,
        in_channels=4,
        hidden_size=48,
        num_layers=3,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=4,
        cross_attention_dim=20,
    )
    return model, {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_mask": prompt_mask(dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 24, 24),
        "cross_attention_kwargs": {"base_sequence_length": 64},
        "return_dict": False,
    }


# -- with a control net ------------------------------------------------------------------------------------------------


@denoiser(latent=("hidden_states", "controlnet_block_samples"))
def qwen_image_control(r: Draw) -> tuple[nn.Module, Call]:
    """Residuals of a control net, one for every two blocks."""
    model, call = qwen_image(r)
    return model, {**call, "controlnet_block_samples": [r.rows(TOKENS, 32) for _ in range(2)]}


@denoiser(
    latent=("x", "controlnet_block_samples"),
    time=("t",),
    prompt=("cap_feats",),
    blocks=("noise_refiner", "layers"),
)
def z_image_control(r: Draw) -> tuple[nn.Module, Call]:
    """Residuals of a control net by the number of the block; they cover the padded image and the padded prompt."""
    model, call = z_image(r)
    return model, {**call, "controlnet_block_samples": {i: r.rows(96 + 32, 32) for i in (0, 2)}}
