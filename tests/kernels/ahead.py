"""Run by test_int8_linear.py in a process of its own: compiles the kernel ahead of time for GPUs that are not there.

Prints one line of JSON for each GPU and tile that it is launched with: their name, the registers spilled (or bytes of
stack), shared memory, and whether the instruction that multiplies int8 matrices there is in the code.
"""

import json
import pathlib
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ditopt.codegen.triton.int8_linear import BLOCK_K, BLOCK_N, ROWS, STAGES, kernel

TARGETS = {
    "sm80": (GPUTarget("cuda", 80, 32), r"mma\.sync.*s8"),
    "sm90": (GPUTarget("cuda", 90, 32), r"wgmma.*s8|mma\.sync.*s8"),
    "sm100": (GPUTarget("cuda", 100, 32), r"tcgen05\.mma.*i8|mma\.sync.*s8"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), r"v_mfma_i32"),
}
STRIDES = [f"{what}_{axis}" for what in ("gate", "residual") for axis in ("sample", "token", "column")]
TYPES = {
    **dict.fromkeys(("values", "weight"), "*i8"),
    **dict.fromkeys(("scale", "weight_scale"), "*fp32"),
    **dict.fromkeys(("bias", "gate", "residual", "out"), "*bf16"),
    **dict.fromkeys(("rows", "columns", "width", "tokens", *STRIDES), "i32"),
}
FIXED = {
    "ACTIVATION": 3,
    "HAS_BIAS": True,
    "HAS_GATE": True,
    "HAS_RESIDUAL": True,
    "BLOCK_N": BLOCK_N,
    "BLOCK_K": BLOCK_K,
}


def spills_of_cubin(cubin):
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    (stack,), (local,) = re.findall(r"STACK:(\d+)", told.stdout), re.findall(r"LOCAL:(\d+)", told.stdout)
    return int(stack) + int(local)


def compiled(target, instruction, rows, warps):
    types = {name: TYPES.get(name, "constexpr") for name in kernel.arg_names}
    fixed = {(kernel.arg_names.index(name),): value for name, value in {**FIXED, "BLOCK_M": rows}.items()}
    dense = ("values", "weight", "scale", "weight_scale", "bias", "gate", "residual", "out", "columns", "width")
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in dense}
    options = {"num_warps": warps, "num_stages": STAGES}
    if target.backend == "hip":
        options["num_stages"] = 2
    made = triton.compile(ASTSource(kernel, types, fixed, aligned), target=target, options=options)
    if target.backend == "hip":
        code = made.asm["amdgcn"]
        spills = sum(map(int, re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", code)))
    else:
        code, spills = made.asm["ptx"], spills_of_cubin(made.asm["cubin"])
    return spills, made.metadata.shared, bool(re.search(instruction, code))


if __name__ == "__main__":
    for name, (target, instruction) in TARGETS.items():
        for rows, warps in ROWS.items():
            print(json.dumps([f"{name}, {rows} rows", *compiled(target, instruction, rows, warps)]))
