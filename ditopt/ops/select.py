"""``ditopt::select``: a value that a step either computes or predicts.

    select(computed, predicted, decision) -> Tensor

``decision`` names the entry of ``Program.decisions`` that is asked once a step. The two operands have one shape,
dtype and device. A program in which nothing has been decided yet computes: that is the reference below, and what
makes a cached program equal to the plain one. Lowering fixes every decision of a step variant, puts one operand in
the place of each select, and drops what only the other one needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("ditopt", "DEF")
_library.define("select(Tensor computed, Tensor predicted, str decision) -> Tensor")

select = torch.ops.ditopt.select.default


def reference(computed: Tensor, predicted: Tensor, decision: str) -> Tensor:
    """The undecided program computes."""
    if computed.shape != predicted.shape or computed.dtype != predicted.dtype:
        raise ValueError(
            f"select({decision!r}): computed is {computed.dtype}{list(computed.shape)}, "
            f"predicted is {predicted.dtype}{list(predicted.shape)}; they must agree"
        )
    return computed.clone()  # an operator's result may not alias its operands


_library.impl("select", reference, "CompositeExplicitAutograd")
