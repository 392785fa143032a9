"""The Triton kernel of gather_tokens and scatter_tokens without a GPU: interpreted, and compiled ahead of time.

Triton decides when it is imported whether it interprets, so each is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton_aot import SHARED, TARGETS

ROOT = Path(__file__).parents[2]


def test_interpreted_it_agrees_with_the_references():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpret_tokens"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compared 47 cases" in done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-m", "tests.kernels.compile_tokens"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled_and_shared_memory_suffices(rows, target):
    mine = [r for r in rows if r["target"] == target]
    assert len(mine) == 10
    assert [r for r in mine if r["spilled"]] == []
    assert max(r["shared"] for r in mine) <= SHARED[target]
