"""Attention operators back to the operators that the model wrote, for whatever runs no attention of its own.

The way there (ir/attention.py) and back changes nothing: the same operators on the same operands, in the same order.
Views and permutations that were only made for the operator disappear, also from memos.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from ditopt.ir.edit import Editor, drop_dead, prune, replace_functions
from ditopt.ir.product import composed, is_plain, permutation
from ditopt.ir.program import Function, Program, TensorType, formal
from ditopt.ops import attention, block_sparse_attention, linear_attention, select_blocks
from ditopt.ops.attention import decompose as open_softmax
from ditopt.ops.block_sparse_attention import decompose as open_sparse
from ditopt.ops.linear_attention import decompose as open_linear
from ditopt.ops.select_blocks import decompose as open_draft

aten = torch.ops.aten

ORIGIN = "open_attention"


def opened(program: Program) -> Program:
    """``program`` without attention operators; the same object where it has none. It opens a Program once."""
    if "opened" not in program._cache:
        program._cache["opened"] = _opened(program)
    found: Program = program._cache["opened"]
    return found


def _opened(program: Program) -> Program:
    changed = {
        name: _open(f, formals=name == program.entry)
        for name, f in program.functions.items()
        if any(n.target in (attention, linear_attention) for n in f.graph.nodes)
    }
    return prune(_read(replace_functions(program, changed))) if changed else program


def spelled(program: Program) -> Program:
    """``program`` with block-sparse attention and its drafts as plain operators, for a target that has none of its own.
    No operator of it has a row for each query and a column for each key."""
    changed = {
        name: _spell(f, formals=name == program.entry)
        for name, f in program.functions.items()
        if any(n.target in (block_sparse_attention, select_blocks) for n in f.graph.nodes)
    }
    return replace_functions(program, changed)


_SCORES = 1 << 22
"""Scores that are held at a time, unless that takes more than ``_PARTS`` parts."""

_PARTS = 16


def _spell(function: Function, formals: bool) -> Function:
    with Editor(function, ORIGIN) as e:
        for node in list(e.graph.nodes):
            if node.target not in (block_sparse_attention, select_blocks):
                continue

            def emit(target: Any, *args: Any, at: fx.Node = node, **kwargs: Any) -> fx.Node:
                made = e.op(target, *args, at=at, region=str(at.meta["region"]), **kwargs)
                if "path" in at.meta:
                    made.meta["path"] = at.meta["path"]
                return made

            if node.target is select_blocks:
                for user, new in zip(range(2), open_draft(emit, *node.args, **node.kwargs), strict=True):  # type: ignore[arg-type]
                    for item in [u for u in node.users if u.args[1] == user]:
                        item.replace_all_uses_with(new)
                continue
            value = open_sparse(emit, *node.args, rows=_rows(node), **node.kwargs)  # type: ignore[arg-type]
            if not value.meta["val"].is_contiguous():
                value = emit(aten.clone.default, value, memory_format=torch.contiguous_format)
            node.replace_all_uses_with(value)
        e.drop_dead(formals)
    return e.function()


def _rows(node: fx.Node) -> int:
    """Queries of a sparse attention to handle at a time."""
    args: Any = node.args
    query, index = (args[i].meta["val"].shape for i in (0, 3))
    seen = int(index[-1]) * args[8] + sum(args[10])
    fit = _SCORES // max(1, math.prod(map(int, query[:-2])) * seen)
    return max(fit, -(-int(query[-2]) // _PARTS), 1)


def _open(function: Function, formals: bool) -> Function:
    with Editor(function, ORIGIN) as e:
        for node in list(e.graph.nodes):
            if node.target not in (attention, linear_attention):
                continue

            def emit(target: Any, *args: Any, at: fx.Node = node, **kwargs: Any) -> fx.Node:
                made = e.op(target, *args, at=at, region=str(at.meta["region"]), **kwargs)
                if "path" in at.meta:
                    made.meta["path"] = at.meta["path"]
                return made

            decompose: Any = open_softmax if node.target is attention else open_linear
            value = decompose(emit, *node.args, **node.kwargs)
            node.replace_all_uses_with(value)
            _undo(value)
        e.drop_dead(formals)
    return e.function()


def _undo(value: fx.Node) -> None:
    """Let what takes back the last move of ``value`` read what was moved."""
    source = value.args[0] if value.args else None
    if not isinstance(source, fx.Node):
        return
    for user in list(value.users):
        if user.op == "output" or TensorType.of(user.meta["val"]) != TensorType.of(source.meta["val"]):
            continue
        own, other = permutation(value), permutation(user)
        turned = own is not None and other is not None and is_plain(composed(own, other))
        if turned or (value.target is user.target is aten.view.default):
            user.replace_all_uses_with(source)
            _undo(source)


def _read(program: Program) -> Program:
    """``program`` without memo values that nobody reads any more."""
    read = {formal(p).ref for f in program.functions.values() for p in f.placeholders if formal(p).kind == "memo"}
    functions, memos = {}, []
    for memo in program.memos:
        kept = [i for i, v in enumerate(memo.values) if v in read]
        memos.append(dataclasses.replace(memo, values=tuple(memo.values[i] for i in kept)))
        if len(kept) < len(memo.values):
            function = program.functions[memo.function]
            with Editor(function, ORIGIN) as e:
                e.set_results([e.results[i] for i in kept])
            functions[memo.function] = drop_dead(e.function(), ORIGIN)
    return replace_functions(program.replace(memos=tuple(m for m in memos if m.values)), functions)
