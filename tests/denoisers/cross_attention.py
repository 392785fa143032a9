"""Image denoisers with one stream: class labels, cross-attention, or text and image tokens in one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.denoisers.base import BATCH, COLUMNS, ROWS, TEXT, Call, Draw, denoiser, make, positions, prompt_mask

HEIGHT, WIDTH = 2 * ROWS, 2 * COLUMNS
"""Latent pixels for patches of two by two."""


def _class_conditional(r: Draw) -> Call:
    # these classes take the root of the number of tokens for both sides
    return {"hidden_states": r.rows(4, HEIGHT, HEIGHT), "timestep": r.steps(), "class_labels": r.labels(9)}


@denoiser(prompt=("class_labels",))
def dit(r: Draw) -> tuple[nn.Module, Call]:
    model = make(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=HEIGHT,
        patch_size=2,
        num_embeds_ada_norm=9,
    )
    return model, _class_conditional(r)


@denoiser(prompt=("class_labels",))
def transformer2d(r: Draw) -> tuple[nn.Module, Call]:
    model = make(
        "Transformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=HEIGHT,
        patch_size=2,
        num_embeds_ada_norm=9,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    return model, _class_conditional(r)


def _pixart(sample_size: int, **config: Any) -> nn.Module:
    return make(
        "PixArtTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=48,
        caption_channels=20,
        sample_size=sample_size,
        patch_size=2,
        **config,
    )


@denoiser()
def pixart_sigma(r: Draw) -> tuple[nn.Module, Call]:
    return _pixart(32, use_additional_conditions=False), {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_attention_mask": prompt_mask(dtype=torch.float32),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@denoiser()
def pixart_alpha(r: Draw) -> tuple[nn.Module, Call]:
    """Conditioned on resolution and aspect ratio, as the checkpoints for 1024 pixels are."""
    return _pixart(128, use_additional_conditions=True), {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[128.0, 160.0]]).repeat(BATCH, 1),
            "aspect_ratio": torch.full((BATCH, 1), 0.8),
        },
    }


@denoiser(prompt=("encoder_hidden_states", "encoder_hidden_states_t5", "image_meta_size"), blocks=("blocks",))
def hunyuan_dit(r: Draw) -> tuple[nn.Module, Call]:
    """Long skips: the second half of the blocks also reads the first."""
    model = make(
        "HunyuanDiT2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=6,
        hidden_size=32,
        sample_size=HEIGHT,
        patch_size=2,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=12,
        text_len=TEXT,
        text_len_t5=5,
        activation_fn="gelu-approximate",
    )
    return model, {
        "hidden_states": r.rows(4, HEIGHT, HEIGHT),
        "timestep": r.steps().float(),
        "encoder_hidden_states": r.rows(TEXT, 24),
        "text_embedding_mask": prompt_mask(dtype=torch.float32),
        "encoder_hidden_states_t5": r.rows(5, 16),
        "text_embedding_mask_t5": prompt_mask(5, torch.float32),
        "image_meta_size": torch.tensor([[1024.0, 1024, 1024, 1024, 0, 0]]).repeat(BATCH, 1),
        "style": torch.zeros(BATCH, dtype=torch.long),
        "image_rotary_emb": [r.randn(ROWS * ROWS, 16), r.randn(ROWS * ROWS, 16)],
    }


@denoiser(blocks=("noise_refiner", "layers"))
def lumina2(r: Draw) -> tuple[nn.Module, Call]:
    """Turns the prompt mask into Python lengths."""
    model = make(
        "Lumina2Transformer2DModel",
        hidden_size=48,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=4,
        in_channels=4,
        sample_size=HEIGHT,
        patch_size=2,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(64, 64, 64),
        cap_feat_dim=20,
    )
    return model, {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_attention_mask": prompt_mask(),
    }


def _sana(**config: Any) -> nn.Module:
    return make(
        "SanaTransformer2DModel",
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=20,
        sample_size=ROWS,
        patch_size=1,
        **config,
    )


@denoiser()
def sana(r: Draw) -> tuple[nn.Module, Call]:
    """Linear attention on the image, ordinary attention to the prompt."""
    return _sana(), {
        "hidden_states": r.rows(4, ROWS, COLUMNS),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_attention_mask": prompt_mask(dtype=torch.float32),
    }


@denoiser(prompt=("encoder_hidden_states", "guidance"))
def sana_sprint(r: Draw) -> tuple[nn.Module, Call]:
    return _sana(guidance_embeds=True, qk_norm="rms_norm_across_heads"), {
        "hidden_states": r.rows(4, ROWS, COLUMNS),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "guidance": torch.full((BATCH,), 0.45),
    }


@denoiser(blocks=("blocks",))
def prx(r: Draw) -> tuple[nn.Module, Call]:
    model = make(
        "PRXTransformer2DModel",
        hidden_size=48,
        num_heads=3,
        depth=3,
        mlp_ratio=2.0,
        in_channels=4,
        patch_size=2,
        context_in_dim=20,
        axes_dim=[8, 8],
    )
    return model, {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, 20),
    }


@denoiser(latent=("x",), time=("t",), prompt=("cap_feats",), blocks=("noise_refiner", "layers"))
def z_image(r: Draw) -> tuple[nn.Module, Call]:
    """Lists of one latent and one prompt a request, prompt_mask to multiples of 32 tokens inside."""
    model = make(
        "ZImageTransformer2DModel",
        dim=32,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        in_channels=4,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        cap_feat_dim=20,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 32, 32],
    )
    return model, {
        "x": [r.randn(4, 1, HEIGHT, WIDTH) for _ in range(BATCH)],
        "t": r.sigmas(),
        "cap_feats": [r.randn(TEXT, 20) for _ in range(BATCH)],
    }


@denoiser(blocks=("layers",))
def ideogram4(r: Draw) -> tuple[nn.Module, Call]:
    """One packed sequence: each token is marked as text or image, and either argument is zero at the other's tokens."""
    from diffusers.models.transformers.transformer_ideogram4 import (
        IMAGE_POSITION_OFFSET,
        LLM_TOKEN_INDICATOR,
        OUTPUT_IMAGE_INDICATOR,
    )

    model = make(
        "Ideogram4Transformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        in_channels=8,
        intermediate_size=48,
        adaln_dim=16,
        llm_features_dim=20,
        rope_theta=10000,
        mrope_section=(4, 2, 2),
    )
    tokens = ROWS * COLUMNS
    text, image = torch.zeros(BATCH, TEXT + tokens, 20), torch.zeros(BATCH, TEXT + tokens, 8)
    text[:, :TEXT], image[:, TEXT:] = r.rows(TEXT, 20), r.rows(tokens, 8)
    where = torch.cat([torch.arange(TEXT)[:, None].expand(-1, 3), positions().long() + IMAGE_POSITION_OFFSET])
    kind = torch.tensor([LLM_TOKEN_INDICATOR] * TEXT + [OUTPUT_IMAGE_INDICATOR] * tokens)
    return model, {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "timestep": r.sigmas(),
        "position_ids": where.repeat(BATCH, 1, 1),
        "segment_ids": torch.ones(BATCH, TEXT + tokens, dtype=torch.long),
        "indicator": kind.repeat(BATCH, 1),
    }


@denoiser()
def krea2(r: Draw) -> tuple[nn.Module, Call]:
    """The prompt is what several layers of its encoder gave, fused by blocks of their own."""
    model = make(
        "Krea2Transformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        num_key_value_heads=1,
        num_layers=3,
        in_channels=8,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=20,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=24,
        num_layerwise_text_blocks=2,
        num_refiner_text_blocks=2,
        axes_dims_rope=(8, 4, 4),
    )
    return model, {
        "hidden_states": r.rows(ROWS * COLUMNS, 8),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, 3, 20),
        "encoder_attention_mask": prompt_mask(),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), positions()]),
    }


def _nucleus(r: Draw, **config: Any) -> tuple[nn.Module, Call]:
    model = make(
        "NucleusMoEImageTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=2,
        patch_size=2,
        joint_attention_dim=20,
        axes_dims_rope=(8, 4, 4),
        **config,
    )
    return model, {
        "hidden_states": r.rows(ROWS * COLUMNS, 8),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_hidden_states_mask": prompt_mask(dtype=torch.long),
        "img_shapes": [(1, ROWS, COLUMNS)] * BATCH,
    }


@denoiser()
def nucleus_dense(r: Draw) -> tuple[nn.Module, Call]:
    return _nucleus(r, num_layers=3, moe_enabled=False, capacity_factors=[8.0] * 3)


@denoiser()
def nucleus_moe(r: Draw) -> tuple[nn.Module, Call]:
    """Experts choose a fixed number of tokens, in all blocks but the first."""
    return _nucleus(
        r,
        num_layers=4,
        moe_enabled=True,
        capacity_factors=[0.0, 2.0, 2.0, 2.0],
        num_experts=4,
        moe_intermediate_dim=24,
        dense_moe_strategy="leave_first_one_block_dense",
    )
