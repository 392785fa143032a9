"""Another order of the tokens for all blocks: put in before the first one, taken back behind the last one.

Attention does not know the order of tokens, and what handles each token alone does not either. So the rewrite moves
only what comes in from outside: the stream itself, and what is combined with it token by token (rotations, positions,
control residuals). ``Reorder`` follows the axis of the tokens through the step and the bodies, and refuses where an
operator could tell the order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.ir.axes import follow, source
from ditopt.ir.binding import data_operands
from ditopt.ir.cost import is_attention, is_matmul
from ditopt.ir.dims import Dim, Dims, Known
from ditopt.ir.edit import Editor, fake_of
from ditopt.ir.program import Formal, Function, Program, Region, TensorType, call_args, callee, formal, is_call
from ditopt.ir.regions import describe
from ditopt.ir.sparse import Grid, inverse, order_name, tile_order

aten = torch.ops.aten

_MOVES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.slice.Tensor,
    aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.cat.default, aten.stack.default, aten.clone.default, aten.contiguous.default, aten._to_copy.default,
    aten.detach.default, aten.flatten.using_ints, aten.unflatten.int, aten.view_as_real.default,
    aten.view_as_complex.default, aten.alias.default, operator.getitem,
}  # fmt: skip
"""Operators that keep the tokens where they are, as long as their axis stays whole."""

_BY_ROW = {
    aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default, aten.softmax.int,
    aten._softmax.default, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.linalg_vector_norm.default,
    aten.rsqrt.default, aten.var.correction,
}  # fmt: skip
"""Operators that reduce over dimensions: over channels each token is alone, over tokens their order does not matter."""


class Refused(Exception):
    """What the order of the tokens means something to, in a sentence."""


_Need = tuple[int, int, int, int]
"""A formal of a body that has to be put in order: its number, the axis, where the tokens begin there, its size."""


class Reorder:
    """Puts the stream that enters the block ``region`` as tokens of ``grid`` in tiles."""

    def __init__(self, program: Program, grid: Grid, tile: Grid, origin: str) -> None:
        self._program, self._grid, self._tile, self._origin = program, grid, tile, origin
        self._tokens = math.prod(grid)
        self._bodies: dict[Any, list[_Need]] = {}

    def run(self, region: Region, name: str, start: int) -> tuple[Program, int]:
        """The new program, and how many values are put in order. ``name``: the formal of the stream, whose tokens begin
        at ``start``. Raises Refused."""
        step = self._program.step
        calls = [c for c in self._program.calls() if str(c.meta["region"]).startswith("blocks.")]
        first = next(c for c in calls if str(c.meta["region"]) == region.id)
        body = self._program.functions[callee(first)]
        at = next(i for i, p in enumerate(body.placeholders) if formal(p).ref == name)
        stream = next(s for s in region.streams if s.formal == name)
        entry = call_args(first)[at]
        if len(stream.axes) != 1:
            raise Refused("its tokens lie along several axes")
        known = follow(self._program, step, {entry: self._source(entry, stream.axes[0], start)})
        ahead = _ancestors(calls)
        moved = {n for n in known if n is not entry and n in ahead}
        with Editor(step, self._origin) as e:
            put = _Put(e, self)
            for node in step.graph.nodes:
                if node is entry or node.op == "output":
                    continue
                if node not in ahead:
                    for operand in [a for a in node.all_input_nodes if a in moved]:
                        e[node].replace_input_with(e[operand], put(operand, *self._where(known, operand), back=True))
                    continue
                if is_call(node):
                    for number, axis, begin, size in self._call(node, known, entry):
                        value = call_args(node)[number]
                        e[node].args = (
                            *e[node].args[: number + 2], put(value, axis, begin, size), *e[node].args[number + 3 :]
                        )  # fmt: skip
                elif node.op == "call_function" and any(a in known for a in node.all_input_nodes):
                    for operand, axis, begin, size in self._check(node, known):
                        e[node].replace_input_with(e[operand], put(operand, axis, begin, size))
                if entry in node.all_input_nodes:
                    e[node].replace_input_with(e[entry], put(entry, *self._where(known, entry)))
            e.set_results([
                put(r, *self._where(known, r), back=True) if r in moved else e[r] for r in step.results
            ])  # fmt: skip
            e.drop_dead(formals=False)
        functions = {**self._program.functions, self._program.entry: e.function()}
        program = self._program.replace(functions=functions, params={**self._program.params, **put.params})
        return describe(program), put.count

    def _source(self, node: fx.Node, axis: int, start: int) -> Dims:
        """The dimensions of the stream with the tokens alone as an axis."""
        dims = list(source(node.meta["val"].shape))
        whole = dims[axis]
        part = Dim.of(self._tokens, axis)
        dims = [Dim(d.size) for d in dims]
        dims[axis] = Dim(whole.size, part.atoms, start)
        return tuple(dims)

    def _where(self, known: Known, node: fx.Node) -> tuple[int, int, int]:
        """The dimension along which the tokens lie in a value, where they begin, and its size."""
        return self._intact(known[node], str(node.target))

    def _intact(self, dims: Any, what: str) -> tuple[int, int, int]:
        found = [(i, d.start, d.size) for i, d in enumerate(dims) if isinstance(d, Dim) and d.axes]
        if len(found) != 1 or dims[found[0][0]].length != self._tokens or len(_long(dims[found[0][0]])) != 1:
            raise Refused(f"{what} cuts or regroups the tokens")
        return found[0]

    def _call(self, call: fx.Node, known: Known, entry: fx.Node) -> list[_Need]:
        given = tuple(known.get(a, ()) for a in call_args(call))
        if not any(given):
            return []
        key = callee(call), given
        if key not in self._bodies:
            self._bodies[key] = self._body(self._program.functions[callee(call)], given)
        needs = self._bodies[key]
        for number, *_ in needs:
            if call_args(call)[number] in known:
                raise Refused("a block combines tokens with tokens at other places")
        return needs

    def _body(self, body: Function, given: Sequence[Any]) -> list[_Need]:
        start = dict(zip(body.placeholders, given, strict=True))
        known = follow(self._program, body, {p: d for p, d in start.items() if d})
        others = [p for p in body.placeholders if not start[p]]
        ways: dict[fx.Node, Known] = {}
        needs: dict[_Need, None] = {}
        for node in body.graph.nodes:
            if node.op != "call_function" or not any(a in known for a in node.all_input_nodes):
                continue
            for operand, axis, begin, size in self._check(node, known):
                for p in others:
                    if p not in ways:
                        ways[p] = follow(self._program, body, {p: source(p.meta["val"].shape)})
                held = [p for p in others if operand in ways[p]]
                froms = [(p, ways[p][operand][axis]) for p in held if ways[p][operand][axis].axes]
                if not froms:
                    raise Refused(f"{node.target} combines tokens with positions whose origin the graph does not show")
                for p, dim in froms:
                    if not dim.whole or len(_long(dim)) != 1 or len(dim.axes) != 1:
                        raise Refused(f"{node.target} combines tokens with positions that are regrouped before")
                    needs[others_number(body, p), next(iter(dim.axes)), begin, size] = None
        return list(needs)

    def _check(self, node: fx.Node, known: Known) -> list[tuple[fx.Node, int, int, int]]:
        """What ``node`` combines with the tokens place by place: operand, dimension, where the tokens begin, size."""
        args: Any = node.args
        what = str(node.target).removesuffix(".default")
        if is_attention(node):
            mask = [*args, None, None, None][3]
            if isinstance(mask, fx.Node) and args[1] in known and int(mask.meta["val"].shape[-1]) > 1:
                raise Refused("an attention has a mask over the tokens")
            if isinstance(mask, fx.Node) and mask.meta["val"].ndim > 1 and int(mask.meta["val"].shape[-2]) > 1:
                raise Refused("an attention has a mask with a row for each token")
            if (args[1] in known) != (args[2] in known):
                raise Refused("an attention has keys and values of different tokens")
            return []
        plain = torch.Tag.pointwise in getattr(node.target, "tags", ())
        by_weights = node.target is aten.linear.default
        if node.target in _BY_ROW or by_weights:
            return []
        if is_matmul(node):
            if not all(a in known for a in data_operands(node)[:2]):
                raise Refused(f"{what} multiplies the tokens with something else than weights")
            return []
        if node.target in _MOVES:
            if isinstance(node.meta["val"], torch.Tensor):
                if node in known:
                    self._intact(known[node], what)
                elif node.target not in (aten.slice.Tensor, operator.getitem):  # these took none of the tokens
                    raise Refused(f"{what} hides the tokens")
            return []
        if not plain:
            raise Refused(f"{what} may mix tokens outside of attention")
        rank = node.meta["val"].ndim
        tokens = {i - rank: (b, s) for i, b, s in [self._intact(known[node], what)]} if node in known else {}
        if not tokens:
            raise Refused(f"{what} hides the tokens")
        out = []
        for operand in data_operands(node):
            value = operand.meta["val"]
            if operand in known or not isinstance(value, torch.Tensor):
                continue
            for k, (begin, size) in tokens.items():
                if value.ndim >= -k and int(value.shape[k]) == size and size > 1:
                    out.append((operand, value.ndim + k, begin, size))
        return out

    def order(self, begin: int, size: int, back: bool) -> tuple[str, Tensor]:
        """The name and the content of what puts ``size`` rows in order whose tokens begin at ``begin``."""
        ends = torch.arange(begin, dtype=torch.int32), torch.arange(begin + self._tokens, size, dtype=torch.int32)
        order = torch.cat([ends[0], tile_order(self._grid, self._tile) + begin, ends[1]])
        name = order_name(self._grid, self._tile)
        name += f".{begin}.{size}" if size != self._tokens else ""
        return (f"{name}.back", inverse(order)) if back else (name, order)


class _Put:
    """Emits each order of each value once."""

    def __init__(self, e: Editor, of: Reorder) -> None:
        self._e, self._of = e, of
        self._made: dict[Any, fx.Node] = {}
        self.params: dict[str, Tensor] = {}
        self.count = 0

    def __call__(self, node: fx.Node, axis: int, begin: int, size: int, back: bool = False) -> fx.Node:
        key = node, axis, begin, size, back
        if key not in self._made:
            e, value = self._e, node.meta["val"]
            name, content = self._of.order(begin, size, back)
            if name not in self._made:
                like = [n.meta["val"] for n in e.graph.nodes if n.op == "placeholder"]
                self.params[name] = content.to(value.device)
                fake = fake_of(TensorType.of(content), like, value.device)
                self._made[name] = e.placeholder(name.replace(".", "_"), Formal("param", name), fake)
            where = e[node]
            after = self._made[name] if node.op == "placeholder" else where
            last = [n for n in e.graph.nodes if n.op == "placeholder"][-1] if node.op == "placeholder" else after
            made = e.op(aten.index_select.default, where, axis, self._made[name], after=last)
            made = self._laid_out(made, value)
            self._made[key], self.count = made, self.count + 1
        return self._made[key]

    def _laid_out(self, made: fx.Node, value: Tensor) -> fx.Node:
        """``made`` in the memory layout of ``value``."""
        if TensorType.of(made.meta["val"]) == TensorType.of(value):
            return made
        strides = value.stride()
        order = sorted(range(value.ndim), key=lambda d: (-strides[d], d))
        turned = self._e.op(aten.permute.default, made, order, after=made)
        dense = self._e.op(aten.clone.default, turned, memory_format=torch.contiguous_format, after=turned)
        back = [order.index(d) for d in range(value.ndim)]
        out = self._e.op(aten.permute.default, dense, back, after=dense)
        if TensorType.of(out.meta["val"]) != TensorType.of(value):
            raise Refused("a value with gaps in memory would have to be put in order")
        return out


def others_number(body: Function, placeholder: fx.Node) -> int:
    """The number of a formal."""
    return body.placeholders.index(placeholder)


def _long(dim: Dim) -> list[Any]:
    return [a for a in dim.atoms if a.size > 1]


def _ancestors(calls: Sequence[fx.Node]) -> set[fx.Node]:
    """The calls, all that they are computed from, and their results."""
    found, todo = set(calls), list(calls)
    while todo:
        fresh = [a for a in todo.pop().all_input_nodes if a not in found]
        found.update(fresh)
        todo += fresh
    return found | {u for c in calls for u in c.users}
