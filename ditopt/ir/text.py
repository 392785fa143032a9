"""A Program as text: valid, deterministic Python, one line an operator, types where a value is defined.

``print_program`` prints broken Programs too, so that they can be looked at; ``parse_program`` reads the text of a
well-formed one back. Names of values are made here, from what placeholders stand for and from the order of the
operators, so that two Programs print alike whatever fx called their nodes.
"""

from __future__ import annotations

import dataclasses
import difflib
import keyword
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ditopt.ir.parse import parse_program
from ditopt.ir.program import Formal, Function, Program, TensorType, call_args, callee, is_call
from ditopt.ir.words import CONST, FORMALS, HEADER, NAMESPACES, RECORDS, SECTIONS, WORDS, OpOverload, fingerprint

__all__ = ["diff", "parse_program", "print_program"]

COMMENT_COLUMN = 88
"""Where region ids stand; to the right of it when the line is longer."""

_WORD_OF = {v: k for k, v in WORDS.items() if not isinstance(v, float)}
_RESERVED = {*WORDS, *NAMESPACES, *FORMALS.values(), "device", "slice", "complex", "strides", "torch"}
_NUMBERED = re.compile(r"[vn]\d+")


def print_program(p: Program) -> str:
    """The text of ``p``."""
    return "\n".join(_lines(p, {f.name: _names(p, f) for f in p.functions.values()})) + "\n"


def diff(before: Program, after: Program) -> str:
    """What changed: one line of counts, then a unified diff of the texts.

    Values that both programs compute keep the name they have in ``before``; new ones are called ``n0, n1, ...``. So a
    local edit gives a short diff. Equal programs give "no change".
    """
    old = {f.name: _names(before, f) for f in before.functions.values()}
    new = {f.name: _names(after, f) for f in after.functions.values()}
    counts = []
    for name in {**before.functions, **after.functions}:
        a, b = before.functions.get(name), after.functions.get(name)
        if a is None or b is None:
            counts.append(f"{name}: " + (_size(before, a, "removed") if a else _size(after, b, "new")))
            continue
        pairs = _align(before, a, old[name], after, b, new[name])
        names = iter(f"n{i}" for i in range(len(new[name])))
        kept = {y: old[name][x] for x, y in pairs}
        new[name] |= {y: kept.get(y) or next(names) for y in _shown(after, b)}
        rewired = sum(_statement(x, old[name]) != _statement(y, new[name]) for x, y in pairs)
        added, removed = len(_shown(after, b)) - len(pairs), len(_shown(before, a)) - len(pairs)
        if added or removed or rewired:
            counts.append(f"{name}: {added} added, {removed} removed, {rewired} changed")
    texts = list(_lines(before, old)), list(_lines(after, new))
    lines = list(difflib.unified_diff(*texts, "before", "after", lineterm=""))
    if not lines:
        return "no change\n"
    return "\n".join(["; ".join(counts) or "no node changed", *lines]) + "\n"


def _size(p: Program, f: Function | None, what: str) -> str:
    return f"{what} ({len(_shown(p, f)) if f else 0} nodes)"


# The parts of a text


def _lines(p: Program, names: Mapping[str, Mapping[fx.Node, str]]) -> Iterator[str]:
    yield HEADER
    for section in SECTIONS:
        items = getattr(p, section)
        if items or section in ("inputs", "outputs"):
            yield from _section(section, [_record(i) if type(i) in RECORDS else _value(i, {}) for i in items])
    params = []
    for name in sorted(p.params, key=_natural):
        tensor = p.params[name]
        type_ = _type(TensorType(tensor.dtype, tuple(tensor.shape)))
        const = name.startswith(CONST)
        args = f"{_value(name, {})}, {type_}" + (f', sha256="{fingerprint(tensor)}"' if const else "")
        params.append(f"{'Const' if const else 'Param'}({args})")
    yield from _section("params", params)
    for function in _ordered(p):
        yield ""
        yield ""
        yield from _function(p, function, names[function.name])
    yield ""
    yield ""
    yield f"entry = {_value(p.entry, {})}"


def _section(name: str, items: Sequence[str]) -> Iterator[str]:
    if not items:
        yield f"{name} = []"
        return
    yield f"{name} = ["
    yield from (f"    {item}," for item in items)
    yield "]"


def _ordered(p: Program) -> list[Function]:
    """Functions in the one order that does not depend on the dict: callees first, the entry last."""
    found: dict[str, None] = {}

    def visit(name: str, inside: frozenset[str]) -> None:
        if name in p.functions and name not in found and name not in inside:
            for node in p.functions[name].graph.nodes:
                if is_call(node):
                    visit(callee(node), inside | {name})
            found[name] = None

    nobody_reads = sorted(set(p.functions) - {p.entry})
    for name in [*(m.function for m in p.memos), p.entry]:
        visit(name, frozenset())
    return [p.functions[n] for n in [*(n for n in nobody_reads if n not in found), *found]]


def _function(p: Program, f: Function, names: Mapping[fx.Node, str]) -> Iterator[str]:
    plain = all(_kind(n) == "formal" for n in f.placeholders)
    yield f"def {f.name}(" + ("" if f.placeholders else "):")
    for node in f.placeholders:
        what = node.meta.get("formal") or Formal("formal", names[node])
        default = "" if plain else f" = {FORMALS[what.kind]}({_value(what.ref, {})})"
        yield _commented(f"    {names[node]}: {_type_of(node.meta.get('val'))}{default},", node)
    if f.placeholders:
        yield "):"
    for node in _shown(p, f):
        yield _commented(f"    {names[node]}: {_type_of(node.meta.get('val'))} = {_statement(node, names)}", node)
    flat = f.output.args[0]
    results = tuple(flat) if isinstance(flat, (list, tuple)) else (flat,)
    split = len(results) - len(f.state_out)
    state = [f"{_value(s, {})}: {_value(r, names)}" for s, r in zip(f.state_out, results[split:], strict=False)]
    yield f"    return {_value(results[:split], names)}" + (f", {{{', '.join(state)}}}" if state else "")


def _commented(line: str, node: fx.Node) -> str:
    region = node.meta.get("region", "")
    return f"{line:<{COMMENT_COLUMN - 2}}  # {region}" if region else line


def _shown(p: Program, f: Function) -> list[fx.Node]:
    """The nodes that are a line: all but placeholders, the output and the names of callees."""
    return [
        n
        for n in f.graph.nodes
        if n.op not in ("placeholder", "output") and not (n.op == "get_attr" and str(n.target) in p.functions)
    ]


def _kind(node: fx.Node) -> str:
    return node.meta["formal"].kind if "formal" in node.meta else "formal"


def _names(p: Program, f: Function) -> dict[fx.Node, str]:
    """Placeholders by what they stand for, other nodes by their position; no name means anything else in the text."""
    names: dict[fx.Node, str] = {}
    reserved = _RESERVED | set(p.functions)
    taken = set(reserved)
    for node in f.placeholders:
        base = re.sub(r"\W", "_", node.meta["formal"].ref if "formal" in node.meta else node.name, flags=re.ASCII)
        if not base or base[0].isdigit():
            base = "_" + base
        if base in reserved or keyword.iskeyword(base) or _NUMBERED.fullmatch(base):
            base += "_"
        name, i = base, 0
        while name in taken:
            i += 1
            name = f"{base}_{i}"
        taken.add(name)
        names[node] = name
    return names | {node: f"v{i}" for i, node in enumerate(_shown(p, f))}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which blocks.2 stands before blocks.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


# Types, records and values


def _type(t: TensorType) -> str:
    word = _WORD_OF.get(t.dtype, str(t.dtype).removeprefix("torch."))
    sizes = ", ".join(map(str, t.shape)) or "()"
    return f"{word}[{sizes}]" + (f" @ strides({', '.join(map(str, t.stride))})" if t.stride is not None else "")


def _type_of(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        return _type(TensorType.of(val))
    if isinstance(val, (list, tuple)):
        return _brackets([_type_of(v) for v in val], isinstance(val, tuple))
    return "None" if val is None else type(val).__name__


def _brackets(items: Sequence[str], is_tuple: bool) -> str:
    text = ", ".join(items)
    if is_tuple:
        return f"({text},)" if len(items) == 1 else f"({text})"
    return f"[{text}]"


def _record(record: Any) -> str:
    """A call of the dataclass's name; fields at their default are left out."""
    parts = []
    for i, field in enumerate(dataclasses.fields(record)):
        value = getattr(record, field.name)
        if field.default is not dataclasses.MISSING and value == field.default:
            continue
        text = _field(value)
        parts.append(text if i < RECORDS[type(record)] else f"{field.name}={text}")
    return f"{type(record).__name__}({', '.join(parts)})"


def _field(value: Any) -> str:
    if isinstance(value, TensorType):
        return _type(value)
    if type(value) in RECORDS:
        return _record(value)
    return _brackets([_field(v) for v in value], False) if isinstance(value, tuple) else _value(value, {})


def _statement(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """The right-hand side of a node's line."""
    args = [_value(a, names) for a in node.args]
    if is_call(node):
        return f"{callee(node)}({', '.join(_value(a, names) for a in call_args(node))})"
    if node.target is operator.getitem and len(args) == 2:
        return f"{args[0]}[{args[1]}]"
    named = sorted(node.kwargs.items())
    odd = {k: v for k, v in named if keyword.iskeyword(k)}
    args += [f"{k}={_value(v, names)}" for k, v in named if k not in odd]
    if odd:
        args.append("**{" + ", ".join(f"{_value(k, {})}: {_value(v, names)}" for k, v in odd.items()) + "}")
    if isinstance(node.target, OpOverload):
        return f"{node.target}({', '.join(args)})"
    return f"{node.op}({', '.join([_value(str(node.target), {}), *args])})"


def _value(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names.get(value, f"unknown({_value(value.name, {})})")
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        return repr(int(value))
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, complex):
        return f"complex({value.real!r}, {value.imag!r})"
    if isinstance(value, str):
        escaped = value.encode("unicode_escape").decode("ascii").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return _brackets([_value(v, names) for v in value], isinstance(value, tuple))
    if isinstance(value, slice):
        return f"slice({', '.join(_value(v, names) for v in (value.start, value.stop, value.step))})"
    if isinstance(value, torch.device):
        return f'device("{value}")'
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)) and value in _WORD_OF:
        return _WORD_OF[value]
    return f"unknown({_value(type(value).__name__, {})})"


# Alignment for diff


def _align(
    p: Program, a: Function, a_names: Mapping[fx.Node, str], q: Program, b: Function, b_names: Mapping[fx.Node, str]
) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of nodes, in order, that are the same step of the computation in ``a`` and in ``b``.

    Nodes match when they apply the same operator to operands that come from the same operators or placeholders; what
    is left between two matches is paired by operator alone, so that the consumer of an inserted node keeps its name.
    """
    xs, ys = _shown(p, a), _shown(q, b)
    pairs: list[tuple[fx.Node, fx.Node]] = []
    for same, i, i_end, j, j_end in _opcodes(_keys(xs, a_names), _keys(ys, b_names)):
        if same:
            pairs += zip(xs[i:i_end], ys[j:j_end], strict=True)
            continue
        left, right = xs[i:i_end], ys[j:j_end]
        for also, k, k_end, m, m_end in _opcodes([_head(n) for n in left], [_head(n) for n in right]):
            if also:
                pairs += zip(left[k:k_end], right[m:m_end], strict=True)
    return pairs


def _opcodes(a: list[str], b: list[str]) -> Iterator[tuple[bool, int, int, int, int]]:
    for tag, i, i_end, j, j_end in difflib.SequenceMatcher(None, a, b).get_opcodes():
        yield tag == "equal", i, i_end, j, j_end


def _head(node: fx.Node) -> str:
    return callee(node) if is_call(node) else str(node.target)


def _keys(nodes: Iterable[fx.Node], names: Mapping[fx.Node, str]) -> list[str]:
    coarse = {n: _head(n) if not name or _NUMBERED.fullmatch(name) else name for n, name in names.items()}
    return [_statement(n, coarse) for n in nodes]
