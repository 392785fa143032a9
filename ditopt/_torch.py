"""The only file that imports a private torch name.

Everything under ``torch._*`` moves between releases; gathering it here makes a new torch one file's work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "compile_graph",
    "fake_mode_of",
    "flex_attention",
    "invoke_subgraph",
    "is_fake",
    "pytree",
    "weightless",
    "whole_lists",
]

invoke_subgraph = torch.ops.higher_order.invoke_subgraph
flex_attention = torch.ops.higher_order.flex_attention


def is_fake(value: object) -> bool:
    """Whether ``value`` is a tensor without storage."""
    return isinstance(value, FakeTensor)


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode:
    """The one FakeTensorMode that ``values`` belong to, or a fresh one."""
    return detect_fake_mode(list(values)) or FakeTensorMode()


def weightless() -> FakeTensorMode:
    """A mode under which a model is built as shapes and types without memory, and can be captured outside of it."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # imports sympy

    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(tracked_fakes=[]))


@contextlib.contextmanager
def whole_lists() -> Iterator[None]:
    """Inside, ``tolist`` of a tensor of a trace is one call that a TorchFunctionMode sees, as it is in eager; without
    it the numbers are read one by one."""
    owners: list[Any] = [kind for kind in (FakeTensor, FunctionalTensor) if "tolist" in vars(kind)]
    own = [kind.tolist for kind in owners]
    for kind in owners:
        kind.tolist = torch.Tensor.tolist
    try:
        yield
    finally:
        for kind, method in zip(owners, own, strict=True):
            kind.tolist = method


def compile_graph(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    """Inductor on one fx graph, outside Dynamo: a callable over flat inputs that returns a tuple."""
    from torch._inductor import standalone_compile

    return standalone_compile(module, list(example_inputs), dynamic_shapes="from_example_inputs")
