"""How a model wrote what a semantic operator stands for: a text of ATen operators, replayed bit for bit.

    t0 = transpose.int(k, -2, -1); t1 = matmul.default(q, t0); t2 = softmax.int(t1, -1); t3 = matmul.default(t2, v)

Names without a definition are operands of the semantic operator; the last value is the result. The text is an attribute
of the operator, so that it prints, parses and compares with it. It is read by a walk over ``ast`` that knows names,
literals and functional ATen operators, and executes nothing.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx

from ditopt._torch import OpOverload
from ditopt.errors import TextError
from ditopt.ir.words import WORDS

_WORD_OF = {v: k for k, v in WORDS.items() if not isinstance(v, float)}


@dataclass(frozen=True)
class Name:
    """A value of the text."""

    text: str


@dataclass(frozen=True)
class Step:
    """One operator: what it defines, and its arguments with a ``Name`` for each value."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def write(steps: Sequence[Step]) -> str:
    """The text of ``steps``; ValueError where an argument cannot be written."""
    lines = []
    for step in steps:
        given = [_show(a) for a in step.args] + [f"{k}={_show(v)}" for k, v in sorted(step.kwargs.items())]
        lines.append(f"{step.name} = {str(step.target).removeprefix('aten.')}({', '.join(given)})")
    return "; ".join(lines)


@functools.lru_cache(maxsize=256)
def read(text: str) -> tuple[Step, ...]:
    """The steps of a text; TextError where it is none."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _error(text, "it is no sequence of assignments") from None
    if not body:
        raise _error(text, "it is empty")
    return tuple(_step(text, line) for line in body)


def replay(text: str, operands: Mapping[str, Any], emit: Callable[..., Any]) -> Any:
    """The result of ``emit(target, *args, **kwargs)`` for the last step; TextError for a name that is not defined."""
    values = dict(operands)
    result = None

    def value(item: Any) -> Any:
        if isinstance(item, Name):
            if values.get(item.text) is None:
                raise _error(text, f"{item.text} is not defined there")
            return values[item.text]
        return type(item)(value(i) for i in item) if isinstance(item, (list, tuple)) else item

    for step in read(text):
        result = emit(step.target, *(value(a) for a in step.args), **{k: value(v) for k, v in step.kwargs.items()})
        values[step.name] = result
    return result


def named(item: Any, names: Mapping[fx.Node, str]) -> Any:
    """An argument of a node with a ``Name`` for each node."""
    mark: Any = lambda x: Name(names[x]) if isinstance(x, fx.Node) else x  # noqa: E731 - typed as fx wants it
    return fx.node.map_aggregate(item, mark)


def _error(text: str, why: str) -> TextError:
    return TextError(f"the spelling {text[:80]!r} cannot be read: {why}")


def _show(value: Any) -> str:
    if isinstance(value, Name):
        return value.text
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str) and value.isprintable() and "'" not in value and "\\" not in value:
        return f"'{value}'"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, torch.device):
        return f"device('{value}')"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)) and value in _WORD_OF:
        return _WORD_OF[value]
    raise ValueError(f"{type(value).__name__} has no text in a spelling")


def _step(text: str, line: ast.stmt) -> Step:
    if not (isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name)):
        raise _error(text, "expected `name = operator.overload(...)`")
    call = line.value
    if not (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and all(k.arg for k in call.keywords)
    ):
        raise _error(text, "expected `name = operator.overload(...)`")
    packet = getattr(torch.ops.aten, call.func.value.id, None)
    target = getattr(packet, call.func.attr, None)
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        raise _error(text, f"aten has no functional operator {call.func.value.id}.{call.func.attr}")
    args = tuple(_value(text, a) for a in call.args)
    return Step(line.targets[0].id, target, args, {str(k.arg): _value(text, k.value) for k in call.keywords})


def _value(text: str, node: ast.expr) -> Any:
    def fail() -> NoReturn:
        raise _error(text, f"{ast.unparse(node)[:40]!r} is no value")

    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, (bool, int, float, str, type(None))) else fail()
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(text, node.operand)
        return -number if type(number) in (int, float) else fail()
    if isinstance(node, ast.Name):
        return WORDS.get(node.id, Name(node.id))
    if isinstance(node, ast.List):
        return [_value(text, e) for e in node.elts]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "device":
        values = [_value(text, a) for a in node.args]
        if len(values) == 1 and isinstance(values[0], str) and not node.keywords:
            try:
                return torch.device(values[0])
            except RuntimeError:
                fail()
    fail()
