"""Compile Triton kernels for GPUs that are not there, and read what the compiler says about them.

Must run in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = ("sm80", "sm90", "sm100", "gfx942")
SHARED = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that a block may have."""


@dataclass(frozen=True)
class Usage:
    """Registers a thread, bytes (NVIDIA) or registers (AMD) that are spilled, bytes of shared memory, the assembly."""

    registers: int
    spilled: int
    shared: int
    text: str


def compile_for(
    target: str,
    kernel: Any,
    types: Mapping[str, Any],
    constants: Mapping[str, Any],
    even: Collection[str] = (),
    **options: Any,
) -> Usage:
    """``kernel`` compiled for ``target``. ``types``: Triton's word for each argument that is no constant, or a tuple of
    words. Pointers, and the numbers ``even``, are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    aligned = [at for i, n in enumerate(kernel.arg_names) for at in _aligned(signature[n], (i,), n in even)]
    source = ASTSource(kernel, signature, places, {at: [["tt.divisibility", 16]] for at in aligned})
    if target.startswith("sm"):
        made = triton.compile(source, target=GPUTarget("cuda", int(target[2:]), 32), options=options)
        return _nvidia(made, Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    made = triton.compile(source, target=GPUTarget("hip", target, 64), options=options)
    text = made.asm["amdgcn"]
    words = "vgpr_count|vgpr_spill_count|private_segment_fixed_size"
    found = {k: int(v) for k, v in re.findall(rf"\.({words}):\s+(\d+)", text)}
    # scalar registers that do not fit go to lanes of a vector register, not to memory
    spilled = found["vgpr_spill_count"] + found["private_segment_fixed_size"]
    return Usage(found["vgpr_count"], spilled, int(made.metadata.shared), text)


def _aligned(word: Any, at: tuple[int, ...], even: bool) -> list[tuple[int, ...]]:
    """Where in an argument multiples of 16 are."""
    if isinstance(word, tuple):
        return [found for i, w in enumerate(word) for found in _aligned(w, (*at, i), even)]
    return [at] if even or word.startswith("*") else []


def _nvidia(made: Any, tool: Path) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], int(made.metadata.shared), made.asm["ptx"])
