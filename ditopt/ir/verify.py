"""The rules of a well-formed Program, checked after every pass.

``verify`` raises at the first broken rule: the message names the function, the node and the rule. It looks at types
only, never at numbers, and runs no operator.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from torch import fx

from ditopt._torch import is_fake
from ditopt.errors import VerifyError
from ditopt.ir.program import (
    Decision,
    Formal,
    Function,
    Predictor,
    Program,
    Raster,
    Region,
    Stream,
    TensorType,
    call_args,
    callee,
    formal,
    is_call,
)
from ditopt.ir.words import DTYPES, NAMESPACES, OpOverload
from ditopt.ops.select import select

__all__ = ["verify"]

_REGION = re.compile(r"[\w.\-]*")


def verify(p: Program) -> None:
    """Raise VerifyError unless ``p`` is well-formed."""
    _Verifier(p).run()


class _Verifier:
    def __init__(self, p: Program) -> None:
        self.p = p
        self.inputs = {i.name: i for i in p.inputs}
        self.slots = {s.name: s for s in p.state}
        self.decisions = {d.name: d for d in p.decisions}
        self.regions = {r.id for r in p.regions}
        self.asked: set[str] = set()
        self.modes: set[Any] = set()

    def run(self) -> None:
        self.tables()
        for name, function in self.p.functions.items():
            if name != function.name:
                self.fail(f"functions[{name!r}]", f"the function calls itself {function.name!r}; the two must agree")
            self.function(function)
        for function in self.p.functions.values():  # only now: a call is compared with a body that is well-formed
            for node in filter(is_call, function.graph.nodes):
                self.call(f"{function.name}, node {node.name}", node)
        self.memos()
        self.step()
        self.ask()
        self.uses()

    def fail(self, where: str, rule: str) -> NoReturn:
        raise VerifyError(f"{where}: {rule}")

    # What the Program declares

    def tables(self) -> None:
        p = self.p
        self.unique("inputs", [i.name for i in p.inputs])
        self.unique("outputs", p.outputs)
        self.unique("state", [s.name for s in p.state])
        self.unique("memos", [m.name for m in p.memos])
        self.unique("memos", [v for m in p.memos for v in m.values])
        self.unique("decisions", [d.name for d in p.decisions])
        self.unique("decisions", [c for d in p.decisions for c in d.controls])
        self.unique("regions", [r.id for r in p.regions])
        for name in p.functions:
            if not name.isidentifier() or name in NAMESPACES:
                self.fail(f"functions[{name!r}]", "a function's name must be a Python identifier and no namespace")
        if p.entry not in p.functions:
            self.fail("entry", f"there is no function {p.entry!r}; there are {_list(p.functions)}")
        for region in p.regions:
            where = f"region {region.id!r}"
            if not region.id or region.id.startswith(".") or not _REGION.fullmatch(region.id):
                self.fail(where, "an id is made of letters, digits, _, - and dots, and does not begin with a dot")
            if region.parent and region.parent not in self.regions:
                self.fail(where, f"its parent {region.parent!r} does not exist")
            if region.function and region.function not in p.functions:
                self.fail(where, f"its function {region.function!r} does not exist")
            for stream in region.streams:
                self.stream(f"{where}, stream {stream.formal!r}", stream, region)
        if not all(0 <= f <= 1 for f in p.pace) or p.pace[:1] == (0.0,):
            self.fail("pace", f"{list(p.pace)} are no factors from 0 to 1, the first above 0")
        self.parents()
        for raster in p.relies:
            self.raster("relies", raster)
        for decision in p.decisions:
            self.decision(decision)

    def parents(self) -> None:
        parent = {r.id: r.parent for r in self.p.regions}
        for start in parent:
            seen = {start}
            at = parent[start]
            while at:
                if at in seen:
                    self.fail(f"region {start!r}", "it is its own ancestor")
                seen.add(at)
                at = parent[at]

    def stream(self, where: str, s: Stream, region: Region) -> None:
        if not region.function:
            self.fail(where, "the region has no function that it could run through")
        body = self.p.functions[region.function]
        held = next((p for p in body.placeholders if p.meta.get("formal") == Formal("formal", s.formal)), None)
        if held is None:
            self.fail(where, f"{region.function} has no parameter of this name")
        if not 0 <= s.result < body.n_results:
            self.fail(where, f"{region.function} has no result {s.result}; it has {body.n_results}")
        shape = held.meta["val"].shape
        if not s.axes or len(set(s.axes)) < len(s.axes) or not all(0 <= a < len(shape) for a in s.axes):
            self.fail(where, f"axes {list(s.axes)} are no axes of {list(shape)}")
        room = math.prod(int(shape[a]) for a in s.axes)
        if s.start < 0 or s.tokens < 1 or s.start + s.tokens > room:
            self.fail(where, f"tokens {s.start} to {s.start + s.tokens} are not among the {room} of its parameter")
        if s.grid and math.prod(s.grid) != s.tokens:
            self.fail(where, f"a grid of {' x '.join(map(str, s.grid))} does not hold {s.tokens} tokens")
        if s.raster is not None:
            self.raster(where, s.raster)
            if s.raster.grid != s.grid:
                self.fail(where, "its positions show another grid than its own")

    def raster(self, where: str, r: Raster) -> None:
        shape = next((i.type.shape for i in self.p.inputs if i.name == r.source), None)
        if shape is None:
            self.fail(where, f"there is no input {r.source!r} that could hold positions")
        if not 0 <= r.axis < len(shape) or r.start < 0 or r.tokens < 1 or r.start + r.tokens > shape[r.axis]:
            self.fail(
                where, f"positions {r.start} to {r.start + r.tokens} are not along axis {r.axis} of {list(shape)}"
            )

    def decision(self, d: Decision) -> None:
        where = f"decision {d.name!r}"
        for region in d.regions:
            if region not in self.regions:
                self.fail(where, f"its region {region!r} does not exist")
        for name in d.needs:
            if name not in self.decisions or name == d.name:
                self.fail(where, f"it needs {name!r}, which is no other decision")
        for k, slots in enumerate(d.slots):
            self.group(where, f"slots[{k}]", slots, d.predictor)
        if d.gram:
            self.number(where, "gram", d.gram, "f64", (d.predictor.anchors, d.predictor.anchors))
        if d.rule is not None:
            self.number(where, "rule.signal", d.rule.signal, "f32", (1,))
            if d.rule.since and (d.rule.since not in self.decisions or d.rule.test != "sum"):
                self.fail(where, f"rule.since={d.rule.since!r} is no decision, or its test adds nothing up")
            if d.rule.need:
                self.number(where, "rule.need", d.rule.need, "f32", (1,))
            if d.rule.weights or d.rule.slots:
                self.group(where, "rule.slots", d.rule.slots, d.rule.predictor)

    def group(self, where: str, what: str, slots: Sequence[str], predictor: Predictor) -> None:
        """``slots`` are what ``predictor`` reads of one value."""
        if len(slots) != predictor.size:
            self.fail(
                where,
                f"{what} has {len(slots)} slots; {predictor.basis} of order {predictor.order} needs {predictor.size}",
            )
        for slot in slots:
            if slot not in self.slots:
                self.fail(where, f"{what} names the state slot {slot!r}, which does not exist")
            if self.slots[slot].type != self.slots[slots[0]].type:
                self.fail(where, f"{what} has slots of different types")

    def number(self, where: str, what: str, slot: str, dtype: str, shape: tuple[int, ...]) -> None:
        """``slot`` holds what the host reads."""
        if slot not in self.slots:
            self.fail(where, f"{what} names the state slot {slot!r}, which does not exist")
        self.agree(where, what, self.slots[slot].type, "what the host reads", TensorType(DTYPES[dtype], shape))

    # One function

    def function(self, f: Function) -> None:
        try:
            f.graph.lint()
        except Exception as error:  # fx has no error type of its own for this
            self.fail(f.name, f"the graph is not in topological order or is damaged ({error})")
        outputs = [n for n in f.graph.nodes if n.op == "output"]
        if len(outputs) != 1:
            self.fail(f.name, f"it has {len(outputs)} output nodes; expected one")
        seen: set[Formal] = set()
        for node in f.graph.nodes:
            where = f"{f.name}, node {node.name}"
            if node.op == "output":
                self.output(f, where, node)
                continue
            if node.op not in ("placeholder", "call_function", "get_attr"):
                self.fail(where, f"the node kind {node.op!r} is not allowed")
            if node.op == "get_attr":
                self.callee_name(where, node)
            else:
                self.value(where, node)
            if not isinstance(node.meta.get("origin"), str) or not node.meta["origin"]:
                self.fail(where, 'it does not say which pass made it; expected meta["origin"]')
            self.region(where, node)
            if node.op == "placeholder":
                what = node.meta.get("formal")
                if not isinstance(what, Formal):
                    self.fail(where, 'a placeholder must say what it stands for; expected meta["formal"]')
                if what in seen:
                    self.fail(where, f"another placeholder already stands for the {what.kind} {what.ref!r}")
                seen.add(what)
            elif node.op == "call_function" and not is_call(node):
                self.operator(where, node)

    def value(self, where: str, node: fx.Node) -> None:
        val = node.meta.get("val")
        flat = _flat(val) if node.op == "call_function" else [val]
        if val is None or not all(is_fake(v) or (v is None and v is not val) for v in flat):
            found = "nothing" if val is None else type(val).__name__
            expected = "a FakeTensor" + (" or a tuple of them" if node.op == "call_function" else "")
            self.fail(where, f'its type is unknown; expected meta["val"] to be {expected}, found {found}')
        for v in flat:
            if v is not None:
                if v.dtype not in DTYPES.values():
                    self.fail(where, f"its dtype {v.dtype} has no name in the text of a Program")
                self.modes.add(v.fake_mode)
        if len(self.modes) > 1:
            self.fail(where, "its value belongs to another FakeTensorMode than those before it; a Program has one")

    def region(self, where: str, node: fx.Node) -> None:
        region = node.meta.get("region")
        if not isinstance(region, str):
            self.fail(where, 'it has no region; expected meta["region"], "" where there is none')
        if region and not region.startswith(".") and region not in self.regions:
            self.fail(where, f"its region {region!r} does not exist")
        if not _REGION.fullmatch(region):
            self.fail(where, f"its region {region!r} holds more than letters, digits, _, - and dots")

    def operator(self, where: str, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args if len(node.args) == 2 else (None, None)
            vals = source.meta.get("val") if isinstance(source, fx.Node) else None
            if not isinstance(vals, (tuple, list)) or type(index) is not int or not 0 <= index < len(vals):
                self.fail(where, "it takes an item that does not exist: expected (a node with several results, index)")
            self.agree(where, "the item", vals[index], "this node", node.meta["val"])
            return
        if not isinstance(node.target, OpOverload) or str(node.target).split(".")[0] not in NAMESPACES:
            self.fail(where, f"the target {node.target} is no operator of {', '.join(NAMESPACES)}")
        if node.target._schema.is_mutable:
            self.fail(where, f"{node.target} writes to its operands; a Program is functional")
        for used in node.all_input_nodes:
            if used.op == "get_attr":
                self.fail(where, f"it reads {used.name}, which is the name of a function and not a value")
        if node.target is select:
            self.select(where, node)

    def select(self, where: str, node: fx.Node) -> None:
        computed, predicted, name = node.args if len(node.args) == 3 else (None, None, None)
        if not isinstance(computed, fx.Node) or not isinstance(predicted, fx.Node):
            self.fail(where, "select takes (computed, predicted, decision) by position")
        if name not in self.decisions:
            self.fail(where, f"it asks the decision {name!r}, which does not exist")
        a, b = TensorType.of(computed.meta["val"]), TensorType.of(predicted.meta["val"])
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            self.fail(where, f"select's operands must agree in type; computed is {a}, predicted is {b}")
        self.asked.add(str(name))

    def callee_name(self, where: str, node: fx.Node) -> None:
        if node.target not in self.p.functions:
            self.fail(where, f"it names {node.target!r}, which is no function of the Program")
        if not all(is_call(u) and u.args[0] is node and node not in call_args(u) for u in node.users):
            self.fail(where, "a function's name may only stand in a call")

    def call(self, where: str, node: fx.Node) -> None:
        named = node.args[0] if len(node.args) > 1 else None
        if not isinstance(named, fx.Node) or named.op != "get_attr" or named.target != callee(node) or node.kwargs:
            self.fail(where, "a call is invoke_subgraph(<get_attr of the function>, <its name>, *actuals)")
        body = self.p.functions[callee(node)]
        if body.name == self.p.entry or body.state_out:
            self.fail(where, f"it calls {body.name}, which is the step or writes state; only block bodies are called")
        if any(is_call(n) for n in body.graph.nodes):
            self.fail(where, f"it calls {body.name}, which calls a function itself; calls do not nest")
        for node_in in body.placeholders:
            if "formal" not in node_in.meta or formal(node_in).kind != "formal":
                self.fail(f"{body.name}, node {node_in.name}", "a called function has formals only: kind 'formal'")
        actuals = call_args(node)
        if len(actuals) != len(body.placeholders):
            self.fail(where, f"{body.name} takes {len(body.placeholders)} arguments, the call gives {len(actuals)}")
        for i, (actual, wanted) in enumerate(zip(actuals, body.placeholders, strict=True)):
            if not isinstance(actual, fx.Node):
                self.fail(where, f"argument {i} is {actual!r}; expected a node")
            self.agree(where, f"argument {i}", actual.meta.get("val"), f"{body.name}'s formal", wanted.meta.get("val"))
        vals = node.meta["val"]
        if not isinstance(vals, tuple) or len(vals) != len(body.results):
            self.fail(where, f"{body.name} has {len(body.results)} results; expected a tuple of as many types")
        for i, (val, result) in enumerate(zip(vals, body.results, strict=True)):
            self.agree(where, f"result {i}", val, f"{body.name}'s", result.meta.get("val"))

    def output(self, f: Function, where: str, node: fx.Node) -> None:
        results = node.args[0] if len(node.args) == 1 else None
        if not isinstance(results, (tuple, list)) or not all(
            isinstance(r, fx.Node) and is_fake(r.meta.get("val")) for r in results
        ):
            self.fail(where, "the output must be one flat tuple of nodes that are tensors")
        if len(results) < len(f.state_out):
            self.fail(where, f"it has {len(results)} results and {len(f.state_out)} state slots to write")
        if f.name != self.p.entry and f.state_out:
            self.fail(where, "only the entry writes state")
        self.unique(f"{f.name}, state_out", f.state_out)
        for slot, result in zip(f.state_out, results[len(results) - len(f.state_out) :], strict=True):
            if slot not in self.slots:
                self.fail(where, f"it writes the state slot {slot!r}, which does not exist")
            self.agree(where, f"the new value of {slot!r}", result.meta["val"], "the slot", self.slots[slot].type)

    # Between functions

    def uses(self) -> None:
        p = self.p
        roots = {p.entry, *(m.function for m in p.memos)}
        called = {
            callee(n) for name in roots if name in p.functions for n in p.functions[name].graph.nodes if is_call(n)
        }
        for name in p.functions:
            if name not in roots | called:
                self.fail(name, "nothing calls this function")

    def memos(self) -> None:
        self.values: dict[str, Any] = {}
        for memo in self.p.memos:
            where = f"memo {memo.name!r}"
            if memo.function not in self.p.functions or memo.function == self.p.entry:
                self.fail(where, f"its function {memo.function!r} does not exist or is the entry")
            for key in memo.keys:
                if key not in self.inputs:
                    self.fail(where, f"its key {key!r} is no input of the model")
            f = self.p.functions[memo.function]
            self.formals(f, {"input", "param", "memo"})
            for node in f.placeholders:
                what = formal(node)
                if what.kind == "input" and what.ref not in memo.keys:
                    self.fail(
                        f"{f.name}, node {node.name}",
                        f"it reads the input {what.ref!r}, which is no key of {memo.name!r}",
                    )
                for other in self.p.memos:
                    missing = [k for k in other.keys if k not in memo.keys]
                    if what.kind == "memo" and what.ref in other.values and missing:
                        self.fail(
                            f"{f.name}, node {node.name}",
                            f"it reads {what.ref!r}, which changes with {', '.join(missing)}: no key of {memo.name!r}",
                        )
            if len(memo.values) != f.n_results:
                self.fail(where, f"it names {len(memo.values)} values; {f.name} has {f.n_results} results")
            self.values |= {v: r.meta["val"] for v, r in zip(memo.values, f.results, strict=True)}

    def step(self) -> None:
        f = self.p.step
        self.formals(f, {"input", "param", "state", "memo", "control"})
        if f.n_results != len(self.p.outputs):
            self.fail(f.name, f"it has {f.n_results} results; the Program has {len(self.p.outputs)} outputs")

    def formals(self, f: Function, kinds: set[str]) -> None:
        """Placeholders are of ``kinds`` and have the type of what they stand for."""
        known: dict[str, dict[str, Any]] = {
            "input": {k: i.type for k, i in self.inputs.items()},
            "state": {k: s.type for k, s in self.slots.items()},
            "memo": self.values,
            "control": {name: type_ for d in self.decisions.values() for name, type_ in d.controls.items()},
        }
        for node in f.placeholders:
            what, where = formal(node), f"{f.name}, node {node.name}"
            if what.kind not in kinds:
                self.fail(where, f"a formal of kind {what.kind!r} is not allowed here; expected {_list(sorted(kinds))}")
            if what.kind == "param":
                if what.ref not in self.p.params:
                    self.fail(where, f"there is no param {what.ref!r}")
                tensor, got = self.p.params[what.ref], TensorType.of(node.meta["val"])
                if (tensor.dtype, tuple(tensor.shape)) != (got.dtype, got.shape):
                    self.fail(
                        where, f"it is {_show(got)}; the param {what.ref!r} is {tensor.dtype}{list(tensor.shape)}"
                    )
                continue
            if what.ref not in known[what.kind]:
                self.fail(where, f"there is no {what.kind} {what.ref!r}")
            self.agree(where, "it", node.meta["val"], f"the {what.kind} {what.ref!r}", known[what.kind][what.ref])

    def ask(self) -> None:
        for name in self.decisions:
            if name not in self.asked:
                self.fail(f"decision {name!r}", "no ditopt.select asks it")

    # Helpers

    def unique(self, where: str, names: Iterable[str]) -> None:
        seen: set[str] = set()
        for name in names:
            if name in seen:
                self.fail(where, f"{name!r} is there twice")
            seen.add(name)

    def agree(self, where: str, what: str, a: Any, other: str, b: Any) -> None:
        """Both are the same type; strides of dimensions of one element say nothing and are not compared."""
        a, b = _type(a), _type(b)
        if a is None or b is None or _key(a) != _key(b):
            self.fail(where, f"{what} is {_show(a)}, {other} is {_show(b)}; the types must be equal")


def _flat(val: Any) -> list[Any]:
    return [x for v in val for x in _flat(v)] if isinstance(val, (tuple, list)) else [val]


def _type(val: Any) -> TensorType | None:
    if isinstance(val, TensorType):
        return val
    return TensorType.of(val) if is_fake(val) else None


def _key(t: TensorType) -> Any:
    stride = t.stride and tuple(st for st, size in zip(t.stride, t.shape, strict=True) if size != 1)
    return t.dtype, t.shape, stride


def _show(t: TensorType | None) -> str:
    if t is None:
        return "no tensor"
    return f"{t.dtype}{list(t.shape)}" + (f" with strides {list(t.stride)}" if t.stride else "")


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
