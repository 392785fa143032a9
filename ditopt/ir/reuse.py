"""Values that live from step to step: slots, their updates, and predictions from them.

What every pass that reuses across steps is made of. ``Reuse`` collects the slots of one decision while a pass edits the
entry; ``predict`` writes the linear combination of slots; ``dense`` gives a value the layout that a slot can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ditopt.ir.edit import Editor
from ditopt.ir.program import Formal, StateSlot, TensorType
from ditopt.ops import select

aten = torch.ops.aten


class Reuse:
    """The state of the decision ``name``, whose predictor reads the last ``order + 1`` values.

    ``groups``: for each kept value its slots, newest first (``Decision.slots``); ``types``: all slots; ``weights``: the
    control input with the coefficients, or "" where the newest value is taken as it is (order 0).
    """

    def __init__(self, e: Editor, name: str, order: int) -> None:
        self.e, self.name, self.order = e, name, order
        self.groups: list[tuple[str, ...]] = []
        self.types: list[StateSlot] = []
        self.weights = f"{name}.weights" if order else ""
        self._control: fx.Node | None = None
        self._new: dict[str, fx.Node] = {}

    def slots(self, value: Any) -> list[fx.Node]:
        """Placeholders of new slots for a (fake) value of this type, newest first."""
        group = tuple(f"{self.name}.{len(self.groups)}.{i}" for i in range(self.order + 1))
        self.groups.append(group)
        self.types += [StateSlot(slot, TensorType.of(value)) for slot in group]
        return [self.e.placeholder(slot.replace(".", "_"), Formal("state", slot), value) for slot in group]

    def control(self) -> fx.Node | None:
        """The placeholder of the coefficients; None where there are none."""
        if self.weights and self._control is None:
            value = coefficients(self.e, self.order)
            self._control = self.e.placeholder(f"{self.name}_weights", Formal("control", self.weights), value)
        return self._control

    def keep(self, slots: Sequence[fx.Node], new: fx.Node) -> None:
        """Where the step computes, the first slot takes ``new`` and each other one the value before it."""
        for slot, value in zip(slots, [new, *slots[:-1]], strict=True):
            name = slot.meta["formal"].ref
            self._new[name] = self.e.op(select, value, slot, self.name)

    def finish(self, state_out: Sequence[str]) -> None:
        """Append the new state to the results of the entry, whose own state so far is ``state_out``."""
        self.e.set_results([*self.e.results, *self._new.values()], [*state_out, *self._new])
        self.e.drop_dead()


def coefficients(e: Editor, order: int) -> Any:
    """A (fake) control tensor: float32, shape (order + 1,)."""
    with e.mode:
        return torch.empty(order + 1)


def predict(e: Editor, slots: Sequence[fx.Node], weights: fx.Node | None, at: fx.Node, region: str = "") -> fx.Node:
    """Nodes for the sum of ``weights[i] * slots[i]`` in at least float32, cast back; one slot is taken as it is."""
    if weights is None:
        return slots[0]
    where: dict[str, Any] = {"at": at, "region": region}
    dtype = slots[0].meta["val"].dtype
    half = dtype in (torch.float16, torch.bfloat16)
    terms = []
    for i, slot in enumerate(slots):
        value = e.op(aten._to_copy.default, slot, dtype=torch.float32, **where) if half else slot
        terms.append(e.op(aten.mul.Tensor, value, e.op(aten.select.int, weights, 0, i, **where), **where))
    total = terms[0]
    for term in terms[1:]:
        total = e.op(aten.add.Tensor, total, term, **where)
    return e.op(aten._to_copy.default, total, dtype=dtype, **where) if half else total


def dense(e: Editor, node: fx.Node, at: fx.Node) -> fx.Node:
    """``node``, or where it is a view with gaps (a stream split from a joined one) a copy without."""
    if dense_type(node.meta["val"]) is node.meta["val"]:
        return node
    region = str(node.meta["region"])
    return e.op(aten.clone.default, node, at=at, region=region, memory_format=torch.contiguous_format)


def dense_type(value: Any) -> Any:
    """The (fake) value itself where its memory has no gaps, else its contiguous likeness."""
    like = torch.empty_like(value)  # keeps the strides of dense values, and only of those
    return value if like.stride() == value.stride() else value.contiguous()
