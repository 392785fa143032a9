"""Token selection on a shipped model: PSNR against executed FLOPs, beside fewer steps at the same seeds.

    python -m examples.bench.tokens --model digits --samples 4 --out examples/bench/tokens.csv

Rows are added to the file as they are measured. ``share``: executed FLOPs inside blocks, of the plain model's.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

import ditopt
from ditopt import demo, measure

RECIPES = ("ras", "ras{high_ratio=0}", "ras{share=halves}", "ras{sample_ratio=0.75}")
FIELDS = ("model", "setting", "steps", "samples", "share", "psnr", "psnr_low")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samples", type=int, default=20, help="samples of the one request")
    parser.add_argument("--fewer", type=int, nargs="*", default=[24, 22, 20])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model = demo.shipped(given.model, given.samples)
    plain = model.sample(model.pipeline(), 0, given.steps)

    def note(setting: str, steps: int, share: float, samples: torch.Tensor) -> None:
        error = measure.psnr(samples, plain)
        row = (
            given.model,
            setting,
            steps,
            given.samples,
            f"{share:.4f}",
            f"{error.median():.2f}",
            f"{error.min():.2f}",
        )
        fresh = not given.out.exists()
        with given.out.open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([FIELDS, row] if fresh else [row])
        print(*row, flush=True)

    for recipe in given.recipes:
        fast = ditopt.optimize(model.pipeline(), recipe, steps=given.steps, target="eager")
        samples = model.sample(fast, 0, given.steps)
        stats = fast.transformer.stats
        note(recipe, given.steps, stats.share_block_flops, samples)
    for steps in given.fewer:
        note("fewer steps", steps, steps / given.steps, model.sample(model.pipeline(), 0, steps))


if __name__ == "__main__":
    main()
