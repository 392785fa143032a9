"""``ditopt::block_sparse_attention``: softmax attention in which each block of queries sees a list of blocks of keys.

    block_sparse_attention(query, key, value, index, count=None, mask=None, scale=None, block_q=64, block_k=64,
                           dense_q=[0, 0], dense_k=[0, 0])

query (*B, N, D), key (*B, M, D), value (*B, M, E) -> (*B, N, E), contiguous, float32, bfloat16 or float16.

``dense_q`` says how many queries at the beginning and at the end see every key (text), ``dense_k`` how many keys there
every query sees. The tokens between are cut into blocks of ``block_q`` and ``block_k``; the last block of each may be
shorter. Block ``i`` of the queries sees the dense keys and the blocks of keys ``index[..., i, :count[..., i]]``;
``index`` is int32 of (*B, queries' blocks, k) with batches that broadcast, ``count`` likewise without the k (left out:
k everywhere). What stands behind the count must be a block that exists. ``mask`` broadcasts to (*B, 1, M): true where
keys are seen, or what is added to their scores. A query that sees no key gives zeros.

``.lse`` gives the logarithm of the sum of exponentials besides, (*B, N) in float32 (-inf where no key is seen): two
attentions over disjoint keys are merged by it.

The reference gathers the listed keys of some blocks of queries at a time: no tensor has a row for each query and a
column for each key. ``decompose`` writes the same as operators, for backends that have none of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

ROWS = 128
"""Queries that the reference handles at a time, where blocks are smaller: measured on a CPU."""

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor index, Tensor? count=None, Tensor? mask=None, float? scale=None, "
    "int block_q=64, int block_k=64, int[2] dense_q=[0, 0], int[2] dense_k=[0, 0]"
)

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(f"block_sparse_attention({_ARGUMENTS}) -> Tensor")
_library.define(f"block_sparse_attention.lse({_ARGUMENTS}) -> (Tensor, Tensor)")

block_sparse_attention = torch.ops.ditopt.block_sparse_attention.default


def blocks(tokens: int, dense: Sequence[int], block: int) -> int:
    """How many blocks the tokens between the dense ones are."""
    return -(-(tokens - sum(dense)) // block)


def _shape(x: Any) -> list[int]:
    return [int(n) for n in (x.meta["val"] if isinstance(x, fx.Node) else x).shape]


def _type(x: Any) -> tuple[torch.dtype, torch.device]:
    value = x.meta["val"] if isinstance(x, fx.Node) else x
    return value.dtype, value.device


@dataclass
class _Keys:
    """What the blocks of queries see: ``blocked`` (batch * blocks, block * channels) to be listed, ``dense`` (batch, 1,
    tokens, channels) or None."""

    blocked: Any
    dense: Any
    block: int
    channels: int


def _keys(emit: Callable[..., Any], x: Any, tokens: int, channels: int, block: int, dense: Sequence[int]) -> _Keys:
    """``x`` is (batch, tokens, channels)."""
    batch, (head, tail) = _shape(x)[0], dense
    ends = []
    if head:
        ends.append(emit(aten.slice.Tensor, x, 1, 0, head))
    if tail:
        ends.append(emit(aten.slice.Tensor, x, 1, tokens - tail, tokens))
    always = ends[0] if len(ends) == 1 else emit(aten.cat.default, ends, 1) if ends else None
    if always is not None:
        always = emit(aten.unsqueeze.default, always, 1)
    count = blocks(tokens, dense, block)
    middle = _padded(emit, _between(emit, x, tokens, dense), count * block)
    return _Keys(emit(aten.reshape.default, middle, [batch * count, block * channels]), always, block, channels)


def _between(emit: Callable[..., Any], x: Any, tokens: int, dense: Sequence[int]) -> Any:
    return emit(aten.slice.Tensor, x, 1, dense[0], tokens - dense[1]) if any(dense) else x


def _padded(emit: Callable[..., Any], x: Any, tokens: int) -> Any:
    """(batch, tokens, channels) with zeros behind."""
    missing = tokens - _shape(x)[1]
    return emit(aten.constant_pad_nd.default, x, [0, 0, 0, missing], 0.0) if missing else x


def _gathered(emit: Callable[..., Any], keys: _Keys, index: Any, batch: int, rows: int) -> Any:
    """(batch, rows, keys, channels) of what each of ``rows`` blocks of queries sees; ``index`` is flat."""
    found = emit(aten.index_select.default, keys.blocked, 0, index)
    length = _shape(index)[0] // (batch * rows) * keys.block
    found = emit(aten.reshape.default, found, [batch, rows, length, keys.channels])
    if keys.dense is None:
        return found
    tokens = _shape(keys.dense)[2]
    always = emit(aten.expand.default, keys.dense, [batch, rows, tokens, keys.channels])
    return emit(aten.cat.default, [always, found], 2)


def decompose(
    emit: Callable[..., Any],
    query: Any,
    key: Any,
    value: Any,
    index: Any,
    count: Any = None,
    mask: Any = None,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    dense_q: Sequence[int] = (0, 0),
    dense_k: Sequence[int] = (0, 0),
    *,
    lse: bool = False,
    rows: int = ROWS,
) -> Any:
    """The operators that it stands for, made by ``emit(target, *args, **kwargs)`` from nodes or tensors; about ``rows``
    queries at a time. With ``lse``, the pair."""
    *layout, n, d = _shape(query)
    m, e = _shape(value)[-2:]
    b, nq, nk = math.prod(layout), blocks(n, dense_q, block_q), blocks(m, dense_k, block_k)
    dtype, device = _type(query)
    scale = d**-0.5 if scale is None else scale
    q, k, v = (
        emit(aten.reshape.default, x, [b, *_shape(x)[-2:]]) if len(layout) != 1 else x for x in (query, key, value)
    )
    seen = None if mask is None else _flat(emit, mask, layout, 2, whole=True)
    listed = _flat(emit, index, layout, 2)
    keep = _keep(emit, listed, None if count is None else _flat(emit, count, layout, 1), m, block_k, dense_k, device)
    offset = emit(aten.arange.start_step, 0, b * nk, nk, dtype=torch.int32, device=device)
    places = emit(aten.add.Tensor, listed, emit(aten.reshape.default, offset, [b, 1, 1]))
    keys, values = (_keys(emit, x, m, c, block_k, dense_k) for x, c in ((k, d), (v, e)))
    masks = None
    if seen is not None:
        masks = _keys(emit, emit(aten.reshape.default, seen, [b, m, 1]), m, 1, block_k, dense_k)
    middle = _padded(emit, _between(emit, q, n, dense_q), nq * block_q)
    parts = emit(aten.reshape.default, middle, [b, nq, block_q, d])
    chunk = max(1, rows // block_q)
    outs, sums = [], []
    for i in range(0, nq, chunk):
        c = min(chunk, nq - i)
        at = emit(aten.reshape.default, emit(aten.slice.Tensor, places, 1, i, i + c), [-1])
        bias = _bias(emit, keep, masks, at, b, i, c, dtype)
        part = emit(aten.slice.Tensor, parts, 1, i, i + c)
        out, logs = _attend(
            emit, part, _gathered(emit, keys, at, b, c), _gathered(emit, values, at, b, c), bias, scale, lse
        )
        outs.append(out)
        sums.append(logs)
    out = emit(aten.reshape.default, _cat(emit, outs, 1), [b, nq * block_q, e])
    logs = emit(aten.reshape.default, _cat(emit, sums, 1), [b, nq * block_q, 1]) if lse else None
    full = None if seen is None else emit(aten.unsqueeze.default, seen, 1)
    ends = _dense_rows(emit, q, k, v, full, scale, n, dense_q, lse)
    result = _restored(emit, out, ends[0], n, dense_q, [*layout, n, e])
    return (result, _restored(emit, logs, ends[1], n, dense_q, [*layout, n])) if lse else result


def _cat(emit: Callable[..., Any], parts: Sequence[Any], dim: int) -> Any:
    return parts[0] if len(parts) == 1 else emit(aten.cat.default, list(parts), dim)


def _flat(emit: Callable[..., Any], x: Any, layout: Sequence[int], rank: int, whole: bool = False) -> Any:
    """``x`` with one batch dimension before its last ``rank`` ones: of size 1 where it is the same for all and need not
    be ``whole``, else as large as ``layout``."""
    own = _shape(x)
    batch, rest = own[: len(own) - rank], own[len(own) - rank :]
    if math.prod(batch) == 1 and not whole:
        return emit(aten.reshape.default, x, [1, *rest])
    return emit(aten.reshape.default, emit(aten.expand.default, x, [*layout, *rest]), [math.prod(layout), *rest])


def _keep(
    emit: Callable[..., Any], index: Any, count: Any, m: int, block: int, dense: Sequence[int], device: torch.device
) -> Any:
    """(batch or 1, blocks of queries, 1, keys) which of the gathered keys count; None where all do."""
    _, nq, k = _shape(index)
    tokens = m - sum(dense)
    kept = None
    if tokens % block:
        inside = emit(aten.arange.default, block, dtype=torch.int32, device=device)
        first = emit(aten.unsqueeze.default, emit(aten.mul.Tensor, index, block), -1)
        kept = emit(aten.lt.Scalar, emit(aten.add.Tensor, first, inside), tokens)
    if count is not None:
        order = emit(aten.arange.default, k, dtype=torch.int32, device=device)
        listed = emit(aten.lt.Tensor, order, emit(aten.unsqueeze.default, count, -1))
        listed = emit(aten.unsqueeze.default, listed, -1)
        kept = listed if kept is None else emit(aten.logical_and.default, kept, listed)
    if kept is None:
        return None
    batch = _shape(kept)[0]
    kept = emit(aten.expand.default, kept, [batch, nq, k, block])
    kept = emit(aten.reshape.default, kept, [batch, nq, 1, k * block])
    if sum(dense):
        always = emit(aten.full.default, [batch, nq, 1, sum(dense)], True, dtype=torch.bool, device=device)
        kept = emit(aten.cat.default, [always, kept], 3)
    return kept


def _bias(
    emit: Callable[..., Any], keep: Any, masks: _Keys | None, at: Any, b: int, i: int, c: int, dtype: torch.dtype
) -> Any:
    """A mask of the keys that ``c`` blocks of queries see, from block ``i`` on: (batch or 1, c, 1, keys)."""
    kept = None if keep is None else emit(aten.slice.Tensor, keep, 1, i, i + c)
    if masks is None:
        return kept
    found = emit(aten.transpose.int, _gathered(emit, masks, at, b, c), 2, 3)
    if _type(found)[0] is torch.bool:
        return found if kept is None else emit(aten.logical_and.default, found, kept)
    return found if kept is None else emit(aten.where.ScalarOther, kept, found, -math.inf)


def _attend(emit: Callable[..., Any], q: Any, k: Any, v: Any, bias: Any, scale: float, lse: bool) -> tuple[Any, Any]:
    """Attention of (batch, blocks, rows, channels), and its LSE where asked for.

    Two products around a softmax beat the fused CPU kernel in bfloat16, and with a mask in float32; in float16 the
    products have no fast kernel."""
    dtype = _type(q)[0]
    explicit = dtype is torch.bfloat16 or (dtype is torch.float32 and bias is not None)
    if not explicit and not lse:
        return emit(aten.scaled_dot_product_attention.default, q, k, v, bias, scale=scale), None
    boolean = bias is not None and _type(bias)[0] is torch.bool
    if lse:
        q, k, v = (emit(aten._to_copy.default, x, dtype=torch.float32) for x in (q, k, v))
    scores = emit(aten.matmul.default, emit(aten.mul.Tensor, q, scale), emit(aten.transpose.int, k, -2, -1))
    if bias is not None:
        scores = (
            emit(aten.where.ScalarOther, bias, scores, -math.inf) if boolean else emit(aten.add.Tensor, scores, bias)
        )
    weights = emit(aten.softmax.int, scores, -1)
    if bias is not None:  # no key at all: zeros, not NaN
        some = bias if boolean else emit(aten.gt.Scalar, bias, -math.inf)
        weights = emit(aten.where.ScalarOther, emit(aten.any.dim, some, -1, True), weights, 0.0)
    out = emit(aten.matmul.default, weights, v)
    if not lse:
        return out, None
    logs = emit(aten.logsumexp.default, scores, [-1], True)
    return emit(aten._to_copy.default, out, dtype=dtype), logs


def _dense_rows(
    emit: Callable[..., Any],
    q: Any,
    k: Any,
    v: Any,
    seen: Any,
    scale: float,
    n: int,
    dense: Sequence[int],
    lse: bool,
) -> tuple[list[Any], list[Any]]:
    """What the dense queries at the beginning and at the end give, each None where there are none."""
    outs: list[Any] = []
    sums: list[Any] = []
    k, v = (emit(aten.unsqueeze.default, x, 1) for x in (k, v)) if any(dense) else (k, v)
    for start, stop in ((0, dense[0]), (n - dense[1], n)):
        if start == stop:
            outs.append(None)
            sums.append(None)
            continue
        rows = emit(aten.unsqueeze.default, emit(aten.slice.Tensor, q, 1, start, stop), 1)
        if lse:
            out, logs = _attend(emit, rows, k, v, seen, scale, lse=True)
            sums.append(emit(aten.squeeze.dim, logs, 1))
        else:
            bias = seen
            if bias is not None:
                bias = emit(aten.expand.default, bias, [*_shape(bias)[:-2], stop - start, _shape(bias)[-1]])
            out = emit(aten.scaled_dot_product_attention.default, rows, k, v, bias, scale=scale)
        outs.append(emit(aten.squeeze.dim, out, 1))
    return outs, sums


def _restored(
    emit: Callable[..., Any], middle: Any, ends: Sequence[Any], n: int, dense: Sequence[int], shape: Sequence[int]
) -> Any:
    """All rows in order, without those that only filled the last block."""
    tokens = n - sum(dense)
    if _shape(middle)[1] != tokens:
        middle = emit(aten.slice.Tensor, middle, 1, 0, tokens)
    parts = [p for p in (ends[0] if dense[0] else None, middle, ends[1] if dense[1] else None) if p is not None]
    return emit(aten.reshape.default, _cat(emit, parts, 1), list(shape))


def _run(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
    dense_q: Sequence[int] = (0, 0),
    dense_k: Sequence[int] = (0, 0),
) -> Tensor:
    """What the module says; ValueError where operands do not fit."""
    check(query, key, value, index, count, mask, block_q, block_k, dense_q, dense_k)
    args = (query, key, value, index, count, mask, scale, block_q, block_k, dense_q, dense_k)
    out: Tensor = decompose(_run, *args)
    return out.contiguous()


def reference_lse(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The same with the LSE."""
    names = ("query", "key", "value", "index", "count", "mask", "scale", "block_q", "block_k", "dense_q", "dense_k")
    given = dict(zip(names, args, strict=False)) | kwargs
    check(**{k: v for k, v in given.items() if k != "scale"})
    out, lse = decompose(_run, **given, lse=True)
    return out.contiguous(), lse.contiguous()


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor | None = None,
    mask: Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
    dense_q: Sequence[int] = (0, 0),
    dense_k: Sequence[int] = (0, 0),
) -> None:
    """ValueError, with what was given and what was expected, where operands do not fit each other."""
    batch = query.shape[:-2]
    n, m = query.shape[-2], key.shape[-2]
    fit = query.ndim >= 2 and key.shape[:-2] == batch == value.shape[:-2]
    if not fit or query.shape[-1] != key.shape[-1] or value.shape[-2] != m:
        shapes = ", ".join(str(list(t.shape)) for t in (query, key, value))
        raise ValueError(f"block-sparse attention takes (*B, N, D), (*B, M, D) and (*B, M, E); it was given {shapes}")
    if min(block_q, block_k) < 1 or min(*dense_q, *dense_k) < 0 or n <= sum(dense_q) or m <= sum(dense_k):
        raise ValueError(
            f"between {sum(dense_q)} of {n} dense queries and {sum(dense_k)} of {m} dense keys there is nothing to cut "
            f"into blocks of {block_q} and {block_k}"
        )
    nq = blocks(n, dense_q, block_q)
    if index.dtype is not torch.int32 or index.ndim < 2 or index.shape[-2] != nq or not index.shape[-1]:
        raise ValueError(f"index is int32 (..., {nq}, k), a row for each block of queries; it is {_text(index)}")
    if count is not None and (count.dtype is not torch.int32 or count.shape[-1:] != (nq,)):
        raise ValueError(f"count is int32 (..., {nq}), a number for each block of queries; it is {_text(count)}")
    if mask is not None and (mask.ndim < 2 or mask.shape[-2] != 1 or mask.shape[-1] != m):
        raise ValueError(f"a mask of keys broadcasts to (*B, 1, {m}); it is {_text(mask)}")


def _text(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _fake(*args: Any, **kwargs: Any) -> Tensor:
    names = ("query", "key", "value", "index", "count", "mask", "scale", "block_q", "block_k", "dense_q", "dense_k")
    given = dict(zip(names, args, strict=False)) | kwargs
    check(**{k: v for k, v in given.items() if k != "scale"})
    query, value = given["query"], given["value"]
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _fake_lse(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    out = _fake(*args, **kwargs)
    return out, out.new_empty(out.shape[:-1], dtype=torch.float32)


_library.impl("block_sparse_attention", reference, "CompositeExplicitAutograd")
_library.impl("block_sparse_attention.lse", reference_lse, "CompositeExplicitAutograd")
torch.library.register_fake("ditopt::block_sparse_attention", _fake, lib=_library)
torch.library.register_fake("ditopt::block_sparse_attention.lse", _fake_lse, lib=_library)
