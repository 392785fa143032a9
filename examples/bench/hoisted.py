"""Whether hoisting changes what an engine gives: python -m examples.bench.hoisted [NAME ...] [--out hoisted.csv].

For each denoiser of ``tests/denoisers``, six steps with ``lossless`` and six with the same passes but hoisting, on the
same engine: the largest distance of a step's outputs, relative to their norm. Each denoiser in a process of its own; a
model that cannot run on a target has the reason there. Rows of ``--out`` replace those in the file as they come.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ditopt
from examples.bench.probe import STEPS, Outputs, Request, one_line, tensors_of
from tests.denoisers import REGISTRY

OUT = Path(__file__).with_suffix(".csv")

WITHOUT = "canonicalize, outline_blocks"

TARGETS = ("inductor", "onnxruntime")

BOUND = 1e-6


@torch.no_grad()
def outputs(request: Request, recipe: str, target: str) -> Outputs:
    """What one request gives."""
    fast = ditopt.optimize(request.model, recipe, example_inputs=request.calls[0], target=target, steps=STEPS)
    with fast.session(steps=STEPS):
        return [tensors_of(fast(**call)) for call in request.calls]


def apart(a: Outputs, b: Outputs) -> float:
    """The distance of outputs relative to their norm, the largest of all steps."""
    pairs = [(x, y) for step, other in zip(a, b, strict=True) for x, y in zip(step, other, strict=True)]
    return max(_distance(x, y) for x, y in pairs)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def measure(name: str, targets: Sequence[str]) -> dict[str, str]:
    """A row of the table."""
    warnings.simplefilter("ignore")  # the models' own
    torch.set_num_threads(1)
    request = Request.of(REGISTRY[name])
    row = {"model": name}
    for target in targets:
        try:
            got, want = (outputs(request, recipe, target) for recipe in ("lossless", WITHOUT))
            row[target] = f"{apart(got, want):.1e}"
        except Exception as error:  # whatever a model brings up is an answer
            row[target] = one_line(error)
    return row


def read(file: Path) -> dict[str, dict[str, str]]:
    """The rows of a table by model; none where there is no file."""
    if not file.exists():
        return {}
    with file.open(newline="") as stream:
        return {row["model"]: row for row in csv.DictReader(stream)}


def write(rows: dict[str, dict[str, str]], file: Path) -> None:
    """A table in the order of the registry."""
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, ["model", *TARGETS], lineterminator="\n")
        table.writeheader()
        table.writerows(rows[name] for name in REGISTRY if name in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", default=list(REGISTRY), help="denoisers (default: all)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--out", type=Path, help=f"the table (the committed one is {OUT.name})")
    args = parser.parse_args()
    if unknown := [n for n in args.name if n not in REGISTRY]:
        parser.error(f"no denoiser is called {unknown[0]!r}; there are: {', '.join(REGISTRY)}")
    rows = read(args.out) if args.out else {}
    fresh: Any = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        for name, row in zip(args.name, pool.map(measure, args.name, [args.targets] * len(args.name)), strict=True):
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            rows[name] = {**rows.get(name, {}), **row}
            if args.out:
                write(rows, args.out)
    for target in args.targets:
        values = [float(v) for row in rows.values() if (v := row.get(target, "")) and v[:1].isdigit()]
        if values:
            near = sum(v <= BOUND for v in values)
            print(f"{target}: {near} of {len(values)} within {BOUND:g}, worst {max(values):.1e}")


if __name__ == "__main__":
    main()
