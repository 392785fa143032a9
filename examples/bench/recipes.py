"""Every recipe that leaves work of some steps out, as it ships, on the shipped models, beside fewer steps.

    python -m examples.bench.recipes --models digits scenes sprites --out examples/bench/recipes.csv
    python -m examples.bench.recipes --readme examples/bench/recipes.csv

All parameters have their defaults; recipes that are fitted are fitted on the requests of seeds 0 and 1 (searches take a
minute), and judged on others; those that need what was trained elsewhere are left out. ``share``: executed FLOPs of the
plain model's, of the second request. ``reused``: decisions of a request that reused (blocks that are never run are
none). ``psnr``: dB to the plain samples, mean. ``steps``, ``psnr_steps``: as many plain steps as do at least that work
(a tenth of a step less is allowed). ``said``: why a recipe cannot be used on that model.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import ditopt
from ditopt import measure
from ditopt.errors import DitoptError
from ditopt.recipe import available
from examples.bench.caching import Bench

FULL = 30
EVERY_STEP = {"quantize", "sparse_attention"}
"""Passes that make all steps cheaper; what they save is not in FLOPs."""

ELSEWHERE = {"router", "smoothquant"}
"""Calibrations of recipes that read what was trained elsewhere, or leave no work out."""


@dataclass(frozen=True)
class Row:
    """See the top of this file; numbers are NaN where ``said`` says why."""

    model: str
    recipe: str
    share: float
    reused: int
    psnr: float
    steps: int
    psnr_steps: float
    said: str = ""


def candidates() -> list[str]:
    """Names of the recipes that leave work out."""
    found = []
    for name, system in available().items():
        passes = set() if not system.passes else {s.name for s in system.recipe().steps}
        if system.contract == "approximate" and not passes & EVERY_STEP and system.calibration not in ELSEWHERE:
            found.append(name)
    return sorted(found)


def measured(bench: Bench, name: str, plain: dict[int, float]) -> Row:
    """What a recipe is worth on a model. ``plain``: the PSNR of fewer steps, filled as needed."""
    system = available()[name]
    nan = math.nan
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = "table" in system.values() and system.calibration
            recipe: Any = f"{name}{{table={folder}/table.safetensors}}" if table else name
            if system.calibration and (table or not system.passes):
                recipe = ditopt.calibrate(
                    bench.pipeline(), recipe, bench.shipped.sample, steps=FULL, seeds=range(2), progress=False
                )
            pipe = ditopt.optimize(bench.pipeline(), recipe, steps=FULL, target="eager")
            images, flops = bench.run(pipe, FULL)
        stats = pipe.transformer.stats
        reused = round(sum(stats.hits.values()) / max(stats.requests, 1))
    except DitoptError as error:
        return Row(bench.shipped.name, name, nan, 0, nan, 0, nan, str(error).splitlines()[0][:200])
    share = flops / bench.flops
    steps = min(FULL, max(2, math.ceil(share * FULL - 0.1)))
    if steps not in plain:
        plain[steps] = psnr(bench, bench.run(bench.pipeline(), steps, count=False)[0])
    return Row(bench.shipped.name, name, share, reused, psnr(bench, images), steps, plain[steps])


def psnr(bench: Bench, images: Any) -> float:
    """To the plain samples, mean in dB."""
    return float(measure.psnr(images.clamp(0, 1), bench.plain).mean())


def write(rows: Sequence[Row], path: Path) -> None:
    """The rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def read(path: Path) -> list[Row]:
    """The rows that ``write`` wrote."""
    with path.open(newline="") as file:
        return [
            Row(
                d["model"],
                d["recipe"],
                float(d["share"]),
                int(d["reused"]),
                float(d["psnr"]),
                int(d["steps"]),
                float(d["psnr_steps"]),
                d["said"],
            )
            for d in csv.DictReader(file)
        ]


def verdict(row: Row) -> str:
    """A cell of README's table."""
    if row.said:
        return "refused"
    if math.isinf(row.psnr):
        return "finds nothing to do"
    word = "wins" if row.psnr > row.psnr_steps else "**loses**"
    return f"{row.share:.0%}: {row.psnr:.1f}, {word} ({row.psnr_steps:.1f})"


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table, a recipe a line and a model a column."""
    rows = list(rows)
    models = list(dict.fromkeys(r.model for r in rows))
    cells = {(r.recipe, r.model): verdict(r) for r in rows}
    lines = ["| recipe | " + " | ".join(f"*{m}*" for m in models) + " |", "|---" * (len(models) + 1) + "|"]
    for name in sorted({r.recipe for r in rows}):
        lines.append(f"| `{name}` | " + " | ".join(cells.get((name, m), "") for m in models) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits"])
    parser.add_argument("--recipes", nargs="+", help="default: all that leave work out")
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4, help="samples of a request")
    parser.add_argument("--out", type=Path, help="rows that it holds stay, and are not measured again")
    parser.add_argument(
        "--readme", type=Path, metavar="CSV", help="print README's table of these rows, measure nothing"
    )
    args = parser.parse_args()
    if args.readme:
        print(table(read(args.readme)))
        return
    rows = read(args.out) if args.out and args.out.exists() else []
    for model in args.models:
        there = {r.recipe for r in rows if r.model == model}
        names = [n for n in args.recipes or candidates() if n not in there]
        if not names:
            continue
        bench = Bench(model, FULL, args.requests, args.samples, reference=False)
        plain: dict[int, float] = {}
        for name in tqdm(names, unit="recipe", mininterval=5):
            rows.append(measured(bench, name, plain))
            print(rows[-1], flush=True)
            if args.out:
                write(rows, args.out)


if __name__ == "__main__":
    main()
