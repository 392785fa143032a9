"""A run of blocks in a model's forward, as data, and as a module that can be captured.

A ``Segment`` is what forward does between the call of the first block and the return of the last one, as one run showed
it: which modules it called, with what, and the functions of torch between them. ``Blocks`` runs it on given tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditopt._torch import pytree


@dataclass(frozen=True)
class Made:
    """A tensor that a step of a segment gave: among the leaves of what it returned."""

    step: int
    leaf: int


@dataclass(frozen=True)
class Given:
    """A tensor from outside of the segment, by its number."""

    index: int


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer of the model, by its dotted name."""

    name: str


@dataclass(frozen=True)
class Part:
    """A module of the model that is handed to another one, by its path."""

    path: str


@dataclass(frozen=True)
class Kind:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> Kind:
        return Kind(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def fits(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is of this kind, whatever its layout in memory."""
        return (tuple(tensor.shape), tensor.dtype, tensor.device) == (self.shape, self.dtype, self.device)


@dataclass(frozen=True)
class Step:
    """One call. ``callee``: the path of a module, or a function of torch. ``operands``: the leaves of its arguments;
    ``results`` those of what it returned: a Kind for a new tensor, Made or Given for one that was there already."""

    callee: str | Callable[..., Any]
    operands: tuple[Any, ...]
    arguments: pytree.TreeSpec
    results: tuple[Any, ...]
    packing: pytree.TreeSpec

    @property
    def is_block(self) -> bool:
        """Whether a module is called."""
        return isinstance(self.callee, str)


@dataclass(frozen=True)
class Segment:
    """``names`` and ``kinds`` of the tensors from outside; ``outputs``: what the rest of forward reads; ``before``: how
    often forward calls modules of the segment before it begins."""

    steps: tuple[Step, ...]
    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    outputs: tuple[Made, ...]
    before: int

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules that are called, in order, each once."""
        return tuple(dict.fromkeys(s.callee for s in self.steps if isinstance(s.callee, str)))

    @property
    def between(self) -> int:
        """How many functions of torch are called between modules."""
        return sum(not s.is_block for s in self.steps)


class Blocks(nn.Module):
    """The segment of ``model`` as a module: the model's own modules, with all of their names, and another forward."""

    segment: Segment

    @staticmethod
    def of(model: nn.Module, segment: Segment) -> Blocks:
        """``model`` is a copy. The class is made here because errors say the names of classes."""
        made: Blocks = type(f"the run of blocks of {type(model).__name__}", (Blocks,), {"segment": segment})()
        for shared in ("_modules", "_parameters", "_buffers"):
            made.__dict__[shared] = model.__dict__[shared]
        return made.eval()

    def forward(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        given = [tensors[name] for name in self.segment.names]
        made: list[list[Any]] = []
        for step in self.segment.steps:
            leaves = [self._value(leaf, given, made) for leaf in step.operands]
            args, kwargs = pytree.tree_unflatten(leaves, step.arguments)
            made.append(pytree.tree_leaves(self._callable(step.callee)(*args, **kwargs)))
        return tuple(made[o.step][o.leaf] for o in self.segment.outputs)

    def _callable(self, callee: str | Callable[..., Any]) -> Callable[..., Any]:
        if not isinstance(callee, str):
            return callee
        module = self.get_submodule(callee)
        # hooks ran in forward, around what the segment holds
        return module.forward if module._forward_hooks or module._forward_pre_hooks else module

    def _value(self, leaf: Any, given: Sequence[Tensor], made: Sequence[Sequence[Any]]) -> Any:
        if isinstance(leaf, Made):
            return made[leaf.step][leaf.leaf]
        if isinstance(leaf, Given):
            return given[leaf.index]
        if isinstance(leaf, Weight):
            path, _, name = leaf.name.rpartition(".")
            return getattr(self.get_submodule(path), name)
        return self.get_submodule(leaf.path) if isinstance(leaf, Part) else leaf
