"""How far a block reaches around its residual branches, and which blocks are equal up to their weights.

The branches of a block are its core. ``extend`` adds what lies between them, a merge of earlier blocks into the stream
(a long skip), and what only this block reads: the modulation of the timestep, the keys and values of the text. Equal
cores grow in lockstep, by what all of them have, so that equal blocks stay equal: what only the first block reads, such
as the embedding of the text, is no part of it. A block without an equal takes one layer of each kind (of the timestep,
of the text), no more.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ditopt.ir.binding import Binding
from ditopt.ir.cost import is_attention, is_matmul
from ditopt.ir.reach import Reach, places
from ditopt.ir.residual import CASTS

aten = torch.ops.aten


def extend(cores: Sequence[int], streams: Sequence[int], binding: Mapping[fx.Node, Binding], reach: Reach) -> list[int]:
    """For each block, given the nodes of its branches and the values its branches continue: all its nodes."""
    blocks = [_whole_tuples(reach.convex(core), reach) for core in cores]
    blocks = [_with_merge(i, blocks, streams[i], binding, reach) for i in range(len(blocks))]
    classes: dict[Hashable, list[int]] = {}
    for i, block in enumerate(blocks):
        classes.setdefault(pattern(reach.members(block))[0], []).append(i)
    for alike in classes.values():
        for i, grown in zip(alike, _Growth(alike, blocks, streams, binding, reach).run(), strict=True):
            blocks[i] = grown
    return [_whole_tuples(block, reach) for block in blocks]


def _whole_tuples(block: int, reach: Reach) -> int:
    """The block with the items of all tuples made in it, and none of other tuples: only tensors enter and leave."""
    for i, node in enumerate(reach.nodes):
        if node.target is operator.getitem:
            block = block | 1 << i if block >> reach.reads[i][0] & 1 else block & ~(1 << i)
    return block


def _with_merge(at: int, blocks: Sequence[int], streams: int, binding: Mapping[fx.Node, Binding], reach: Reach) -> int:
    """The block with the layer that makes its stream of several earlier blocks, where there is one."""
    taken = 0
    for b in blocks:
        taken |= b
    own, sources = 0, set()
    todo = places(streams & ~taken)
    while todo:
        i = todo.pop()
        node = reach.nodes[i]
        if taken >> i & 1:
            sources |= {k for k, b in enumerate(blocks) if b >> i & 1}
        elif node.op == "call_function" and binding[node] & Binding.LATENT and not own >> i & 1:
            own |= 1 << i
            todo += reach.reads[i]
    whole = reach.convex(blocks[at] | own)
    if len(sources) < 2 or not any(is_matmul(reach.nodes[i]) for i in places(own)) or whole & taken & ~blocks[at]:
        return blocks[at]
    return whole


class _Growth:
    """Equal blocks that take in, step by step, what all of them alone read or write."""

    def __init__(
        self,
        alike: Sequence[int],
        blocks: Sequence[int],
        streams: Sequence[int],
        binding: Mapping[fx.Node, Binding],
        reach: Reach,
    ) -> None:
        self.reach, self.binding = reach, binding
        self.own = [blocks[i] for i in alike]
        self.streams = [streams[i] for i in alike]
        self.taken = 0
        for b in blocks:
            self.taken |= b
        self.layers: dict[Binding, int] = {}  # products taken in so far, by what they depend on
        self.slots = list(zip(*(pattern(reach.members(b))[1] for b in self.own), strict=True))

    def run(self) -> list[int]:
        grew = True
        while grew:
            grew = False
            for producers in list(self.slots):
                grew |= self._back(producers)
        self._casts()
        return self.own

    def _back(self, producers: Sequence[fx.Node]) -> bool:
        if not all(self._private(k, n) for k, n in enumerate(producers)) or len({label(n) for n in producers}) > 1:
            return False
        for k, node in enumerate(producers):
            self._take(k, node)
            if _is_layer(node):
                kind = self.binding[node]
                self.layers[kind] = self.layers.get(kind, 0) | 1 << self.reach.place[node]
        self.slots += zip(*(n.all_input_nodes for n in producers), strict=True)
        return True

    def _private(self, k: int, node: fx.Node) -> bool:
        """Whether only the ``k``-th block reads ``node``, and it is no stream of it."""
        i = self.reach.place[node]
        if node.op != "call_function" or (self.taken | self.streams[k]) >> i & 1:
            return False
        if not all(u.op != "output" and self.own[k] >> self.reach.place[u] & 1 for u in node.users):
            return False
        deeper = _is_layer(node) and self.reach.below[i] & self.layers.get(self.binding[node], 0)
        return len(self.own) > 1 or not deeper

    def _casts(self) -> None:
        """Take in the casts that end every one of these blocks: a stream in another dtype than its sums."""
        if len(self.own) < 2:
            return
        for ends in zip(*(self.reach.members(own) for own in self.own), strict=True):
            readers = [next(iter(n.users)) for n in ends if len(n.users) == 1]
            fresh = [r for r in readers if r.target in CASTS and not self.taken >> self.reach.place[r] & 1]
            if len(fresh) == len(ends) and len({label(r) for r in fresh}) == 1:
                for k, r in enumerate(fresh):
                    self._take(k, r)

    def _take(self, k: int, node: fx.Node) -> None:
        bit = 1 << self.reach.place[node]
        self.own[k] |= bit
        self.taken |= bit


def _is_layer(node: fx.Node) -> bool:
    return is_matmul(node) or is_attention(node)


# -- equality up to weights --------------------------------------------------------------------------------------------


def pattern(nodes: Sequence[fx.Node], notes: Iterable[Hashable] = ()) -> tuple[Hashable, list[fx.Node]]:
    """What these operators compute, whatever they are applied to, and the nodes that they are applied to.

    Two lists of operators with equal patterns are one function called twice, with the inputs in order. ``notes``: one
    for each node, to be equal too.
    """
    local = {n: i for i, n in enumerate(nodes)}
    inputs: dict[fx.Node, int] = {}

    def encode(node: fx.Node) -> Any:
        if node in local:
            return _Ref(f"%{local[node]}")
        return _Ref(f"${inputs.setdefault(node, len(inputs))}")

    parts: list[Hashable] = []
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), encode)
        parts.append((str(node.target), repr(args), repr(kwargs)))
    types = tuple(_type(n.meta["val"]) for n in inputs)
    return (tuple(parts), types, tuple(notes)), list(inputs)


def label(node: fx.Node) -> Hashable:
    """Operator, constants and types of a node, without what it is connected to."""
    mark: Any = lambda n: _Ref(_type(n.meta["val"]))  # noqa: E731 - typed as map_arg wants it
    args, kwargs = fx.map_arg((node.args, node.kwargs), mark)
    return (str(node.target), repr(args), repr(kwargs), _type(node.meta["val"]))


class _Ref:
    """A node in the repr of arguments."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _type(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({','.join(_type(v) for v in value)})"
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
