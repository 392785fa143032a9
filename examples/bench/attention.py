"""Block-sparse attention against dense kernels on a CPU: python -m examples.bench.attention [--out FILE.csv].

One thread, 6 heads of 64 channels, blocks of 128: the operator ``ditopt::block_sparse_attention`` over random lists, torch's
fused attention, and dense attention as products around a softmax, 256 queries at a time (the fastest dense one in
bfloat16). CPU time, medians over rounds that take turns; only ratios are told.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ditopt.ops import block_sparse_attention

HEADS, CHANNELS, BLOCK = 6, 64, 128


def products(query: Tensor, key: Tensor, value: Tensor, rows: int = 256) -> Tensor:
    """Dense attention, ``rows`` queries at a time."""
    query, turned = query * query.shape[-1] ** -0.5, key.transpose(-1, -2).contiguous()
    parts = [torch.softmax(query[:, :, i : i + rows] @ turned, -1) @ value for i in range(0, query.shape[2], rows)]
    return torch.cat(parts, 2)


def medians(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each, run in turns."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(s[1:]) for name, s in spent.items()}


def measure(tokens: int, density: float, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """One row of the table."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, HEADS, CHANNELS, generator=g).to(dtype).transpose(1, 2) for _ in range(3)
    )
    count = tokens // BLOCK
    kept = max(1, round(count * density))
    index = torch.rand(count, count, generator=g).argsort(-1)[:, :kept].sort(-1).values.int()
    dense: dict[str, Callable[[], object]] = {
        "fused": lambda: F.scaled_dot_product_attention(query, key, value),
    }
    if dtype is not torch.float16:  # its products have no fast kernel on a CPU
        dense["products"] = lambda: products(query, key, value)
    sparse = {"sparse": lambda: block_sparse_attention(query, key, value, index, block_q=BLOCK, block_k=BLOCK)}
    seconds = medians({**dense, **sparse}, rounds)
    best = min(seconds[n] for n in dense)
    return {
        "tokens": tokens,
        "density": density,
        "dtype": str(dtype).removeprefix("torch."),
        "to fused": round(seconds["sparse"] / seconds["fused"], 3),
        "to best dense": round(seconds["sparse"] / best, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write a CSV file")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for tokens in (1024, 4096):
            for density in (0.5, 0.25, 0.125):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    rows.append(measure(tokens, density, dtype, args.rounds))
                    print(rows[-1], flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
