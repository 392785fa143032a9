"""``ditopt::linear_attention``: attention by a product of features instead of a softmax.

    linear_attention(query, key, value, eps=0.0, spelling="linear", reads=None)

query (*B, N, D), key (*B, M, D), value (*B, M, E) -> (*B, N, E)::

    (query @ key^T @ value) / ((query @ key^T).sum(-1) + eps)

Queries and keys are features already (relu(q), elu(k) + 1, ...): what made them stays outside, so any kernel is the
same operator. ``spelling`` and ``reads`` are as in ``ditopt::attention``; "linear" sums over the keys first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ditopt.ops.attention import _check, _run
from ditopt.ops.spelling import replay

LINEAR = "linear"

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "linear_attention(Tensor query, Tensor key, Tensor value, float eps=0.0, "
    'str spelling="linear", Tensor[]? reads=None) -> Tensor'
)

linear_attention = torch.ops.ditopt.linear_attention.default

_PLAIN = (
    "t0 = transpose.int(k, -2, -1); t1 = matmul.default(t0, v); t2 = matmul.default(q, t1); "
    "t3 = sum.dim_IntList(t0, [-1], True); t4 = matmul.default(q, t3); t5 = add.Tensor(t4, {eps!r}); "
    "t6 = div.Tensor(t2, t5)"
)


def decompose(
    emit: Callable[..., Any],
    query: Any,
    key: Any,
    value: Any,
    eps: float = 0.0,
    spelling: str = LINEAR,
    reads: Sequence[Any] | None = None,
) -> Any:
    """The operators that the attention stands for; see ``ops/attention.py``."""
    given = {"q": query, "k": key, "v": value} | {f"r{i}": r for i, r in enumerate(reads or ())}
    return replay(_PLAIN.format(eps=float(eps)) if spelling == LINEAR else spelling, given, emit)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    eps: float = 0.0,
    spelling: str = LINEAR,
    reads: Sequence[Tensor] | None = None,
) -> Tensor:
    """What the spelling computes."""
    _check(query, key, value, None)
    out: Tensor = decompose(_run, query, key, value, eps, spelling, reads)
    return out


_library.impl("linear_attention", reference, "CompositeExplicitAutograd")
# a fake of its own: without one torch runs the reference on the device "meta", where strides are other ones
torch.library.register_fake("ditopt::linear_attention", reference, lib=_library)
