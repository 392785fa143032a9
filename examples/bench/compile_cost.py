"""What a deep model costs to compile: python -m examples.bench.compile_cost [--depths 4 28] [--rounds 3] [--out FILE].

The same DiT (diffusers, random weights) at several depths through ``ditopt.optimize(..., target="inductor")``: seconds
of capture, passes and compilation up to the first result, beside ``torch.compile`` of the plain model. Blocks that are
equal up to their weights are one function, so the cost should hardly grow with depth. CPU seconds, children included
and compiled in one process, each time in a process of its own with an empty compiler cache; the depths in turns, the
median of the rounds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

import ditopt

OUT = Path(__file__).with_suffix(".csv")

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
    began = cpu_seconds()
    fast = ditopt.optimize(model, "lossless", target="inductor") if way == "ditopt" else torch.compile(model)
    with torch.no_grad():
        out = fast(**call, return_dict=False)[0]
    took = round(cpu_seconds() - began, 1)
    error = float((out - plain).abs().max() / plain.abs().max())
    return {"way": way, "depth": depth, "cpu_s": took, "relative_error": f"{error:.1e}"}


def fresh(way: str, depth: int) -> dict[str, Any]:
    """A row from a process of its own."""
    command = [sys.executable, "-m", "examples.bench.compile_cost", "--row", way, str(depth)]
    with tempfile.TemporaryDirectory() as cache:
        # one compiling process, which is this one: the time of workers is counted only when they end
        more = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **more})
    row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 28])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help=f"write the table there (the committed one is {OUT.name})")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row[0], int(args.row[1]))))
        return
    rows = []
    for way in args.ways:
        taken: dict[int, list[dict[str, Any]]] = {depth: [] for depth in args.depths}
        for _ in range(args.rounds):
            for depth in args.depths:
                taken[depth].append(fresh(way, depth))
                print(way, depth, taken[depth][-1]["cpu_s"], flush=True)
        for found in taken.values():
            rows.append({**found[0], "cpu_s": statistics.median(row["cpu_s"] for row in found)})
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
