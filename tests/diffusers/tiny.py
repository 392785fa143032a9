"""Tiny pipelines of diffusers' own classes: random denoiser, encoders and VAE, built from configurations.

Tokenizers are the one stand-in: real ones come from files that are not part of the libraries.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

VOCABULARY = 64


class Words:
    """A tokenizer: one number a word, the same in every process."""

    model_max_length = 8
    added_tokens_encoder: tuple[str, ...] = ()

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def __call__(self, text: Any, max_length: int | None = None, **_: Any) -> Any:
        rows = [
            [2 + zlib.crc32(w.encode()) % (VOCABULARY - 3) for w in t.split()]
            for t in ([text] if isinstance(text, str) else text)
        ]
        length = max_length or max(len(r) for r in rows)
        padded = [(r + [VOCABULARY - 1] + [0] * length)[:length] for r in rows]
        mask = [[int(i <= len(r)) for i in range(length)] for r in rows]
        return SimpleNamespace(input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask))

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [str(row) for row in ids.tolist()]


def clip(cls: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=1,
    )
    return cls(config)


def t5(cls: Any, config: Any) -> Any:
    return cls(config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def vae(channels: int) -> Any:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        block_out_channels=[4],
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


def noise(model: nn.Module) -> nn.Module:
    """``model`` in eval mode, with noise on every weight that is constant: gates that are zero hide the blocks."""
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() == 1 or float(p.std()) == 0:
                p.add_(torch.randn(p.shape) * 0.15)
    return model.eval()


def sd3() -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        qk_norm="rms_norm",
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        noise(transformer),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(4).eval(),
        clip(CLIPTextModelWithProjection).eval(),
        Words(),
        clip(CLIPTextModelWithProjection).eval(),
        Words(),
        t5(T5EncoderModel, T5Config).eval(),
        Words(),
    )


def flux() -> Any:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae(4).eval(),
        clip(CLIPTextModel).eval(),
        Words(),
        t5(T5EncoderModel, T5Config).eval(),
        Words(),
        noise(transformer),
    )


def wan_denoiser() -> Any:
    return noise(
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
    )


def wan(experts: int = 1) -> Any:
    return WanPipeline(
        Words(),
        t5(UMT5EncoderModel, UMT5Config).eval(),
        AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        wan_denoiser(),
        wan_denoiser() if experts == 2 else None,
        boundary_ratio=0.8 if experts == 2 else None,
    )


MAKE: dict[str, Callable[[], Any]] = {"sd3": sd3, "flux": flux, "wan": wan, "wan2": functools.partial(wan, 2)}


@functools.cache
def _prototype(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = MAKE[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(name: str) -> Any:
    """A new pipeline; the same weights each time."""
    return copy.deepcopy(_prototype(name))


ARGUMENTS: dict[str, dict[str, Any]] = {
    "sd3": {"height": 8, "width": 8, "max_sequence_length": 8},
    "flux": {"height": 8, "width": 8, "max_sequence_length": 8},
    "wan": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8},
}
ARGUMENTS["wan2"] = ARGUMENTS["wan"]


def run(pipe: Any, name: str, steps: int | None = 6, guided: bool = True, seed: int = 0, **more: Any) -> Tensor:
    """The latents of one request."""
    scale = {"guidance_scale": 4.0 if guided else 1.0}
    if name == "flux":
        scale = {"guidance_scale": 3.5, "true_cfg_scale": 4.0 if guided else 1.0}
    arguments = {
        "prompt": "a small red boat",
        "negative_prompt": "fog" if guided else None,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "return_dict": False,
        **scale,
        **ARGUMENTS[name],
        **more,
    }
    result: Tensor = pipe(**arguments)[0]
    return result
