"""Run by test_block_sparse_attention.py without TRITON_INTERPRET: a line of JSON for each configuration and target."""

from __future__ import annotations

import json
import warnings

import torch

from ditopt.codegen.triton.block_sparse_attention import _width, block_sparse_attention_kernel, pieces, warps
from tests.kernels.triton_aot import TARGETS, compile_for

WORDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# type, channels, block, with counts, mask and LSE
CONFIGURATIONS = [
    ("bf16", 64, 64, False),
    ("bf16", 64, 64, True),
    ("bf16", 128, 128, True),
    ("fp16", 72, 16, True),
    ("fp32", 64, 64, True),
]


def types(word: str) -> dict[str, str]:
    """Triton's word for each argument of the kernel."""
    out = dict.fromkeys(block_sparse_attention_kernel.arg_names, "i32")
    out |= dict.fromkeys(("Q", "K", "V", "OUT", "MASK"), f"*{word}")
    return out | {"INDEX": "*i32", "COUNT": "*i32", "LSE": "*fp32", "scale": "fp32"}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for word, d, block, more in CONFIGURATIONS:
        constants = {"D": d, "E": d, "WIDTH_D": _width(d), "WIDTH_E": _width(d), "BLOCK_Q": block, "BLOCK_K": block}
        constants |= dict.fromkeys(("HAS_COUNT", "HAS_MASK", "WITH_LSE"), more)
        constants |= pieces(d, d, block, block, WORDS[word])
        for target in TARGETS:
            options = warps(d, d, WORDS[word])
            use = compile_for(target, block_sparse_attention_kernel, types(word), constants, (), **options)
            row = {"type": word, "d": d, "target": target, "registers": use.registers, "spilled": use.spilled}
            units = [w for w in ("wgmma", "tcgen05", "mma.sync", "v_mfma") if w in use.text]
            print(json.dumps({**row, "shared": use.shared, "units": units}), flush=True)
