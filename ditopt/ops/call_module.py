"""``ditopt::call_module``: a module of the model that stays Python, because its control flow depends on the latent.

    call_module(inputs, weights, body) -> Tensor[]

A token that chooses its experts decides how many rows each of them computes, and no graph of fixed sizes holds that.
The rest of the model is a graph all the same: the module is one operator of it, whose weights are operands like all
others, so that equal modules of different blocks are one operator and changed weights are seen. ``body`` names an entry
of ``BODIES``, which capture makes; it lives as long as the process, so a program that calls one cannot be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Body:
    """What a name stands for. ``run``: inputs and weights to results that alias neither, of the types of ``results``
    (tensors without memory); ``flops`` of one run; ``line``: " at file:line (code)" of what cannot be a graph."""

    run: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
    results: tuple[Tensor, ...]
    flops: int
    line: str


BODIES: dict[str, Body] = {}
"""Bodies by name."""

_library = torch.library.Library("ditopt", "FRAGMENT")
_library.define("call_module(Tensor[] inputs, Tensor[] weights, str body) -> Tensor[]")

call_module = torch.ops.ditopt.call_module.default


def _body(name: str) -> Body:
    if name not in BODIES:
        raise ValueError(f"call_module calls {name}, Python of a model that is not part of this process")
    return BODIES[name]


def reference(inputs: Sequence[Tensor], weights: Sequence[Tensor], body: str) -> list[Tensor]:
    """Run the module."""
    return list(_body(body).run(inputs, weights))


def types(inputs: Sequence[Tensor], weights: Sequence[Tensor], body: str) -> list[Tensor]:
    """The results without values."""
    return [
        torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device=inputs[0].device) for r in _body(body).results
    ]


def calls(graphs: Iterable[fx.Graph]) -> list[Body]:
    """The bodies that graphs call."""
    return [_body(str(n.args[2])) for g in graphs for n in g.find_nodes(op="call_function", target=call_module)]


_library.impl("call_module", reference, "CompositeExplicitAutograd")
torch.library.register_fake("ditopt::call_module", types, lib=_library)
