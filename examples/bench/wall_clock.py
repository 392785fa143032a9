"""Does time fall as executed FLOPs do? python -m examples.bench.wall_clock [--depth 12] [--out wall_clock.csv]

A DiT of published width (DiT-B: 768 channels, 12 heads) over 1024 tokens, with random weights: how long a request takes
does not depend on what they are. The plain model and every recipe run the same requests in turns, so that whatever else
the machine does meets all of them; of each round the ratio to the plain request of that round is kept, and the median
of rounds is told: ``time`` by the clock, ``cpu`` in seconds of the processor, which other work disturbs less. ``share``
is what torch's own counter sees executed, over that of the plain model; ``kept`` is how much of the saving that it
promises is there: (1 - cpu) / (1 - share).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ditopt
from ditopt.optimized import OptimizedModule

RECIPES = (
    "lossless",
    "fora{interval=2}",
    "fora{interval=3}",
    "taylorseer{interval=3,order=2}",
    "forecast{interval=2}",
    "dbcache{F=1,W=2,policy=static,mask=1100100100}",
)
OUT = Path(__file__).with_suffix(".csv")


def dit_b(depth: int) -> nn.Module:
    """DiT-B/2 on latents of 64x64."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_layers=depth, num_attention_heads=12, attention_head_dim=64, in_channels=4, out_channels=4, sample_size=64
    )
    return model.eval().requires_grad_(False)


def request(model: nn.Module, steps: int, seed: int) -> Tensor:
    """A request of ``steps`` Euler steps, one sample."""
    generator = torch.Generator().manual_seed(seed)
    x, label = torch.randn(1, 4, 64, 64, generator=generator), torch.randint(1000, (1,), generator=generator)
    with torch.no_grad(), model.session(steps=steps) if isinstance(model, OptimizedModule) else nullcontext():
        for t in torch.linspace(999, 0, steps).round().long():
            x = x - model(x, timestep=t[None], class_labels=label, return_dict=False)[0] / steps
    return x


def flops(run: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return int(counter.get_total_flops())


def rows(depth: int, steps: int, rounds: int, recipes: Sequence[str], target: str) -> list[dict[str, Any]]:
    """What each recipe executes and how long it takes, beside the plain model."""
    plain = dit_b(depth)
    # Executed work is counted on eager, where the counter sees every operator; the schedule is the same elsewhere.
    counted = {r: ditopt.optimize(plain, r, steps=steps, target="eager") for r in recipes}
    full = flops(lambda: request(plain, steps, 0))
    for model in counted.values():
        request(model, steps, 1)  # captures, and fills tables
    shares = {r: flops(lambda m=m: request(m, steps, 0)) / full for r, m in counted.items()}  # type: ignore[misc]
    timed = counted
    if target != "eager":
        timed = {r: ditopt.optimize(plain, r, steps=steps, target=target) for r in recipes}
        for model in timed.values():
            request(model, steps, 1)
    turns = list({"plain": plain, **timed}.items())
    clocks = {"time": time.perf_counter, "cpu": time.process_time}
    seconds: dict[tuple[str, str], list[float]] = {(c, name): [] for c in clocks for name, _ in turns}
    for k in tqdm(range(rounds), unit="round"):
        start = k * len(turns) // rounds
        for name, model in [*turns[start:], *turns[:start]]:
            began = {c: clock() for c, clock in clocks.items()}
            request(model, steps, 2 + k)
            for c, clock in clocks.items():
                seconds[c, name].append(clock() - began[c])
    out = []
    for r in recipes:
        row: dict[str, Any] = {"recipe": r, "target": target, "share": shares[r]}
        for c in clocks:
            pairs = zip(seconds[c, r], seconds[c, "plain"], strict=True)
            row[c] = statistics.median(own / base for own, base in pairs)
        row["kept"] = (1 - row["cpu"]) / (1 - shares[r]) if shares[r] < 0.99 else float("nan")
        out.append(row)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12, help="blocks (DiT-B has 12)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--target", default="eager")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(args.depth, args.steps, args.rounds, args.recipes, args.target)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["recipe", "target", "blocks", "steps", "rounds", "share", "time", "cpu", "kept"])
        for row in found:
            numbers = [f"{row[k]:.4f}" for k in ("share", "time", "cpu", "kept")]
            writer.writerow([row["recipe"], row["target"], args.depth, args.steps, args.rounds, *numbers])
    sys.stdout.write(args.out.read_text())


if __name__ == "__main__":
    main()
