"""Semantic operators: one file each, with schema, fake, eager reference and contract.

Importing this package registers them as ``torch.ops.ditopt.*``.
"""

from ditopt.ops.attention import attention
from ditopt.ops.block_sparse_attention import block_sparse_attention
from ditopt.ops.call_module import call_module
from ditopt.ops.linear_attention import linear_attention
from ditopt.ops.select import select
from ditopt.ops.select_blocks import select_blocks

__all__ = ["attention", "block_sparse_attention", "call_module", "linear_attention", "select", "select_blocks"]
