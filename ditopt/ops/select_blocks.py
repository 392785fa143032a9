"""``ditopt::select_blocks``: which blocks of keys matter to which blocks of queries, by a draft of the attention.

    select_blocks(query, key, k, block_q, block_k, dense_q, dense_k, selector="topk", share=1.0, scale=None)
        -> (index, count)

query (*B, N, D), key (*B, M, D) -> int32 (*B, queries' blocks, k) and (*B, queries' blocks), as
``ditopt::block_sparse_attention`` takes them with the same blocks and dense ends. Queries and keys are averaged over
their blocks; the draft is the softmax of the products of the averages.

``selector``: "topk" lists the ``k`` best blocks of each row, in the order of the keys; "topp" the best ones until they
hold ``share`` of the row's draft; "head" those among the best ``share`` of all entries of a draft, over all its rows.
The last two list from the best on, at least one and at most ``k``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ditopt.ops.block_sparse_attention import _between, _padded, _run, _shape, _type, blocks

aten = torch.ops.aten

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "select_blocks(Tensor query, Tensor key, int k, int block_q, int block_k, int[2] dense_q, int[2] dense_k, "
    'str selector="topk", float share=1.0, float? scale=None) -> (Tensor, Tensor)'
)

select_blocks = torch.ops.ditopt.select_blocks.default

SELECTORS = ("topk", "topp", "head")


def decompose(
    emit: Callable[..., Any],
    query: Any,
    key: Any,
    k: int,
    block_q: int,
    block_k: int,
    dense_q: Sequence[int],
    dense_k: Sequence[int],
    selector: str = "topk",
    share: float = 1.0,
    scale: float | None = None,
) -> tuple[Any, Any]:
    """The operators that it stands for, made by ``emit(target, *args, **kwargs)`` from nodes or tensors."""
    *layout, _, d = _shape(query)
    device = _type(query)[1]
    pooled = [
        _averages(emit, x, block, dense) for x, block, dense in ((query, block_q, dense_q), (key, block_k, dense_k))
    ]
    b, nq, nk = math.prod(layout), *(_shape(p)[1] for p in pooled)
    left = emit(aten.mul.Tensor, pooled[0], d**-0.5 if scale is None else scale)
    draft = emit(aten.softmax.int, emit(aten.matmul.default, left, emit(aten.transpose.int, pooled[1], 1, 2)), -1)
    if selector == "topk":
        best = emit(operator.getitem, emit(aten.topk.default, draft, k, -1), 1)
        index = emit(operator.getitem, emit(aten.sort.default, best, -1), 0)
        count = emit(aten.full.default, [b, nq], k, dtype=torch.int32, device=device)
    else:
        sorted_ = emit(aten.topk.default, draft, k, -1)
        values, index = emit(operator.getitem, sorted_, 0), emit(operator.getitem, sorted_, 1)
        if selector == "topp":
            before = emit(aten.sub.Tensor, emit(aten.cumsum.default, values, -1), values)
            kept = emit(aten.lt.Scalar, before, share)
        else:
            entries = max(1, round(share * nq * nk))
            largest = emit(aten.topk.default, emit(aten.reshape.default, draft, [b, nq * nk]), entries, -1)
            least = emit(aten.slice.Tensor, emit(operator.getitem, largest, 0), 1, entries - 1, entries)
            kept = emit(aten.ge.Tensor, values, emit(aten.unsqueeze.default, least, -1))
        number = emit(aten.sum.dim_IntList, emit(aten._to_copy.default, kept, dtype=torch.int32), [-1])
        count = emit(aten._to_copy.default, emit(aten.clamp.default, number, 1, k), dtype=torch.int32)
    index = emit(aten._to_copy.default, index, dtype=torch.int32)
    return emit(aten.reshape.default, index, [*layout, nq, k]), emit(aten.reshape.default, count, [*layout, nq])


def _averages(emit: Callable[..., Any], x: Any, block: int, dense: Sequence[int]) -> Any:
    """(batch, blocks, channels), in float32: averages over the blocks, the last one over what there is of it."""
    *layout, n, d = _shape(x)
    b, count = math.prod(layout), blocks(n, dense, block)
    flat = emit(aten.reshape.default, x, [b, n, d])
    middle = _padded(emit, _between(emit, flat, n, dense), count * block)
    wide = emit(aten._to_copy.default, middle, dtype=torch.float32)
    total = emit(aten.sum.dim_IntList, emit(aten.reshape.default, wide, [b, count, block, d]), [2])
    short = n - sum(dense) - (count - 1) * block
    if short == block:
        return emit(aten.mul.Tensor, total, 1 / block)
    start = emit(aten.arange.default, count, dtype=torch.float32, device=_type(x)[1])
    left = emit(aten.add.Tensor, emit(aten.mul.Tensor, start, -block), n - sum(dense))
    length = emit(aten.reshape.default, emit(aten.clamp.default, left, None, block), [1, count, 1])
    return emit(aten.div.Tensor, total, length)


def reference(
    query: Tensor,
    key: Tensor,
    k: int,
    block_q: int,
    block_k: int,
    dense_q: Sequence[int],
    dense_k: Sequence[int],
    selector: str = "topk",
    share: float = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What the module says; ValueError where the operands do not fit."""
    _check(query, key, k, block_q, block_k, dense_q, dense_k, selector)
    index, count = decompose(_run, query, key, k, block_q, block_k, dense_q, dense_k, selector, share, scale)
    return index.contiguous(), count.contiguous()


def _check(
    query: Tensor,
    key: Tensor,
    k: int,
    block_q: int,
    block_k: int,
    dense_q: Sequence[int],
    dense_k: Sequence[int],
    selector: str,
) -> None:
    if query.shape[:-2] != key.shape[:-2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"a draft takes (*B, N, D) and (*B, M, D), not {list(query.shape)} and {list(key.shape)}")
    if selector not in SELECTORS:
        raise ValueError(f"selector is one of {', '.join(SELECTORS)}, not {selector!r}")
    there = blocks(key.shape[-2], dense_k, block_k)
    if not 0 < k <= there:
        raise ValueError(f"k is from 1 to {there}, the blocks that there are; it is {k}")


def _fake(
    query: Tensor,
    key: Tensor,
    k: int,
    block_q: int,
    block_k: int,
    dense_q: Sequence[int],
    dense_k: Sequence[int],
    selector: str = "topk",
    share: float = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, k, block_q, block_k, dense_q, dense_k, selector)
    rows = (*query.shape[:-2], blocks(query.shape[-2], dense_q, block_q))
    return query.new_empty((*rows, k), dtype=torch.int32), query.new_empty(rows, dtype=torch.int32)


_library.impl("select_blocks", reference, "CompositeExplicitAutograd")
torch.library.register_fake("ditopt::select_blocks", _fake, lib=_library)
