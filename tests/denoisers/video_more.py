"""More video denoisers: control branches, histories of frames, faces, prompts of several encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.denoisers.base import BATCH, COLUMNS, ROWS, TEXT, Call, Draw, denoiser, make, prompt_mask
from tests.denoisers.video import FRAMES, HEIGHT, TOKENS, WIDTH

SECOND = 5
"""Tokens of a second encoder, or of an image."""


def _call(r: Draw, channels: int = 4, frames: int = FRAMES) -> Call:
    """Channels before frames, integer timesteps, one prompt."""
    return {
        "hidden_states": r.rows(channels, frames, HEIGHT, WIDTH),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
    }


# -- Wan's kin ---------------------------------------------------------------------------------------------------------

WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "patch_size": (1, 2, 2),
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 48,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


@denoiser(prompt=("encoder_hidden_states", "control_hidden_states"), blocks=("blocks",))
def wan_vace(r: Draw) -> tuple[nn.Module, Call]:
    """A tower of control blocks (a chain beside the main one), each with a hint for one main block, times its scale."""
    model = make("WanVACETransformer3DModel", **WAN, vace_layers=[0, 2], vace_in_channels=12)
    control = r.rows(12, FRAMES, HEIGHT, WIDTH)
    return model, {
        **_call(r),
        "control_hidden_states": control,
        "control_hidden_states_scale": torch.tensor([1.0, 0.7]),
    }


@denoiser(prompt=("encoder_hidden_states", "encoder_hidden_states_image"), blocks=("blocks",))
def chronoedit(r: Draw) -> tuple[nn.Module, Call]:
    """Two frames that stand far apart, an image besides the prompt, and the known frame among the channels."""
    config = {**WAN, "in_channels": 9}
    model = make("ChronoEditTransformer3DModel", **config, image_dim=16, added_kv_proj_dim=24)
    call = _call(r, channels=9)
    return model, {
        **call,
        "encoder_hidden_states": r.rows(512, 20),
        "encoder_hidden_states_image": r.rows(SECOND, 16),
    }


# -- CogVideoX's kin ---------------------------------------------------------------------------------------------------


@denoiser(prompt=("encoder_hidden_states", "id_cond", "id_vit_hidden"))
def consisid(r: Draw) -> tuple[nn.Module, Call]:
    """A face, in features of several scales, is attended to after every second block."""
    model = make(
        "ConsisIDTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=8,
        out_channels=4,
        num_layers=4,
        time_embed_dim=12,
        text_embed_dim=20,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        sample_frames=5,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=16,
        cross_attn_num_heads=2,
        LFE_id_dim=14,
        LFE_vit_dim=18,
        LFE_depth=4,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=3,
        LFE_num_querie=6,
        LFE_output_dim=32,
        LFE_ff_mult=2,
        LFE_num_scale=2,
    )
    return model, {
        "hidden_states": r.rows(FRAMES, 8, HEIGHT, WIDTH),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "image_rotary_emb": (r.randn(TOKENS, 24), r.randn(TOKENS, 24)),
        "id_cond": r.rows(14),
        "id_vit_hidden": [r.rows(9, 18), r.rows(9, 18)],
    }


@denoiser(prompt=("encoder_hidden_states", "encoder_hidden_states_t5"))
def easyanimate(r: Draw) -> tuple[nn.Module, Call]:
    """Rotary positions written into slices of queries and keys; the last blocks share weights between the streams."""
    model = make(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=9,
        out_channels=4,
        patch_size=2,
        num_layers=4,
        mmdit_layers=2,
        time_embed_dim=12,
        add_norm_text_encoder=True,
        text_embed_dim=20,
        text_embed_dim_t5=20,
    )
    return model, {
        **_call(r),
        "encoder_hidden_states_t5": r.rows(SECOND, 20),
        "inpaint_latents": r.rows(5, FRAMES, HEIGHT, WIDTH),
    }


# -- HunyuanVideo's kin ------------------------------------------------------------------------------------------------


@denoiser(prompt=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"))
def hunyuan_video15(r: Draw) -> tuple[nn.Module, Call]:
    """Tokens of two prompts and an image, those that count put in front of those that do not."""
    return _hunyuan15(), {**_hunyuan15_call(r), "image_embeds": r.rows(SECOND, 16)}


@denoiser(prompt=("encoder_hidden_states", "encoder_hidden_states_2"))
def hunyuan_video15_text(r: Draw) -> tuple[nn.Module, Call]:
    """Without an image, whose embeddings are zeros then."""
    return _hunyuan15(), {**_hunyuan15_call(r), "image_embeds": torch.zeros(BATCH, SECOND, 16)}


def _hunyuan15() -> nn.Module:
    return make(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_refiner_layers=2,
        text_embed_dim=20,
        text_embed_2_dim=12,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
    )


def _hunyuan15_call(r: Draw) -> Call:
    second = prompt_mask(SECOND, torch.int64)
    return {
        "hidden_states": r.rows(9, FRAMES, ROWS, COLUMNS),
        "timestep": r.steps().float(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_attention_mask": prompt_mask(dtype=torch.int64),
        "encoder_hidden_states_2": r.rows(SECOND, 12),
        "encoder_attention_mask_2": second,
    }


@denoiser(
    prompt=("encoder_hidden_states", "pooled_projections", "image_embeds", "guidance"),
    blocks=("transformer_blocks", "single_transformer_blocks"),
)
def hunyuan_framepack(r: Draw) -> tuple[nn.Module, Call]:
    """A history of frames in three resolutions in front of the frames that are made."""
    model = make(
        "HunyuanVideoFramepackTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=2,
        text_embed_dim=20,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    prefix, old, near, clean, new = torch.arange(10).split([1, 4, 2, 1, FRAMES])
    return model, {
        **_call(r),
        "encoder_attention_mask": prompt_mask(dtype=torch.int64),
        "pooled_projections": r.rows(12),
        "image_embeds": r.rows(SECOND, 16),
        "indices_latents": new,
        "guidance": torch.full((BATCH,), 6000.0),
        "latents_clean": r.rows(4, 2, HEIGHT, WIDTH),
        "indices_latents_clean": torch.cat([prefix, clean]),
        "latents_history_2x": r.rows(4, 2, HEIGHT, WIDTH),
        "indices_latents_history_2x": near,
        "latents_history_4x": r.rows(4, 4, HEIGHT, WIDTH),
        "indices_latents_history_4x": old,
    }


# -- Motif, Sana, Kandinsky --------------------------------------------------------------------------------------------


@denoiser(prompt=("encoder_hidden_states", "image_embeds"), blocks=("transformer_blocks", "single_transformer_blocks"))
def motif_video(r: Draw) -> tuple[nn.Module, Call]:
    """The last blocks start from the embedded latent again, and attend to what the others have made of it."""
    model = make(
        "MotifVideoTransformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        text_embed_dim=20,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    return model, {
        **_call(r, channels=9),
        "encoder_attention_mask": prompt_mask(dtype=torch.int64),
        "image_embeds": r.rows(SECOND, 16),
    }


@denoiser()
def sana_video(r: Draw) -> tuple[nn.Module, Call]:
    """Linear attention, and convolutions over time instead of MLPs."""
    model = make(
        "SanaVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=20,
        rope_max_seq_len=32,
    )
    return model, {**_call(r), "encoder_attention_mask": prompt_mask(dtype=torch.int64)}


@denoiser(
    latent=("hidden_states", "audio_hidden_states"),
    prompt=("encoder_hidden_states", "pooled_projections"),
    blocks=("visual_transformer_blocks",),
)
def kandinsky6(r: Draw) -> tuple[nn.Module, Call]:
    """Video and sound, each of which attends to the other, as in the published models; channels last."""
    model = make(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=20,
        in_text_dim2=12,
        time_dim=24,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=2,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
        in_audio_dim=5,
        out_audio_dim=5,
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )
    return model, {
        "hidden_states": r.rows(FRAMES, HEIGHT, WIDTH, 9),
        "audio_hidden_states": r.rows(9, 5),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "pooled_projections": r.rows(12),
        "timestep": r.steps().float(),
        "visual_rope_pos": (torch.tensor([0, 1]), torch.arange(ROWS), torch.arange(COLUMNS)),
        "encoder_attention_mask": prompt_mask(),
        "visual_token_type_ids": torch.tensor([[0, 1]]).expand(BATCH, -1),
    }
