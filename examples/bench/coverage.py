"""The coverage table: what ditopt does with every denoiser of ``tests.denoisers``.

    python -m examples.bench.coverage                   # all of them, written to examples/bench/coverage.csv
    python -m examples.bench.coverage --only flux wan   # these; their rows replace those in the file
    python -m examples.bench.coverage --part 2/4        # every fourth, beginning with the second
    python -m examples.bench.coverage --quick           # what takes half of the time stays as it is in the file
    python -m examples.bench.coverage --readme          # the table for README.md, from the file

Each denoiser runs in a process of its own, which gives its memory back and may take too long.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from tqdm import tqdm

from examples.bench.probe import COLUMNS, PENDING, Row, probe
from tests.denoisers import REGISTRY

CSV = Path(__file__).with_suffix(".csv")

BEGIN, END = "<!-- coverage: python -m examples.bench.coverage --readme -->", "<!-- end of coverage -->"


PRELOAD = ["examples.bench.probe", "diffusers.models.transformers", "torch.onnx", "onnxscript", "onnxruntime"]
"""What the server of processes imports once; each process is a fork of it."""


def measure(name: str, limit: float, full: bool = True) -> Row:
    """The row of a denoiser, from a fresh process that may take ``limit`` seconds. ``full``: see ``probe``."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "row.json")
        process = server.Process(target=work, args=(name, file, full))
        process.start()
        process.join(limit)
        reason = f"no: the process ended with {process.exitcode}"
        if process.is_alive():
            reason = f"no: not done after {limit:.0f} s"
            process.kill()
            process.join()
        row = Row(**json.loads(file.read_text())) if file.exists() else Row(name)
    lost: dict[str, Any] = {c: reason for c in COLUMNS if getattr(row, c) == PENDING}
    return replace(row, **lost)


def work(name: str, file: Path, full: bool) -> None:
    """Write the row of a denoiser to ``file``, after each question anew."""
    import torch

    torch.set_num_threads(1)

    def write(row: Row) -> None:
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(asdict(row)))
        partial.replace(file)

    probe(name, write, full=full)


def read(file: Path = CSV) -> dict[str, Row]:
    """The rows of a table by name; none where there is no file."""
    if not file.exists():
        return {}
    with file.open(newline="") as stream:
        rows = [Row(**{k: _KINDS[k](v) for k, v in line.items()}) for line in csv.DictReader(stream)]
    return {row.name: row for row in rows}


_KINDS = {f.name: {"str": str, "int": int, "float": float}[str(f.type)] for f in fields(Row)}


def write(rows: Iterable[Row], file: Path = CSV) -> None:
    """A table in the order of the registry."""
    order = list(REGISTRY)
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, [f.name for f in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(row) for row in sorted(rows, key=lambda row: order.index(row.name)))


# -- README ------------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """The counts of each column; folded, a line for each denoiser and why what fails fails."""
    counts = ", ".join(_count(rows, column) for column in COLUMNS)
    lines = [
        f"**Of {len(rows)}: {counts}; all five {sum(r.green for r in rows)}.**",
        "",
        f"<details><summary>The {len(rows)} denoisers</summary>",
        "",
        "| denoiser | captured | blocks | bodies | weights that leave the loop | exact | cached | ONNX |",
        "|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    failing = [f"* {r.name}: {shorten('; '.join(r.reasons()), 240, placeholder=' ...')}" for r in rows if r.reasons()]
    if failing:
        lines += ["", "What fails, and why:", "", *failing]
    exempt = [f"* {r.name}: {c}: {getattr(r, c).removeprefix('none: ')}" for r in rows for c in _exempt(r)]
    if exempt:
        lines += ["", "What does not apply, and why:", "", *exempt]
    return "\n".join([*lines, "", "</details>"])


def _count(rows: Sequence[Row], column: str) -> str:
    concerned = sum(row.applies(column) for row in rows)
    return f"{column} {sum(r.passed(column) for r in rows)}" + f" of {concerned}" * (concerned < len(rows))


def _exempt(row: Row) -> list[str]:
    return [column for column in COLUMNS if not row.applies(column)]


def _line(row: Row) -> str:
    marks = {c: "✓" if row.passed(c) else "✗" if row.applies(c) else "n/a" for c in COLUMNS}
    captured = row.captured if row.passed("captured") else "✗"
    blocks = f"{row.blocks}" if row.passed("blocks") else f"✗ {row.blocks} of {row.expected}"
    cells = [row.name, captured, blocks, str(row.classes), f"{row.hoisted:.0%}"]
    return "| " + " | ".join([*cells, marks["exact"], marks["cached"], marks["onnx"]]) + " |"


# -- command -----------------------------------------------------------------------------------------------------------


def chosen(only: Sequence[str] | None, part: str | None) -> list[str]:
    """The denoisers that the options name. ValueError for an unknown one and for a part that is not K/N."""
    unknown = [name for name in only or () if name not in REGISTRY]
    if unknown:
        raise ValueError(f"no denoiser is called {', '.join(unknown)}; there are {', '.join(REGISTRY)}")
    names = list(only or REGISTRY)
    if part is None:
        return names
    k, _, n = part.partition("/")
    if not (k.isdigit() and n.isdigit() and 1 <= int(k) <= int(n)):
        raise ValueError(f"--part {part} given; expected K/N, such as 1/4")
    return names[int(k) - 1 :: int(n)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.bench.coverage", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these denoisers")
    parser.add_argument("--part", metavar="K/N", help="every Nth denoiser, beginning with the Kth")
    parser.add_argument(
        "--out", type=Path, default=CSV, metavar="FILE", help="the table to write (default: %(default)s)"
    )
    parser.add_argument("--limit", type=float, default=900.0, metavar="SECONDS", help="time of one denoiser")
    parser.add_argument("--quick", action="store_true", help="leave ONNX and the bare export as they are in the table")
    parser.add_argument("--readme", action="store_true", help="print the table for README.md and measure nothing")
    options = parser.parse_args(arguments)
    if options.readme:
        return print(f"{BEGIN}\n{markdown(list(read(options.out).values()))}\n{END}")
    try:
        names = chosen(options.only, options.part)
    except ValueError as error:
        parser.error(str(error))
    for name in (bar := tqdm(names, unit="model")):
        row, table = measure(name, options.limit, not options.quick), read(options.out)
        if options.quick:
            before = table.get(name, Row(name))
            row = replace(row, onnx=before.onnx, bare=before.bare)
        write([*(table | {name: row}).values()], options.out)
        told = "; ".join(row.reasons()) or ("all five" if row.green else "all that apply")
        bar.write(f"{name}: {told}", file=sys.stderr)


if __name__ == "__main__":
    main()
