"""The Triton kernel of int8_linear without a GPU: interpreted on odd sizes, and compiled ahead of time.

Triton decides when it is imported whether it interprets, so each is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

FAR = {"half": 2e-3}
"""Cases whose result is rounded to few digits, and how far two roundings may be apart."""


def lines(module: str, **environment: str) -> list[Any]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}"],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_interpreted_it_computes_what_the_reference_does():
    found: dict[str, float] = dict(lines("interpret_int8", TRITON_INTERPRET="1"))
    assert len(found) >= 10
    assert {name: far for name, far in found.items() if far > FAR.get(name, 1e-6)} == {}


def test_it_compiles_for_every_gpu_without_spills():
    found: dict[str, Any] = {name: rest for name, *rest in lines("compile_int8")}
    assert {name.split(",")[0] for name in found} == {"sm80", "sm90", "sm100", "gfx942"}
    assert len(found) == 8
    for name, (spilled, shared, instruction) in found.items():
        assert spilled == 0, f"{name} spills"
        assert shared <= 64 * 1024, name  # what every one of them has
        assert instruction, f"{name} multiplies without its int8 instruction"
