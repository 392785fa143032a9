"""The model as a function of flat tensors, which is what a graph is, around a copy that shares its weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from ditopt._torch import pytree
from ditopt.capture.spec import SCALARS, CallSpec, dotted
from ditopt.offload import keep_shared, strip


def shared_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the module structure around the same tensors, without the offload hooks of accelerate."""
    kept: dict[int, Any] = {**keep_shared(model), **{id(t): t for t in [*model.parameters(), *model.buffers()]}}
    twin = copy.deepcopy(model, kept)
    strip(twin)
    return twin


class Packing:
    """How the model's output was packed in its last run. A plain object: export restores a module's own containers."""

    def __init__(self) -> None:
        self.marks: list[tuple[bool, Any]] = []
        self.tree: Any = None
        self.structure: str | tuple[str, ...] = "tuple"
        self.changed: list[str] = []  # attributes of the model that the run changed

    def note(self, out: Any) -> tuple[Tensor, ...]:
        """The tensors of an output, in order; remembers how they were packed."""
        leaves, self.tree = pytree.tree_flatten(out)
        self.marks = [(isinstance(leaf, Tensor), None if isinstance(leaf, Tensor) else leaf) for leaf in leaves]
        self.structure = tuple(out) if isinstance(out, dict) else "single" if isinstance(out, Tensor) else "tuple"
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def pack(self, values: Sequence[Tensor]) -> Any:
        """An output like the noted one with other tensors."""
        rest = iter(values)
        return pytree.tree_unflatten(
            [next(rest) if is_tensor else static for is_tensor, static in self.marks], self.tree
        )


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
        args, kwargs = _split(self.model, bound)
        before = _python_state(self.model)  # compared here: torch.export puts attributes back when it is done
        with self._around():
            out = self.model(*args, **kwargs)
        self.packing.changed = [k for k, v in _python_state(self.model).items() if before.get(k, v) != v]
        return (*self.packing.note(out), *self._more())


def _split(model: nn.Module, bound: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Bound arguments as positional and keyword ones (``forward(self, *xs)`` and positional-only need the former)."""
    args: list[Any] = []
    kwargs = dict(bound)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in kwargs and parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            args.extend(kwargs.pop(name))
        elif name in kwargs and parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            args.append(kwargs.pop(name))
    return args, kwargs


def _python_state(model: nn.Module) -> dict[str, Any]:
    """The Python values among the attributes of all modules, in containers too, by dotted name."""
    return {
        f"{name}.{dotted(path)}" if name else dotted(path): v
        for name, module in model.named_modules()
        for path, v in pytree.tree_flatten_with_path(vars(module))[0]
        if isinstance(v, SCALARS)
    }
