"""What a file of the registry says of an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

Form = Literal["kernel", "written out"]


@dataclass(frozen=True)
class Claim:
    """``count`` operators called ``op`` run as ``form`` on a target, because of ``reason``."""

    op: str
    form: Form
    reason: str
    count: int = 1


@dataclass(frozen=True)
class Entry:
    """``claim(node, target)``: how ``op`` is run there, and the reason. ``write(emit, node, target)``: the node written
    out by ``emit(op, *args, **kwargs)``, its result or one for each of its results; None where ir/opening.py does so.
    ``install(node)``: asked for each node on a GPU, puts the kernel for it in place. ``onnx``: for torch.onnx, from an
    opset how an operator that stays, or that ``write`` makes, is written. ``integer(node, target)``: of a product with
    a quantized weight, whether it is one of integers there, and the reason."""

    op: Any
    claim: Callable[[fx.Node, str], tuple[Form, str]]
    write: Callable[[Any, fx.Node, str], Any] | None = None
    install: Callable[[fx.Node], None] | None = None
    onnx: Mapping[Any, Callable[[int], Callable[..., Any]]] = field(default_factory=dict)
    integer: Callable[[fx.Node, str], tuple[bool, str]] | None = None


def on_gpu(node: fx.Node) -> bool:
    """Whether ``node`` computes on a GPU."""
    value = node.meta["val"]
    return bool((value[0] if isinstance(value, (tuple, list)) else value).device.type == "cuda")


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's value."""
    return tuple(int(s) for s in node.meta["val"].shape)
