"""Values made of weights alone: a memo without keys, which the loop reads and the runtime computes again where a weight
changed (runtime/memo.py). Written files hold them as weights (ir/fold.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from ditopt._torch import fake_mode_of
from ditopt.ir.edit import Editor
from ditopt.ir.program import Formal, Function, Memo, Program, formal


class Derived:
    """Collects the values of one new memo of ``program``: ``read`` brings weights in, ``e`` computes, ``keep`` names
    what the loop reads."""

    def __init__(self, program: Program, name: str, origin: str) -> None:
        taken = {m.name for m in program.memos}
        self.name = next(n for n in (name, *(f"{name}{k}" for k in range(2, 99))) if n not in taken)
        graph = fx.Graph()
        graph.output(())
        self.e = Editor(Function(f"memo_{self.name}", graph), origin)
        self.e.mode = fake_mode_of([p.meta["val"] for p in program.step.placeholders])
        self._formals: dict[Formal, fx.Node] = {}
        self._copies: dict[tuple[int, fx.Node], fx.Node] = {}
        self._kept: dict[fx.Node, str] = {}

    def read(self, node: fx.Node, actual: Mapping[fx.Node, fx.Node] | None = None) -> fx.Node:
        """``node``, made of weights alone, computed in the memo. It stands in the entry, or in a body whose formals are
        ``actual`` nodes of the entry."""
        if actual is not None and node in actual:
            return self.read(actual[node])
        if node.op == "placeholder":
            what = formal(node)
            if what not in self._formals:
                self._formals[what] = self.e.placeholder(what.ref.replace(".", "_"), what, node.meta["val"])
            return self._formals[what]
        key = (id(actual) if actual is not None else 0, node)
        if key not in self._copies:
            made = {a: self.read(a, actual) for a in node.all_input_nodes}
            with self.e.graph.inserting_before(self.e.graph.output_node()):
                copy = self.e.graph.node_copy(node, made.__getitem__)
            copy.meta["region"] = ""
            self._copies[key] = copy
        return self._copies[key]

    def keep(self, value: fx.Node) -> Formal:
        """What the loop reads ``value`` as."""
        return Formal("memo", self._kept.setdefault(value, f"{self.name}.{len(self._kept)}"))

    def added(self, program: Program) -> Program:
        """``program`` with the memo, which its functions read."""
        self.e.set_results(self._kept)
        self.e.drop_dead()
        function = self.e.function()
        memo = Memo(self.name, function.name, (), tuple(self._kept.values()), "request")
        alone = sum(not m.keys for m in program.memos)  # these come first, for the others may read them
        memos = (*program.memos[:alone], memo, *program.memos[alone:])
        return program.replace(functions={**program.functions, function.name: function}, memos=memos)


class Reads:
    """Placeholders of the entry for values of a memo, each once."""

    def __init__(self, e: Editor) -> None:
        self.e = e
        self._made: dict[Formal, fx.Node] = {}

    def of(self, what: Formal, value: Any) -> fx.Node:
        """The placeholder that reads ``what``, a (fake) ``value``."""
        if what not in self._made:
            self._made[what] = self.e.placeholder(what.ref.replace(".", "_"), what, value)
        return self._made[what]
