"""Video denoisers: latents with frames, in one stream, two streams, or beside a stream of audio."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.denoisers.base import BATCH, COLUMNS, ROWS, TEXT, Call, Draw, denoiser, make, prompt_mask

FRAMES = 2

HEIGHT, WIDTH = 2 * ROWS, 2 * COLUMNS
"""Latent pixels for patches of two by two."""

TOKENS = FRAMES * ROWS * COLUMNS


def _text_to_video(r: Draw, channels: int = 4) -> Call:
    """Channels before frames, integer timesteps, one prompt."""
    return {
        "hidden_states": r.rows(channels, FRAMES, HEIGHT, WIDTH),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
    }


# -- CogVideoX, Allegro, Latte -----------------------------------------------------------------------------------------


def _cogvideox(**config: Any) -> nn.Module:
    return make(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        time_embed_dim=12,
        text_embed_dim=20,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT,
        **config,
    )


def _cogvideox_call(r: Draw) -> Call:
    return {
        "hidden_states": r.rows(FRAMES, 4, HEIGHT, WIDTH),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
    }


@denoiser()
def cogvideox(r: Draw) -> tuple[nn.Module, Call]:
    """Absolute positions, as in the model of 2 billion parameters."""
    return _cogvideox(), _cogvideox_call(r)


@denoiser()
def cogvideox_rotary(r: Draw) -> tuple[nn.Module, Call]:
    """Rotary positions, as in the model of 5 billion parameters."""
    model = _cogvideox(use_rotary_positional_embeddings=True)
    return model, {**_cogvideox_call(r), "image_rotary_emb": (r.randn(TOKENS, 16), r.randn(TOKENS, 16))}


def _axis(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of one axis: two (length, width)."""
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(width // 2) * 2 / width)
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


@denoiser()
def allegro(r: Draw) -> tuple[nn.Module, Call]:
    """Rotary tables of three axes, gathered by integer positions inside the model."""
    model = make(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        cross_attention_dim=48,
        caption_channels=20,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        sample_frames=FRAMES,
        patch_size=2,
    )
    lengths = FRAMES, ROWS, COLUMNS
    where = torch.cartesian_prod(*(torch.arange(n) for n in lengths)).unbind(-1)
    rotary = tuple(_axis(n, 8) for n in lengths), tuple(axis[None] for axis in where)
    return model, {**_text_to_video(r), "image_rotary_emb": rotary}


@denoiser(blocks=("transformer_blocks", "temporal_transformer_blocks"))
def latte(r: Draw) -> tuple[nn.Module, Call]:
    """Blocks over space and over time in turns."""
    model = make(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        caption_channels=20,
        sample_size=HEIGHT,
        patch_size=2,
        video_length=FRAMES,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    call = _text_to_video(r)
    return model, {**call, "hidden_states": r.rows(4, FRAMES, HEIGHT, HEIGHT), "enable_temporal_attentions": True}


# -- HunyuanVideo, LTX, Mochi ------------------------------------------------------------------------------------------


def _hunyuan(r: Draw, **config: Any) -> tuple[nn.Module, Call]:
    model = make(
        "HunyuanVideoTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=2,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=20,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
        **config,
    )
    return model, {
        "hidden_states": r.rows(4, FRAMES, ROWS, COLUMNS),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_attention_mask": prompt_mask(dtype=torch.float32),
        "pooled_projections": r.rows(12),
        "guidance": torch.full((BATCH,), 6000.0),
    }


HUNYUAN_PROMPT = ("encoder_hidden_states", "pooled_projections", "guidance")
HUNYUAN_BLOCKS = ("transformer_blocks", "single_transformer_blocks")


@denoiser(prompt=HUNYUAN_PROMPT, blocks=HUNYUAN_BLOCKS)
def hunyuan_video(r: Draw) -> tuple[nn.Module, Call]:
    return _hunyuan(r)


@denoiser(prompt=HUNYUAN_PROMPT, blocks=HUNYUAN_BLOCKS)
def hunyuan_video_token_replace(r: Draw) -> tuple[nn.Module, Call]:
    """The tokens of the first frame are modulated as if they were clean."""
    return _hunyuan(r, image_condition_type="token_replace")


LTX: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "cross_attention_dim": 32,
    "caption_channels": 20,
    "qk_norm": "rms_norm_across_heads",
}

GRID = {"num_frames": FRAMES, "height": ROWS, "width": COLUMNS}


@denoiser()
def ltx(r: Draw) -> tuple[nn.Module, Call]:
    return make("LTXVideoTransformer3DModel", **LTX), {
        "hidden_states": r.rows(TOKENS, 4),
        "timestep": r.steps(),
        "encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_attention_mask": prompt_mask(),
        **GRID,
    }


@denoiser(
    latent=("hidden_states", "audio_hidden_states"), prompt=("encoder_hidden_states", "audio_encoder_hidden_states")
)
def ltx2(r: Draw) -> tuple[nn.Module, Call]:
    """A stream of video and one of audio, each of which attends to the other."""
    model = make(
        "LTX2VideoTransformer3DModel",
        **LTX,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_cross_attention_dim=16,
        rope_double_precision=False,
    )
    return model, {
        "hidden_states": r.rows(TOKENS, 4),
        "audio_hidden_states": r.rows(9, 4),
        "timestep": r.sigmas() * 1000,
        "encoder_hidden_states": r.rows(TEXT, 20),
        "audio_encoder_hidden_states": r.rows(TEXT, 20),
        "encoder_attention_mask": prompt_mask(),
        "audio_num_frames": 9,
        "fps": 25.0,
        **GRID,
    }


@denoiser()
def mochi(r: Draw) -> tuple[nn.Module, Call]:
    """Text tokens are selected by the prompt mask."""
    model = make(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=3,
        patch_size=2,
        pooled_projection_dim=16,
        text_embed_dim=24,
        time_embed_dim=24,
        qk_norm="rms_norm",
        activation_fn="swiglu",
        max_sequence_length=TEXT,
    )
    call = _text_to_video(r)
    return model, {**call, "encoder_hidden_states": r.rows(TEXT, 24), "encoder_attention_mask": prompt_mask()}


# -- Wan and its kin ---------------------------------------------------------------------------------------------------


def _wan(cls: str = "WanTransformer3DModel", **config: Any) -> nn.Module:
    return make(
        cls,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        patch_size=(1, 2, 2),
        text_dim=20,
        freq_dim=32,
        ffn_dim=48,
        cross_attn_norm=True,
        rope_max_seq_len=32,
        **config,
    )


@denoiser(blocks=("blocks",))
def wan(r: Draw) -> tuple[nn.Module, Call]:
    return _wan(), _text_to_video(r)


@denoiser(prompt=("encoder_hidden_states", "encoder_hidden_states_image"), blocks=("blocks",))
def wan_image_to_video(r: Draw) -> tuple[nn.Module, Call]:
    """Cross-attention to an image besides the prompt; the class takes all tokens but the last 512 for the image's."""
    model = _wan(image_dim=16, added_kv_proj_dim=24)
    text = r.rows(512, 20)
    return model, {**_text_to_video(r), "encoder_hidden_states": text, "encoder_hidden_states_image": r.rows(9, 16)}


@denoiser(blocks=("blocks",))
def wan_time_per_token(r: Draw) -> tuple[nn.Module, Call]:
    """A time for each token: the tokens of the first frame are clean."""
    times = r.steps()[:, None].float().repeat(1, TOKENS)
    times[:, : ROWS * COLUMNS] = 0
    return _wan(), {**_text_to_video(r), "timestep": times}


@denoiser(blocks=("blocks",))
def skyreels(r: Draw) -> tuple[nn.Module, Call]:
    return _wan("SkyReelsV2Transformer3DModel"), _text_to_video(r)


@denoiser(time=("timestep", "r_timestep"), blocks=("blocks",))
def anyflow(r: Draw) -> tuple[nn.Module, Call]:
    """Maps from one time to another, both given for each frame."""
    model = _wan("AnyFlowTransformer3DModel", gate_value=0.25, deltatime_type="r")
    times = r.steps()[:, None].float().repeat(1, FRAMES)
    return model, {
        "hidden_states": r.rows(FRAMES, 4, HEIGHT, WIDTH),
        "timestep": times,
        "r_timestep": times / 2,
        "encoder_hidden_states": r.rows(TEXT, 20),
    }


# -- Cosmos, Kandinsky -------------------------------------------------------------------------------------------------


def _resize(image: Tensor, size: list[int], interpolation: object) -> Tensor:
    return F.interpolate(image, size=size, mode="nearest")


def _without_torchvision() -> None:
    """Cosmos resizes a mask by torchvision, to its nearest pixels; without that package, give it the same of torch."""
    module: Any = importlib.import_module("diffusers.models.transformers.transformer_cosmos")
    if not hasattr(module, "transforms"):
        functional = SimpleNamespace(resize=_resize)
        module.transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))


@denoiser()
def cosmos(r: Draw) -> tuple[nn.Module, Call]:
    _without_torchvision()
    model = make(
        "CosmosTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        mlp_ratio=2,
        text_embed_dim=20,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=True,
        extra_pos_embed_type="learnable",
    )
    return model, {
        **_text_to_video(r),
        "attention_mask": prompt_mask(dtype=torch.float32),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, HEIGHT, WIDTH),
    }


@denoiser(prompt=("encoder_hidden_states", "pooled_projections"), blocks=("visual_transformer_blocks",))
def kandinsky5(r: Draw) -> tuple[nn.Module, Call]:
    """Channels last; one request a call."""
    model = make(
        "Kandinsky5Transformer3DModel",
        model_dim=32,
        ff_dim=48,
        num_text_blocks=3,
        num_visual_blocks=3,
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=20,
        in_text_dim2=16,
        time_dim=24,
        patch_size=(1, 2, 2),
        axes_dims=(4, 6, 6),
        visual_cond=False,
        attention_type="regular",
    )
    return model, {
        "hidden_states": r.randn(1, FRAMES, HEIGHT, WIDTH, 4),
        "encoder_hidden_states": r.randn(1, TEXT, 20),
        "timestep": r.steps()[:1].float(),
        "pooled_projections": r.randn(1, 16),
        "visual_rope_pos": [torch.arange(FRAMES), torch.arange(ROWS), torch.arange(COLUMNS)],
        "text_rope_pos": torch.arange(TEXT),
    }


@denoiser(prompt=(), blocks=("visual_transformer_blocks",))
def kandinsky6_upscaler(r: Draw) -> tuple[nn.Module, Call]:
    """Sparse attention over tiles; conditioned on a low-resolution video among the channels, and on no prompt."""
    model = make(
        "Kandinsky6SRTransformer3DModel",
        model_dim=32,
        ff_dim=48,
        num_visual_blocks=3,
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=24,
        patch_size=(1, 1, 1),
        axes_dims=(4, 6, 6),
        tile_sizes=((16, 16),),
        nabla_window=(3, 3, 3),
    )
    return model, {"hidden_states": r.randn(1, FRAMES, 16, 16, 9), "timestep": r.steps()[:1].float()}
