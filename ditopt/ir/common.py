"""Common subexpressions: operators that compute the same of the same operands become one."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ditopt._torch import is_fake
from ditopt.ir.edit import Editor
from ditopt.ir.program import Function, Program, TensorType, formal
from ditopt.ir.words import CONST


def merge_equal(program: Program, nodes: Iterable[fx.Node], origin: str) -> tuple[Program, int]:
    """``program`` with one operator in place of equal ones among ``nodes`` of its entry, and how many went."""
    found = duplicates(program.step, nodes, program.params)
    with Editor(program.step, origin) as e:
        for node, other in found.items():
            e.replace(e[node], e[other])
        e.drop_dead(formals=False)
    return program.replace(functions={**program.functions, program.entry: e.function()}), len(found)


def duplicates(function: Function, nodes: Iterable[fx.Node], params: Mapping[str, Tensor]) -> dict[fx.Node, fx.Node]:
    """Of ``nodes``, operators in their order, those that compute what an earlier one of them does -> that one.

    Operators are equal by target, constants (1, 1.0 and True are three) and operands; a weight is the same where it is
    the same tensor, and a constant of the trace, which nothing outside of the program writes to, also where it has the
    same type and bits (of one without memory they are not known). Nodes must be deterministic.
    """
    same = _weights(function, params)
    found: dict[fx.Node, fx.Node] = {}
    first: dict[Hashable, fx.Node] = {}
    for node in nodes:
        key = _key(node, same)
        if key in first:
            found[node] = same[node] = first[key]
        else:
            first[key] = node
    return found


def _key(node: fx.Node, same: Mapping[fx.Node, fx.Node]) -> Hashable:
    """What a node computes: its operator, and the text of its arguments with operands by name."""
    named: Any = lambda n: _Operand(same.get(n, n))  # noqa: E731 - typed as map_arg wants it
    args, kwargs = fx.map_arg((node.args, node.kwargs), named)
    return str(node.target), repr(args), repr(kwargs)


class _Operand:
    """A node in the repr of arguments: names of the nodes of a graph are unique."""

    def __init__(self, node: fx.Node) -> None:
        self._text = f"%{node.name}"

    def __repr__(self) -> str:
        return self._text


def _weights(function: Function, params: Mapping[str, Tensor]) -> dict[fx.Node, fx.Node]:
    """Placeholders of weights and constants that hold what an earlier one holds -> that one."""
    found: dict[fx.Node, fx.Node] = {}
    handles: dict[int, fx.Node] = {}
    constants: dict[Hashable, list[fx.Node]] = {}
    for p in function.placeholders:
        what = formal(p)
        if what.kind != "param":
            continue
        tensor = params[what.ref]
        other = handles.setdefault(id(tensor), p)
        if other is p and what.ref.startswith(CONST) and not is_fake(tensor):
            alike = constants.setdefault((TensorType.of(tensor), tensor.device), [])
            other = next((a for a in alike if torch.equal(_bits(params[formal(a).ref]), _bits(tensor))), p)
            if other is p:
                alike.append(p)
        if other is not p:
            found[p] = other
    return found


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: zeros of both signs differ, and not a number equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
