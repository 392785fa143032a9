"""The only file that imports a private torch name.

Everything under ``torch._*`` moves between releases; gathering it here makes a new torch one file's work.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._C import DisableTorchFunctionSubclass
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator as HigherOrder
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DisableTorchFunctionSubclass",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrder",
    "OpOverload",
    "TorchDispatchMode",
    "compile_graph",
    "depends_on_values",
    "fake_mode_of",
    "fixed_size",
    "flex_attention",
    "guards_of",
    "int_mm",
    "invoke_subgraph",
    "is_fake",
    "is_unbacked",
    "masked_softmax",
    "may_alias",
    "pytree",
    "valueless",
    "weightless",
    "whole_lists",
]

invoke_subgraph = torch.ops.higher_order.invoke_subgraph
flex_attention = torch.ops.higher_order.flex_attention
int_mm = torch.ops.aten._int_mm.default
masked_softmax = torch.ops.aten._masked_softmax.default

_meta = torch.library.Library("aten", "IMPL", "Meta")
if not torch._C._dispatch_has_kernel_for_dispatch_key(masked_softmax.name(), "Meta"):
    _meta.impl("_masked_softmax", lambda scores, *_: torch.empty_like(scores))  # torch 2.13 gives it no type


def is_fake(value: object) -> bool:
    """Whether ``value`` is a tensor without storage."""
    return isinstance(value, FakeTensor)


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode:
    """The one FakeTensorMode that ``values`` belong to, or a fresh one."""
    return detect_fake_mode(list(values)) or FakeTensorMode()


def valueless(
    kind: type[torch.Tensor],
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """A tensor of the subclass ``kind`` that has a type and no memory."""
    return torch.Tensor._make_wrapper_subclass(kind, shape, strides=strides, dtype=dtype, device=device)


def is_unbacked(value: object) -> bool:
    """Whether ``value`` is a number of a trace that depends on the values of tensors."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # imports sympy

    return bool(free_unbacked_symbols(value))


def depends_on_values(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the type or number of what ``op`` returns depends on the values of tensors among its arguments."""
    if torch.Tag.dynamic_output_shape not in op.tags and not op._can_decompose():
        return torch.Tag.data_dependent_output in op.tags
    mode = FakeTensorMode()
    with mode, torch.no_grad():

        def like(t: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)

        given, named = pytree.tree_map_only(torch.Tensor, like, (tuple(args), dict(kwargs)))
        try:
            op(*given, **named)
        except (DynamicOutputShapeException, DataDependentOutputException):
            return True
    return False


def fixed_size(size: int | torch.SymInt) -> int | None:
    """A size of a traced tensor as a number, or None where it is a symbol."""
    if isinstance(size, torch.SymInt):
        found: int | None = size.node.maybe_as_int()
        return found
    return size


def may_alias(op: OpOverload) -> bool:
    """Whether ``op`` is composite and returns a view of its operand for some operands or all."""
    named = torch.Tag.maybe_aliasing_or_mutating in op.tags
    return bool((named or any(a.alias_info for a in op._schema.arguments)) and op._can_decompose())


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


def guards_of(exported: Any) -> tuple[str, ...]:
    """What an ExportedProgram with dynamic sizes assumes of them, as Python over ``L['tensors'][i].size()[d]``."""
    return tuple(getattr(exported, "_guards_code", None) or ())


def compile_graph(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    """Inductor on one fx graph, outside Dynamo: a callable over flat inputs that returns a tuple.

    Where torch's cache holds nothing of a graph it warns that the callable cannot be saved. Nothing here saves it
    (files come from Programs), so that warning is kept from users, who could take it for a failure.
    """
    from torch._inductor import standalone_compile

    log = logging.getLogger("torch._inductor.standalone_compile")
    log.addFilter(_matters)
    try:
        return standalone_compile(module, list(example_inputs), dynamic_shapes="from_example_inputs")
    finally:
        log.removeFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    return "artifact generation failed, cannot save" not in record.getMessage()
