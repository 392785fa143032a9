"""What a loaded model is called with: nested arguments as named tensors, and a check of those that are no tensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditopt.artifact import Manifest, constant
from ditopt.errors import BadInput, SessionError

_LONG = 240
"""Characters of a value that a message shows."""


class Arguments:
    """The arguments that one exported signature takes.

    ``manifest.extra["constants"]`` holds what the capture saw for arguments that are no tensors (as ``constant`` writes
    it), and the defaults of those that were left out: such arguments may be repeated or left out, not changed.
    """

    def __init__(self, manifest: Manifest, where: str) -> None:
        self._where = where
        self._inputs = {i.name: i.type for i in manifest.inputs}
        self._constants = dict(leaves(manifest.extra.get("constants", {})))
        names = [*self._inputs, *self._constants]
        self._containers = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
        order = manifest.extra.get("signature") or dict.fromkeys(name.split(".")[0] for name in self._inputs)
        self.order: tuple[str, ...] = tuple(order)

    def __str__(self) -> str:
        return ", ".join(f"{n}: {_describe(t.dtype, t.shape)}" for n, t in self._inputs.items())

    def tensors(self, named: Mapping[str, Any]) -> list[Tensor]:
        """The model's inputs in order, from arguments by parameter name. BadInput where an argument is none of this
        signature, SessionError for another shape or dtype."""
        given: dict[str, Tensor] = {}
        for top, value in named.items():
            found = dict(leaves({top: value}, objects=self._containers))
            for name, leaf in found.items():
                if name not in self._inputs:
                    self._check_constant(top, name, leaf)
                elif leaf is not None:  # else reported below as missing
                    given[name] = self._tensor(name, leaf)
            lost = [n for n in self._constants if n not in found and (n == top or n.startswith(f"{top}."))]
            if lost:
                gave = f"{top} without {lost[0]}" if found else f"{top}={value!r}"
                raise BadInput(f"{gave} given, but {self._captured(top)}; export again with such arguments")
        missing = [name for name in self._inputs if name not in given]
        if missing:
            raise BadInput(f"{', '.join(missing)} not given; {self._where} takes {self}")
        return [given[name] for name in self._inputs]

    def _tensor(self, name: str, value: Any) -> Tensor:
        wanted = self._inputs[name]
        if isinstance(value, (bool, int, float)):
            value = torch.tensor(value, dtype=wanted.dtype)
        elif not isinstance(value, Tensor):
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                raise BadInput(f"{name} is a {type(value).__name__}; {self._where} expects a tensor there") from None
        value = wanted.pairs(value)
        if value.dtype != wanted.dtype or tuple(value.shape) != wanted.shape:
            raise SessionError(
                f"{name} is {_describe(value.dtype, value.shape)}, but {self._where} was exported for "
                f"{_describe(wanted.dtype, wanted.shape)}; convert it, or export again with such inputs"
            )
        return value

    def _check_constant(self, top: str, name: str, value: Any) -> None:
        """A leaf that is no input: what the export saw, or None for an argument that it did not see."""
        known = name == top and not self._seen(top)
        if isinstance(value, (Tensor, np.ndarray)):
            if known or name not in self._constants:
                raise BadInput(f"unknown input {name!r}; {self._where} takes {self}")
            raise BadInput(f"{name} is a tensor, but {self._captured(top)}; export again with such arguments")
        value = constant(value)
        if name in self._constants:
            if isinstance(value, _SCALARS) and value == self._constants[name]:
                return
        elif value is None and known:
            return
        raise BadInput(
            f"{name}={_short(repr(value))} given, but {self._captured(top)}; export again with such arguments"
        )

    def _seen(self, top: str) -> list[str]:
        """The leaves of an argument that the export saw."""
        return [n for n in (*self._inputs, *self._constants) if n == top or n.startswith(f"{top}.")]

    def _captured(self, top: str) -> str:
        """What the export saw for an argument, in words."""
        if not self._seen(top):
            return f"{self._where} was exported without it and takes {self}"
        return f"{self._where} was exported with {top}={_short(self._text(top))}"

    def _text(self, name: str) -> str:
        if name in self._constants:
            return repr(self._constants[name])
        if name in self._inputs:
            return _describe(self._inputs[name].dtype, self._inputs[name].shape)
        words = dict.fromkeys(n.removeprefix(f"{name}.").split(".")[0] for n in self._seen(name))
        inside = {word: self._text(f"{name}.{word}") for word in words}
        if all(word.isdigit() for word in words):
            return f"[{', '.join(inside[word] for word in sorted(words, key=int))}]"
        return "{" + ", ".join(f"{word!r}: {text}" for word, text in inside.items()) + "}"


_SCALARS = (bool, int, float, str, type(None), np.generic)


def leaves(value: Any, name: str = "", objects: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of nested dicts, lists and tuples, and of the attributes of what stands under a name in
    ``objects``; named as the capture names them."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        parts: Any = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    elif name in objects and hasattr(value, "__dict__") and not isinstance(value, (Tensor, np.ndarray)):
        parts = vars(value).items()
    else:
        yield name, value
        return
    for key, part in parts:
        yield from leaves(part, f"{name}.{key}" if name else str(key), objects)


def _describe(dtype: torch.dtype, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')}{json.dumps(list(shape))}"


def _short(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[: _LONG // 2]} ... {text[-_LONG // 2 :]}"
