"""What ditopt's analysis costs: python -m examples.bench.speed [NAME ...] [--rounds 3] [--out speed.csv].

For each denoiser of ``tests/denoisers`` that torch.export alone can trace, CPU seconds of ``ditopt.optimize`` with
every exact pass (capture, its check against the model, structure, passes, and what eager runs), beside those of
``torch.export.export(strict=False)`` with ``run_decompositions({})``. In turns, the median of the rounds; each denoiser
in a process of its own, in which both ran once before on another model.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ditopt
from tests.denoisers import REGISTRY

OUT = Path(__file__).with_suffix(".csv")

EXACT = "canonicalize, recognize_attention, lower_complex, outline_blocks, hoist_invariants"

GOAL = 2.0
"""How many times the bare export everything may take."""


def bare(model: nn.Module, call: dict[str, Any]) -> None:
    """What torch does for such a capture."""
    with torch.no_grad():
        torch.export.export(model, (), dict(call), strict=False).run_decompositions({})


def whole(model: nn.Module, call: dict[str, Any]) -> None:
    """What ditopt does up to the first step."""
    ditopt.optimize(model, EXACT, example_inputs=call, target="eager", steps=4)


def seconds(run: Callable[[nn.Module, dict[str, Any]], None], name: str) -> float:
    """CPU seconds of ``run`` on a new model: a trace may leave something in the one that it had."""
    model, call = REGISTRY[name].build()
    began = time.process_time()
    run(model, call)
    return time.process_time() - began


def measure(name: str, rounds: int) -> dict[str, object]:
    """A row of the table; {} where torch.export alone cannot trace the model."""
    warnings.simplefilter("ignore")  # the models' own, and that no attention had to be recognised
    torch.set_num_threads(1)
    for run in (bare, whole):
        seconds(run, "prior")
    took: dict[Any, list[float]] = {bare: [], whole: []}
    for _ in range(rounds):
        try:
            took[bare].append(seconds(bare, name))
        except Exception:
            return {}
        took[whole].append(seconds(whole, name))
    export, ours = (statistics.median(took[run]) for run in (bare, whole))
    return {"model": name, "export_s": round(export, 2), "ditopt_s": round(ours, 2), "ratio": round(ours / export, 2)}


def _row(name: str, rounds: int, answers: Any) -> None:
    answers.put(measure(name, rounds))


def rows_of(names: Sequence[str], rounds: int) -> list[dict[str, object]]:
    """The rows of ``names``, told as they come."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["ditopt", "diffusers.models.transformers", "tests.denoisers"])
    rows = []
    for name in names:
        answers = server.Queue()
        process = server.Process(target=_row, args=(name, rounds, answers))
        process.start()
        row = answers.get()
        process.join()
        print(
            ", ".join(f"{k} {v}" for k, v in row.items()) or f"{name}: torch.export alone cannot trace it", flush=True
        )
        rows += [row] if row else []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", default=list(REGISTRY), help="denoisers (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help=f"write the table there (the committed one is {OUT.name})")
    args = parser.parse_args()
    if unknown := [n for n in args.name if n not in REGISTRY]:
        parser.error(f"no denoiser is called {unknown[0]!r}; there are: {', '.join(REGISTRY)}")
    rows = rows_of(args.name, args.rounds)
    ratios: list[Any] = [row["ratio"] for row in rows]
    if not ratios:
        parser.error("torch.export alone can trace none of these")
    print(
        f"{len(rows)} denoisers: median {statistics.median(ratios):.2f}, worst {max(ratios):.2f} times torch.export "
        f"with run_decompositions({{}}); {sum(r <= GOAL for r in ratios)} within {GOAL:g}"
    )
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
