"""Run by test_tokens.py without TRITON_INTERPRET: a line of JSON for each configuration and target."""

from __future__ import annotations

import json
import warnings

from ditopt.codegen.triton.tokens import TENSORS, WARPS, kernel, tile
from tests.kernels.triton_aot import TARGETS, compile_for

# element types of the tensors, and the longest row
CONFIGURATIONS = [
    (["i16"], 768),
    (["i16", "i16"], 64),
    (["i16", "i32", "i32"], 128),
    (["i64", "u8"], 33),
    (["i32"] * TENSORS, 1),
]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for elements, inner in CONFIGURATIONS:
        pointers = tuple(f"*{e}" for e in elements)
        four = (("i32",) * 4,) * len(elements)
        types = {"SOURCES": pointers, "INTOS": pointers, "SHAPES": four, "FROMS": four, "TOS": four, "INDEX": "*i64"}
        types |= dict.fromkeys(("samples", "tokens", "count"), "i32")
        block, columns = tile(inner)
        for gather in (True, False):
            constants = {"GATHER": gather, "BLOCK": block, "COLS": columns}
            for target in TARGETS:
                use = compile_for(target, kernel, types, constants, num_warps=WARPS)
                row = {"tensors": len(elements), "inner": inner, "gather": gather, "target": target}
                print(json.dumps({**row, "spilled": use.spilled, "shared": use.shared}), flush=True)
