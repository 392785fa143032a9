"""Denoisers of sound and of embeddings, and a temporal transformer that is a part of one."""

from __future__ import annotations

import torch
from torch import nn

from tests.denoisers.base import BATCH, COLUMNS, ROWS, TEXT, Call, Draw, denoiser, make, prompt_mask

LENGTH = 64
"""Latent frames of sound."""


@denoiser(prompt=("encoder_hidden_states", "global_hidden_states"))
def stable_audio(r: Draw) -> tuple[nn.Module, Call]:
    """The time enters as a token before the others."""
    model = make(
        "StableAudioDiTModel",
        num_attention_heads=4,
        attention_head_dim=8,
        num_key_value_attention_heads=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        sample_size=LENGTH,
        cross_attention_dim=16,
        cross_attention_input_dim=20,
        time_proj_dim=8,
        global_states_input_dim=12,
    )
    return model, {
        "hidden_states": r.rows(4, LENGTH),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "global_hidden_states": r.rows(1, 12),
        "rotary_embedding": (r.randn(LENGTH + 1, 4), r.randn(LENGTH + 1, 4)),
    }


@denoiser(blocks=("blocks",))
def longcat_audio(r: Draw) -> tuple[nn.Module, Call]:
    model = make(
        "LongCatAudioDiTTransformer",
        dit_dim=32,
        dit_depth=3,
        dit_heads=2,
        dit_text_dim=20,
        latent_dim=8,
        text_conv=False,
    )
    return model, {
        "hidden_states": r.rows(LENGTH, 8),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_attention_mask": prompt_mask(),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.bool),
    }


@denoiser(prompt=("proj_embedding", "encoder_hidden_states"))
def prior(r: Draw) -> tuple[nn.Module, Call]:
    """Denoises one embedding; the sequence is prompt, time, embedding and a learned query."""
    model = make(
        "PriorTransformer",
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        embedding_dim=20,
        num_embeddings=LENGTH,
        additional_embeddings=4,
    )
    return model, {
        "hidden_states": r.rows(20),
        "timestep": r.steps(),
        "proj_embedding": r.rows(20),
        "encoder_hidden_states": r.rows(LENGTH, 20),
    }


@denoiser(time=(), prompt=())
def temporal(r: Draw) -> tuple[nn.Module, Call]:
    """A motion module: attends over frames at each pixel, and knows neither time nor prompt."""
    model = make(
        "TransformerTemporalModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=32,
        num_layers=3,
        norm_num_groups=4,
        attention_bias=False,
    )
    frames = 4
    return model, {"hidden_states": r.randn(BATCH * frames, 32, ROWS, COLUMNS), "num_frames": frames}
