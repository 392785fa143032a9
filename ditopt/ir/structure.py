"""Where the blocks are: repeated subgraphs, found in the order of the trace.

A traced model is a sequence of operators; its repeated blocks are a stretch of that sequence that repeats itself with
some period. ``find_blocks`` looks for such stretches (operators, shapes and constants must agree; names of modules and
arguments are never read), cuts each where the fewest latent values cross, and adds blocks of another kind that continue
a stretch (such as a last block that drops the text stream).
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from ditopt.ir.binding import Binding
from ditopt.ir.cost import is_attention, is_matmul
from ditopt.ir.program import Function, TensorType

aten = torch.ops.aten

CASTS = {aten._to_copy.default, aten.to.dtype, aten.type_as.default, aten.clone.default, aten.contiguous.default}


@dataclass(frozen=True)
class Block:
    """The operators of one block, in trace order, and the number of its stage (a run of equal blocks)."""

    nodes: tuple[fx.Node, ...]
    stage: int


@dataclass(frozen=True)
class _Window:
    """``sequence[start:stop]`` is one block of stage ``stage``."""

    start: int
    stop: int
    stage: int


def trace(function: Function) -> list[fx.Node]:
    """The operators of a function in order."""
    return [n for n in function.graph.nodes if n.op == "call_function"]


def find_blocks(function: Function, binding: Mapping[fx.Node, Binding]) -> list[Block]:
    """The blocks of a flat function along the trace; empty where nothing repeats.

    What depends on the timestep alone or on nothing is left out while looking for repeats: blocks may take different
    slices of one modulation table and still be equal. It joins the block that alone reads it.
    """
    sequence = [n for n in trace(function) if binding[n] & (Binding.LATENT | Binding.PROMPT)]
    labels = _labels(sequence)
    latent = [bool(binding[n] & Binding.LATENT) for n in sequence]
    work = [a and (is_attention(n) or is_matmul(n)) for a, n in zip(latent, sequence, strict=True)]
    crossing = _Crossing(sequence, latent)
    runs = _runs(sequence, labels, work, crossing, 0, len(sequence))
    windows = [_Window(a, b, stage) for stage, run in enumerate(runs) for a, b in run]
    windows = _with_odd_blocks(sequence, latent, windows)
    owner = {n: k for k, w in enumerate(windows) for n in sequence[w.start : w.stop]}
    for node in reversed(trace(function)):
        if node not in owner and not binding[node] & (Binding.LATENT | Binding.PROMPT):
            readers = {owner.get(u) for u in node.users}
            if len(readers) == 1 and (reader := readers.pop()) is not None:
                owner[node] = reader
    members: list[list[fx.Node]] = [[] for _ in windows]
    for node in trace(function):
        if node in owner:
            members[owner[node]].append(node)
    return [Block(tuple(m), w.stage) for m, w in zip(members, windows, strict=True)]


def _labels(nodes: Sequence[fx.Node]) -> np.ndarray:
    """One number a node: equal where operator, constants and types agree."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(label(n), len(known)) for n in nodes])


def label(node: fx.Node) -> Hashable:
    """Operator, constants and types of a node, without what it is connected to."""
    mark: Any = lambda n: _Mark(_type(n.meta["val"]))  # noqa: E731 - typed as map_arg wants it
    args, kwargs = fx.map_arg((node.args, node.kwargs), mark)
    return (str(node.target), repr(args), repr(kwargs), _type(node.meta["val"]))


class _Mark:
    def __init__(self, type: str) -> None:
        self._type = type

    def __repr__(self) -> str:
        return self._type


def _type(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({','.join(_type(v) for v in value)})"
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _runs(
    nodes: Sequence[fx.Node], labels: np.ndarray, work: Sequence[bool], reach: _Crossing, start: int, stop: int
) -> list[list[tuple[int, int]]]:
    """Runs of equal blocks in the order of the trace: the longest stretch that repeats, cut into blocks, then what is
    left and right of them."""
    best: tuple[int, int, int, int] | None = None
    count = np.concatenate([[0], np.cumsum(work)])
    part = labels[start:stop]
    for period in range(4, len(part) // 2 + 1):
        equal = np.flatnonzero(part[:-period] != part[period:])
        edges = np.concatenate([[-1], equal, [len(part) - period]])
        lengths = np.diff(edges) - 1
        i = int(lengths.argmax())
        length = int(lengths[i])
        if length < period:
            continue
        first = start + int(edges[i]) + 1
        last = first + length + period
        per_block = (count[last] - count[first]) * period / (last - first)
        if per_block < 2:
            continue
        # a multiple of the true period covers as much; the smallest period wins unless a longer one covers clearly more
        if best is None or last - first > 1.05 * best[0]:
            best = (last - first, first, last, period)
    if best is None:
        return []
    _, first, last, period = best
    cuts = _cuts(nodes, reach, first, last, period)
    left = _runs(nodes, labels, work, reach, start, cuts[0][0])
    return [*left, cuts, *_runs(nodes, labels, work, reach, cuts[-1][1], stop)]


class _Crossing:
    """Which values cross a cut of the trace."""

    def __init__(self, nodes: Sequence[fx.Node], latent: Sequence[bool]) -> None:
        index = {n: i for i, n in enumerate(nodes)}
        self.last = [
            max((index.get(u, len(nodes)) for u in n.users), default=i) if n.target is not None else i
            for i, n in enumerate(nodes)
        ]
        # what is computed from a whole (split, getitem) crosses as the parts, the tuple itself never does
        self.counted = [not isinstance(n.meta["val"], (tuple, list)) for n in nodes]
        deltas = np.zeros((2, len(nodes) + 2), dtype=int)
        for i, end in enumerate(self.last):
            if self.counted[i] and end > i:
                for row in (0, 1) if latent[i] else (1,):
                    deltas[row, i + 1] += 1
                    deltas[row, min(end, len(nodes)) + 1] -= 1
        self.latent, self.all = (np.cumsum(d) for d in deltas)


def _cuts(nodes: Sequence[fx.Node], reach: _Crossing, start: int, stop: int, period: int) -> list[tuple[int, int]]:
    """The blocks in a periodic stretch: at the phase at which the fewest values cross from block to block.

    Where the stretch ends before the splits and joins that end a block (the last one drops a stream), the blocks are
    cut before them too, so that it is one of them.
    """
    options = []
    for phase in range(period):
        copies = (stop - start - phase) // period
        tail = start + phase + (copies + 1) * period
        short = max(tail - stop, 0)
        if 0 < short < period and all(_is_join(n) for n in nodes[stop - period : tail - period]):
            copies += 1
        else:
            short = 0
        inner = [start + phase + k * period for k in range(1, copies + (copies == 1))]
        if copies < 2:
            continue
        options.append((int(reach.latent[inner].max()), -copies, int(reach.all[inner].max()), phase, copies, short))
    _, _, _, phase, copies, short = min(options)
    return [(a, a + period - short) for a in range(start + phase, start + phase + copies * period, period)]


def _with_odd_blocks(nodes: Sequence[fx.Node], latent: Sequence[bool], windows: list[_Window]) -> list[_Window]:
    """Add what continues a run with an attention of its own: from the end of the run to the last residual add."""
    out: list[_Window] = []
    stage = 0
    for i, window in enumerate(windows):
        out.append(_Window(window.start, window.stop, stage))
        follows = windows[i + 1] if i + 1 < len(windows) else None
        stop = follows.start if follows is not None else len(nodes)
        if any(latent[k] and is_attention(nodes[k]) for k in range(window.stop, stop)):
            end = _last_residual(nodes, window.stop, stop)
            if end is not None:
                stage += 1
                out.append(_Window(window.stop, end, stage))
        stage += follows is not None and follows.stage != window.stage
    return out


def _last_residual(nodes: Sequence[fx.Node], start: int, stop: int) -> int | None:
    """End of the chain of residual adds that begins with a value from before ``start``."""
    before = {n for n in nodes[max(0, start - 2000) : start] if isinstance(n.meta["val"], torch.Tensor)}
    index = {n: k for k, n in enumerate(nodes[start:stop], start)}
    chain: set[fx.Node] = {n for n in before if any(u in index for u in n.users)}
    end = None
    for k in range(start, stop):
        node = nodes[k]
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if node.target is aten.add.Tensor and len(operands) == 2:
            for a, b in (operands, operands[::-1]):
                if (
                    a in chain
                    and b not in chain
                    and b in index
                    and TensorType.of(a.meta["val"]).shape == TensorType.of(node.meta["val"]).shape
                ):
                    chain.add(node)
                    end = k + 1
        elif node.target in CASTS and operands and operands[0] in chain:
            chain.add(node)
    return end


@dataclass(frozen=True)
class Module:
    """A residual branch of a block: ``role`` and the value that leaves it, before the gate."""

    role: str
    output: fx.Node
    nodes: frozenset[fx.Node]


def find_modules(body: Function, binding: Mapping[fx.Node, Binding]) -> list[Module]:
    """The attention and MLP branches of a block body, by its residual adds.

    ``x + gate * m(norm(x))``: the branch leaves at ``m``, before a gate that does not depend on the latent. A branch
    that attends is attention (with an MLP beside it in parallel blocks), another that multiplies matrices is an MLP.
    """
    stream = _streams(body, binding)
    assigned: set[fx.Node] = set()
    modules: list[Module] = []
    for node in trace(body):
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if node.target is aten.add.Tensor and len(operands) == 2:
            if all(a in stream for a in operands) and _same_shape(operands[0], node):
                stream.add(node)  # a control residual, a position embedding of the prompt's length
                continue
            for old, branch in (operands, operands[::-1]):
                if old in stream and branch not in stream and _same_shape(old, node):
                    # what does not depend on the latent (a position embedding) shifts the stream and is no module
                    found = _branch(branch, stream, binding) if binding[branch] & Binding.LATENT else None
                    if found is not None and found.output not in {m.output for m in modules}:
                        modules.append(Module(found.role, found.output, frozenset(found.nodes - assigned)))
                        assigned |= found.nodes
                    stream.add(node)
                    break
        elif _is_layout(node) and operands and all(a in stream for a in node.all_input_nodes):
            stream.add(node)
    return modules


def _streams(body: Function, binding: Mapping[fx.Node, Binding]) -> set[fx.Node]:
    """Formals that a residual stream may enter by: latent ones, and the text of the first block, which still depends on
    the prompt alone. Weights are constant."""
    return {p for p in body.placeholders if binding[p] & (Binding.LATENT | Binding.PROMPT)}


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return bool(a.meta["val"].shape == b.meta["val"].shape)


def _is_layout(node: fx.Node) -> bool:
    """Operators that move the values of a stream without computing: joining, splitting, casting."""
    return node.target in CASTS or _is_join(node)


def _is_join(node: fx.Node) -> bool:
    """Operators that join or split streams."""
    return node.target in {
        aten.cat.default,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        operator.getitem,
    }


def rejoined(node: fx.Node) -> fx.Node | None:
    """The value that ``node`` joins again from all its slices in order; None where it does anything else."""
    if node.target is not aten.cat.default:
        return None
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    dim, position = node.args[1] if len(node.args) > 1 else 0, 0
    if any(p.target is not aten.slice.Tensor or p.args[0] is not parts[0].args[0] for p in parts):
        return None
    for part in parts:
        at, start = part.args[1:3] if len(part.args) > 2 else (*part.args[1:], 0)
        if at != dim or (start or 0) != position:
            return None
        position += part.meta["val"].shape[dim]
    whole: fx.Node = parts[0].args[0]  # type: ignore[assignment]
    return whole if _same_shape(whole, node) else None


def _branch(value: fx.Node, stream: set[fx.Node], binding: Mapping[fx.Node, Binding]) -> Module | None:
    while value.target in CASTS:
        value = value.args[0]  # type: ignore[assignment]
    if value.target is aten.mul.Tensor:
        pair = [a for a in value.args if isinstance(a, fx.Node)]
        latent = [a for a in pair if binding[a] & Binding.LATENT]
        if len(pair) == 2 and len(latent) == 1 and latent[0].meta["val"].shape == value.meta["val"].shape:
            value = latent[0]
    nodes: set[fx.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if node in nodes or node in stream or node.op == "placeholder":
            continue
        nodes.add(node)
        todo += node.all_input_nodes
    if any(is_attention(n) for n in nodes) or any("softmax" in str(n.target) for n in nodes):
        return Module("attn", value, frozenset(nodes))
    if any(is_matmul(n) for n in nodes):
        return Module("mlp", value, frozenset(nodes))
    return None


def stream_origins(body: Function, binding: Mapping[fx.Node, Binding]) -> list[int | None]:
    """For each result of a body: the formal whose stream it continues by residual adds and casts, or None."""
    streams = _streams(body, binding)
    origin: dict[fx.Node, int] = {p: i for i, p in enumerate(body.placeholders) if p in streams}
    for node in trace(body):
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if node.target is aten.add.Tensor and len(operands) == 2:
            for old, other in (operands, operands[::-1]):
                if old in origin and other not in origin and _same_shape(old, node):
                    origin[node] = origin[old]
                    break
        elif node.target in CASTS and operands and operands[0] in origin:
            origin[node] = origin[operands[0]]
    return [origin.get(r) for r in body.results]
