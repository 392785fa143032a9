"""A step for one half of its batch, beside the step itself: guidance that doubles the batch, with one half left out.

Sizes are numbers in a graph. ``Half`` follows the batch from the inputs through the graph (ir/dims.py), writes every
operator that it reaches once more with half the size there, and leaves what it does not reach shared by both. What
would mix samples, or where the batch is lost, is refused in a sentence, so that nothing is guessed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ditopt.ir.binding import data_operands
from ditopt.ir.cost import is_attention, is_convolution, is_matmul
from ditopt.ir.dims import Dim, Dims, Known, through
from ditopt.ir.edit import Editor
from ditopt.ir.outline import clone_body
from ditopt.ir.program import Formal, Function, Program, TensorType, call_args, callee, formal, is_call
from ditopt.ops import gather_tokens, scatter_tokens, select

aten = torch.ops.aten


class Lost(Exception):
    """The batch cannot be followed; a sentence says where."""


class Half:
    """One half of the batch of ``rows`` samples of ``program``, written by the Editor ``e`` of its step.

    ``last``: whether it is the second half. ``held``: how it reads what earlier steps kept of both halves: its own, or
    the "mean" of both. ``[node]``: the half of a node of the step (itself where all samples share it). ``functions``:
    bodies for half the batch. Lost where that cannot be.
    """

    def __init__(self, program: Program, e: Editor, rows: int, last: bool, mean: bool = False) -> None:
        self.program, self.e, self.rows, self.last, self.mean = program, e, rows, last, mean
        self.functions: dict[str, Function] = {}
        self._bodies: dict[Any, tuple[str, list[tuple[int, bool]], list[Any]]] = {}
        self.known = _follow_step(program, rows)
        self._half: dict[fx.Node, fx.Node] = {}
        self._write(program.step, e, self.known, self._half, self._cut)

    def __getitem__(self, node: fx.Node) -> fx.Node:
        return self._half.get(node, self.e[node])

    def splits(self, node: fx.Node) -> bool:
        """Whether samples have their own part of ``node``."""
        return _splits(self.known.get(node, ()))

    def parts(self, node: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The part of the other half, and that of this one, in ``value``, which is as large as ``node``."""
        at, size = _place(self.known[node], self.rows, node)
        halves = [self.e.op(aten.slice.Tensor, value, at, s, s + size // 2) for s in (0, size // 2)]
        return (halves[0], halves[1]) if self.last else (halves[1], halves[0])

    def join(self, node: fx.Node, other: fx.Node, own: fx.Node) -> fx.Node:
        """The two parts, put together as they are in ``node``, in its layout."""
        at, _ = _place(self.known[node], self.rows, node)
        both = [other, own] if self.last else [own, other]
        wanted = node.meta["val"]
        if TensorType.of(wanted).stride is None:
            return self.e.op(aten.cat.default, both, at)
        order = sorted(range(wanted.ndim), key=lambda d: -wanted.stride(d))
        both = [self.e.op(aten.permute.default, b, order) for b in both]
        joined = self.e.op(aten.cat.default, both, order.index(at))
        return self.e.op(aten.permute.default, joined, [order.index(d) for d in range(len(order))])

    def _cut(self, node: fx.Node) -> fx.Node:
        """This half of a placeholder of the step."""
        other, own = self.parts(node, self.e[node])
        if not (self.mean and formal(node).kind == "state" and node.meta["val"].is_floating_point()):
            return own
        return self.e.op(aten.mul.Tensor, self.e.op(aten.add.Tensor, own, other), 0.5)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _write(
        self,
        function: Function,
        e: Editor,
        known: Known,
        half: dict[fx.Node, fx.Node],
        start: Callable[[fx.Node], fx.Node],
    ) -> None:
        """Write the half of ``function`` behind its nodes in ``e``."""
        for node in function.graph.nodes:
            if node.op == "placeholder" and _splits(known.get(node, ())):
                half[node] = start(node)
            elif is_call(node) and any(a in half for a in call_args(node)):
                self._call(node, e, known, half)
            elif node.op == "call_function" and node not in half and any(a in half for a in data_operands(node)):
                half[node] = self._operator(node, e, known, half)

    def _operator(self, node: fx.Node, e: Editor, known: Known, half: Mapping[fx.Node, fx.Node]) -> fx.Node:
        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda a: half.get(a, e[a]))
        if not any(_splits(known.get(a, ())) for a in data_operands(node)):
            return e.op(node.target, *args, region=str(node.meta["region"]), **kwargs)
        _refuse_mixing(node, known)
        dims: Any = known.get(node, ())
        value = node.meta["val"]
        several = isinstance(value, (tuple, list))
        wanted = [_shape(d, self.rows, node) for d in (dims if several else (dims,))]
        if node.target in _SIZES:
            args = (args[0], *_SIZES[node.target](args, wanted[0]))
        if _broadcasts(node) and not several:
            args, kwargs = fx.map_arg((args, kwargs), lambda a: self._fitted(a, node, wanted[0], e))
        try:
            made = e.op(node.target, *args, region=str(node.meta["region"]), **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise Lost(f"{node.name} ({node.target}) does not take half the batch: {str(error)[:120]}") from error
        got = [list(v.shape) for v in (made.meta["val"] if several else (made.meta["val"],)) if v is not None]
        if got != [w for w, v in zip(wanted, value if several else (value,), strict=True) if v is not None]:
            raise Lost(f"{node.name} ({node.target}) has shape {got[0]} for half the batch; expected {wanted[0]}")
        return made

    def _fitted(self, arg: fx.Node, node: fx.Node, wanted: Sequence[int], e: Editor) -> fx.Node:
        """An operand that still has all samples (a constant that was made as large as the batch) cut to this half."""
        shape, whole = arg.meta["val"].shape, node.meta["val"].shape
        limit = len(wanted) - (2 if is_matmul(node) else 0)
        for k in range(max(len(wanted) - len(shape), 0), limit):
            at = k - len(wanted) + len(shape)
            if wanted[k] != whole[k] and int(shape[at]) == int(whole[k]):
                first = wanted[k] if self.last else 0
                return e.op(aten.slice.Tensor, arg, at, first, first + wanted[k])
        return arg

    def _call(self, node: fx.Node, e: Editor, known: Known, half: dict[fx.Node, fx.Node]) -> None:
        """The call of a body for half the batch; its results."""
        given = tuple(known.get(a, ()) for a in call_args(node))
        args = [half.get(a, e[a]) for a in call_args(node)]
        key = (callee(node), given, tuple(TensorType.of(a.meta["val"]) for a in args))
        if key not in self._bodies:
            self._bodies[key] = self._body(*key)
        name, reads, values = self._bodies[key]
        actual = [args[i] if own else e[call_args(node)[i]] for i, own in reads]
        results = e.call(name, actual, values, e.graph.output_node(), str(node.meta["region"]))
        for user in node.users:
            half[user] = results[int(user.args[1])]  # type: ignore[arg-type]

    def _body(
        self, name: str, given: tuple[Dims, ...], types: tuple[TensorType, ...]
    ) -> tuple[str, list[tuple[int, bool]], list[Any]]:
        """A body for half the batch: its name, the number of each argument that it reads and whether it reads half of
        it, the types of its results."""
        body = self.program.functions[name]
        known = _follow(self.program, body, dict(zip(body.placeholders, given, strict=True)))
        new = f"{name}_half" + (str(len(self._bodies)) if f"{name}_half" in self.functions else "")
        half: dict[fx.Node, fx.Node] = {}
        wanted = dict(zip(body.placeholders, types, strict=True))
        with clone_body(body, new, "cache_guidance") as e:

            def start(p: fx.Node) -> fx.Node:
                with e.mode:
                    t = wanted[p]
                    value = torch.empty_strided(t.shape, t.stride or _dense(t.shape), dtype=t.dtype)
                    value = value.to(p.meta["val"].device)
                return e.placeholder(f"{p.name}_half", Formal("formal", f"{formal(p).ref}_half"), value)

            self._write(body, e, known, half, start)
            e.set_results([half.get(r, e[r]) for r in body.results])
            e.drop_dead()
        made = self.functions[new] = e.function(new)
        places = {e[p]: (i, False) for i, p in enumerate(body.placeholders)}
        places |= {half[p]: (i, True) for i, p in enumerate(body.placeholders) if p in half}
        return new, [places[p] for p in made.placeholders], [r.meta["val"] for r in made.results]


def _dense(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return strides[::-1]


# -- where the batch is ------------------------------------------------------------------------------------------------


def _follow_step(program: Program, rows: int) -> Known:
    """The dimensions of every node of the step that the batch reaches, by way of memos and of state too."""
    step = program.step
    named = {i.name for i in program.inputs if i.role != "shape"}
    refs: dict[tuple[str, str], Dims] = {}

    def begin(function: Function) -> dict[fx.Node, Dims]:
        start: dict[fx.Node, Dims] = {}
        for p in function.placeholders:
            what, shape = formal(p), p.meta["val"].shape
            if what.kind == "input" and what.ref in named and len(shape) and int(shape[0]) == rows:
                start[p] = (Dim.of(rows, 0), *(Dim(int(n)) for n in shape[1:]))
            elif (what.kind, what.ref) in refs:
                start[p] = refs[what.kind, what.ref]
        return start

    for memo in program.memos:
        function = program.functions[memo.function]
        inside = _follow(program, function, begin(function))
        refs |= {("memo", v): inside[r] for v, r in zip(memo.values, function.results, strict=True) if r in inside}
    while True:
        known = _follow(program, step, begin(step))
        new = zip(step.state_out, step.results[step.n_results :], strict=True)
        found = {("state", s): known[r] for s, r in new if _splits(known.get(r, ())) and ("state", s) not in refs}
        if not found:
            return known
        refs |= found


def _follow(program: Program, function: Function, start: Mapping[fx.Node, Dims]) -> Known:
    """The dimensions of every node of ``function`` that the batch reaches from the placeholders in ``start``."""
    known: Known = {n: d for n, d in start.items() if d}
    for node in function.graph.nodes:
        if node.op != "call_function":
            continue
        if is_call(node):
            body = program.functions[callee(node)]
            given = {p: known.get(a, ()) for p, a in zip(body.placeholders, call_args(node), strict=True)}
            inside = _follow(program, body, given) if any(given.values()) else {}
            dims: Any = tuple(inside.get(r, ()) for r in body.results)
            dims = dims if any(dims) else ()
        else:
            dims = _reduced(node, known) or through(node, known) or _interleaved(node, known)
        if dims:
            known[node] = dims
    return known


def _reduced(node: fx.Node, known: Known) -> Dims:
    """The dimensions of a reduction that drops those that it reduces; () for everything else."""
    value = node.meta["val"]
    args: Any = node.args
    if node.target not in _REDUCTIONS or not known.get(args[0]) or value.ndim == len(known[args[0]]):
        return ()
    gone = _reduces(node)
    dims: Dims = tuple(d for i, d in enumerate(known[args[0]]) if i not in gone)
    return dims if len(dims) == value.ndim else ()


def _interleaved(node: fx.Node, known: Known) -> Dims:
    """The dimensions of a value into which another one is put at every second place (rotary embeddings); () for
    everything else."""
    args: Any = node.args
    if node.target is not aten.slice_scatter.default or len(args) < 3:
        return ()
    at = args[2] % node.meta["val"].ndim
    there = [known[a] for a in args[:2] if known.get(a) and not known[a][at].axes]
    return (*there[0][:at], Dim(int(node.meta["val"].shape[at])), *there[0][at + 1 :]) if there else ()


def _reduces(node: fx.Node) -> set[int]:
    """The dimensions of its first operand that a reduction, or an operator along a dimension, runs over."""
    args: Any = node.args
    ndim = args[0].meta["val"].ndim
    place = 2 if node.target in {*_NORMS, aten.topk.default} else 1
    given = args[place] if len(args) > place else node.kwargs.get("dim", _DEFAULTS.get(node.target))
    if given is None or given == []:
        return set(range(ndim))
    listed: Any = given if isinstance(given, (list, tuple)) else [given]
    return {int(d) % ndim for d in listed}


def _splits(dims: Any) -> bool:
    """Whether the batch runs along one of the dimensions (of any of several results)."""
    return any(_splits(d) if isinstance(d, tuple) else 0 in d.axes for d in dims)


def _shape(dims: Dims, rows: int, node: fx.Node) -> list[int]:
    """The shape of half of what has these dimensions."""
    if not _splits(dims):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and node.target is not operator.getitem:
            raise Lost(f"the batch is not followed through {node.name} ({node.target})")
        return [int(n) for n in value.shape] if isinstance(value, torch.Tensor) else []
    if sum(bool(d.axes) for d in dims) > 1:
        raise Lost(f"{node.name} ({node.target}) sets samples of the batch against each other")
    return [_halved(d, rows, node) for d in dims]


def _halved(dim: Dim, rows: int, node: fx.Node) -> int:
    if not dim.axes:
        return dim.size
    if not dim.whole or [a.size for a in dim.atoms if a.axes] != [rows]:
        raise Lost(f"{node.name} ({node.target}) takes the batch apart or joins it with something else")
    return dim.size // 2


def _place(dims: Dims, rows: int, node: fx.Node) -> tuple[int, int]:
    """The dimension of which the batch is the outermost factor, and its size."""
    for at, dim in enumerate(dims):
        if dim.axes:
            _halved(dim, rows, node)
            if not dim.atoms[0].axes:
                break
            return at, dim.size
    raise Lost(f"the samples of {node.name} do not lie one behind the other")


def _refuse_mixing(node: fx.Node, known: Known) -> None:
    """Lost where an operator is not known to treat each sample by itself."""
    args: Any = node.args
    target: Any = node.target
    where = f"{node.name} ({target})"
    if target in _ALONG:
        if known.get(args[0]) and any(known[args[0]][i].axes for i in _reduces(node)):
            raise Lost(f"{where} runs over the samples of the batch")
    elif target in (aten.cat.default, aten.stack.default):
        at = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
        if target is aten.cat.default and any(known[a][at].axes for a in args[0] if known.get(a)):
            raise Lost(f"{where} joins samples with something else")
    elif is_matmul(node) and not is_convolution(node):
        for operand, at in _inner(node):
            if known.get(operand) and len(known[operand]) > 1 and known[operand][at].axes:
                raise Lost(f"{where} sums over the samples of the batch")
    elif is_attention(node):
        if any(known[a][-2].axes | known[a][-1].axes for a in args[:3] if known.get(a)):
            raise Lost(f"{where} lets the samples of the batch attend to each other")
    elif not (target in _EACH or is_convolution(node) or torch.Tag.pointwise in getattr(target, "tags", ())):
        raise Lost(f"{where} is not known to treat each sample by itself")
    if target in _WEIGHTED or is_convolution(node):
        main = args[1 if target is aten.embedding.default else 0]
        if any(_splits(known.get(a, ())) for a in data_operands(node) if a is not main):
            raise Lost(f"{where} has weights of its own for each sample")


def _inner(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The operands of a product, each with the dimension that it sums over."""
    args: Any = node.args
    if node.target is aten.einsum.default:
        return []  # letters that are summed carry no dimension of the result, which is then lost
    if node.target in (aten.linear.default,):
        return [(args[0], -1)]
    left, right = args[1:3] if node.target in (aten.addmm.default, aten.baddbmm.default) else args[:2]
    return [(left, -1), (right, -2), (right, -1)] if right.meta["val"].ndim == 2 else [(left, -1), (right, -2)]


def _broadcasts(node: fx.Node) -> bool:
    """Whether all operands of a node have the samples of its result, or share one value."""
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    products = (aten.bmm.default, aten.baddbmm.default, aten.matmul.default)
    return pointwise or is_attention(node) or node.target in (select, aten.cat.default, *_PLACING, *products)


_SIZES: dict[Any, Callable[[Any, list[int]], tuple[Any, ...]]] = {
    aten.view.default: lambda args, shape: (shape,),
    aten.reshape.default: lambda args, shape: (shape,),
    aten._unsafe_view.default: lambda args, shape: (shape,),
    aten.expand.default: lambda args, shape: (shape,),
    aten.unflatten.int: lambda args, shape: (args[1], shape[args[1] :][: len(args[2])] if args[1] >= 0 else args[2]),
}
"""Operators that are told sizes -> their arguments behind the first, for a result of this shape."""

_PLACING: set[Any] = {aten.copy.default, aten.slice_scatter.default, aten.select_scatter.default}
"""Operators that put values into what is often made without them, as large as the batch."""

_WEIGHTED: set[Any] = {
    aten.linear.default,
    aten.embedding.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.group_norm.default,
}

_NORMS: set[Any] = {aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim}
"""Reductions whose dimensions are the third argument."""

_REDUCTIONS: set[Any] = _NORMS | {
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.argmax.default,
    aten.prod.dim_int,
}

_ALONG: set[Any] = _REDUCTIONS | {
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten.var.correction,
    aten.cumsum.default,
    aten.flip.default,
    aten.select.int,
    aten.unbind.int,
    aten.glu.default,
    aten.topk.default,
    aten.sort.default,
}
"""Operators along the dimensions that their second (of norms and topk the third) argument names."""

_DEFAULTS: dict[Any, int] = {aten.unbind.int: 0, aten.glu.default: -1, aten.topk.default: -1, aten.sort.default: -1}
"""The dimension where none is named; without an entry all of them."""

_EACH: set[Any] = {
    *_SIZES,
    *_PLACING,
    select,
    gather_tokens,
    scatter_tokens,
    operator.getitem,
    aten.clone.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.dropout.default,
    aten.flatten.using_ints,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.rms_norm.default,
    aten.group_norm.default,
    aten.embedding.default,
    aten.view_as_complex.default,
    aten.view_as_real.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.upsample_nearest2d.vec,
    aten.conv_transpose2d.input,
}
"""Operators that treat each sample by itself: what they make of dimensions is checked against ir/dims.py."""
