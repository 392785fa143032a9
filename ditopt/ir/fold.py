"""What depends on the weights alone, computed: for a program whose weights are written down and stay as they are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from ditopt.ir.edit import Editor, prune
from ditopt.ir.program import Function, Program, formal


def weights_of_constants(program: Program) -> Program:
    """``program`` in which the values of memos that depend on no input are weights (``memo.<value>``), computed by
    torch from those that they are made of. A change of a weight is no longer seen: see ``hoist_invariants``."""
    constant = [m for m in program.memos if not m.keys]
    made: dict[str, Tensor] = {}
    for memo in constant:
        function = program.functions[memo.function]
        args = [
            made[what.ref] if what.kind == "memo" else program.params[what.ref]
            for what in map(formal, function.placeholders)
        ]
        with torch.no_grad():
            results = fx.Interpreter(program.module(function.name)).run(*args)
        made |= zip(memo.values, results, strict=True)
    if not made:
        return program
    return prune(
        program.replace(
            functions={name: _reading(function, made) for name, function in program.functions.items()},
            params={**program.params, **{f"memo.{name}": value for name, value in made.items()}},
            memos=tuple(m for m in program.memos if m not in constant),
        )
    )


def _reading(function: Function, made: dict[str, Tensor]) -> Function:
    """``function`` with weights in the place of the values that are ``made``."""
    found = [p for p in function.placeholders if formal(p).kind == "memo" and formal(p).ref in made]
    if not found:
        return function
    with Editor(function, "weights_of_constants") as e:
        for p in found:
            e[p].meta["formal"] = replace(formal(p), kind="param", ref=f"memo.{formal(p).ref}")
    return e.function()
