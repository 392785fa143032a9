"""Run by test_int8_linear.py in a process of its own: compiles the kernel ahead of time for GPUs that are not there.

Prints one line of JSON for each GPU and tile that it is launched with: their name, what was spilled, shared memory, and
whether the instruction that multiplies int8 matrices there is in the code.
"""

import json
import re

from ditopt.codegen.triton.int8_linear import BLOCK_K, BLOCK_N, ROWS, STAGES, kernel
from tests.kernels.triton_aot import compile_for

UNITS = {
    "sm80": r"mma\.sync.*s8",
    "sm90": r"wgmma.*s8|mma\.sync.*s8",
    "sm100": r"tcgen05\.mma.*i8|mma\.sync.*s8",
    "gfx942": r"v_mfma_i32",
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

if __name__ == "__main__":
    for name, instruction in UNITS.items():
        for rows, warps in ROWS.items():
            stages = STAGES if name.startswith("sm") else 2
            even = ("columns", "width")
            use = compile_for(name, kernel, TYPES, {**FIXED, "BLOCK_M": rows}, even, num_warps=warps, num_stages=stages)
            told = use.spilled, use.shared, bool(re.search(instruction, use.text))
            print(json.dumps([f"{name}, {rows} rows", *told]))
