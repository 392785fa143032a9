"""Values of tensors that a model's Python looks at, recorded in one run and replayed in another.

Tracing stops where Python asks for the value of a tensor (``int(mask.sum())``, ``lengths.tolist()``, ``x[mask]``).
``Recorder`` notes what was read, in an eager run; under ``Replayer`` a traced run gets the same values as constants,
and the tensors that were read become results of the graph, so that a guard can compare them (see ``guard``). Where only
the *size* of a result depends on values, only the size is replayed: ``x[mask]`` becomes a gather of so many rows.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ditopt._torch import pytree, whole_lists
from ditopt.capture import where


@dataclass(frozen=True)
class Read:
    """One look at a tensor: where in the model, what the tensor held, what Python got, and the path of the innermost
    module that was running ("" for the model itself)."""

    line: str
    value: Tensor
    answer: Any
    module: str = ""

    @property
    def held(self) -> str:
        """What a graph holds because of it, in words."""
        return f"holds values that Python reads{self.line}"

    @property
    def differs(self) -> str:
        """What is said where another value is read."""
        return f"its Python reads a value{self.line} that is another for these inputs"


_READERS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.item: lambda t: t.item(),
    Tensor.tolist: lambda t: t.tolist(),
    Tensor.numpy: lambda t: t.numpy(),
    Tensor.__array__: lambda t: t.numpy(),
    Tensor.__bool__: bool,
    Tensor.__int__: int,
    Tensor.__float__: float,
    Tensor.__index__: lambda t: int(t.item()),
    Tensor.is_nonzero: bool,
    torch.is_nonzero: bool,
}
"""Function of one tensor -> what Python gets from its content."""

_SIZES: dict[Any, int] = {
    **dict.fromkeys((torch.arange, torch.linspace, torch.zeros, torch.ones, torch.empty), 0),
    **dict.fromkeys((Tensor.view, Tensor.reshape, Tensor.expand, Tensor.repeat, Tensor.narrow, Tensor.split), 1),
    **dict.fromkeys((torch.reshape, torch.narrow, torch.split, torch.tile), 1),
}
"""Function that takes a tensor of one number for a size -> how many leading arguments are no sizes."""


class Reads(TorchFunctionMode):
    """Calls ``read`` for each look at a tensor's values."""

    def read(self, tensor: Tensor, take: Callable[[Tensor], Any]) -> Any:
        """What Python gets from ``tensor``."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in _READERS and isinstance(args[0], Tensor):
            return self.read(args[0], _READERS[func])
        if func in _SIZES:
            n = _SIZES[func]
            rest, named = pytree.tree_map(self._size, (tuple(args[n:]), named))
            return func(*args[:n], *rest, **named)
        special = _SPECIAL.get(func)
        found = special(self, *args, **named) if special is not None else NotImplemented
        return func(*args, **named) if found is NotImplemented else found

    def _size(self, value: Any) -> Any:
        return self.read(value, _READERS[Tensor.item]) if _is_number(value) else value

    def nonzero(self, mask: Tensor) -> tuple[Tensor, ...]:
        """Indices of what is not zero in ``mask``, one int64 vector a dimension; their number is read."""
        flat = (mask != 0).flatten()
        count = self.read(flat.sum(), _READERS[Tensor.item])
        place = torch.where(flat, flat.cumsum(0) - 1, count)  # zeros all go behind the end
        places = torch.zeros(count + 1, dtype=torch.int64, device=mask.device)
        found = places.scatter(0, place, torch.arange(flat.numel(), device=mask.device))[:count]
        out = []
        for size in reversed(mask.shape):
            out.append(found % size)
            found = found // size
        return tuple(reversed(out))

    def index(self, index: Any, masks: bool = True) -> Any:
        """An index whose masks are vectors of integers (where ``masks``) and whose slices have Python bounds."""
        out: list[Any] = []
        for one in index if isinstance(index, tuple) else (index,):
            if masks and isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) and one.ndim:
                out.extend(self.nonzero(one))
            elif isinstance(one, slice):
                out.append(slice(*(self._size(v) for v in (one.start, one.stop, one.step))))
            else:
                out.append(one)
        return tuple(out)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point()


def _nonzero(reads: Reads, tensor: Tensor, *, as_tuple: bool = False) -> Any:
    found = reads.nonzero(tensor)
    return found if as_tuple else torch.stack(found, 1)


def _where(reads: Reads, condition: Tensor, *choices: Any, **named: Any) -> Any:
    return NotImplemented if choices or named else reads.nonzero(condition)


def _masked_select(reads: Reads, tensor: Tensor, mask: Tensor) -> Any:
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    return tensor.expand(shape)[reads.nonzero(mask.expand(shape))]


def _repeat_interleave(reads: Reads, tensor: Tensor, repeats: Any = None, *args: Any, **named: Any) -> Any:
    if not isinstance(repeats, Tensor) or named.get("output_size") is not None:
        return NotImplemented
    count = reads.read(repeats.sum(), _READERS[Tensor.item])
    if repeats.numel() == 1:
        return torch.repeat_interleave(tensor, count, *args, **named)
    return torch.repeat_interleave(tensor, repeats, *args, **{**named, "output_size": count})


def _bincount(reads: Reads, tensor: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Any:
    if not tensor.numel():
        return NotImplemented
    size = max(reads.read(tensor.max() + 1, _READERS[Tensor.item]), minlength)
    ones = torch.ones_like(tensor, dtype=torch.int64) if weights is None else weights
    return torch.zeros(size, dtype=ones.dtype, device=tensor.device).scatter_add(0, tensor.long(), ones)


def _getitem(reads: Reads, tensor: Tensor, index: Any) -> Any:
    return tensor[reads.index(index)]


def _setitem(reads: Reads, tensor: Tensor, index: Any, value: Any) -> Any:
    one_value = not isinstance(value, Tensor) or value.ndim == 0  # then how many places a mask has does not matter
    tensor[reads.index(index, masks=not one_value)] = value


def _equal(reads: Reads, a: Tensor, b: Tensor) -> Any:
    return a.shape == b.shape and reads.read((a == b).all(), bool)


def _contains(reads: Reads, tensor: Tensor, element: Any) -> Any:
    return reads.read((tensor == element).any(), bool)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere), _nonzero),
    torch.where: _where,
    **dict.fromkeys((torch.masked_select, Tensor.masked_select), _masked_select),
    **dict.fromkeys((torch.repeat_interleave, Tensor.repeat_interleave), _repeat_interleave),
    **dict.fromkeys((torch.bincount, Tensor.bincount), _bincount),
    Tensor.__getitem__: _getitem,
    Tensor.__setitem__: _setitem,
    **dict.fromkeys((torch.equal, Tensor.equal), _equal),
    Tensor.__contains__: _contains,
}
"""Function whose result's size, or whose value for Python, depends on the values of tensors -> what replaces it."""


class Recorder(Reads):
    """Notes every look at a tensor of ``model``, in order, in ``reads``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is noted inside."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def read(self, tensor: Tensor, take: Callable[[Tensor], Any]) -> Any:
        value = tensor.detach().clone().cpu()
        self.reads.append(Read(where.of_caller(), value, take(value.clone()), where.module_of_caller(self._paths)))
        return take(value.clone())  # Python may change the list or array that it gets


class Lost(Exception):
    """A traced run looked at a tensor that the recorded run did not look at."""


class Replayer(Reads):
    """Answers from recorded reads; ``seen`` are those that were used, ``observed`` the tensors that were asked for.

    Reads are found by their line in the model and their order there: a model may look at more when it is not traced.
    """

    def __init__(self, reads: Sequence[Read]) -> None:
        super().__init__()
        self._waiting: dict[str, deque[Read]] = defaultdict(deque)
        for read in reads:
            self._waiting[read.line].append(read)
        self.seen: list[Read] = []
        self.observed: list[Tensor] = []

    def __enter__(self) -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(whole_lists())
            entered = super().__enter__()
            self._stack = stack.pop_all()
        return entered

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._stack.close()

    def read(self, tensor: Tensor, take: Callable[[Tensor], Any]) -> Any:
        line = where.of_caller()
        if not self._waiting[line]:
            raise Lost(f"a value is read{line} that the model does not read outside of tracing")
        found = self._waiting[line].popleft()
        if (found.value.shape, found.value.dtype) != (tensor.shape, tensor.dtype):
            raise Lost(f"another value is read{line} than outside of tracing")
        self.seen.append(found)
        self.observed.append(tensor.detach().clone())  # a copy: the model may write into it later
        return found.answer
