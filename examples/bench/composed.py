"""All rewrites in one recipe, and what was chosen among them: python -m examples.bench.composed --out FILE.csv

Joined recipes on the shipped models, beside plain sampling with fewer steps that costs as much. ``balanced`` is the
cheapest recipe here of which 95 % of samples reach 35 dB to the plain ones on every model, ``aggressive`` that of which
they reach 30 dB; the candidates that lost stay in the table. PSNR is the median over samples, ``psnr_low`` the 5th
percentile, accuracy what a classifier sees of what the prompts say.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from ditopt import demo, measure

EXACT = "canonicalize, outline_blocks, hoist_invariants"
INTEGER = "quantize{scheme=w8a8}, fuse_quantization"


def forecast(first: int, every: int) -> str:
    """The cache of the model's output."""
    return f"cache{{region=model,first={first},every={every},predictor=lagrange,order=1,time=timestep}}"


FIVE = (
    f"{EXACT}, skip_blocks{{region=blocks.40%:50%,since=0.6}}, select_tokens{{ratio=0.75,first=8,every=2}}, "
    f"{forecast(10, 2)}, {INTEGER}, sparse_attention{{pattern=draft,density=0.75,block=16,region=blocks.1:}}"
)

RECIPES = {
    "w8a8": "w8a8",
    "balanced": "balanced",
    "balanced{first=2}": "balanced{first=2}",
    "aggressive": "aggressive",
    "aggressive{interval=3}": "aggressive{interval=3}",
    "tokens and w8a8": f"{EXACT}, select_tokens{{ratio=0.75,first=6,every=2}}, {INTEGER}",
    "all five": FIVE,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits", "scenes", "sprites"])
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines: list[str] = []
    for name in args.models:
        model = demo.shipped(name, args.samples)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a pass that finds no grid says so; the row shows what it costs
            wanted = [(RECIPES[r], "eager") for r in args.only]
            found = demo.bench(model, wanted, steps=args.steps, rounds=1, compiled=False)
        print(f"{name}\n{measure.table(found.rows)}", flush=True)
        text = measure.to_csv(found.rows, model=name, samples=args.samples)
        lines += text.splitlines()[1 if lines else 0 :]
        if args.out:
            args.out.write_text("\n".join(lines) + "\n")
    if not args.out:
        sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
