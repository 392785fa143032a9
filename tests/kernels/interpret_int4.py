"""Run by test_int4_linear.py in a process of its own, under TRITON_INTERPRET=1: each case against the eager reference.

Prints one line of JSON a case: its name and the largest error, relative to the largest value.
"""

import json

import torch

from ditopt.codegen.triton.int4_linear import launch
from ditopt.ops.int4_linear import reference
from ditopt.ops.quantize import quantize

CASES = {
    "one row": {"shape": (1, 1, 32), "columns": 16, "group": 32},
    "odd": {
        "shape": (2, 19, 96),
        "columns": 45,
        "group": 32,
        "rank": 5,
        "bias": True,
        "gate": "sample",
        "residual": True,
        "activation": "gelu",
    },
    "two dimensions": {"shape": (33, 192), "columns": 17, "group": 64, "bias": True},
    "a group of two pieces": {"shape": (1, 20, 256), "columns": 33, "group": 128, "rank": 16},
    "one group, ragged": {"shape": (3, 7, 70), "columns": 24, "group": 0, "rank": 3, "activation": "silu"},
    "four dimensions": {"shape": (2, 2, 5, 64), "columns": 24, "group": 64, "gate": "full", "residual": True},
    "gelu_tanh": {"shape": (1, 40, 64), "columns": 33, "group": 32, "activation": "gelu_tanh", "rank": 32},
    "relu": {"shape": (1, 40, 64), "columns": 33, "group": 32, "activation": "relu", "gate": "column"},
    "half": {
        "shape": (2, 19, 64),
        "columns": 31,
        "group": 64,
        "rank": 8,
        "bias": True,
        "dtype": torch.float16,
        "residual": True,
    },
    "larger than a tile": {"shape": (1, 70, 128), "columns": 70, "group": 64, "rank": 20, "bias": True},
}


def error(shape, columns, group, rank=0, bias=False, gate="", residual=False, dtype=torch.float32, activation="none"):
    g = torch.Generator().manual_seed(0)
    values, scale = quantize(torch.randn(shape, generator=g), 4, group)
    weight, weight_scale = quantize(torch.randn(columns, shape[-1], generator=g), 4, group, True)
    full = (*shape[:-1], columns)
    gates = {"sample": (shape[0], *(1,) * (len(shape) - 2), columns), "full": full, "column": (columns,)}
    b = torch.randn(columns, generator=g).to(dtype) if bias else None
    thin = torch.randn(*shape[:-1], rank, generator=g).to(dtype) if rank else None
    up = torch.randn(columns, rank, generator=g).to(dtype) if rank else None
    gated = torch.randn(gates[gate], generator=g).to(dtype) if gate else None
    added = torch.randn(full, generator=g).to(dtype) if residual else None
    operands = (values, scale, weight, weight_scale, b, thin, up, dtype, activation, gated, added)
    found, wanted = launch(*operands, blocks=(32, 32)), reference(*operands)
    assert found.dtype is wanted.dtype
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


if __name__ == "__main__":
    for name, case in CASES.items():
        print(json.dumps([name, error(**case)]))
