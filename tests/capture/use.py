"""Captures a model by one call and runs a call through the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ditopt._torch import pytree
from ditopt.capture import Captured, bind, capture
from ditopt.ir.interpret import run_program


def take(model: nn.Module, *args: Any, roles: Any = None, **kwargs: Any) -> Captured:
    spec, tensors = bind(model, args, kwargs)
    return capture(model, spec, tensors, roles)


def run(model: nn.Module, c: Captured, *args: Any, **kwargs: Any) -> Any:
    """One call through the graph, with the model's own calling convention."""
    spec, tensors = bind(model, args, kwargs)
    assert spec.key == c.spec.key
    outputs, _ = run_program(c.program, dict(zip(spec.names, tensors, strict=True)))
    return c.pack(outputs)


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and bits."""
    (x, xs), (y, ys) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return (
        type(a) is type(b)
        and xs == ys
        and all(
            p.dtype == q.dtype and torch.equal(p, q) if isinstance(p, Tensor) else p == q
            for p, q in zip(x, y, strict=True)
        )
    )
