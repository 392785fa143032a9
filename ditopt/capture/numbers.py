"""Python numbers of a call are tensors in a graph: what makes tensors of numbers takes these too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Numbers(TorchFunctionMode):
    """``torch.full(size, t)`` and ``torch.tensor([t, t])`` for a number ``t`` that is a tensor without dimensions.

    Eager reads the number; a trace cannot, and need not: the values are expanded and stacked instead, same bits.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        make = _MAKERS.get(func)
        made = make(*args, **named) if make is not None else None
        return func(*args, **named) if made is None else made


def _full(size: Any, fill_value: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor | None:
    if not isinstance(fill_value, Tensor):
        return None
    return fill_value.to(device=device, dtype=dtype).expand(size).clone()


def _tensor(data: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor | None:
    if isinstance(data, Tensor) or not _holds_tensors(data):
        return None
    return _stacked(data).to(device=device, dtype=dtype)


def _holds_tensors(data: Any) -> bool:
    return isinstance(data, Tensor) or (isinstance(data, (list, tuple)) and any(map(_holds_tensors, data)))


def _stacked(data: Any) -> Tensor:
    return torch.stack([_stacked(d) for d in data]) if isinstance(data, (list, tuple)) else torch.as_tensor(data)


_MAKERS: dict[Any, Callable[..., Tensor | None]] = {torch.full: _full, torch.tensor: _tensor}
