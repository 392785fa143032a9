"""What smoothing does to samples of the shipped models: python -m examples.bench.smoothing --out FILE.csv

For each model the maxima of the activations are recorded once (``smoothquant``, other seeds than those compared), then
schemes are compared with and without smoothing: PSNR to the plain samples, median and 5th percentile over samples.
``smoothed`` is how many inputs of quantized layers are divided, of how many.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import ditopt
from ditopt import demo

SCHEMES = {"w8a8": "w8a8", "svdquant": "svdquant{rank=16,group=32}"}
ALPHAS = (0.3, 0.5, 0.75)


def with_alpha(recipe: str, alpha: float | None, maxima: Path) -> str:
    """``recipe``, which smooths by ``alpha``."""
    if alpha is None:
        return recipe
    given = f"alpha={alpha}" + (f",maxima={maxima}" if alpha else "")
    return f"{recipe[:-1]},{given}}}" if recipe.endswith("}") else f"{recipe}{{{given}}}"


def smoothed(model: demo.Shipped, recipe: str, steps: int) -> str:
    """How many inputs of layers the recipe smooths, of how many."""
    pipe = ditopt.optimize(model.pipeline(), recipe, target="eager", steps=steps)
    model.sample(pipe, 0, 2)
    notes = " ".join(n for r in pipe.transformer.history for n in r.notes)
    found = re.search(r"(\d+ of \d+) inputs of layers", notes)
    return found.group(1) if found else ""


def run(
    name: str, schemes: Sequence[str], samples: int, steps: int, seeds: int, folder: Path
) -> list[dict[str, object]]:
    """The rows of one model."""
    model, table = demo.shipped(name, samples), folder / f"{name}.safetensors"
    ditopt.calibrate(
        model.pipeline(), f"smoothquant{{table={table}}}", model.sample, steps=steps, seeds=range(100, 100 + seeds)
    )
    wanted = {
        with_alpha(recipe, alpha, table): (scheme, alpha)
        for scheme, recipe in SCHEMES.items()
        if scheme in schemes
        for alpha in (None, *ALPHAS)
    }
    found = demo.bench(model, [(r, "eager") for r in wanted], steps=steps, rounds=1, compiled=False)
    rows = {row.name: row for row in found.rows}
    return [
        {
            "model": name,
            "scheme": scheme,
            "alpha": "none" if alpha is None else alpha,
            "smoothed": smoothed(model, recipe, steps) if alpha is not None else "",
            "psnr": f"{rows[recipe].psnr:.1f}",
            "psnr_low": f"{rows[recipe].psnr_low:.1f}",
            "samples": samples,
            "steps": steps,
        }
        for recipe, (scheme, alpha) in wanted.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits", "scenes", "sprites"])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1, help="requests that are recorded")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            rows += run(name, args.schemes, args.samples, args.steps, args.seeds, Path(folder))
    with open(args.out, "w", newline="") if args.out else sys.stdout as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
