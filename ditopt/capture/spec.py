"""How one call of a model maps to flat tensors and back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditopt import roles as role_rules
from ditopt._torch import pytree
from ditopt.capture.opened import opened
from ditopt.errors import BadInput

SCALARS = (bool, int, float, str, type(None))
STATIC = (*SCALARS, Enum, torch.dtype, torch.device, torch.Size)
"""Types of leaves that a graph holds fixed."""


@dataclass(frozen=True)
class CallSpec:
    """How one call of a model maps to flat tensors and back.

    ``key`` identifies the signature: structure, shapes, dtypes, devices and static values. Python floats, and an
    integer timestep, become tensors (NumPy's numbers count as Python's); every other Python value is static. ``names``:
    dotted names of the tensors; ``arguments``: the parameters of forward; ``labels``: dotted names of all leaves;
    ``defaults``: (dotted name, value) of each leaf of the defaults of parameters that the call leaves out.
    """

    key: tuple[Any, ...]
    names: tuple[str, ...]
    positions: tuple[int, ...]
    statics: tuple[Any, ...]
    tree: pytree.TreeSpec

    arguments: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each tensor, in the order of ``names``."""
        return tuple(self.key[1 + i][0] for i in self.positions)

    @property
    def family(self) -> tuple[Any, ...]:
        """``key`` with ranks in place of shapes: what calls have in common that differ in sizes only."""
        taken = set(self.positions)
        return (self.key[0], *((len(k[0]), *k[1:]) if i in taken else k for i, k in enumerate(self.key[1:])))

    def static_items(self) -> list[tuple[str, Any]]:
        """(dotted name, value) of the arguments that are no tensors."""
        taken = set(self.positions)
        return [(n, v) for i, (n, v) in enumerate(zip(self.labels, self.statics, strict=True)) if i not in taken]

    def lengths(self) -> dict[str, int]:
        """Dotted name of each list or tuple that is not empty -> how many entries it has."""
        entries: dict[str, set[str]] = {}
        for label in self.labels:
            words = label.split(".")
            for i, word in enumerate(words):
                if word.isdigit():
                    entries.setdefault(".".join(words[:i]), set()).add(word)
        return {name: len(found) for name, found in entries.items()}

    def unflatten(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The bound arguments of a call, with ``tensors`` in their places."""
        leaves = list(self.statics)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        bound: dict[str, Any] = pytree.tree_unflatten(leaves, self.tree)
        return bound


def bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[CallSpec, list[Tensor]]:
    """The CallSpec of a call, and its tensors in order. A call that does not fit ``model.forward`` is BadInput."""
    signature = inspect.signature(model.forward)
    arguments = by_name(model, args, kwargs)
    leaves, tree = pytree.tree_flatten_with_path(opened(arguments))
    names: list[str] = []
    positions: list[int] = []
    statics: list[Any] = []
    tensors: list[Tensor] = []
    key: list[Any] = [tree]
    for i, (path, leaf) in enumerate(leaves):
        name = dotted(path)
        if isinstance(leaf, np.generic):
            leaf = leaf.item()
        if isinstance(leaf, float) or (type(leaf) is int and role_rules.is_time(name)):
            leaf = torch.tensor(leaf, device=_device(model))
        if isinstance(leaf, Tensor):
            names.append(name)
            positions.append(i)
            statics.append(None)
            tensors.append(leaf)
            key.append((tuple(leaf.shape), leaf.dtype, leaf.device))
        elif isinstance(leaf, STATIC):
            statics.append(leaf)
            key.append(leaf)
        else:
            raise BadInput(
                f"argument {name} is a {type(leaf).__name__}; ditopt takes tensors, numbers, strings, enums, None "
                "and nested tuples, lists, dicts and plain objects of them"
            )
    labels = tuple(dotted(path) for path, _ in leaves)
    left_out = {
        n: p.default for n, p in signature.parameters.items() if p.default is not p.empty and n not in arguments
    }
    defaults = [(dotted(path), leaf) for path, leaf in pytree.tree_flatten_with_path(left_out)[0]]
    spec = CallSpec(
        tuple(key),
        tuple(names),
        tuple(positions),
        tuple(statics),
        tree,
        tuple(signature.parameters),
        labels,
        tuple((name, leaf) for name, leaf in defaults if isinstance(leaf, STATIC)),
    )
    return spec, tensors


def by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of ``model.forward``. BadInput where they do not fit."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise BadInput(f"the call does not fit {type(model).__name__}.forward{signature}: {error}") from None
    arguments: dict[str, Any] = {}
    for name, value in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    return arguments


def arguments_of(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional and keyword arguments of a call, from a dict of keyword arguments or a tuple; BadInput otherwise."""
    if isinstance(example, Mapping):
        return (), example
    if isinstance(example, (tuple, list)):
        return example, {}
    raise BadInput(f"example_inputs is a {type(example).__name__}; expected a dict of keyword arguments or a tuple")


def dotted(path: Sequence[Any]) -> str:
    """A path of keys and indices as one name."""
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")
