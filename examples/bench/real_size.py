"""Binding times at real size, without weights: python -m examples.bench.real_size [NAME ...] [--out real_size.csv].

Published configurations are built under fake tensors (shapes and types, no memory), captured, and hoisted: how many of
the weights never see the latent and therefore leave the loop, and what capture and the exact passes cost.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ditopt._torch import weightless
from ditopt.capture import bind, capture
from ditopt.explanation import binding_shares
from ditopt.ir.cost import step_flops
from ditopt.pipeline import PassManager

Call = tuple[nn.Module, dict[str, Any]]
OUT = Path(__file__).with_suffix(".csv")
GB = 1e9


def half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def one(value: float = 500.0) -> Tensor:
    return torch.full((1,), value, dtype=torch.bfloat16)


def dit_xl() -> Call:
    """DiT-XL/2 at 256x256 pixels: 28 blocks."""
    model = diffusers.DiTTransformer2DModel(
        num_layers=28, num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, sample_size=32
    )
    label, t = torch.ones(1, dtype=torch.long), torch.full((1,), 500)
    return model, {"hidden_states": half(1, 4, 32, 32), "timestep": t, "class_labels": label}


def flux_dev() -> Call:
    """FLUX.1-dev at 1024x1024 pixels: 19 double and 38 single blocks."""
    text = {"encoder_hidden_states": half(1, 512, 4096), "pooled_projections": half(1, 768)}
    ids = {"img_ids": torch.zeros(4096, 3), "txt_ids": torch.zeros(512, 3)}
    model = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    return model, {"hidden_states": half(1, 4096, 64), "timestep": one(0.5), "guidance": one(3.5), **text, **ids}


def pixart_sigma() -> Call:
    """PixArt-Sigma at 1024x1024 pixels: 28 blocks."""
    model = diffusers.PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=False)
    mask = torch.ones(1, 300)
    sizes = {"resolution": None, "aspect_ratio": None}
    text = {"encoder_hidden_states": half(1, 300, 4096), "encoder_attention_mask": mask}
    return model, {"hidden_states": half(1, 4, 128, 128), "timestep": one(), "added_cond_kwargs": sizes, **text}


def qwen_image() -> Call:
    """Qwen-Image at 1024x1024 pixels: 60 double blocks."""
    model = diffusers.QwenImageTransformer2DModel()
    text = {"encoder_hidden_states": half(1, 128, 3584), "encoder_hidden_states_mask": torch.ones(1, 128).long()}
    shapes = {"img_shapes": [(1, 64, 64)]}
    return model, {"hidden_states": half(1, 4096, 64), "timestep": one(0.5), **shapes, **text}


def sd3_medium() -> Call:
    """Stable Diffusion 3 medium at 1024x1024 pixels: 24 double blocks."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    text = {"encoder_hidden_states": half(1, 333, 4096), "pooled_projections": half(1, 2048)}
    return model, {"hidden_states": half(1, 16, 128, 128), "timestep": one(), **text}


def wan_14b() -> Call:
    """Wan2.1-14B at 81 frames of 1280x720 pixels: 40 blocks."""
    model = diffusers.WanTransformer3DModel(num_attention_heads=40, attention_head_dim=128, num_layers=40)
    text = half(1, 512, 4096)
    return model, {"hidden_states": half(1, 16, 21, 90, 160), "timestep": one(), "encoder_hidden_states": text}


MODELS: dict[str, Callable[[], Call]] = {
    "DiT-XL/2": dit_xl,
    "FLUX.1-dev": flux_dev,
    "SD3-medium": sd3_medium,
    "PixArt-Sigma": pixart_sigma,
    "Qwen-Image": qwen_image,
    "Wan2.1-14B": wan_14b,
}


def measure(name: str) -> dict[str, object]:
    """One row of the table. Memory is the peak of the process, so each row wants a process of its own."""
    torch.set_default_dtype(torch.bfloat16)
    with weightless():
        model, call = MODELS[name]()
        model.eval()
    began = time.process_time()
    spec, tensors = bind(model, (), call)
    captured = capture(model, spec, tensors)
    seconds = time.process_time() - began
    began = time.process_time()
    history = PassManager("lossless").run(captured.program)
    passes = time.process_time() - began
    outlined = next(r.program for r in history if r.program.blocks())
    shares = binding_shares(history[0].program)
    weights, work = (sum(v[i] for v in shares.values()) for i in (0, 1))
    free = [v for kind, v in shares.items() if kind not in ("latent", "constant")]
    return {
        "model": name,
        "parameters_B": round(sum(p.numel() for p in model.parameters()) / GB, 2),
        "nodes": len(captured.program.step.graph.nodes),
        "TFLOP_step": round(step_flops(outlined)[0] / 1e12, 2),
        "blocks": len(outlined.blocks()),
        "bodies": len({r.function for r in outlined.blocks()}),
        "hoisted_weights_percent": round(100 * sum(v[0] for v in free) / weights, 1),
        "hoisted_flops_percent": round(100 * sum(v[1] for v in free) / work, 2),
        "capture_s": round(seconds),
        "passes_s": round(passes),
        "peak_GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--out", type=Path, help=f"write the table there (the committed one is {OUT.name})")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [n for n in args.name if n not in MODELS]:
        parser.error(f"no configuration is called {unknown[0]!r}; there are: {', '.join(MODELS)}")
    if args.row:
        print(json.dumps(measure(args.name[0])))
        return
    rows: list[dict[str, str]] = []
    for name in args.name:
        command = [sys.executable, "-m", "examples.bench.real_size", name, "--row"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(said.splitlines()[-1]))
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
