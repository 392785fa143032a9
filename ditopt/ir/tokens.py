"""The rewrite behind ``select_tokens`` and ``edit_tokens``: beside the step on all tokens, one on the chosen ones.

The step gets a second path: the streams of the latent are gathered in front of the run, blocks are called with bodies
that know part of the tokens (ir/short.py), and where something is reached that needs all of them (the model's output, a
block behind the run) the computed ones are put into what was there before. ``select`` chooses between the two paths, so
that lowering makes step graphs of them as of any other decision. State: the last value at each place where the paths
meet again, keys and values of every attention, and what the next positions are chosen by (``Chooses``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from ditopt.errors import RecipeError
from ditopt.ir.binding import Binding, bind
from ditopt.ir.cost import is_attention
from ditopt.ir.edit import Editor, prune, replace_functions
from ditopt.ir.live import Value, alive, decided_by
from ditopt.ir.outline import clone_body
from ditopt.ir.program import (
    Decision,
    Formal,
    Function,
    Interval,
    Predictor,
    Program,
    Region,
    Rule,
    Stream,
    TensorType,
    call_args,
    callee,
    formal,
    is_call,
    owner,
)
from ditopt.ir.reuse import Reuse, dense, dense_type
from ditopt.ir.select import select_regions
from ditopt.ir.short import Mixes, Place, Short, TokenSet, after, together
from ditopt.ir.short_rules import visit
from ditopt.ir.span import Span
from ditopt.ops import select

aten = torch.ops.aten


def part(tokens: int, ratio: float, multiple: int) -> int:
    """How many of ``tokens`` a partial step computes: the share ``ratio``, rounded down to a ``multiple``, at least
    one. ``Mixes`` where a share below 1 comes to all of them."""
    if ratio == 1:
        return tokens
    count = max(int(tokens * ratio) // multiple * multiple, multiple)
    if count >= tokens:
        raise Mixes(
            f"multiple={multiple}: of {tokens} tokens a partial step would compute all; give a multiple below {tokens}"
        )
    return count


def run_of_blocks(program: Program, name: str, region: str) -> set[str]:
    """The ids of the blocks that ``region`` names for the pass ``name``; RecipeError where it is no run of blocks."""
    selections = select_regions(program, region)
    if any(s.kind != "run" for s in selections):
        raise RecipeError(f"{name}{{region={region}}}: name a run of blocks, such as blocks or blocks.2:-2")
    return {b.id for s in selections for b in s.blocks}


def never_partial(schedule: Interval, steps: int | None) -> str:
    """Why no step of a request of ``steps`` computes part of its tokens, "" where one may."""
    if schedule.mask or not steps or steps - schedule.last > schedule.first:
        return ""
    dense = f"the first {schedule.first}" + (f" and the last {schedule.last}" if schedule.last else "")
    return f"a request of {steps} steps has no other than {dense}: give fewer"


@dataclass(frozen=True)
class _Part:
    """A body on part of the tokens. ``takes``: formal -> (formal of the whole body, place, rank) that is gathered for
    it; ``kept``: its formals of kept keys and values, in the order of the ``sites`` (nodes of the body without tokens)
    that the full body gives back; ``places``: of its results."""

    name: str
    full: str
    shorts: Mapping[str, str]
    takes: Mapping[str, tuple[str, Place, int]]
    kept: tuple[str, ...]
    values: tuple[Any, ...]
    places: tuple[Place | None, ...]
    sites: tuple[fx.Node, ...]


class Choosing:
    """The rewrite. ``counts``: how many of so many tokens a partial step computes, for the first part of a request and
    for each later one: each has a path of its own, and a decision that takes it (``names``); what is kept is kept for
    all. ``chooser``: makes who chooses, from this and the editable value whose tokens are chosen, where it enters the
    run. ``entry``, ``stream``: that value in ``program``, and these tokens there. ``blocks``: ids of those that run on
    part of the tokens. ``attended``: of each full body, by name, its attentions of tokens to each other, with the
    places of queries and keys."""

    def __init__(
        self,
        program: Program,
        ids: set[str],
        counts: Sequence[Callable[[int], int]],
        chooser: Callable[[Choosing, fx.Node], Chooses],
        origin: str = "select_tokens",
    ) -> None:
        self.before, self.origin = program, origin
        self.names = [f"tokens{len(program.decisions) + k}" for k in range(len(counts))]
        self.name = self.names[0]
        self.binding = bind(program)
        self.span = Span(program, self.binding, ids)
        self.functions: dict[str, Function] = {}
        self.regions: dict[str, str] = {}
        self.blocks: list[str] = []
        self.attended: dict[str, list[tuple[fx.Node, Place, Place]]] = {}
        self.e = Editor(program.step, origin)
        self.reuse = Reuse(self.e, self.name, Predictor())
        self._parts: dict[Any, _Part] = {}
        self._full: dict[fx.Node, fx.Node] = {}  # results of calls that were made again
        self._met: dict[tuple[fx.Node, fx.Node | None], fx.Node] = {}
        self._old = {self.e[n]: n for n in program.step.graph.nodes if n.op != "output"}
        self._alive = {d.name: alive(program, d.name) for d in program.decisions}
        self._homes, self._updates = _kept(program, self._alive)
        self._late = _behind(self.span)
        self._holding: set[str] = set()  # decisions that leave out what is kept here
        self._patched: set[str] = set()  # those whose slots a partial step writes in part
        self.entry, self.stream = _entry(program, self.span)
        start, stream = self.entry, self.stream
        value = start.meta["val"]
        place = Place(stream.axes[0], stream.start, int(value.shape[stream.axes[0]]), 0 if stream.axes[0] else -1)
        rows = int(value.shape[0]) if place.batch == 0 else 1
        sets = [TokenSet(stream.tokens, count(stream.tokens), rows) for count in counts]
        self.set = sets[0]
        node = self.e[start]
        self.chooser = chooser(self, node)
        self.shorts = [Short(self.e, s, self.chooser.index(s.count), self._keep) for s in sets]
        for short in self.shorts:
            short.twins[node] = short.take(node, place, value.ndim), place
        self.short = self.shorts[0]  # where tokens are is the same in all

    def program(self, schedule: Interval, later: Sequence[Interval] = ()) -> Program:
        """The rewritten Program; ``Mixes`` where tokens meet outside of attention. ``later``: the steps at which each
        further count is not yet taken."""
        for node in [n for n in self.before.step.graph.nodes if n.op == "call_function"]:
            self._node(node)
        results = [self._whole(self._now(r)) for r in self.before.step.results]
        self.e.set_results(results)
        self.chooser.finish(*self._output(), [(node, chosen) for (node, _), chosen in self._met.items()])
        self.reuse.finish(self.before.step.state_out)
        together(self.e)
        decisions = [
            dataclasses.replace(d, needs=(*d.needs, self.name)) if d.name in self._patched else d
            for d in self.before.decisions
        ]
        needs = tuple(d.name for d in self.before.decisions if d.name in self._holding)
        slots = tuple(self.reuse.groups)
        rule = self.chooser.rule
        decisions.append(
            Decision(self.name, tuple(self.blocks), schedule, Predictor(), slots, "", rule=rule, needs=needs)
        )
        first = tuple(f"{block}.{self.name}" for block in self.blocks)  # these are asked where it is the first's turn
        for name, steps in zip(self.names[1:], later, strict=True):
            decisions.append(Decision(name, first, steps, Predictor("none"), (), ""))
        step = self.e.function()
        body = {str(n.meta["region"]): callee(n) for n in step.graph.nodes if is_call(n)}
        out = replace_functions(self.before, {**self.functions, self.before.entry: step})
        self._measurable(out)
        regions = []
        for r in out.regions:
            regions.append(dataclasses.replace(r, function=body[r.id]) if r.id in body else r)
            parts = [f"{r.id}.{name}" for name in self.names]
            regions += [Region(part, "part", r.id, r.stage, function=body[part]) for part in parts if part in body]
        return prune(
            out.replace(state=(*out.state, *self.reuse.types), decisions=tuple(decisions), regions=tuple(regions))
        )

    def _measurable(self, program: Program) -> None:
        """``Mixes`` where a step would have to know which tokens it computes before it measures."""
        new = dict(zip(program.step.state_out, program.step.results[program.step.n_results :], strict=True))
        for d in self.before.decisions:
            rule = d.rule
            if rule and not rule.lag and set(self.names).intersection(decided_by(program, new[rule.signal])):
                raise Mixes(
                    f"{d.name} decides by signal={rule.kind}, measured where a partial step has computed the chosen "
                    "tokens only: decide it by a schedule, or by modulated, boundary, change or drift"
                )

    # -- the entry -----------------------------------------------------------------------------------------------------

    def _now(self, node: fx.Node) -> fx.Node:
        return self._full.get(self.e[node], self.e[node])

    def _node(self, node: fx.Node) -> None:
        inside = node in self.span
        if is_call(node):
            if not any(self._now(a) in self.short.twins for a in call_args(node)):
                return
            if inside:
                self._call(node)
                return
        elif node.args and isinstance(node.args[0], fx.Node) and is_call(node.args[0]):
            return
        elif node not in self._updates:
            try:
                for short in self.shorts:
                    visit(short, self.e[node])
                return
            except Mixes as reason:
                if inside:
                    raise Mixes(f"between blocks, {reason}") from None
        for operand in node.all_input_nodes:
            old = self._now(operand)
            if old in self.short.twins:
                self.e[node].replace_input_with(old, self._whole(old, self._updates.get(node)))

    def _whole(self, node: fx.Node, slot: fx.Node | None = None) -> fx.Node:
        """What reads ``node`` for all tokens reads, whichever path was taken. ``slot``: of an earlier decision, which
        holds what the node was."""
        old = self._old.get(node)
        if node not in self.short.twins or old not in self._late:
            return node
        key = node, slot or self._homes.get(old)
        if key not in self._met:
            self._met[key] = self._meet(*key)
        return self._met[key]

    def _meet(self, node: fx.Node, held: fx.Node | None) -> fx.Node:
        twins, place = [s.twins[node][0] for s in self.shorts], self.short.twins[node][1]
        at = after(node, *twins)
        value = node if held else dense(self.e, node, at)
        if place is None:
            return self.e.op(select, value, self.path([dense(self.e, t, at) for t in twins], at), self.name, at=at)
        slot = self.e[held] if held else self.reuse.slots(value.meta["val"])[0][0]
        puts = [s.put(slot, t, place, at) for s, t in zip(self.shorts, twins, strict=True)]
        chosen = self.e.op(select, value, self.path(puts, at), self.name, at=at)
        if held:
            self._patched.add(owner(formal(held).ref))
        else:
            self.reuse.update(slot, self.held(chosen, slot, (None, self._old[node])), "always")
        return chosen

    def held(self, new: fx.Node, slot: fx.Node, value: Value) -> fx.Node:
        """``new`` for ``slot``, which stays what it was where an earlier decision leaves out ``value`` (of the Program
        before), of which it is made."""
        for name in [d.name for d in self.before.decisions if value not in self._alive[d.name]]:
            new = self.e.op(select, new, slot, name, at=after(new))
            self._holding.add(name)
        return new

    def path(self, values: Sequence[fx.Node], at: fx.Node) -> fx.Node:
        """Of one value for each count that of the count which the step takes."""
        out = values[-1]
        for value, name in zip(reversed(values[:-1]), reversed(self.names[1:]), strict=True):
            out = self.e.op(select, value, out, name, at=at)
        return out

    def _keep(self, node: fx.Node, place: Place) -> fx.Node:
        raise Mixes("attention lies outside of blocks")

    def _output(self) -> tuple[fx.Node, fx.Node]:
        """The prediction: what computes it in the Program before, and what is read of it now."""
        for old, new in zip(self.before.step.results[: self.before.step.n_results], self.e.results, strict=False):
            if self.binding[old] & Binding.LATENT:
                while old.target is select:
                    old = old.args[0]  # type: ignore[assignment]
                return old, new
        raise Mixes("no output depends on the latent")

    def channels(self, output: fx.Node) -> int:
        """How many channels of the output are the noise, where a variance follows them: those of the latent; else 0."""
        shape = list(output.meta["val"].shape)
        for p in self.before.step.placeholders:
            given = list(p.meta["val"].shape)
            if formal(p).kind == "input" and self.binding[p] & Binding.LATENT and len(given) == len(shape):
                more = [(a, b) for a, b in zip(given, shape, strict=True) if a != b]
                if len(more) == 1 and more[0][1] == 2 * more[0][0]:
                    return int(more[0][0])
        return 0

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        """The call of the full body, which gives back keys and values too, and behind it that of the part."""
        e, block = self.e, str(node.meta["region"])
        old = e[node]
        parts = [self._body(node, block, k) for k in range(len(self.shorts))]
        kept, values, places = parts[0].kept, parts[0].values, parts[0].places
        full = e.call(parts[0].full, call_args(old), [*node.meta["val"], *values], old.next, block)
        for user in list(old.users):
            self._full[user] = full[user.args[1]]  # type: ignore[index]
            self._old[full[user.args[1]]] = self._old[user]  # type: ignore[index]
            user.replace_all_uses_with(full[user.args[1]])  # type: ignore[index]
        slots = {k: self.reuse.slots(v)[0][0] for k, v in zip(kept, values, strict=True)}
        made = [self._part(node, p, k, slots, full[-1].next) for k, p in enumerate(parts)]
        n, at = len(node.meta["val"]), max(m[-1] for m in made).next
        for i, where in enumerate(places):
            for short, results in zip(self.shorts, made, strict=True):
                short.twins[full[i]] = results[i], where
        for i, (ref, site) in enumerate(zip(kept, parts[0].sites, strict=True), n):
            chosen = e.op(select, full[i], self.path([results[i] for results in made], at), self.name, at=at)
            self.reuse.update(slots[ref], self.held(chosen, slots[ref], (node, site)), "always")
        self.blocks.append(block)

    def _part(self, node: fx.Node, part: _Part, k: int, slots: Mapping[str, fx.Node], at: fx.Node) -> list[fx.Node]:
        """The call of ``part`` for count ``k``; its results."""
        body, old, short = self.before.functions[callee(node)], self.e[node], self.shorts[k]
        given = {formal(p).ref: a for p, a in zip(body.placeholders, call_args(old), strict=True)}
        args = []
        for p in self.functions[part.name].placeholders:
            ref = formal(p).ref
            if ref in part.takes:
                name, place, rank = part.takes[ref]
                args.append(short.take(given[name], place, rank))
            elif ref in part.shorts:
                args.append(short.twin(given[part.shorts[ref]]))
            elif ref == _INDEX:
                args.append(short.index)
            else:
                args.append(slots[ref] if ref in slots else short.twin(given[ref]))
        values = [r.meta["val"] for r in self.functions[part.name].results]
        return self.e.call(part.name, args, values, at, f"{node.meta['region']}.{self.names[k]}")

    def _body(self, node: fx.Node, block: str, k: int) -> _Part:
        actual = [self._now(a) for a in call_args(node)]
        twins = [self.shorts[k].twins.get(a, (a, None)) for a in actual]
        kinds = [(i, p, repr(TensorType.of(t.meta["val"]))) for i, (t, p) in enumerate(twins) if p is not None]
        key = callee(node), tuple(kinds), k
        if key not in self._parts:
            try:
                self._parts[key] = self._made(callee(node), twins, k)
            except Mixes as reason:
                raise Mixes(f"{block}: {reason}") from None
        return self._parts[key]

    def _made(self, name: str, twins: list[tuple[fx.Node, Place | None]], k: int) -> _Part:
        body, set_, short = self.before.functions[name], self.shorts[k].set, f"{name}_{self.names[k]}_part"
        number = sum(p.name.startswith(short) for p in self._parts.values()) or ""
        takes: dict[str, tuple[str, Place, int]] = {}
        kept: dict[str, fx.Node] = {}
        shorts: dict[str, str] = {}
        with clone_body(body, f"{short}{number}", self.origin) as e:

            def new(ref: str, value: Any) -> fx.Node:
                return e.placeholder(ref, Formal("formal", ref), value)

            def keep(node: fx.Node, place: Place) -> fx.Node:
                ref = f"kept{len(kept)}"
                kept[ref] = node
                with e.mode:
                    return new(ref, dense_type(node.meta["val"]))

            def formal_(node: fx.Node, place: Place, rank: int) -> fx.Node | None:
                if node.op != "placeholder":
                    return None
                ref = f"{formal(node).ref}_part"
                if ref in takes:
                    return None  # taken in two ways: once gathered outside, once here
                takes[ref] = (formal(node).ref, place, rank)
                return new(ref, _taken_type(e, node.meta["val"], place, rank, set_))

            with e.mode:
                index = new(_INDEX, torch.empty((set_.rows, set_.count), dtype=torch.int64))
            s = Short(e, set_, index, keep, formal_)
            for p, (twin, place) in zip(body.placeholders, twins, strict=True):
                if place is not None:
                    ref = f"{formal(p).ref}_part"
                    shorts[ref] = formal(p).ref
                    s.twins[e[p]] = new(ref, twin.meta["val"]), place
            for node in [n for n in body.graph.nodes if n.op == "call_function"]:
                visit(s, e[node])
            places = tuple(s.place(e[r]) for r in body.results)
            e.set_results([*(s.twin(e[r]) for r in body.results), *(m for m, _ in s.merged.values())])
            back = {e[n]: n for n in body.graph.nodes if n.op != "output"}
            sites = [back[n] for n in s.merged]
            attentions = [n for n in body.graph.nodes if is_attention(n)]
            seen = [(n, s.place(e[n.args[0]]), s.place(e[n.args[1]])) for n in attentions]
            e.drop_dead()
            together(e)
        part = e.function()
        self.functions[part.name] = part
        with clone_body(body, f"{name}_{self.name}{number}", self.origin) as e:
            e.set_results([*e.results, *(dense(e, e[node], after(e[node])) for node in sites)])
            attended = [(e[n], query, key) for n, query, key in seen if query is not None and key is not None]
        full = e.function()
        self.functions[full.name] = full
        self.attended[full.name] = attended
        values = tuple(r.meta["val"] for r in full.results[len(body.results) :])
        return _Part(part.name, full.name, shorts, takes, tuple(kept), values, places, tuple(sites))


_INDEX = "positions"


def _taken_type(e: Editor, value: Any, place: Place, rank: int, set_: TokenSet) -> Any:
    shape = [int(n) for n in value.shape]
    if set_.rows > 1:
        shape = [1] * (rank - len(shape)) + shape
        shape[place.batch] = set_.rows
    shape[place.dim - rank + len(shape)] = set_.short(place.size)
    with e.mode:
        return torch.empty(shape, dtype=value.dtype, device=value.device)


def _entry(program: Program, span: Span) -> tuple[fx.Node, Stream]:
    """The value whose tokens are chosen, where it enters the run, and its stream there."""
    first = span.calls[0]
    stream = stream_of(program, str(first.meta["region"]))
    if len(stream.axes) != 1:
        raise Mixes(
            f"the tokens of {first.meta['region']} lie in {len(stream.axes)} dimensions of its stream, not in one"
        )
    body = program.functions[callee(first)]
    at = next(i for i, p in enumerate(body.placeholders) if formal(p).ref == stream.formal)
    return call_args(first)[at], stream


def stream_of(program: Program, block: str) -> Stream:
    """The stream of a block whose tokens are chosen: the latent's."""
    streams = program.region(block).streams
    known = [s for s in streams if s.made_of == "latent"] or [s for s in streams if s.made_of == ""]
    if not known:
        raise Mixes(f"{block} has no stream of the latent whose tokens could be chosen")
    return max(known, key=lambda s: s.tokens)


def _kept(program: Program, alive: Mapping[str, set[Value]]) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
    """What the slots of earlier decisions hold: value -> the slot in which it is found after each step that computes
    it; and each node that updates a slot on computed steps only -> that slot."""
    slots = {formal(p).ref: p for p in program.step.placeholders if formal(p).kind == "state"}
    homes: dict[fx.Node, fx.Node] = {}
    updates: dict[fx.Node, fx.Node] = {}
    for name, new in zip(program.step.state_out, program.step.results[program.step.n_results :], strict=True):
        slot = slots.get(name)
        if slot is None:
            continue
        value = new
        if new.target is select and new.args[1] is slot:
            updates[new] = slot
            value = new.args[0]  # type: ignore[assignment]
            if (None, value) in alive[str(new.args[2])]:
                continue  # it is computed on other steps too
        homes.setdefault(value, slot)
    return homes, updates


def _behind(span: Span) -> set[fx.Node]:
    """What the blocks of ``span`` are read for; all else is computed for all tokens in any case."""
    found: set[fx.Node] = set()
    todo = list(span.calls)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.users
    return found


class Chooses(Protocol):
    """Who chooses: by what steps before left in state slots of its own. ``rule``: by which the host decides whether a
    step that its schedule leaves open is partial, None where all of them are."""

    rule: Rule | None

    def index(self, count: int) -> fx.Node:
        """The positions of ``count`` tokens in each row, in their order, int64 (rows, count)."""
        ...

    def finish(self, old: fx.Node, output: fx.Node, met: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        """Give the slots their new content, once both paths stand.

        old: what computes the model's output in the Program before. output: what does now. met: nodes of the whole
        path, each with what is read from there on, whichever path was taken.
        """
        ...
