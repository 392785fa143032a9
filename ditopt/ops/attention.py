"""``ditopt::attention``: softmax attention, however a model spells it.

    attention(query, key, value, mask=None, scale=None, is_causal=False, enable_gqa=False, spelling="sdpa", reads=None)

query (*B, N, D), key (*B, M, D), value (*B, M, E) -> (*B, N, E), where batch dimensions broadcast::

    softmax(scale * query @ key^T + mask) @ value

``mask`` broadcasts to (*B, N, M): true where a boolean one lets a query see a key, else added. ``scale`` defaults to
D ** -0.5. What a model applies to its queries and keys before (norms, rotations, a scale) stays outside.

``spelling`` is how the model wrote it (ops/spelling.py), on the operands q, k, v and mask, and on ``reads`` as r0, r1,
...: tensors that only the spelling needs. "sdpa" is ``aten.scaled_dot_product_attention``. The operator computes what
its spelling computes, bit for bit, and lowering puts those operators in its place where no backend claims it. A pass
that changes an operand must drop the spelling: ``attention(q, k, v, mask, scale, is_causal)`` is then the same function
within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ditopt.ops.spelling import replay

aten = torch.ops.aten

SDPA = "sdpa"

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, float? scale=None, bool is_causal=False, "
    'bool enable_gqa=False, str spelling="sdpa", Tensor[]? reads=None) -> Tensor'
)

attention = torch.ops.ditopt.attention.default


def decompose(
    emit: Callable[..., Any],
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    spelling: str = SDPA,
    reads: Sequence[Any] | None = None,
) -> Any:
    """The operators that the attention stands for, made by ``emit(target, *args, **kwargs)``; operands are whatever
    ``emit`` takes. TextError where the spelling cannot be read."""
    if spelling != SDPA:
        given = {"q": query, "k": key, "v": value, "mask": mask} | {f"r{i}": r for i, r in enumerate(reads or ())}
        return replay(spelling, given, emit)
    more: list[Any] = [] if mask is None and not is_causal else [mask]
    more += [0.0, True] if is_causal else []
    named: dict[str, Any] = {} if scale is None else {"scale": scale}
    if enable_gqa:
        named["enable_gqa"] = True
    return emit(aten.scaled_dot_product_attention.default, query, key, value, *more, **named)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    spelling: str = SDPA,
    reads: Sequence[Tensor] | None = None,
) -> Tensor:
    """What the spelling computes."""
    _check(query, key, value, mask)
    out: Tensor = decompose(_run, query, key, value, mask, scale, is_causal, enable_gqa, spelling, reads)
    return out


def _run(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    agree = query.ndim == key.ndim == value.ndim >= 2
    if not agree or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        shapes = ", ".join(str(list(t.shape)) for t in (query, key, value))
        raise ValueError(f"attention takes (*B, N, D), (*B, M, D) and (*B, M, E); query, key and value are {shapes}")
    if mask is not None and any(
        m not in (1, n) for m, n in zip(mask.shape[-2:], (query.shape[-2], key.shape[-2]), strict=False)
    ):
        raise ValueError(
            f"a mask of {query.shape[-2]} queries and {key.shape[-2]} keys ends in these numbers or in 1; it is "
            f"{list(mask.shape)}"
        )


_library.impl("attention", reference, "CompositeExplicitAutograd")
# a fake of its own: without one torch runs the reference on the device "meta", where strides are other ones
torch.library.register_fake("ditopt::attention", reference, lib=_library)
