"""The operator int4_linear against its formula, and its Triton kernel without a GPU: interpreted, and compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ditopt.ops.int4_linear import int4_linear
from ditopt.ops.quantize import quantize
from tests.kernels.test_int8_linear import FAR, lines


def operands(rows=5, width=64, columns=12, group=16, rank=3):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, rows, width, generator=g), torch.randn(columns, width, generator=g)
    thin, up = torch.randn(2, rows, rank, generator=g), torch.randn(columns, rank, generator=g)
    return (*quantize(x, 4, group), *quantize(w, 4, group, True), torch.randn(columns, generator=g), thin, up)


def test_it_computes_what_its_formula_says():
    """In NumPy, integer products group by group."""
    values, scale, weight, weight_scale, bias, thin, up = given = operands()
    low, high = weight.numpy() & 15, weight.numpy() >> 4
    w = np.stack([low, high], -1).reshape(12, 4, 16).astype(np.int64) - 8
    x = values.numpy().reshape(2, 5, 4, 16).astype(np.int64)
    sums = np.einsum("brgk,ngk->brng", x, w)
    y = (sums * scale.numpy()[:, :, None] * weight_scale.numpy()).sum(-1)
    y = np.maximum(y + thin.numpy() @ up.numpy().T + bias.numpy(), 0)
    gate, residual = torch.full((12,), 0.5), torch.ones(2, 5, 12)
    found = int4_linear(*given, torch.float32, "relu", gate, residual)
    assert np.allclose(found.numpy(), 1 + 0.5 * y, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: torch.zeros(2, 5, 64)}, "takes values"),
        ({2: torch.zeros(12, 31, dtype=torch.uint8)}, "takes scales"),
        ({5: None}, "or neither"),
        ({4: torch.zeros(3)}, "does not fit 12 columns"),
    ],
)
def test_operands_that_do_not_fit(change, said):
    given: list[Any] = list(operands())
    for k, value in change.items():
        given[k] = value
    with pytest.raises(ValueError, match=said):
        int4_linear(*given)


def test_interpreted_it_computes_what_the_reference_does():
    found: dict[str, float] = dict(lines("interpret_int4", TRITON_INTERPRET="1"))
    assert len(found) >= 10
    assert {name: far for name, far in found.items() if far > FAR.get(name, 1e-6)} == {}


def test_it_compiles_for_every_gpu_without_spills():
    found: dict[str, Any] = {name: rest for name, *rest in lines("compile_int4")}
    assert {name.split(",")[0] for name in found} == {"sm80", "sm90", "sm100", "gfx942"}
    assert len(found) == 8
    for name, (spilled, shared, instruction) in found.items():
        assert spilled == 0, f"{name} spills"
        assert shared <= 64 * 1024, name  # what every one of them has
        assert instruction, f"{name} multiplies without its int8 instruction"
