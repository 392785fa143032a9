"""The model as a function of flat tensors, which is what a graph is, around a copy that shares its weights."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ditopt._torch import is_fake, pytree
from ditopt.capture import opened
from ditopt.capture.held import deep_copy, held
from ditopt.capture.numbers import Numbers
from ditopt.capture.spec import SCALARS, CallSpec, dotted
from ditopt.offload import keep_shared, strip


def shared_copy(model: nn.Module, runs: bool = False, written: Sequence[str] = ()) -> nn.Module:
    """A deep copy of the module structure around the same tensors, without the offload hooks of accelerate.

    ``runs``: it will run in eager, where forward may write into buffers; then these are copies, too, and so are the
    parameters that are ``written``, by dotted name."""
    kept: dict[int, Any] = {**keep_shared(model), **{id(t): t for t in [*model.parameters(), *model.buffers()]}}
    kept |= {id(t): t.detach().clone() for t in model.buffers() if runs}
    own = dict(model.named_parameters(remove_duplicate=False)) if written else {}
    kept |= {id(t): nn.Parameter(t.detach().clone(), t.requires_grad) for t in (own[n] for n in written if n in own)}
    kept.update({id(v): v for module in model.modules() for v in vars(module).values() if is_fake(v)})
    twin = deep_copy(model, kept)
    strip(twin)
    for module in twin.modules():
        _register_fakes(module)
    return twin


def _register_fakes(module: nn.Module) -> None:
    """Tensors without storage in plain attributes become buffers: torch.export brings those into its own fake mode."""
    for name, value in list(vars(module).items()):
        if is_fake(value):
            delattr(module, name)
            module.register_buffer(name, value, persistent=False)


class Packing:
    """How the model's output was packed in its last run. A plain object: export restores a module's own containers.

    ``structure``: "single" (a tensor), "tuple", or the dotted names of the tensors of a dict or dataclass.
    """

    def __init__(self) -> None:
        self.structure: str | tuple[str, ...] = "tuple"
        self.opaque: list[str] = []  # types of objects in the output that may hide tensors
        self.changed: list[str] = []  # attributes of the model that the run changed, Python values
        self.filled: list[str] = []  # and those that it made, or that are tensors
        self.removed: list[str] = []  # parts of the arguments that the run took away
        self.written: list[str] = []  # tensors that the run put into its arguments, by dotted name
        self.state: tuple[str, ...] = ()  # parameters and buffers that a trace writes into
        self._fill: Fill | None = None
        self._writes: list[tuple[opened.Path, Fill]] = []

    @property
    def kept(self) -> tuple[str, ...]:
        """Attributes of the model that the run changed."""
        return (*self.changed, *self.filled)

    def note(self, out: Any) -> tuple[Tensor, ...]:
        """The tensors of an output, in order; remembers how they were packed."""
        found: list[tuple[str, Tensor]] = []
        self.opaque = []
        self._fill = self._spread(out, "", found)
        named = isinstance(out, dict) or _is_record(out)
        self.structure = tuple(n for n, _ in found) if named else "single" if isinstance(out, Tensor) else "tuple"
        return tuple(tensor for _, tensor in found)

    def note_writes(self, before: Mapping[opened.Path, Any], arguments: Any) -> tuple[Tensor, ...]:
        """The tensors that the run put into ``arguments``, whose leaves were ``before``; remembers where."""
        found: list[tuple[str, Tensor]] = []
        new, gone = opened.writes(before, arguments)
        self.removed = [dotted(path) for path in gone]
        self._writes = [(path, self._spread(opened.opened(v), dotted(path), found)) for path, v in new.items()]
        self.written = [name for name, _ in found]
        return tuple(tensor for _, tensor in found)

    def pack(self, values: Sequence[Tensor]) -> Any:
        """An output like the noted one with other tensors."""
        assert self._fill is not None, "nothing is noted"
        return self._fill(iter(values))

    @property
    def writes(self) -> bool:
        """Whether the run put anything into its arguments."""
        return bool(self._writes)

    def put(self, values: Sequence[Tensor], arguments: Any) -> None:
        """Write into ``arguments`` what the noted run wrote into its own, with the tensors that follow the output's."""
        rest = iter(values)
        assert self._fill is not None, "nothing is noted"
        self._fill(rest)
        for path, fill in self._writes:
            opened.put(arguments, path, fill(rest))

    def _spread(self, value: Any, name: str, found: list[tuple[str, Tensor]]) -> Fill:
        """How to make ``value`` anew from other tensors; its own go to ``found``."""
        if isinstance(value, Tensor):
            found.append((name, value))
            return next
        parts, tree = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
        inside = f"{name}." if name else ""
        if not tree.is_leaf():
            keys = value if isinstance(value, dict) else range(len(parts))
            fills = [self._spread(part, f"{inside}{key}", found) for key, part in zip(keys, parts, strict=True)]
            return lambda rest: pytree.tree_unflatten([fill(rest) for fill in fills], tree)
        if _is_record(value):
            made = {k: self._spread(v, inside + k, found) for k, v in _attributes(value).items()}
            return lambda rest: _record(type(value), {k: fill(rest) for k, fill in made.items()})
        if hasattr(value, "__dict__"):
            self.opaque.append(type(value).__name__)
        return lambda rest: value


Fill = Callable[[Iterator[Tensor]], Any]
"""Takes as many tensors as it needs, and makes a value."""


def _is_record(value: Any) -> bool:
    """Whether ``value`` is an instance of a dataclass that pytree does not know."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and pytree.tree_structure(value).is_leaf()


def _attributes(record: Any) -> dict[str, Any]:
    """The fields of a dataclass instance, and what else its construction has set."""
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)} | getattr(record, "__dict__", {})


def _record(cls: type, attributes: Mapping[str, Any]) -> Any:
    """An instance with these attributes; what ``__post_init__`` derives from tensors is among them already."""
    record: Any = object.__new__(cls)
    for name, value in attributes.items():
        object.__setattr__(record, name, value)
    return record


class Flat(nn.Module):
    """The model as a function of flat tensors. The packing of its output is learned while it runs.

    ``around`` makes a context in which the model runs; ``more`` gives further results after it (see ``replay``).
    """

    def __init__(
        self,
        model: nn.Module,
        spec: CallSpec,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        more: Callable[[], Sequence[Tensor]] = tuple,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.spec = spec
        self.packing = Packing()
        self._around = around
        self._more = more

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        bound = self.spec.unflatten(tensors)
        args, kwargs = arguments_of_call(self.model, bound)
        given = opened.leaves(bound)
        before = dict(held(self.model))  # compared here: torch.export puts attributes back when it is done
        # only in a trace: any such mode keeps eager from its fused kernels
        numbers = Numbers() if torch.compiler.is_exporting() else nullcontext()
        with self._around(), numbers:
            out = self.model(*args, **kwargs)
        after = dict(held(self.model))
        self.packing.changed = [k for k, v in after.items() if _is_number(v) and _differs(before.get(k, v), v)]
        self.packing.filled = [k for k, v in after.items() if _is_new(k, v, before)]
        return (*self.packing.note(out), *self.packing.note_writes(given, bound), *self._more())


def arguments_of_call(model: nn.Module, bound: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Bound arguments as positional and keyword ones (``forward(self, *xs)`` and positional-only need the former)."""
    args: list[Any] = []
    kwargs = dict(bound)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in kwargs and parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            args.extend(kwargs.pop(name))
        elif name in kwargs and parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            args.append(kwargs.pop(name))
    return args, kwargs


def _is_new(name: str, value: Any, before: Mapping[str, Any]) -> bool:
    return before.get(name) is not value if isinstance(value, Tensor) else _is_number(value) and name not in before


def _is_number(value: Any) -> bool:
    return isinstance(value, (*SCALARS, torch.SymInt))


def _differs(before: Any, now: Any) -> bool:
    """Whether an attribute changed. One that holds a size of a trace was set in it."""
    return isinstance(now, torch.SymInt) or before != now
