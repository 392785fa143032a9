"""Values that live from step to step: slots, their updates, and predictions from them.

What every pass that reuses across steps is made of. ``Reuse`` collects the slots of one decision while a pass edits the
entry; ``predict`` writes the linear combination of slots; ``dense`` gives a value the layout that a slot can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import fx

from ditopt.ir.edit import Editor
from ditopt.ir.program import Formal, Predictor, StateSlot, TensorType
from ditopt.ops import select

aten = torch.ops.aten

Store = Literal["full", "int8"]
"""How a kept value is stored: as it is, or in 8 bits with one scale for each vector along the last axis."""


class Reuse:
    """The state of the decision ``name``.

    ``groups``: for each part of each kept value its slots (``Decision.slots``); ``types``: all slots; ``weights``: the
    control input with the coefficients, or "" where the newest value is taken as it is.
    """

    def __init__(self, e: Editor, name: str, predictor: Predictor, store: Store = "full") -> None:
        self.e, self.name, self.predictor, self.store = e, name, predictor, store
        self.groups: list[tuple[str, ...]] = []
        self.types: list[StateSlot] = []
        self.weights = "" if predictor.basis in ("hold", "learned") else f"{name}.weights"
        self._control: fx.Node | None = None
        self._new: dict[str, fx.Node] = {}

    # -- what is predicted -------------------------------------------------------------------------------------------

    def slots(self, value: Any) -> list[list[fx.Node]]:
        """Placeholders of new slots for a (fake) value of this type: for each part of its encoding a list of them."""
        return [self._group(part) for part in encoded_types(self.e, value, self.store)]

    def _group(self, value: Any) -> list[fx.Node]:
        prefix = f"{self.name}.{len(self.groups)}"
        made = [self._slot(f"{prefix}.{i}", value) for i in range(self.predictor.size)]
        self.groups.append(tuple(slot.meta["formal"].ref for slot in made))
        return made

    def control(self) -> fx.Node | None:
        """The placeholder of the coefficients; None where there are none."""
        if self.weights and self._control is None:
            self._control = self.host(self.weights, TensorType(torch.float32, (self.predictor.size,)))
        return self._control

    def keep(self, slots: Sequence[Sequence[fx.Node]], parts: Sequence[fx.Node], chosen: Sequence[fx.Node]) -> None:
        """``slots`` of a value take their new content: where the step computes, the first anchor takes ``parts`` (what
        was computed, encoded) and each other one what stood before it; the window moves by ``chosen`` every step."""
        for group, part, value in zip(slots, parts, chosen, strict=True):
            self.shift(group, self.predictor, part, value)

    def shift(self, group: Sequence[fx.Node], predictor: Predictor, computed: fx.Node, chosen: fx.Node) -> None:
        """The slots of one value under ``predictor``: anchors move when the step computes, the window every step."""
        anchors, window = group[: predictor.anchors], group[predictor.anchors :]
        for slot, value in zip(anchors, [computed, *anchors[:-1]] if anchors else [], strict=True):
            self.update(slot, value, "computed")
        for slot, value in zip(window, [chosen, *window[:-1]] if window else [], strict=True):
            self.update(slot, value, "always")

    # -- single slots --------------------------------------------------------------------------------------------------

    def forecast(self, value: Any, predictor: Predictor, name: str) -> list[fx.Node]:
        """Slots of a further value, which its own ``predictor`` forecasts; ``shift`` moves them."""
        return [self._slot(f"{self.name}.{name}.{i}", value) for i in range(predictor.size)]

    def slot(self, name: str, value: Any) -> fx.Node:
        """A further slot ``<decision>.<name>`` for a (fake) value of this type; ``update`` gives its new content."""
        return self._slot(f"{self.name}.{name}", value)

    def update(self, slot: fx.Node, new: fx.Node, when: Literal["always", "computed"]) -> None:
        """The slot's content after the step: ``new``, or where that is only for computed steps else what it holds."""
        ref = slot.meta["formal"].ref
        self._new[ref] = new if when == "always" else self.e.op(select, new, slot, self.name)

    def host(self, ref: str, type_: TensorType) -> fx.Node:
        """A new control input."""
        with self.e.mode:
            value = torch.empty(type_.shape, dtype=type_.dtype)
        return self.e.placeholder(ref.replace(".", "_"), Formal("control", ref), value)

    def _slot(self, ref: str, value: Any) -> fx.Node:
        self.types.append(StateSlot(ref, TensorType.of(value)))
        return self.e.placeholder(ref.replace(".", "_"), Formal("state", ref), value)

    def finish(self, state_out: Sequence[str]) -> None:
        """Append the new state to the results of the entry, whose own state so far is ``state_out``."""
        self.e.set_results([*self.e.results, *self._new.values()], [*state_out, *self._new])
        self.e.drop_dead()


# -- encodings ---------------------------------------------------------------------------------------------------------


def encoded_types(e: Editor, value: Any, store: Store) -> list[Any]:
    """(Fake) values of the parts in which a value is stored."""
    if store == "full":
        return [value]
    with e.mode:  # with the strides that ``encode`` gives
        return [value.to(torch.int8), value.float().abs().amax([-1], True)]


def encode(e: Editor, node: fx.Node, store: Store, at: fx.Node, region: str = "") -> list[fx.Node]:
    """The parts in which ``node`` is stored."""
    if store == "full":
        return [node]
    where: dict[str, Any] = {"at": at, "region": region}
    wide = e.op(aten._to_copy.default, node, dtype=torch.float32, **where)
    most = e.op(aten.amax.default, e.op(aten.abs.default, wide, **where), [-1], True, **where)
    scale = e.op(aten.div.Tensor, e.op(aten.clamp_min.default, most, 1e-20, **where), 127.0, **where)
    steps = e.op(aten.round.default, e.op(aten.div.Tensor, wide, scale, **where), **where)
    return [e.op(aten._to_copy.default, steps, dtype=torch.int8, **where), scale]


def decode(e: Editor, parts: Sequence[fx.Node], like: Any, at: fx.Node, region: str = "") -> fx.Node:
    """The value that ``parts`` store, of the type of the (fake) value ``like``."""
    if len(parts) == 1:
        return parts[0]
    where: dict[str, Any] = {"at": at, "region": region}
    steps = e.op(aten._to_copy.default, parts[0], dtype=torch.float32, **where)
    value = e.op(aten.mul.Tensor, steps, parts[1], **where)
    return value if like.dtype is torch.float32 else e.op(aten._to_copy.default, value, dtype=like.dtype, **where)


# -- predictions -------------------------------------------------------------------------------------------------------


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


def guess(
    e: Editor, slots: Sequence[Sequence[fx.Node]], like: Any, weights: fx.Node | None, at: fx.Node, region: str = ""
) -> fx.Node:
    """What the stored ``slots`` of a value (``Reuse.slots``) predict it to be, of the type of ``like``."""
    values = stored(e, slots, like, at, region)
    return predict(e, values if weights is not None else values[:1], weights, at, region)


def stored(e: Editor, slots: Sequence[Sequence[fx.Node]], like: Any, at: fx.Node, region: str = "") -> list[fx.Node]:
    """The values in the ``slots`` of a value, in their order, of the type of ``like``."""
    return [decode(e, parts, like, at, region) for parts in zip(*slots, strict=True)]


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
