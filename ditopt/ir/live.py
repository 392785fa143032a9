"""What decisions reach: which values a step needs where one of them predicts, and what is computed behind one."""

from __future__ import annotations

import operator

from torch import fx

from ditopt.ir.program import Program, call_args, callee, is_call
from ditopt.ops import select

Value = tuple[fx.Node | None, fx.Node]
"""A node of the entry, as (None, node), or one of the body that a call runs, as (call, node)."""


def alive(program: Program, decision: str) -> set[Value]:
    """The values that a step needs, for its results or for its state, where ``decision`` predicts."""
    found: set[Value] = set()
    todo: list[Value] = [(None, r) for r in program.step.results]
    while todo:
        call, node = value = todo.pop()
        if value in found:
            continue
        found.add(value)
        if node.target is select and node.args[2] == decision:
            todo.append((call, node.args[1]))  # type: ignore[arg-type]
        elif call is not None and node.op == "placeholder":
            which = program.functions[callee(call)].placeholders.index(node)
            todo.append((None, call_args(call)[which]))
        elif node.target is operator.getitem and is_call(node.args[0]):  # type: ignore[arg-type]
            called, at = node.args
            todo.append((called, program.functions[callee(called)].results[at]))  # type: ignore[arg-type,index]
        else:
            todo += [(call, a) for a in node.all_input_nodes]
    return found


def decided_by(program: Program, node: fx.Node) -> list[str]:
    """The names of the decisions that ``node`` of the entry depends on, also inside the blocks before it; the nearest
    first."""
    found: dict[str, None] = {}
    seen, todo = {node}, [node]
    while todo:
        n = todo.pop()
        inside = program.functions[callee(n)].graph.nodes if is_call(n) else [n]
        found |= {str(m.args[2]): None for m in inside if m.target is select}
        todo += [a for a in n.all_input_nodes if a not in seen]
        seen.update(n.all_input_nodes)
    return list(found)
