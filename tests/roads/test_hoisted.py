"""Hoisting is exact on compiled engines as well: the same engine, with and without it, gives the same numbers."""

from __future__ import annotations

import pytest
import torch

import ditopt
from tests.tiny_models import ZOO, leaves

PLAIN = "canonicalize, outline_blocks"
CASES = [
    *[(name, "onnxruntime") for name in ("dit", "sd3", "flux", "wan", "plain", "joint")],
    *[(name, "inductor") for name in ("sd3", "flux", "joint")],
]
BOUND = 1e-6


def apart(a, b):
    """The distance relative to the norm, the largest of all outputs."""
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("name", "target"), CASES)
def test_an_engine_gives_the_same_with_and_without_hoisting(name, target):
    """In the step that fills the tables, and in one that reads them."""
    tiny = ZOO[name]
    model, inputs = tiny.model().eval(), tiny.inputs()
    hoisted, without = (ditopt.optimize(model, r, target=target) for r in ("lossless", PLAIN))
    with torch.no_grad():
        plain = leaves(model(**inputs))
        for _ in range(2):
            got, want = (leaves(fast(**inputs)) for fast in (hoisted, without))
            assert apart(got, want) <= BOUND
            assert apart(got, plain) <= BOUND
    assert {m.name for m in hoisted.compiled.plan.manifest.memos} & {"request", "timestep", "schedule"}
    assert {m.name for m in without.compiled.plan.manifest.memos} <= {"folded"}
