"""What a deep model costs to compile: python -m examples.bench.compile_cost [--depths 4 28] [--out compile_cost.csv].

The same DiT (diffusers, random weights) at several depths through ``ditopt.optimize(..., target="inductor")``: seconds
of capture, passes and compilation up to the first result, beside ``torch.compile`` of the plain model. Blocks that are
equal up to their weights are one function, so the cost should hardly grow with depth. CPU seconds, children included,
each row in a process of its own with an empty compiler cache.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

import ditopt

WAYS = ("ditopt", "torch.compile")


def cpu_seconds() -> float:
    """CPU time of this process and of the compilers it ran."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(way: str, depth: int) -> dict[str, object]:
    """One row: seconds until the first result is there."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_layers=depth, num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, sample_size=16
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model.eval().requires_grad_(False)
    call = {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "timestep": torch.full((1,), 500),
        "class_labels": torch.ones(1, dtype=torch.long),
    }
    plain = model(**call, return_dict=False)[0]
    began, wall = cpu_seconds(), time.perf_counter()
    fast = ditopt.optimize(model, "lossless", target="inductor") if way == "ditopt" else torch.compile(model)
    with torch.no_grad():
        out = fast(**call, return_dict=False)[0]
    row = {"way": way, "depth": depth, "cpu_s": round(cpu_seconds() - began, 1)}
    error = float((out - plain).abs().max() / plain.abs().max())
    return {**row, "wall_s": round(time.perf_counter() - wall, 1), "relative_error": f"{error:.1e}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 28])
    parser.add_argument("--out", type=Path, help="write the table there")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row[0], int(args.row[1]))))
        return
    rows = []
    for way in WAYS:
        for depth in args.depths:
            command = [sys.executable, "-m", "examples.bench.compile_cost", "--row", way, str(depth)]
            with tempfile.TemporaryDirectory() as cache:
                run = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    check=True,
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                )
            rows.append(json.loads(run.stdout.splitlines()[-1]))
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
