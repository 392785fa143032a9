"""Modules of a model that stay Python inside its graph: those whose Python looks at values of the latent.

Such a module becomes one operator (``ops/call_module.py``). It is run once in eager, which gives the types of its
results; a trace then holds the operator in its place. What runs it later is a copy of the module without weights, which
are operands, so the modules of equal blocks are one body.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ditopt._torch import pytree
from ditopt.capture.held import deep_copy
from ditopt.capture.replay import Lost, Recorder
from ditopt.capture.spec import STATIC
from ditopt.errors import CaptureError
from ditopt.ops.call_module import BODIES, Body, call_module


class Outside:
    """The modules at ``paths`` (path -> the line that cannot be traced), put outside of the graph of a model: observed
    in a copy that runs in eager, then placed in a copy that is traced."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self.paths = {p: line for p, line in paths.items() if not any(p.startswith(f"{q}.") for q in paths)}
        self._calls: dict[str, deque[_Call]] = defaultdict(deque)

    def observe(self, model: nn.Module, recorder: Recorder) -> None:
        """Note the calls of the modules of ``model``; what they look at is no business of ``recorder``."""
        for path in self.paths:
            module = model.get_submodule(path)
            module.forward = functools.partial(self._observed, path, _twin(module), module, recorder)

    def place(self, model: nn.Module) -> None:
        """Put the operator in the place of the modules of ``model``."""
        for path in self.paths:
            module = model.get_submodule(path)
            module.forward = functools.partial(self._placed, path, module)

    def _observed(
        self, path: str, twin: nn.Module, module: nn.Module, recorder: Recorder, *args: Any, **kwargs: Any
    ) -> Any:
        with recorder.paused():
            call = _Call(twin, args, kwargs, list(_weights(module).values()), self.paths[path])
        self._calls[path].append(call)
        return call.pack(call.first)

    def _placed(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self._calls[path]:
            raise Lost(f"{path} is called more often than outside of tracing")
        call = self._calls[path].popleft()
        inputs = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        return call.pack(call_module(inputs, list(_weights(module).values()), call.name))


class _Call:
    """One call of a module: what runs it again on other tensors is in BODIES under ``name``; ``first`` it gave."""

    def __init__(self, twin: nn.Module, args: Any, kwargs: Any, weights: Sequence[Tensor], line: str) -> None:
        from torch.utils.flop_counter import FlopCounterMode  # imports triton

        self._twin = twin
        self._names = list(_weights(twin))
        leaves, self._tree = pytree.tree_flatten((args, kwargs))
        self._statics = [None if isinstance(v, Tensor) else v for v in leaves]
        self._places = [i for i, v in enumerate(leaves) if isinstance(v, Tensor)]
        inputs = [leaves[i] for i in self._places]
        what = type(twin).__name__
        strange = [type(v).__name__ for v in self._statics if not isinstance(v, STATIC)]
        if strange or not inputs:
            raise CaptureError(
                f"{what} looks at values of the latent{line} and is called with "
                f"{f'a {strange[0]}' if strange else 'no tensor'}, so it cannot stay Python in a graph either; it must "
                "take tensors, numbers and texts"
            )
        before, versions = _state(twin), [t._version for t in (*inputs, *weights)]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            out = self._call(inputs, weights)
        if _state(twin) != before or [t._version for t in (*inputs, *weights)] != versions:
            raise CaptureError(
                f"{what} looks at values of the latent{line} and changes itself or its inputs; it cannot stay Python "
                "in a graph, which runs it as a function"
            )
        parts, self._out = pytree.tree_flatten(out)
        self._kept = [None if isinstance(v, Tensor) else v for v in parts]
        self._holes = [i for i, v in enumerate(parts) if isinstance(v, Tensor)]
        self.first = [parts[i] for i in self._holes]
        types = tuple(torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device="meta") for r in self.first)
        told = [_types(inputs), _types(weights), _types(types), self._statics, str(self._tree), self._names, before]
        self.name = f"{what}_{hashlib.sha256(repr(told).encode()).hexdigest()[:12]}"
        BODIES.setdefault(self.name, Body(self._run, types, counter.get_total_flops(), line))

    def pack(self, results: Sequence[Tensor]) -> Any:
        """What the module returned, with other tensors."""
        parts = list(self._kept)
        for i, result in zip(self._holes, results, strict=True):
            parts[i] = result
        return pytree.tree_unflatten(parts, self._out)

    def _call(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
        leaves = list(self._statics)
        for i, value in zip(self._places, inputs, strict=True):
            leaves[i] = value
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        return functional_call(self._twin, dict(zip(self._names, weights, strict=True)), args, kwargs)

    def _run(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            found = [v for v in pytree.tree_leaves(self._call(inputs, weights)) if isinstance(v, Tensor)]
        given = {t.untyped_storage().data_ptr() for t in (*inputs, *weights)}
        return [r.clone() if r.untyped_storage().data_ptr() in given else r for r in found]


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _twin(module: nn.Module) -> nn.Module:
    """A copy without weights."""
    kept: dict[int, Any] = {}
    for t in _weights(module).values():
        empty = torch.empty_like(t, device="meta")
        kept[id(t)] = nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty
    return deep_copy(module, kept)


def _state(module: nn.Module) -> list[Any]:
    """What else decides what a module computes: its classes, and their attributes by value, or by type and identity."""
    found: list[Any] = []
    for name, part in module.named_modules():
        found.append((name, type(part).__module__, type(part).__qualname__))
        for key, value in vars(part).items():
            if key not in _OWN:
                leaves, tree = pytree.tree_flatten(value)
                shown = [repr(v) if isinstance(v, STATIC) else _shown(v) for v in leaves]
                found.append((key, str(tree), shown))
    return found


_OWN = frozenset([*vars(nn.Module()), "forward"])


def _shown(value: Any) -> str:
    return f"{type(value).__qualname__} {id(value) if isinstance(value, Tensor) else ''}"


def _types(tensors: Sequence[Tensor]) -> list[Any]:
    return [(tuple(t.shape), t.stride(), str(t.dtype)) for t in tensors]
