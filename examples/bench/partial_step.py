"""What does a step on part of the tokens cost? python -m examples.bench.partial_step [--depth 4]

A DiT of published width (DiT-B: 768 channels, 12 heads) over 1024 tokens with random weights, on one thread, by the
pass ``select_tokens``: full and partial steps take turns within one request, and each partial step is compared with the
two full steps around it. ``time``: the median of these ratios by the clock, ``cpu``: in seconds of the processor, which
other work disturbs less; ``flops``: the ratio of executed FLOPs. Kept keys and values, the choice of tokens and every
copy are in the partial step.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ditopt
from examples.bench.wall_clock import dit_b

OUT = Path(__file__).with_suffix(".csv")
CLOCKS = {"time": time.perf_counter, "cpu": time.process_time}


def measured(depth: int, ratio: float, rounds: int, target: str) -> dict[str, Any]:
    """The row of one target and share of tokens; the first round warms up and is not counted."""
    steps = 2 * rounds + 3
    recipe = f"hoist_invariants, select_tokens{{ratio={ratio},mask={'10' * (rounds + 1)}1}}"
    fast = ditopt.optimize(dit_b(depth), recipe, steps=steps, target=target)
    generator = torch.Generator().manual_seed(0)
    x, label = torch.randn(1, 4, 64, 64, generator=generator), torch.zeros(1, dtype=torch.int64)
    spent: dict[str, list[float]] = {name: [] for name in CLOCKS}
    flops: list[int] = []
    with torch.no_grad(), fast.session(steps=steps):
        for t in torch.linspace(999, 0, steps).round().long():
            began, done = {c: clock() for c, clock in CLOCKS.items()}, fast.stats.flops
            x = x - fast(x, timestep=t[None], class_labels=label, return_dict=False)[0] / steps
            for c, clock in CLOCKS.items():
                spent[c].append(clock() - began[c])
            flops.append(fast.stats.flops - done)
    ratios = {
        c: [2 * own / (before + after) for before, own, after in zip(s[2::2], s[3::2], s[4::2], strict=False)]
        for c, s in spent.items()
    }
    seconds = [statistics.median(spent["cpu"][k::2]) for k in (2, 3)]
    return {
        "target": target,
        "active": ratio,
        "full_s": seconds[0],
        "partial_s": seconds[1],
        "flops": flops[3] / flops[2],
        **{c: statistics.median(r) for c, r in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4, help="blocks (DiT-B has 12)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5], help="shares of the tokens")
    parser.add_argument("--targets", nargs="+", default=["eager", "inductor", "onnxruntime"])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        numbers = ("full_s", "partial_s", "flops", "time", "cpu")
        writer.writerow(["target", "tokens", "active", "blocks", "rounds", *numbers])
        for target in args.targets:
            for ratio in args.ratios:
                row = measured(args.depth, ratio, args.rounds, target)
                told = [f"{row[k]:.4f}" for k in numbers]
                writer.writerow([target, 1024, ratio, args.depth, args.rounds, *told])
                file.flush()
    sys.stdout.write(args.out.read_text())


if __name__ == "__main__":
    main()
