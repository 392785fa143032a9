"""Denoisers whose sequence holds more than one image or prompt, whose latents are tokens, and more of sound."""

from __future__ import annotations

import torch
from torch import nn

from tests.denoisers.base import BATCH, COLUMNS, ROWS, TEXT, Call, Draw, denoiser, make, prompt_mask

HEIGHT, WIDTH = 2 * ROWS, 2 * COLUMNS
"""Latent pixels for patches of two by two."""

TOKENS = ROWS * COLUMNS

LENGTH = 64
"""Latent frames of sound."""


def _omnigen(r: Draw, text: int, images: dict[int, list[list[int]]], padding: int) -> tuple[nn.Module, Call]:
    """``text`` tokens in front of time and image; the last request has ``padding`` less."""
    model = make(
        "OmniGenTransformer2DModel",
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        num_layers=3,
        pad_token_id=0,
        vocab_size=50,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        pos_embed_max_size=24,
        time_step_dim=16,
    )
    size = text + 1 + TOKENS
    mask = torch.ones(size, size, dtype=torch.long)
    mask[:text] = mask[:text].tril()
    mask[text, text + 1 :] = 0
    masks = mask.repeat(BATCH, 1, 1)
    masks[-1, :, :padding] = 0
    where = torch.arange(size).repeat(BATCH, 1)
    where[-1] = (where[-1] - padding).clamp_min(0)
    ids = torch.stack([r.labels(49) + 1 for _ in range(text)], 1)
    ids[-1, :padding] = 0
    for row, spans in images.items():
        for start, end in spans:
            ids[row, start:end] = 0
            masks[row, start:end, start:end] = 1
    return model, {
        "hidden_states": r.rows(4, HEIGHT, WIDTH),
        "timestep": r.sigmas(),
        "input_ids": ids,
        "input_img_latents": [r.randn(1, 4, 4, 8) for spans in images.values() for _ in spans],
        "input_image_sizes": images,
        "attention_mask": masks,
        "position_ids": where,
        "return_dict": False,
    }


@denoiser(prompt=("input_ids",), blocks=("layers",))
def omnigen(r: Draw) -> tuple[nn.Module, Call]:
    """A language model: prompt tokens, one token for the time, image."""
    return _omnigen(r, TEXT, {}, 2)


@denoiser(prompt=("input_ids", "input_img_latents"), blocks=("layers",))
def omnigen_edit(r: Draw) -> tuple[nn.Module, Call]:
    """Images stand among the tokens of the prompt, at places that are Python numbers."""
    return _omnigen(r, 12, {0: [[2, 10]], 1: [[4, 12]]}, 3)


def _qwen_image21(r: Draw, slots: list[bool], shapes: list[tuple[int, int, int]]) -> tuple[nn.Module, Call]:
    """``slots``: which tokens of the prompt stand for two by two of a reference image."""
    model = make(
        "QwenImage21Transformer2DModel",
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    images = torch.tensor(slots + [True] * (TOKENS // 4))
    return model, {
        "hidden_states": r.rows(sum(h * w for _, h, w in shapes), 8),
        "encoder_hidden_states": r.rows(len(slots), 20),
        "timestep": r.sigmas(),
        "img_shapes": [shapes] * BATCH,
        "img_mask": images.repeat(BATCH, 1),
        "encoder_hidden_states_mask": prompt_mask(len(slots)),
        "return_dict": False,
    }


@denoiser()
def qwen_image21(r: Draw) -> tuple[nn.Module, Call]:
    """One causal sequence; the prompt is modulated as if the time were zero."""
    return _qwen_image21(r, [False] * TEXT, [(1, ROWS, COLUMNS)])


@denoiser()
def qwen_image21_edit(r: Draw) -> tuple[nn.Module, Call]:
    """A reference image in the middle of the prompt."""
    return _qwen_image21(r, [False] * 3 + [True] * 4 + [False] * 4, [(1, 4, 4), (1, ROWS, COLUMNS)])


@denoiser(blocks=("double_blocks",))
def joyimage_edit_plus(r: Draw) -> tuple[nn.Module, Call]:
    """Patches of the image and of its references in one list, padded where a request has fewer."""
    model = make(
        "JoyImageEditPlusTransformer3DModel",
        num_attention_heads=2,
        hidden_size=32,
        in_channels=4,
        num_layers=3,
        text_dim=20,
        rope_dim_list=[4, 6, 6],
    )
    return model, {
        "hidden_states": r.rows(TOKENS + 16, 4, 1, 2, 2),
        "timestep": r.steps().float(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_hidden_states_mask": prompt_mask(dtype=torch.long),
        "shape_list": [[(1, ROWS, COLUMNS), (1, 4, 4)], [(1, ROWS, COLUMNS), (1, 2, 4)]],
        "return_dict": False,
    }


@denoiser(
    latent=("input_ids",),
    time=(),
    prompt=("encoder_hidden_states", "pooled_text_emb", "micro_conds"),
    blocks=("down_block.res_blocks", "transformer_layers", "up_block.res_blocks"),
)
def uvit(r: Draw) -> tuple[nn.Module, Call]:
    """Latents are tokens, some of them masked; nothing tells the time."""
    model = make(
        "UVit2DModel",
        hidden_size=32,
        cond_embed_dim=12,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=20,
        vocab_size=33,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=3,
        block_num_heads=2,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        sample_size=ROWS,
    )
    return model, {
        "input_ids": torch.stack([r.labels(33) for _ in range(TOKENS)], 1).view(BATCH, ROWS, COLUMNS),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "pooled_text_emb": r.rows(12),
        "micro_conds": torch.tensor([[512.0, 512.0, 0.0, 0.0, 6.0]]).repeat(BATCH, 1),
    }


@denoiser(time=())
def dreamlite(r: Draw) -> tuple[nn.Module, Call]:
    """The transformer inside a U-Net: a part of a model, which knows no time."""
    from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

    model = make(
        "DreamLiteTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=32,
        num_layers=3,
        norm_num_groups=4,
        cross_attention_dim=20,
        use_linear_projection=True,
        qk_norm="rms_norm",
        num_kv_heads=1,
        ff_mult=2,
    )
    for block in model.transformer_blocks:  # type: ignore[union-attr]  # as its U-Net does  # type: ignore[union-attr]
        block.attn1.set_processor(DreamLiteAttnProcessor2_0())
        block.attn2.set_processor(DreamLiteAttnProcessor2_0())
    return model, {
        "hidden_states": r.rows(32, ROWS, COLUMNS),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_attention_mask": prompt_mask(),
        "return_dict": False,
    }


# -- sound -------------------------------------------------------------------------------------------------------------


@denoiser(time=("timestep", "timestep_r"), prompt=("encoder_hidden_states", "context_latents"), blocks=("layers",))
def ace_step(r: Draw) -> tuple[nn.Module, Call]:
    """Every second block sees a window; the time is given twice."""
    model = make(
        "AceStepTransformer1DModel",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=8,
        encoder_hidden_size=20,
    )
    time = r.sigmas()
    return model, {
        "hidden_states": r.rows(2 * LENGTH, 4),
        "timestep": time,
        "timestep_r": time,
        "encoder_hidden_states": r.rows(TEXT, 20),
        "context_latents": r.rows(2 * LENGTH, 8),
        "return_dict": False,
    }


def _stable_audio3(r: Draw) -> tuple[nn.Module, Call]:
    model = make(
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=32,
        depth=3,
        num_heads=2,
        cond_token_dim=20,
        global_cond_dim=12,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2.0,
        num_memory_tokens=4,
    )
    return model, {
        "hidden_states": r.rows(4, LENGTH),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "global_hidden_states": r.rows(12),
        "encoder_attention_mask": prompt_mask(),
        "return_dict": False,
    }


@denoiser(prompt=("encoder_hidden_states", "global_hidden_states"))
def stable_audio3(r: Draw) -> tuple[nn.Module, Call]:
    """Attention is a difference of two."""
    return _stable_audio3(r)


@denoiser(prompt=("encoder_hidden_states", "global_hidden_states", "local_add_cond"))
def stable_audio3_inpaint(r: Draw) -> tuple[nn.Module, Call]:
    """What is to be kept is added in every block."""
    model, call = _stable_audio3(r)
    return model, {**call, "local_add_cond": r.rows(5, LENGTH)}


@denoiser()
def minimax_music3(r: Draw) -> tuple[nn.Module, Call]:
    """The time is a token in front, the condition a part of each frame."""
    model = make(
        "MiniMaxMusic3Transformer1DModel",
        in_channels=4,
        condition_dim=20,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=48,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )
    return model, {
        "hidden_states": r.rows(4, LENGTH),
        "timestep": r.sigmas(),
        "encoder_hidden_states": r.rows(LENGTH, 20),
        "return_dict": False,
    }
