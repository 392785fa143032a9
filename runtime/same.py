"""Recognising a tensor that was seen before, by identity where that is proof and by content where it is not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's content as integers: NaN equals NaN, and 0.0 differs from -0.0."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype == torch.bool:
        return tensor.to(torch.int8)
    return tensor.view(_INTEGER[tensor.dtype.itemsize])


def version(tensor: Tensor) -> int | None:
    """The counter of in-place writes; None for tensors made in inference mode, which have none."""
    return None if tensor.is_inference() else tensor._version


class Held:
    """What a tensor was when it was seen: a copy of its content, and what recognises it without reading it.

    The tensor stays alive as long as this does, so that its address cannot return as another tensor's.
    """

    __slots__ = ("_copy", "_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().clone()
        self._mark(tensor)

    def _mark(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), version(tensor)

    def identical(self, tensor: Tensor, trust: bool = False) -> bool | None:
        """Whether ``tensor`` is what was seen, as far as identity tells; None: only its content can tell.

        Same memory and same count of writes is the same content. Where writes are not counted (inference mode) the
        same memory is proof only under ``trust``.
        """
        mine = self._tensor
        if (mine.shape, mine.dtype, mine.device) != (tensor.shape, tensor.dtype, tensor.device):
            return False
        if tensor.numel() == 0:
            return True
        if mine.data_ptr() != tensor.data_ptr() or mine.stride() != tensor.stride():
            return None
        counted = version(tensor)
        if counted is None or self._version is None:
            return True if trust else None
        return True if counted == self._version else None

    def equal(self, tensor: Tensor) -> bool:
        """Whether the contents agree bit for bit: one host read. Shapes and dtypes must agree."""
        if not torch.equal(bits(self._copy), bits(tensor.detach())):
            return False
        self._mark(tensor)  # the next call with this very tensor needs no read
        return True


class Known:
    """A bounded table of groups of tensors: gives equal groups equal numbers. The least recently used group goes first.

    ``reads`` counts comparisons of content, each a host read.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reads = 0
        self._next = 0
        self._groups: OrderedDict[int, tuple[Held, ...]] = OrderedDict()
        self._confirmed: set[int] = set()

    def copy(self) -> Known:
        """A table that can change without changing this one."""
        new = Known(self.limit)
        new.reads, new._next = self.reads, self._next
        new._groups, new._confirmed = self._groups.copy(), set(self._confirmed)
        return new

    def doubt(self) -> None:
        """A request begins: the same memory without a count of writes no longer is proof."""
        self._confirmed.clear()

    def __contains__(self, number: int) -> bool:
        return number in self._groups

    def find(self, tensors: Sequence[Tensor]) -> int | None:
        """The number of an equal group, or None."""
        open_: list[tuple[int, list[int]]] = []
        for number, group in reversed(self._groups.items()):
            if len(group) != len(tensors):
                continue
            trust = number in self._confirmed
            verdicts = [held.identical(t, trust) for held, t in zip(group, tensors, strict=True)]
            if all(verdicts):
                return self._use(number)
            if False not in verdicts:
                open_.append((number, [i for i, v in enumerate(verdicts) if v is None]))
        for number, unknown in open_:
            if all(self._equal(self._groups[number][i], tensors[i]) for i in unknown):
                return self._use(number)
        return None

    def add(self, tensors: Sequence[Tensor]) -> int:
        """Remember a group that ``find`` does not know; its number is new."""
        number = self._next
        self._next += 1
        self._groups[number] = tuple(Held(t) for t in tensors)
        self._confirmed.add(number)
        while len(self._groups) > self.limit:
            self._groups.popitem(last=False)
        return number

    def _equal(self, held: Held, tensor: Tensor) -> bool:
        self.reads += 1
        return held.equal(tensor)

    def _use(self, number: int) -> int:
        self._groups.move_to_end(number)
        self._confirmed.add(number)
        return number


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Addresses of the memory behind some tensors."""
    return {t.untyped_storage().data_ptr() for t in tensors} - {0}


def own(values: Iterable[Tensor], foreign: set[int]) -> list[Tensor]:
    """``values`` with a copy in the place of each one that lives in ``foreign`` memory (see ``storages``)."""
    return [v.clone() if v.untyped_storage().data_ptr() in foreign else v for v in values]
