"""The Triton kernel of block-sparse attention against the eager reference, in Triton's interpreter.

The interpreter proves the indexing; what the compiler makes of the kernel is test_triton_aot.py's. A process either
interprets or compiles, so the comparison runs in one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_kernel_agrees_with_the_reference():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.codegen.interpret_sparse"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compared 12 cases" in done.stdout
