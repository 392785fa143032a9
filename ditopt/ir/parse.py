"""Program text back into a Program: a walk over ``ast`` with an allow-list. Nothing in the text is ever executed.

The grammar is flat: assignments of records, function definitions, and in a function one operator a line. An operator
is looked up as ``torch.ops.<namespace>.<op>.<overload>`` in ``NAMESPACES`` only. Every fault is a ``TextError`` that
names the line, what stands there and what was expected.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import io
import operator
import pkgutil
import tokenize
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, fx

from ditopt._torch import FakeTensorMode, invoke_subgraph
from ditopt.errors import TextError
from ditopt.ir.program import Formal, Function, Program, TensorType
from ditopt.ir.words import (
    DTYPES,
    FORMALS,
    HEADER,
    NAMESPACES,
    RECORDS,
    SECTIONS,
    WORDS,
    OpOverload,
    OpOverloadPacket,
    fingerprint,
)


def parse_program(text: str, tensors: Mapping[str, Tensor]) -> Program:
    """The Program that ``text`` describes, its params taken from ``tensors`` (others there are ignored).

    References between the parts are not checked here beyond what is needed to build graphs: ``verify`` does that.
    Raises TextError for a fault in the text, and for a tensor that is missing or is not the one the text was made of.
    """
    return _Parser(text, tensors).program()


class _Parser:
    def __init__(self, text: str, tensors: Mapping[str, Tensor]) -> None:
        first = text.partition("\n")[0].rstrip()
        if first != HEADER:
            raise TextError(f"line 1: expected {HEADER!r}, found {first[:80]!r}")
        try:
            self._tree = ast.parse(text)
            tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        except SyntaxError as error:
            raise TextError(f"line {error.lineno}: not valid Python syntax ({error.msg})") from None
        except (ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
            raise TextError(f"line 1: the text cannot be read as Python ({error})") from None
        self._comments = {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}
        self._text = text
        self._tensors = tensors
        self._mode = FakeTensorMode()
        self._device = torch.device("cpu")
        self._functions: dict[str, Function] = {}

    def program(self) -> Program:
        fields: dict[str, Any] = {}
        for stmt in self._tree.body:
            if isinstance(stmt, ast.FunctionDef):
                if stmt.name in self._functions:
                    self._fail(stmt, "function names to be unique")
                self._functions[stmt.name] = self._function(stmt)
                continue
            if not (isinstance(stmt, ast.Assign) and len(stmt.targets) == 1 and isinstance(stmt.targets[0], ast.Name)):
                self._fail(stmt, "`name = ...` or a function definition")
            name = stmt.targets[0].id
            if name in fields:
                self._fail(stmt, f"{name} to be given once")
            if name == "params":
                fields[name] = self._params(stmt.value)
            elif name == "entry":
                fields[name] = self._field(stmt.value, str)
                if fields[name] not in self._functions:
                    self._fail(stmt, "the entry to be a function that stands above")
            elif name in SECTIONS:
                fields[name] = tuple(self._field(e, SECTIONS[name]) for e in self._list(stmt.value))
            else:
                self._fail(stmt, f"one of {', '.join(SECTIONS)}, params, entry")
        for name in ("inputs", "outputs", "params", "entry"):
            if name not in fields:
                end = self._text.count("\n") + 1
                raise TextError(f"line {end}: expected `{name} = ...`, found the end of the text")
        return Program(functions=self._functions, **fields)

    def _fail(self, node: ast.AST, expected: str) -> NoReturn:
        found = (ast.get_source_segment(self._text, node) or "nothing").partition("\n")[0]
        found = found if len(found) <= 100 else found[:97] + "..."
        raise TextError(f"line {getattr(node, 'lineno', 1)}: expected {expected}, found `{found}`")

    # Records

    def _list(self, node: ast.expr) -> list[ast.expr]:
        if not isinstance(node, ast.List):
            self._fail(node, "a list")
        return node.elts

    def _field(self, node: ast.expr, hint: Any) -> Any:
        """The value of ``node``, which must be what the type hint of a record's field says."""
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin is tuple:
            return tuple(self._field(e, inner[0]) for e in self._list(node))
        if hint is TensorType:
            return self._type(node)
        record = next((h for h in (hint, *inner) if h in RECORDS), None) if origin is not Literal else None
        if record is not None and not (isinstance(node, ast.Constant) and node.value is None):
            return self._record(node, record)
        value = self._value(node, {})
        allowed = inner if origin in (typing.Union, types.UnionType) else (hint,)
        for one in allowed:
            if typing.get_origin(one) is Literal:
                if value in typing.get_args(one):
                    return value
            elif one in (None, type(None)):
                if value is None:
                    return value
            elif type(value) is one:
                return value
        if origin is Literal:
            self._fail(node, f"one of {', '.join(map(repr, inner))}")
        self._fail(node, f"a value of type {' | '.join(getattr(a, '__name__', str(a)) for a in allowed)}")

    def _record(self, node: ast.expr, kind: type) -> Any:
        fields, given = self._call(node, kind.__name__)
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        if len(fields) > len(names):
            self._fail(node, f"at most {len(names)} arguments")
        values = dict(zip(names, fields, strict=False))
        for name, value in given.items():
            if name not in names or name in values:
                self._fail(value, f"an argument of {kind.__name__} once ({', '.join(names)}), not {name!r}")
            values[name] = value
        for field in dataclasses.fields(kind):
            if field.default is dataclasses.MISSING and field.name not in values:
                self._fail(node, f"{kind.__name__} with the argument {field.name!r}")
        return kind(**{k: self._field(v, hints[k]) for k, v in values.items()})

    def _call(self, node: ast.expr, *names: str) -> tuple[list[ast.expr], dict[str, ast.expr]]:
        """Arguments of a call of one of ``names``."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names):
            self._fail(node, " or ".join(f"{n}(...)" for n in names))
        if any(k.arg is None for k in node.keywords):
            self._fail(node, "arguments without **")
        return list(node.args), {str(k.arg): k.value for k in node.keywords}

    def _params(self, node: ast.expr) -> dict[str, Tensor]:
        params: dict[str, Tensor] = {}
        for item in self._list(node):
            args, named = self._call(item, "Param", "Const")
            const = typing.cast(Any, item).func.id == "Const"
            if len(args) != 2 or set(named) != ({"sha256"} if const else set()):
                self._fail(item, 'Param("name", type) or Const("name", type, sha256="...")')
            name, type = self._field(args[0], str), self._type(args[1])
            if name in params:
                self._fail(item, "parameter names to be unique")
            if name not in self._tensors:
                self._fail(item, f"a tensor named {name!r} among the {len(self._tensors)} given ones")
            tensor = self._tensors[name]
            if (tensor.dtype, tuple(tensor.shape)) != (type.dtype, type.shape):
                self._fail(item, f"the type of the given tensor, {tensor.dtype}{list(tensor.shape)}")
            if const:
                wanted, got = self._field(named["sha256"], str), fingerprint(tensor)
                if wanted and got and wanted != got:
                    self._fail(item, f"the constant that the text was made of; the given tensor has sha256 {got}")
            params[name] = tensor
        devices = [t.device for t in params.values() if t.device.type != "meta"]
        self._device = devices[0] if devices else self._device
        return params

    # Types and values

    def _type(self, node: ast.expr) -> TensorType:
        stride = None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            args, named = self._call(node.right, "strides")
            if named:
                self._fail(node.right, "strides(...)")
            stride = tuple(self._size(a) for a in args)
            node = node.left
        if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in DTYPES):
            self._fail(node, "a tensor type such as f32[2, 3]")
        sizes = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        shape = tuple(self._size(s) for s in sizes)
        if stride is not None and len(stride) != len(shape):
            self._fail(node, f"{len(shape)} strides")
        return TensorType(DTYPES[node.value.id], shape, stride)

    def _size(self, node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 2**48:
            return node.value
        self._fail(node, "a size")

    def _fake(self, node: ast.expr) -> Any:
        """A fake tensor of the annotation's type; tuples and lists of them for operators with several results."""
        if isinstance(node, ast.Tuple):
            return tuple(self._fake(e) for e in node.elts)
        if isinstance(node, ast.List):
            return [self._fake(e) for e in node.elts]
        if isinstance(node, ast.Constant) and node.value is None:
            return None
        type = self._type(node)
        try:
            with self._mode:
                if type.stride is None:
                    return torch.empty(type.shape, dtype=type.dtype, device=self._device)
                return torch.empty_strided(type.shape, type.stride, dtype=type.dtype, device=self._device)
        except (RuntimeError, TypeError, OverflowError):
            self._fail(node, "a tensor type that can exist")

    def _value(self, node: ast.expr, env: Mapping[str, fx.Node]) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, types.NoneType)):
            return node.value
        if (
            isinstance(node, ast.UnaryOp)
            and isinstance(node.op, ast.USub)
            and isinstance(node.operand, (ast.Constant, ast.Name))
        ):
            value = self._value(node.operand, {})
            if type(value) in (int, float):
                return -value
        if isinstance(node, ast.Name):
            if node.id in env:
                return env[node.id]
            if node.id in WORDS:
                return WORDS[node.id]
            self._fail(node, "a value that an earlier line defines")
        if isinstance(node, ast.List):
            return [self._value(e, env) for e in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(self._value(e, env) for e in node.elts)
        if isinstance(node, ast.Call):
            args, named = self._call(node, "device", "slice", "complex")
            values = [self._value(a, {}) for a in args]
            kind = typing.cast(Any, node).func.id
            try:
                if named:
                    self._fail(node, "arguments without names")
                if kind == "slice" and len(values) == 3:
                    return slice(*values)
                if kind == "complex" and len(values) == 2:
                    return complex(*values)
                if kind == "device" and len(values) == 1 and isinstance(values[0], str):
                    return torch.device(values[0])
            except (RuntimeError, TypeError, ValueError):
                pass
        self._fail(node, "a literal, a value, a dtype, device(...) or slice(start, stop, step)")

    # Functions

    def _function(self, stmt: ast.FunctionDef) -> Function:
        graph = fx.Graph()
        env: dict[str, fx.Node] = {}
        spec = stmt.args
        if spec.posonlyargs or spec.kwonlyargs or spec.vararg or spec.kwarg or stmt.decorator_list:
            self._fail(stmt, "plain parameters and no decorator")
        if spec.defaults and len(spec.defaults) != len(spec.args):
            self._fail(stmt, "every parameter to say what it stands for, or none")
        for i, arg in enumerate(spec.args):
            if arg.annotation is None:
                self._fail(arg, "a parameter with its type")
            what = self._formal(spec.defaults[i]) if spec.defaults else Formal("formal", arg.arg)
            node = graph.placeholder(arg.arg)
            node.meta = self._meta(arg.lineno, self._fake(arg.annotation)) | {"formal": what}
            env[arg.arg] = node
        *lines, last = stmt.body
        for line in lines:
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value):
                self._fail(line, "`name: type = operator(...)`")
            name = line.target.id
            if name in env:
                self._fail(line, f"a new name ({name} is taken)")
            env[name] = self._node(graph, name, line.value, env, self._meta(line.lineno, self._fake(line.annotation)))
        if not (isinstance(last, ast.Return) and last.value):
            self._fail(last, "`return (...)`")
        results, state = self._results(last.value, env)
        graph.output((*results, *state.values()))
        return Function(stmt.name, graph, tuple(state))

    def _meta(self, line: int, val: Any) -> dict[str, Any]:
        return {"val": val, "region": self._comments.get(line, ""), "origin": "parse"}

    def _formal(self, node: ast.expr) -> Formal:
        kinds = {v: k for k, v in FORMALS.items()}
        args, named = self._call(node, *kinds)
        if len(args) != 1 or named:
            self._fail(node, "one name")
        return Formal(typing.cast(Any, kinds[typing.cast(Any, node).func.id]), self._field(args[0], str))

    def _results(self, node: ast.expr, env: Mapping[str, fx.Node]) -> tuple[list[fx.Node], dict[str, fx.Node]]:
        state: dict[str, fx.Node] = {}
        if isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.elts[1], ast.Dict):
            for key, value in zip(node.elts[1].keys, node.elts[1].values, strict=True):
                slot = self._field(key, str) if key is not None else self._fail(value, "the name of a state slot")
                if slot in state:
                    self._fail(value, f"the slot {slot!r} to be written once")
                state[slot] = self._named(value, env)
            node = node.elts[0]
        if not isinstance(node, ast.Tuple):
            self._fail(node, "a tuple of values")
        return [self._named(e, env) for e in node.elts], state

    def _named(self, node: ast.expr, env: Mapping[str, fx.Node]) -> fx.Node:
        if isinstance(node, ast.Name) and node.id in env:
            return env[node.id]
        self._fail(node, "a value that an earlier line defines")

    def _node(
        self, graph: fx.Graph, name: str, expr: ast.expr, env: Mapping[str, fx.Node], meta: dict[str, Any]
    ) -> fx.Node:
        target: Any
        args: tuple[Any, ...]
        kwargs: dict[str, Any] = {}
        if isinstance(expr, ast.Subscript):
            target, args = operator.getitem, (self._named(expr.value, env), self._value(expr.slice, {}))
            if type(args[1]) is not int:
                self._fail(expr, "an index")
        elif isinstance(expr, ast.Call) and isinstance(expr.func, ast.Name):
            if expr.func.id not in self._functions or expr.keywords:
                self._fail(expr, "a call of a function that stands above, without keywords")
            body = graph.get_attr(expr.func.id)
            body.meta = {**meta, "val": None}
            target, args = invoke_subgraph, (body, expr.func.id, *(self._named(a, env) for a in expr.args))
        elif isinstance(expr, ast.Call):
            target = self._operator(expr.func)
            args = tuple(self._value(a, env) for a in expr.args)
            for key, value in self._keywords(expr):
                if key in kwargs:
                    self._fail(expr, f"{key} once")
                kwargs[key] = self._value(value, env)
            self._check_arguments(expr, target, len(args), set(kwargs))
        else:
            self._fail(expr, "an operator, a call or an index")
        node = graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta = meta
        return node

    def _keywords(self, expr: ast.Call) -> list[tuple[str, ast.expr]]:
        """Keyword arguments; one whose name is a word of Python prints as ``**{"from": ...}``."""
        found: list[tuple[str, ast.expr]] = []
        for keyword in expr.keywords:
            if keyword.arg is not None:
                found.append((keyword.arg, keyword.value))
            elif isinstance(keyword.value, ast.Dict) and None not in keyword.value.keys:
                pairs = zip(keyword.value.keys, keyword.value.values, strict=True)
                found.extend((self._field(typing.cast(ast.expr, k), str), v) for k, v in pairs)
            else:
                self._fail(expr, "keyword arguments")
        return found

    def _operator(self, func: ast.expr) -> OpOverload:
        match func:
            case ast.Attribute(ast.Attribute(ast.Name(namespace), op), overload) if namespace in NAMESPACES:
                if namespace == "ditopt":
                    _load_operators()
                packet = getattr(getattr(torch.ops, namespace), op, None)
                if isinstance(packet, OpOverloadPacket) and overload in packet.overloads():
                    found: OpOverload = getattr(packet, overload)
                    if found._schema.is_mutable:
                        self._fail(func, "an operator that does not write to its operands")
                    return found
        self._fail(func, f"an operator <namespace>.<op>.<overload> that exists in {', '.join(NAMESPACES)}")

    def _check_arguments(self, expr: ast.Call, target: OpOverload, n: int, named: set[str]) -> None:
        schema = target._schema.arguments
        positional = [a.name for a in schema if not a.kwarg_only]
        given = {*positional[:n], *named}
        required = {a.name for a in schema if not a.has_default_value()}
        unknown = named - {a.name for a in schema} | named & set(positional[:n])
        if n > len(positional) or unknown or not required <= given:
            self._fail(expr, f"arguments that fit {target._schema}")


def _load_operators() -> None:
    """Register every operator of ditopt: its files run when imported, nothing of a text does."""
    import ditopt.ops

    for found in pkgutil.iter_modules(ditopt.ops.__path__):
        importlib.import_module(f"ditopt.ops.{found.name}")
