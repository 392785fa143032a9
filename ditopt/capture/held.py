"""What modules hold in plain attributes, beside parameters and buffers: copied with a model, and compared around a run.

Models keep there what they made in an earlier call: rotary tables of the last length, the embedding of a prompt.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ditopt._torch import pytree
from ditopt.capture.spec import dotted


def deep_copy(module: nn.Module, kept: Mapping[int, Any]) -> nn.Module:
    """``copy.deepcopy`` with ``kept`` as its memo. What cannot be copied (a lock, a stream, a group of processes) is
    shared, and a ``threading.local`` is made anew with what it holds for this thread."""
    try:
        return copy.deepcopy(module, dict(kept))
    except Exception:  # whatever the parts of a model raise
        memo = dict(kept)
    for part in module.modules():
        for value in _plain(part).values():
            _place(value, memo, set())
    return copy.deepcopy(module, memo)


def renew(twin: nn.Module, model: nn.Module, names: Iterable[str]) -> None:
    """Give the attributes of ``twin``, a copy of ``model``, that hold what ``names`` say (as ``held`` does) the values
    that they have in ``model``."""
    for part, name in dict.fromkeys(_owner(model, name) for name in names):
        value, memo = vars(model.get_submodule(part)).get(name), dict[int, Any]()
        _place(value, memo, set())
        vars(twin.get_submodule(part))[name] = copy.deepcopy(value, memo)


def _owner(model: nn.Module, name: str) -> tuple[str, str]:
    """The path of the module and the name of its attribute that hold ``name``."""
    path, module = "", model
    while (head := name.partition("."))[0] in module._modules:
        path, module, name = f"{path}.{head[0]}".lstrip("."), module.get_submodule(head[0]), head[2]
    return path, name.partition(".")[0]


def _place(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Put into ``memo`` what stands for the parts of ``value`` that cannot be copied."""
    if id(value) in memo or id(value) in seen or isinstance(value, (nn.Module, Tensor)) or _copies(value, memo):
        return
    seen.add(id(value))
    for part in _parts(value):
        _place(part, memo, seen)
    if isinstance(value, threading.local):
        memo[id(value)] = twin = type(value).__new__(type(value))
        vars(twin).update(copy.deepcopy(vars(value), memo))
    elif not _copies(value, memo):
        memo[id(value)] = value


def _copies(value: Any, memo: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, (list, tuple, set)) else list(getattr(value, "__dict__", {}).values())


def held(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What all modules hold in plain attributes, in containers too, by dotted name."""
    for name, module in model.named_modules():
        for path, value in pytree.tree_flatten_with_path(_plain(module))[0]:
            where = f"{name}.{dotted(path)}" if name else dotted(path)
            if isinstance(value, threading.local):
                for inner, part in pytree.tree_flatten_with_path(vars(value))[0]:
                    yield f"{where}.{dotted(inner)}", part
            else:
                yield where, value


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes that a class of its own put into a module."""
    return {name: value for name, value in vars(module).items() if name not in _OWN}


_OWN = frozenset(vars(nn.Module())) - {"training"}
