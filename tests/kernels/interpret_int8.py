"""Run by test_int8_linear.py in a process of its own, under TRITON_INTERPRET=1: each case against the eager reference.

Prints one line of JSON a case: its name and the largest error, relative to the largest value.
"""

import json

import torch

from ditopt.codegen.triton.int8_linear import launch
from ditopt.ops.int8_linear import reference

CASES = {
    "one row": {"shape": (1, 1, 16), "columns": 16},
    "odd": {
        "shape": (2, 19, 37),
        "columns": 45,
        "bias": True,
        "gate": "sample",
        "residual": True,
        "activation": "gelu",
    },
    "two dimensions": {"shape": (33, 70), "columns": 17, "bias": True},
    "four dimensions": {"shape": (2, 2, 5, 40), "columns": 24, "gate": "full", "residual": True},
    "relu": {"shape": (1, 40, 48), "columns": 33, "activation": "relu", "residual": True},
    "silu": {"shape": (1, 40, 48), "columns": 33, "activation": "silu", "gate": "column"},
    "gelu_tanh": {"shape": (1, 40, 48), "columns": 33, "activation": "gelu_tanh", "bias": True},
    "strided residual": {"shape": (2, 9, 32), "columns": 20, "residual": True, "strided": True},
    "half": {
        "shape": (2, 19, 64),
        "columns": 31,
        "bias": True,
        "dtype": torch.float16,
        "gate": "sample",
        "residual": True,
    },
    "larger than a tile": {"shape": (1, 70, 100), "columns": 70, "bias": True, "blocks": (32, 32, 32)},
}


def error(shape, columns, bias=False, gate="", residual=False, strided=False, dtype=torch.float32, **more):
    g = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, shape, generator=g, dtype=torch.int8)
    weight = torch.randint(-127, 128, (columns, shape[-1]), generator=g, dtype=torch.int8)
    scale = torch.rand(*shape[:-1], 1, generator=g) * 0.02
    weight_scale = torch.rand(columns, 1, generator=g) * 0.02
    full = (*shape[:-1], columns)
    gates = {"sample": (shape[0], *(1,) * (len(shape) - 2), columns), "full": full, "column": (columns,)}
    b = torch.randn(columns, generator=g).to(dtype) if bias else None
    gated = torch.randn(gates[gate], generator=g).to(dtype) if gate else None
    added = torch.randn(full, generator=g).to(dtype) if residual else None
    if strided:
        added = torch.randn(*full[:-2], full[-1], full[-2], generator=g).transpose(-1, -2)
    activation, blocks = more.pop("activation", "none"), more.pop("blocks", (32, 32, 32))
    operands = (values, scale, weight, weight_scale, b, dtype, activation, gated, added)
    found, wanted = launch(*operands, blocks=blocks), reference(*operands)
    assert found.dtype is wanted.dtype
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


if __name__ == "__main__":
    for name, case in CASES.items():
        print(json.dumps([name, error(**case)]))
