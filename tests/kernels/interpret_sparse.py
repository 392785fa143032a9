"""Run by test_block_sparse_attention.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import warnings
from typing import Any

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton chooses between interpreting and compiling at its import"

import torch  # noqa: E402

from ditopt.codegen.triton.block_sparse_attention import block_sparse_attention  # noqa: E402
from ditopt.ops.block_sparse_attention import blocks, reference_lse  # noqa: E402

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# queries, keys, channels, values' channels, block, dense ends of queries and keys, lists by head, counts, mask, dtype
CASES: list[dict[str, Any]] = [
    {"n": 1, "m": 1},
    {"n": 63, "m": 63},
    {"n": 63, "m": 40, "d": 24, "e": 8},
    {"n": 70, "m": 70, "dense_q": (7, 3), "dense_k": (7, 3)},
    {"n": 70, "m": 35, "dense_q": (0, 20), "dense_k": (19, 0), "mask": "bool"},
    {"n": 50, "m": 50, "count": True, "by_head": True},
    {"n": 50, "m": 50, "count": True, "mask": "add", "dense_k": (0, 5)},
    {"n": 1000, "m": 100, "block": 48, "heads": 1},
    {"n": 96, "m": 96, "block": 48, "transposed": True},
    {"n": 64, "m": 64, "dtype": F16, "by_head": True, "transposed": True},
    {"n": 45, "m": 64, "dtype": F16, "count": True, "mask": "bool"},
    {"n": 33, "m": 33, "layout": (3,), "d": 17, "e": 5},
]


def compare(case: dict[str, Any], seed: int) -> float:
    """The largest difference of result and LSE over the tolerance of the type."""
    g = torch.Generator().manual_seed(seed)
    n, m, dtype = case["n"], case["m"], case.get("dtype", F32)
    d, block = case.get("d", 32), case.get("block", 16)
    e = case.get("e", d)
    layout = case.get("layout", (1, case.get("heads", 2)))
    dense_q, dense_k = case.get("dense_q", (0, 0)), case.get("dense_k", (0, 0))

    def operand(rows: int, width: int) -> torch.Tensor:
        if case.get("transposed"):  # (batch, tokens, heads, channels) in memory, as models have it
            return torch.randn(layout[0], rows, layout[1], width, generator=g).transpose(1, 2).to(dtype)
        return torch.randn(*layout, rows, width, generator=g).to(dtype)

    nq, nk = blocks(n, dense_q, block), blocks(m, dense_k, block)
    length = max(1, nk // 2)
    batch = layout if case.get("by_head") else ()
    index = torch.rand(*batch, nq, nk, generator=g).argsort(-1)[..., :length].int()
    count = torch.randint(0, length + 1, (*batch, nq), generator=g).int() if case.get("count") else None
    mask = None
    if case.get("mask") == "bool":
        mask = torch.rand(1, m, generator=g) > 0.3
    elif case.get("mask") == "add":
        mask = torch.randn(1, m, generator=g).to(dtype)
    args = (operand(n, d), operand(m, d), operand(m, e), index, count, mask, None, block, block, dense_q, dense_k)
    out, lse = block_sparse_attention(*args, lse=True)
    expected, logs = reference_lse(*args)
    assert out.shape == expected.shape
    assert out.dtype is dtype
    assert lse is not None
    alone, none = block_sparse_attention(*args)
    assert none is None
    assert torch.equal(alone, out)
    assert torch.equal(lse.isinf(), logs.isinf())
    far = max(float((out.float() - expected.float()).abs().max()), float((lse - logs).nan_to_num(0).abs().max()))
    return far / (2e-5 if dtype is F32 else 4e-3)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    worst = 0.0
    for seed, case in enumerate(CASES):
        far = compare(case, seed)
        print(case, f"{far:.3f} of the tolerance", flush=True)
        worst = max(worst, far)
    assert worst < 1, f"{worst} of the tolerance"
    print(f"compared {len(CASES)} cases")
