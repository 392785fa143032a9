"""What another shape of a model costs to capture: python -m examples.bench.shapes [--out shapes.csv].

Five shapes of tiny denoisers (``tests/denoisers``), one after another: from the third on they come from one graph with
dynamic sizes. Beside it the last shape captured on its own. CPU seconds, checks against the model included.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditopt.capture import Captures, bind, capture
from tests.denoisers import REGISTRY
from tests.denoisers.base import positions

SHAPES = ((2, 8, 10), (1, 8, 10), (2, 6, 8), (3, 10, 12), (2, 12, 10))
"""Batch, rows and columns of tokens."""

NAMES = ("sd3", "flux", "wan")


def call(name: str, like: dict[str, Any], batch: int, rows: int, columns: int) -> dict[str, Any]:
    """The arguments ``like`` for another shape."""
    g = torch.Generator().manual_seed(batch * rows * columns)
    out = dict(like)
    for key, value in like.items():
        if not isinstance(value, Tensor) or key == "txt_ids":
            continue
        if key == "img_ids":
            out[key] = positions(rows, columns)
        elif key == "hidden_states" and name == "flux":
            out[key] = torch.randn(batch, rows * columns, value.shape[2], generator=g)
        elif key == "hidden_states":
            out[key] = torch.randn(batch, *value.shape[1:-2], 2 * rows, 2 * columns, generator=g)
        else:
            out[key] = value[:1].expand(batch, *value.shape[1:]).contiguous()
    return out


def measure(name: str) -> dict[str, object]:
    """One row: seconds of each shape in turn, and of the last on its own."""
    model, like = REGISTRY[name].build()
    timed(lambda: take(model, call(name, like, *SHAPES[0])))  # what Python and torch import at the first capture
    captures = Captures(model)
    row: dict[str, object] = {"model": name}
    for i, shape in enumerate(SHAPES):
        given = bind(model, (), call(name, like, *shape))
        row[f"shape_{i + 1}_s"] = timed(lambda given=given: captures.take(*given))
    return {**row, "last_alone_s": timed(lambda: capture(model, *given)), "note": captures.take(*given).notes[0]}


def take(model: nn.Module, kwargs: dict[str, Any]) -> None:
    capture(model, *bind(model, (), kwargs))


def timed(run: Any) -> float:
    """CPU seconds of ``run``."""
    began = time.process_time()
    run()
    return round(time.process_time() - began, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table there")
    args = parser.parse_args()
    rows = []
    for name in NAMES:
        rows.append(measure(name))
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
