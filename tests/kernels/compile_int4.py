"""Run by test_int4_linear.py in a process of its own: compiles the kernel ahead of time for GPUs that are not there.

Prints one line of JSON for each GPU and tile that it is launched with: their name, what was spilled, shared memory, and
whether the instruction that multiplies int8 matrices there is in the code.
"""

import json
import re

from ditopt.codegen.triton.int4_linear import BLOCK_N, ROWS, STAGES, kernel
from tests.kernels.compile_int8 import STRIDES, UNITS
from tests.kernels.triton_aot import compile_for

TYPES = {
    "values": "*i8",
    "weight": "*u8",
    **dict.fromkeys(("scale", "weight_scale"), "*fp32"),
    **dict.fromkeys(("bias", "thin", "up", "gate", "residual", "out"), "*bf16"),
    **dict.fromkeys(("rows", "columns", "width", "group", "groups", "rank", "tokens", *STRIDES), "i32"),
}
FIXED = {
    "ACTIVATION": 3,
    "HAS_BIAS": True,
    "HAS_BRANCH": True,
    "HAS_GATE": True,
    "HAS_RESIDUAL": True,
    "BLOCK_N": BLOCK_N,
    "BLOCK_K": 64,
    "RANK": 32,
}

if __name__ == "__main__":
    for name, instruction in UNITS.items():
        for rows, warps in ROWS.items():
            stages = STAGES if name.startswith("sm") else 2
            even = ("columns", "width", "group", "rank")
            use = compile_for(name, kernel, TYPES, {**FIXED, "BLOCK_M": rows}, even, num_warps=warps, num_stages=stages)
            told = use.spilled, use.shared, bool(re.search(instruction, use.text))
            print(json.dumps([f"{name}, {rows} rows", *told]), flush=True)
