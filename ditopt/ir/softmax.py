"""Softmax attention in a graph: fused, or a softmax between two products.

From a softmax over the last dimension one walks up through what keeps scores scores (numbers that scale them, masks,
casts, views of batch dimensions) to the product of queries and keys, and down to the product with the values. The
softmax of a router is none of this: it has no two products around it that share their batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ditopt._torch import masked_softmax
from ditopt.ir.attention import Found, Mask, Operand, Refused, unmoved
from ditopt.ir.product import Product, is_plain, product
from ditopt.ir.program import Function
from ditopt.ops import attention, linear_attention

aten = torch.ops.aten

_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, masked_softmax}

_CASTS = {aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.contiguous.default}

_VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
}

_HIDES = -1000.0
"""What is filled in at most where a key is not to be seen."""


def find_softmax(function: Function) -> Iterator[tuple[fx.Node, Found | Refused]]:
    """Each softmax attention of ``function`` that is no operator of ditopt yet: its last node, and what was found."""
    for node in function.graph.nodes:
        try:
            if node.target is aten.scaled_dot_product_attention.default:
                yield node, _fused(node)
            elif node.target in _SOFTMAX:
                found = _spelled(node)
                if found is not None:
                    yield found.output, found
        except Refused as refused:
            yield node, Refused(str(refused), _around(node))


def _around(softmax: fx.Node) -> set[fx.Node]:
    """The operators from a softmax to the products before and after it."""
    found = {softmax}
    for step in (lambda n: n.all_input_nodes, lambda n: list(n.users)):
        todo = [softmax]
        while todo:
            near = [n for n in step(todo.pop()) if n.op == "call_function" and n not in found]
            found.update(n for n in near if product(n) or _shape(n)[-2:] == _shape(softmax)[-2:])
            todo += [n for n in near if n in found and product(n) is None]
    return found


def is_recognized(node: fx.Node) -> bool:
    """Whether a node is an attention operator of ditopt."""
    return node.target in (attention, linear_attention)


def _fused(node: fx.Node) -> Found:
    args: Any = node.args
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | dict(node.kwargs)
    if given.get("dropout_p"):
        raise Refused(f"it drops {given['dropout_p']} of the scores at random")
    query, key, value = (Operand(given[n], tuple(range(given[n].meta["val"].ndim))) for n in ("query", "key", "value"))
    mask = given.get("attn_mask")
    masks: tuple[Mask, ...] = ()
    layout = query.shape()[:-2]
    if mask is not None:
        means = "keep" if mask.meta["val"].dtype is torch.bool else "add"
        masks = (Mask(mask, means, (*layout, query.shape()[-2], key.shape()[-2])),)  # type: ignore[arg-type]
    scale = given.get("scale")
    return Found(
        "softmax",
        (node,),
        query,
        key,
        value,
        query.order,
        layout,
        masks,
        None if scale is None else float(scale),
        bool(given.get("is_causal", False)),
        bool(given.get("enable_gqa", False)),
        plain=True,
    )


class _Up:
    """The way from a softmax up to the product of queries and keys."""

    def __init__(self) -> None:
        self.nodes: list[fx.Node] = []
        self.masks: list[Mask] = []
        self.scale = 1.0
        self.product: Product | None = None

    def walk(self, node: fx.Node, shape: tuple[int, ...]) -> bool:
        """Whether ``node`` are scores; ``shape`` is theirs, as what reads them sees it."""
        kept = len(self.nodes), len(self.masks), self.scale
        if self._walk(node, shape):
            return True
        del self.nodes[kept[0] :], self.masks[kept[1] :]
        self.scale = kept[2]
        return False

    def _walk(self, node: fx.Node, shape: tuple[int, ...]) -> bool:
        if node.op != "call_function" or _shape(node) != shape:
            return False
        args: Any = node.args
        self.nodes.append(node)
        found = product(node)
        if found is not None:
            return self._product(found)
        if node.target in _CASTS:
            return self.walk(args[0], shape)
        if node.target in _VIEWS:
            before = _shape(args[0])
            return before[-2:] == shape[-2:] and self.walk(args[0], before)
        factor = _factor(node)
        if factor is not None:
            self.scale *= factor
            return self.walk(args[0], shape)
        if node.target is aten.add.Tensor and not node.kwargs and all(isinstance(a, fx.Node) for a in args):
            return any(self._masked(scores, mask, "add", shape) for scores, mask in (args, args[::-1]))
        return self._filled(node, args, shape)

    def _masked(self, scores: fx.Node, mask: fx.Node, means: Any, shape: tuple[int, ...]) -> bool:
        if _shape(scores) != shape:
            return False
        before = self.scale
        if not self.walk(scores, shape):
            return False
        if means == "add" and before != 1.0:
            raise Refused("its scores are scaled after a mask was added")
        self.masks.append(Mask(mask, means, shape))
        return True

    def _filled(self, node: fx.Node, args: Any, shape: tuple[int, ...]) -> bool:
        """Scores where a mask says so, else a number so small that nothing is seen."""
        if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            scores, mask, fill, means = args[0], args[1], args[2], "drop"
        elif node.target in (aten.where.self, aten.where.ScalarOther) and _number(args[2]) is not None:
            mask, scores, fill, means = args[0], args[1], args[2], "keep"
        elif node.target in (aten.where.self, aten.where.ScalarSelf) and _number(args[1]) is not None:
            mask, fill, scores, means = args[0], args[1], args[2], "drop"
        else:
            return False
        number = _number(fill)
        if number is None or number > _HIDES:
            return False
        if isinstance(fill, fx.Node):
            self.nodes.append(fill)
        return self._masked(scores, mask, means, shape)

    def _product(self, found: Product) -> bool:
        if not is_plain(found.order):
            return False  # the scores of a query do not lie side by side
        if found.added is not None:
            if self.scale != 1.0:
                raise Refused("its scores are scaled after a mask was added")
            self.masks.append(Mask(found.added, "add", _shape(found.node)))
        self.scale *= found.scale
        self.product = found
        return True


def _spelled(softmax: fx.Node) -> Found | None:
    args: Any = softmax.args
    rank = softmax.meta["val"].ndim
    masked = softmax.target is masked_softmax
    if rank < 2 or args[2 if masked else 1] % rank != rank - 1:
        return None
    up = _Up()
    if masked:
        up.masks.append(Mask(args[1], "drop", _shape(softmax)))
    if not up.walk(args[0], _shape(softmax)) or up.product is None:
        return None
    below = _down(softmax)
    if below is None:
        return None
    down, combine = below
    scores = up.product
    key, moved = unmoved(scores.right, scores.swapped)
    query, turned = unmoved(scores.left, scores.left_order)
    value, also = unmoved(combine.right, combine.right_order)
    inside = {*up.nodes, softmax, *down, *moved, *turned, *also}
    chain = {*up.nodes, softmax, *down} - {combine.node}
    for node in chain:
        if node.all_input_nodes and any(u not in inside for u in node.users):
            raise Refused("its scores are read by something else too")
    shapes = [_shape(scores.node)[:-2], *(m.shape[:-2] for m in up.masks), _shape(softmax)[:-2]]
    layout = max(shapes, key=len)
    operands = query, key, value
    refusal = ""
    if any(o.shape()[:-2] != _batch(s) for o, s in zip(operands, (scores, scores, combine), strict=True)):
        if any(s != layout for s in shapes):
            refusal = "its batches are broadcast and viewed in another form"
        elif any(len(o.shape()) != len(layout) + 2 for o in operands):
            refusal = "its batches are broadcast"
    return Found(
        "softmax",
        tuple(sorted(inside)),
        query,
        key,
        value,
        combine.order,
        layout,
        tuple(reversed(up.masks)),
        up.scale,
        refusal=refusal,
    )


def _down(softmax: fx.Node) -> tuple[list[fx.Node], Product] | None:
    """From the softmax to the product with the values, which its rows multiply from the left."""
    nodes: list[fx.Node] = []
    node = softmax
    while True:
        readers = [u for u in node.users if u.op != "output"]
        if len(readers) != 1 or len(node.users) != 1:
            found = [p for u in readers if (p := product(u)) is not None and p.left is node]
            if found:
                raise Refused("its weights are read by something else too")
            return None
        reader = readers[0]
        nodes.append(reader)
        found_one = product(reader)
        if found_one is not None:
            fits = found_one.left is node and found_one.right is not node and is_plain(found_one.left_order)
            return (nodes, found_one) if fits and found_one.added is None and found_one.scale == 1.0 else None
        if reader.target not in _CASTS | _VIEWS or _shape(reader)[-2:] != _shape(softmax)[-2:]:
            return None
        node = reader


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()


def _batch(found: Product) -> tuple[int, ...]:
    return Operand(found.node, found.order).shape()[:-2]


def _factor(node: fx.Node) -> float | None:
    """The number by which ``node`` multiplies its first operand."""
    args: Any = node.args
    if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) and len(args) == 2:
        number = args[1]
        if isinstance(args[0], fx.Node) and isinstance(number, (int, float)) and number:
            return float(number) if "mul" in str(node.target) else 1.0 / float(number)
    return None


def _number(value: Any) -> float | None:
    """The number that an argument is, also as a tensor without dimensions made of one."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, fx.Node):
        args: Any = value.args
        if value.target is aten.scalar_tensor.default:
            return float(args[0])
        if value.target is aten.full.default and not args[0]:
            return float(args[1])
    return None
