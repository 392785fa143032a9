"""The rewrite behind the pass ``skip_blocks``: what reads a value behind a region reads the stream before it instead.

For a run of blocks each result is replaced by the stream that it continues (ir/span.py); for a module of a block the
residual add that it ends in is replaced by what is added to. With a schedule both stay, behind one decision that keeps
no state: ``select(computed, passed by)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx

from ditopt.ir.binding import bind
from ditopt.ir.edit import Editor, prune, replace_functions
from ditopt.ir.modules import before_gate, name_of
from ditopt.ir.outline import clone_body
from ditopt.ir.program import Decision, Function, Interval, Predictor, Program, call_args, callee, formal, is_call
from ditopt.ir.reach import Reach
from ditopt.ir.regions import describe
from ditopt.ir.residual import find_branches
from ditopt.ir.reuse import dense
from ditopt.ir.select import Selection
from ditopt.ir.span import Span
from ditopt.ops import select

ORIGIN = "skip_blocks"


class Skipping:
    """Leaves regions of ``program`` out: for good, or with ``schedule`` on the steps at which it does not compute.

    ``regions``: what was left out; ``refused``: what could not be, in sentences.
    """

    def __init__(self, program: Program, schedule: Interval | None) -> None:
        self.program = program
        self.regions: list[str] = []
        self.refused: list[str] = []
        self._schedule = schedule
        self._name = f"skip{len(program.decisions)}"

    def apply(self, selections: Sequence[Selection]) -> None:
        """Leave out what ``selections`` select."""
        modules: dict[str, list[str]] = {}
        for selection in selections:
            if selection.kind == "run":
                self._run({b.id for b in selection.blocks})
            else:
                for block in selection.blocks:
                    modules.setdefault(block.id, []).append(selection.role)
        if modules:
            self._modules(modules)
        if not self.regions:
            return
        if self._schedule is not None:
            decision = Decision(self._name, tuple(self.regions), self._schedule, Predictor("none"), (), "")
            self.program = self.program.replace(decisions=(*self.program.decisions, decision))
        else:
            self.program = _without(self.program, set(self.regions))
        self.program = describe(prune(self.program))

    def _chosen(self, e: Editor, computed: fx.Node, passed: fx.Node) -> fx.Node:
        """What readers of ``computed`` read from now on."""
        if self._schedule is None:
            return passed
        computed = dense(e, computed, computed.next)
        at = max([computed, passed], key=list(e.graph.nodes).index).next
        return e.op(select, computed, dense(e, passed, at), self._name, at=at)

    # -- runs of blocks ------------------------------------------------------------------------------------------------

    def _run(self, ids: set[str]) -> None:
        named = ", ".join(sorted(ids, key=lambda i: int(i.split(".")[1])))
        span = Span(self.program, bind(self.program), ids)
        if not span.calls:
            self.refused.append(f"{named or 'the region'}: there is no such block any more")
            return
        e = Editor(self.program.step, ORIGIN)
        passed: list[tuple[fx.Node, fx.Node]] = []
        for value in span.results():
            base = span.origin(value, e)
            if base is None or not _alike(base, value):
                self.refused.append(
                    f"{named}: {value.name}, which is read behind, continues no stream from before, so nothing could "
                    "take its place"
                )
                return
            passed.append((value, base))
        results = list(e.results)
        for value, base in passed:
            node = e[value]
            readers = [e[u] for u in value.users if u not in span and u.op != "output"]
            chosen = self._chosen(e, node, base)
            for reader in readers:
                reader.replace_input_with(node, chosen)
            results = [chosen if r is node else r for r in results]
        e.set_results(results)
        e.drop_dead()
        self.program = replace_functions(self.program, {self.program.entry: e.function()})
        self.regions += sorted(ids, key=lambda i: int(i.split(".")[1]))

    # -- modules of blocks ---------------------------------------------------------------------------------------------

    def _modules(self, wanted: dict[str, list[str]]) -> None:
        made: dict[tuple[str, tuple[str, ...]], Function | None] = {}
        with Editor(self.program.step, ORIGIN) as e:
            for call in list(self.program.calls()):
                block, old = str(call.meta["region"]), callee(call)
                if block not in wanted:
                    continue
                key = (old, tuple(sorted(wanted[block])))
                if key not in made:
                    made[key] = self._body(*key)
                body = made[key]
                if body is None:
                    self.refused.append(f"{block}: its {' and '.join(key[1])} is not added to a stream of its shape")
                    continue
                read = {formal(p).ref for p in body.placeholders}
                formals = self.program.functions[old].placeholders
                args = [a for a, p in zip(call_args(e[call]), formals, strict=True) if formal(p).ref in read]
                results = e.call(body.name, args, list(call.meta["val"]), e[call], block)
                for user in list(e[call].users):
                    user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
                self.regions += [f"{block}.{role}" for role in wanted[block]]
            e.drop_dead()
        bodies = {f.name: f for f in made.values() if f is not None}
        if not bodies:
            return
        step = e.function()
        calls = {str(n.meta["region"]): callee(n) for n in step.graph.nodes if is_call(n)}
        regions = [
            dataclasses.replace(r, function=calls[r.id], streams=()) if r.id in calls else r
            for r in self.program.regions
        ]
        self.program = replace_functions(self.program, {**bodies, self.program.entry: step}).replace(
            regions=tuple(regions)
        )

    def _body(self, name: str, roles: tuple[str, ...]) -> Function | None:
        """A copy of a body without its modules of these roles; None where it has none that could be left out."""
        body = self.program.functions[name]
        new = f"{name}_{self._name}_{'_'.join(roles).replace('.', '_')}"
        with clone_body(body, new, ORIGIN) as e:
            found, binding = 0, bind(self.program)
            for branch in find_branches(body, binding, Reach(body)):
                role = "attn" if branch.attends else "mlp"
                if not {role, name_of(before_gate(branch.value, binding))} & set(roles):
                    continue
                stream = _continued(branch.sum, branch.value)
                if stream is None or not _alike(stream, branch.sum):
                    return None
                total = e[branch.sum]
                readers = list(total.users)
                chosen = self._chosen(e, total, e[stream])
                e.set_results([chosen if r is total else r for r in e.results])
                for reader in readers:
                    if reader.op != "output":
                        reader.replace_input_with(total, chosen)
                found += 1
            e.drop_dead()
        return e.function(new) if found else None


def _continued(total: fx.Node, value: fx.Node) -> fx.Node | None:
    """What ``value`` is added to in ``total``, the sum of a branch."""
    operands = [a for a in total.args if isinstance(a, fx.Node)]
    others = [a for a in operands[:2] if a is not value]
    return others[0] if value in operands[:2] and len(others) == 1 else operands[0] if len(operands) == 3 else None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta["val"], b.meta["val"]
    return bool(one.shape == other.shape and one.dtype == other.dtype)


def _without(program: Program, gone: set[str]) -> Program:
    """``program`` whose table of regions lacks ``gone``, what lies in them, and stages that have no block left."""
    regions = [r for r in program.regions if not f"{r.id}.".startswith(tuple(f"{g}." for g in gone))]
    stages = {r.stage for r in regions if r.role == "block"}
    return program.replace(regions=tuple(r for r in regions if r.role != "stage" or r.stage in stages))
