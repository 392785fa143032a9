"""Quantized steps against what else runs on a CPU: python -m examples.bench.quantize [--out quantize.csv].

One step of a DiT (diffusers, random weights) of the width of DiT-B, 768, on 1024 tokens, on one thread:

* the plain model in eager float32, and exported to onnxruntime in float32;
* that export through onnxruntime's own ``quantize_dynamic`` (8 bits, a scale for each output channel);
* recipes of ditopt by target.

All take turns in one process, the order turning with each round; a row's numbers are medians over rounds of wall-clock
seconds and of ratios to the row that they name *in the same round*. The share of the quantized layers' FLOPs in integer
kernels is the engine's own profile. Relative errors are of random weights: a check, no measure of images.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from diffusers import DiTTransformer2DModel
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

import ditopt
from ditopt.kernels import observe

RECIPES = (("lossless", "onnxruntime"), ("w8a8", "onnxruntime"), ("w8a8", "inductor"), ("w8a8", "eager"))

Step = Callable[[], Tensor]


def model_of(layers: int, size: int) -> tuple[Any, dict[str, Any]]:
    """The model, and the arguments of a step: ``size`` x ``size`` latents are a quarter as many tokens."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_layers=layers, num_attention_heads=12, attention_head_dim=64, out_channels=4, sample_size=size
    )
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
    call = {
        "hidden_states": torch.randn(1, 4, size, size),
        "timestep": torch.tensor([500]),
        "class_labels": torch.tensor([1]),
    }
    return model.eval().requires_grad_(False), call


def exported(model: Any, call: dict[str, Any], folder: Path) -> tuple[Step, Step]:
    """The model through torch.onnx in onnxruntime, plain and by quantize_dynamic."""
    plain, quantized = folder / "plain.onnx", folder / "quantized.onnx"
    program = torch.onnx.export(
        model, (), kwargs={**call, "return_dict": False}, dynamo=True, opset_version=20, verbose=False
    )
    assert program is not None
    program.save(plain)
    loaded = onnx.load(plain)
    del loaded.graph.value_info[:]  # else quantize_dynamic finds shapes that it does not expect
    onnx.save(loaded, plain)
    quantize_dynamic(plain, quantized, per_channel=True, weight_type=QuantType.QInt8)
    return tuple(_session(f, call) for f in (plain, quantized))  # type: ignore[return-value]


def _session(file: Path, call: dict[str, Any]) -> Step:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    given = {k: v.numpy() for k, v in call.items() if k in names}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def timed(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Wall-clock seconds of each step, by round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for k in range(rounds):
        turn = k % len(names)
        for name in [*names[turn:], *names[:turn]]:
            began = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _ratio(theirs: Sequence[float], own: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(theirs, own, strict=True)), 3)


def run(layers: int, size: int, rounds: int, wanted: Sequence[tuple[str, str]]) -> list[dict[str, object]]:
    """The rows of the table."""
    model, call = model_of(layers, size)
    steps: dict[str, Step] = {"eager float32": lambda: model(**call, return_dict=False)[0]}
    integer: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        steps["onnxruntime float32"], steps["onnxruntime quantize_dynamic"] = exported(model, call, Path(folder))
        for recipe, target in wanted:
            fast = ditopt.optimize(model, recipe, target=target)
            if recipe != "lossless":
                observed = observe(fast, **call)
                integer[f"{recipe} on {target}"] = f"{observed.share:.3f}"
                print(observed, file=sys.stderr)
            steps[f"{recipe} on {target}"] = lambda f=fast: f(**call, return_dict=False)[0]  # type: ignore[misc]
        reference = steps["eager float32"]()
        error = {n: float((s() - reference).norm() / reference.norm()) for n, s in steps.items()}
        seconds = timed(steps, rounds)
    fields = {"tokens": (size // 2) ** 2, "layers": layers, "threads": torch.get_num_threads(), "rounds": rounds}
    return [
        {
            "way": name,
            **fields,
            "seconds": round(statistics.median(own), 4),
            **{f"x {base}": _ratio(seconds[base], own) for base in list(steps)[:3]},
            "integer_share": integer.get(name, ""),
            "relative_error": f"{error[name]:.2e}",
        }
        for name, own in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", type=int, default=64, help="latents a side; a token is 2 x 2 of them")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--recipes", nargs="+", default=[f"{r}@{t}" for r, t in RECIPES], metavar="RECIPE@TARGET")
    parser.add_argument("--out", type=Path, help="write here instead of stdout")
    given = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [(r, t) for r, _, t in (text.rpartition("@") for text in given.recipes)]
    rows = run(given.layers, given.size, given.rounds, wanted)
    with open(given.out or os.devnull, "w", newline="") as file:
        for out in [file] if given.out else [sys.stdout]:
            writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
