"""Semantic operators: one file each, with schema, fake, eager reference and contract.

Importing this package registers them as ``torch.ops.ditopt.*``.
"""

from ditopt.ops.attention import attention
from ditopt.ops.block_sparse_attention import block_sparse_attention
from ditopt.ops.call_module import call_module
from ditopt.ops.gather_tokens import gather_tokens
from ditopt.ops.int4_linear import int4_linear
from ditopt.ops.int8_linear import int8_linear
from ditopt.ops.linear_attention import linear_attention
from ditopt.ops.low_rank import low_rank
from ditopt.ops.norm_quantize import norm_quantize
from ditopt.ops.packed_linear import packed_linear
from ditopt.ops.quantize import dequantize, quantize
from ditopt.ops.scatter_tokens import scatter_tokens
from ditopt.ops.select import select
from ditopt.ops.select_blocks import select_blocks

__all__ = [
    "attention",
    "block_sparse_attention",
    "call_module",
    "dequantize",
    "gather_tokens",
    "int4_linear",
    "int8_linear",
    "linear_attention",
    "low_rank",
    "norm_quantize",
    "packed_linear",
    "quantize",
    "scatter_tokens",
    "select",
    "select_blocks",
]
