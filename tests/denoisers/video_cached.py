"""Video denoisers that are given more than tensors of one video: packed sequences, histories, and keys and values of
what was made before, in dicts and in objects of classes of their own."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from tests.denoisers.base import BATCH, COLUMNS, ROWS, TEXT, Call, Draw, denoiser, make, prompt_mask
from tests.denoisers.video import FRAMES, HEIGHT, WIDTH
from tests.denoisers.video_more import SECOND

# -- frames in chunks --------------------------------------------------------------------------------------------------

FAR: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "patch_size": (1, 2, 2),
    "compressed_patch_size": (1, 4, 4),
    "full_chunk_limit": 2,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 48,
    "rope_max_seq_len": 32,
    "chunk_partition": (1, 2, 2),
}


def _chunk(r: Draw, frames: int) -> Call:
    times = r.steps()[:, None].float().repeat(1, frames)
    return {
        "hidden_states": r.rows(frames, 4, HEIGHT, WIDTH),
        "timestep": times,
        "r_timestep": times / 2,
        "encoder_hidden_states": r.rows(TEXT, 20),
    }


@denoiser(time=("timestep", "r_timestep"), blocks=("blocks",))
def anyflow_far(r: Draw) -> tuple[nn.Module, Call]:
    """A chunk of frames that attends to the keys and values of the chunks before it, the oldest of them smaller."""
    model = make("AnyFlowFARTransformer3DModel", **FAR)
    tokens, small = ROWS * COLUMNS, ROWS * COLUMNS // 4
    cache = {
        layer: {
            "full_cache": torch.stack([r.rows(2, 2 * 2 * tokens, 16) for _ in range(2)]),
            "compressed_cache": torch.stack([r.rows(2, 2 * 2 * small, 16) for _ in range(2)]),
        }
        for layer in range(3)
    }
    return model, {
        **_chunk(r, 2),
        "chunk_partition": [1, 2, 2],
        "kv_cache": cache,
        "kv_cache_flag": {"num_cached_chunks": 2, "is_cache_step": False},
    }


@denoiser(time=("timestep", "r_timestep"), blocks=("blocks",))
def anyflow_far_whole(r: Draw) -> tuple[nn.Module, Call]:
    """All chunks at once, without a cache: a mask made of the chunks' lengths keeps each from the later ones."""
    return make("AnyFlowFARTransformer3DModel", **FAR), {**_chunk(r, 5), "chunk_partition": [1, 2, 2]}


@denoiser(blocks=("blocks",))
def helios(r: Draw) -> tuple[nn.Module, Call]:
    """A history of frames in three resolutions, modulated as if it were clean; only the new frames read the prompt."""
    model = make(
        "HeliosTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        text_dim=20,
        freq_dim=32,
        ffn_dim=48,
        rope_dim=(4, 6, 6),
        is_amplify_history=True,
    )
    prefix, old, near, clean, new = (part[None] for part in torch.arange(10).split([1, 4, 2, 1, FRAMES]))
    return model, {
        "hidden_states": r.rows(4, FRAMES, HEIGHT, WIDTH),
        "timestep": r.steps()[:1].expand(BATCH),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "indices_hidden_states": new.expand(BATCH, -1),
        "indices_latents_history_short": torch.cat([prefix, clean], 1).expand(BATCH, -1),
        "indices_latents_history_mid": near.expand(BATCH, -1),
        "indices_latents_history_long": old.expand(BATCH, -1),
        "latents_history_short": r.rows(4, 2, HEIGHT, WIDTH),
        "latents_history_mid": r.rows(4, 2, HEIGHT, WIDTH),
        "latents_history_long": r.rows(4, 4, HEIGHT, WIDTH),
    }


# -- packed sequences --------------------------------------------------------------------------------------------------


@denoiser(
    latent=("vision_tokens", "sound_tokens"),
    time=("vision_timesteps", "sound_timesteps"),
    prompt=(),
    blocks=("layers",),
)
def cosmos3_omni(r: Draw) -> tuple[nn.Module, Call]:
    """Token ids, a video whose first frame is known, and sound, in one sequence; the text attends to itself alone."""
    model = make(
        "Cosmos3OmniTransformer",
        head_dim=16,
        hidden_size=32,
        intermediate_size=48,
        latent_channel=4,
        latent_patch_size=2,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_hidden_layers=3,
        num_key_value_heads=1,
        sound_dim=5,
        sound_gen=True,
        vocab_size=50,
        rope_axes_dim=(4, 2, 2),
    )
    frame, sound, frames = ROWS * COLUMNS, 9, 3
    video = frames * frame
    end = TEXT + video
    where = torch.arange(end + sound)
    grid = torch.stack(
        [n.flatten() for n in torch.meshgrid(*map(torch.arange, (frames, ROWS, COLUMNS)), indexing="ij")]
    )
    text, heard = torch.arange(TEXT).expand(3, -1), torch.arange(sound).expand(3, -1)
    time = float(r.steps()[0])
    return model, {
        "input_ids": torch.tensor([3, 17, 44, 5, 9, 21, 1]),
        "text_indexes": where[:TEXT],
        "position_ids": torch.cat([text, grid + TEXT + 100, heard + TEXT + 100], 1).float(),
        "und_len": TEXT,
        "sequence_length": end + sound,
        "vision_tokens": [r.randn(1, 4, frames, HEIGHT, WIDTH)],
        "vision_token_shapes": [(frames, ROWS, COLUMNS)],
        "vision_sequence_indexes": where[TEXT:end],
        "vision_mse_loss_indexes": where[TEXT + frame : end],
        "vision_timesteps": torch.full((video - frame,), time),
        "vision_noisy_frame_indexes": [torch.arange(1, frames)],
        "sound_tokens": [r.randn(5, sound)],
        "sound_token_shapes": [(sound, 1, 1)],
        "sound_sequence_indexes": where[end:],
        "sound_mse_loss_indexes": where[end:],
        "sound_timesteps": torch.full((sound,), time),
        "sound_noisy_frame_indexes": [torch.arange(sound)],
    }


@denoiser(latent=("hidden_states", "audio_hidden_states"))
def minimax_h3(r: Draw) -> tuple[nn.Module, Call]:
    """Text, a known frame, sound and video in one sequence, each row with a time and a modality of its own."""
    model = make(
        "MiniMaxH3Transformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=3,
        ffn_dim=48,
        in_channels=4,
        audio_in_channels=5,
        text_dim=20,
        freq_dim=32,
        time_embed_hidden_dim=24,
        time_embed_dim=12,
        rope_freq_dim=2,
    )
    frame, sound = ROWS * COLUMNS, 9
    counts = torch.tensor([TEXT, frame, sound, FRAMES * frame])
    where = torch.arange(int(counts.sum()))
    text, known, heard, video = where.split(counts.tolist())
    return model, {
        "hidden_states": r.rows(3 * frame, 16),
        "audio_hidden_states": r.rows(sound, 5),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "timestep": torch.tensor([0.9, 0.8, 0.0]),
        "timestep_indices": torch.tensor([2, 2, 1, 0]).repeat_interleave(counts),
        "token_tags": torch.tensor([1, 0, 2, 0]).repeat_interleave(counts),
        "position_ids": torch.stack([where // frame, where % frame // COLUMNS, where % COLUMNS], 1).float(),
        "video_indices": torch.cat([known, video]),
        "audio_indices": heard,
        "text_indices": text,
    }


# -- people who are animated -------------------------------------------------------------------------------------------


@denoiser(
    prompt=("encoder_hidden_states", "encoder_hidden_states_image", "pose_hidden_states", "face_pixel_values"),
    blocks=("blocks",),
)
def wan_animate(r: Draw) -> tuple[nn.Module, Call]:
    """Poses among the latent's tokens, and the motion of a face, encoded from its pixels, after every second block."""
    model = make(
        "WanAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        num_layers=4,
        text_dim=20,
        freq_dim=32,
        ffn_dim=48,
        image_dim=16,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 6, "8": 6, "16": 6},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=10,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return model, {
        "hidden_states": r.rows(12, 3, HEIGHT, WIDTH),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(512, 20),
        "encoder_hidden_states_image": r.rows(SECOND, 16),
        "pose_hidden_states": r.rows(4, 2, HEIGHT, WIDTH),
        "face_pixel_values": r.rows(3, 5, 16, 16),
        "motion_encode_batch_size": 8,
    }


@denoiser(prompt=("encoder_hidden_states", "encoder_hidden_states_image"), blocks=("blocks",))
def wan_animate2(r: Draw) -> tuple[nn.Module, Call]:
    """Lists of one video, and the keys and values of the video that drives it, in an object."""
    model = make(
        "WanAnimate2Transformer3DModel",
        text_len=TEXT + 2,
        in_dim=9,
        dim=32,
        ffn_dim=48,
        freq_dim=32,
        text_dim=20,
        out_dim=4,
        num_heads=2,
        num_layers=3,
    )
    module = importlib.import_module("diffusers.models.transformers.transformer_wan_animate_2")
    cache = module.WanAnimate2KVCache(3)
    image, tokens = r.randn(1, SECOND, 1280), ROWS * COLUMNS
    grid = torch.tensor([[FRAMES, ROWS, COLUMNS]])
    with torch.no_grad():
        model(
            [r.randn(4, FRAMES, HEIGHT, WIDTH)],
            timestep=torch.tensor([999.0]),
            encoder_hidden_states=[r.randn(TEXT, 20)],
            encoder_hidden_states_image=image,
            condition_latents=[r.randn(5, FRAMES, HEIGHT, WIDTH)],
            kv_cache=cache,
            kv_cache_mode="extract",
            seq_len=FRAMES * tokens,
            offset_grid_sizes=grid,
        )
    return model, {
        "hidden_states": [r.randn(4, FRAMES + 1, HEIGHT, WIDTH)],
        "timestep": r.steps()[:1].float(),
        "encoder_hidden_states": [r.randn(TEXT, 20)],
        "condition_latents": [r.randn(5, FRAMES + 1, HEIGHT, WIDTH)],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": (FRAMES + 1) * tokens,
        "encoder_hidden_states_image": image,
        "reference_grid_sizes": grid,
        "origin_len": 4 * FRAMES - 3,
        "origin_area": [16 * ROWS, 16 * COLUMNS],
    }


# -- worlds to walk in -------------------------------------------------------------------------------------------------


@denoiser(prompt=("encoder_hidden_states", "camera_conditions", "chunk_plucker"), blocks=("blocks",))
def sana_wm(r: Draw) -> tuple[nn.Module, Call]:
    """Recurrent and softmax attention in turns, both with a branch for the camera; a time for each frame."""
    model = make(
        "SanaWMTransformer3DModel",
        in_channels=4,
        num_layers=4,
        hidden_size=32,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=16,
        chunk_plucker_channels=12,
        chunk_plucker_post_attn_blocks=4,
        caption_channels=20,
    )
    turn = torch.tensor([0.0, 0.1, 0.2])
    pose = torch.eye(4).repeat(3, 1, 1)
    pose[:, 0, 0], pose[:, 0, 2], pose[:, 2, 0], pose[:, 2, 2] = turn.cos(), turn.sin(), -turn.sin(), turn.cos()
    pose[:, 2, 3] = turn
    lens = torch.tensor([9.0, 8.0, COLUMNS / 2, ROWS / 2]).expand(3, -1)
    times = r.steps()[:, None, None].float().repeat(1, 1, 3)
    times[:, :, 0] = 0
    return model, {
        "hidden_states": r.rows(4, 3, ROWS, COLUMNS),
        "timestep": times,
        "encoder_hidden_states": r.rows(1, TEXT, 20),
        "mask": prompt_mask(dtype=torch.int64),
        "data_info": {"img_hw": torch.tensor([[256.0, 320.0]])},
        "camera_conditions": torch.cat([pose.flatten(1), lens], 1).expand(BATCH, -1, -1).contiguous(),
        "chunk_plucker": r.rows(12, 3, ROWS, COLUMNS),
    }


@denoiser()
def sana_wm_refiner(r: Draw) -> tuple[nn.Module, Call]:
    """A block of frames that attends to the keys and values of the frames before, in an object; sound is left out."""
    model = make(
        "SanaWMLTX2RefinerTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=3,
        caption_channels=20,
    )
    module = importlib.import_module("diffusers.models.transformers.transformer_sana_wm_refiner")
    cache, tokens = module.SanaWMRefinerKVCache(3), ROWS * COLUMNS

    def rotary(first: int, last: int) -> Any:
        frames = list(range(first, last))
        return model.build_rotary_emb_for_absolute_positions(BATCH, frames, ROWS, COLUMNS, torch.device("cpu"), 16.0)  # type: ignore[operator]

    cache.sink_pe = rotary(0, 1)
    for layer in cache.layer_caches:
        layer.store_sink(r.rows(tokens, 32), r.rows(tokens, 32))
        layer.store_history(r.rows(2 * tokens, 32), r.rows(2 * tokens, 32))
    times = r.sigmas()[:1, None].expand(BATCH, FRAMES * tokens) * 1000
    return model, {
        "hidden_states": r.rows(FRAMES * tokens, 4),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "timestep": times.contiguous(),
        "video_rotary_emb": rotary(3, 3 + FRAMES),
        "encoder_attention_mask": prompt_mask(dtype=torch.int64),
        "kv_cache": cache,
        "kv_cache_mode": "inject",
    }
