"""Move out of the loop what does not depend on the latent.

What depends on the weights alone is computed once, what depends on the prompt or the shape once a request. What depends
on the timestep becomes a table with one row a step: one that every request shares, for what depends on nothing else,
and one for what depends on the prompt too. All are memos (``Program.memos``): functions whose values the step reads and
does not recompute. What is computed in the same way of the same values, as each block's view of one table of positions
is, is one value. Exact, and bit-equal in eager: a memo runs the same operators on the same rows as the step did, so
filling it changes no rounding (a table built for all timesteps in one matrix product would).

In DiTs with adaptive layer norm a third of the weights is used by such values only, and leaves the loop with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ditopt.ir import example
from ditopt.ir.binding import Binding, bind
from ditopt.ir.common import merge_equal
from ditopt.ir.cost import is_attention, is_matmul
from ditopt.ir.edit import Editor, prune
from ditopt.ir.keys import free_keys
from ditopt.ir.outline import flatten, outline
from ditopt.ir.program import Formal, Function, Memo, Program, formal
from ditopt.ir.structure import trace
from ditopt.pipeline import Context, Outcome, Pass

CONSTANT, REQUEST, TIMESTEP, SCHEDULE = MEMOS = "constant", "request", "timestep", "schedule"


@dataclass(frozen=True)
class HoistInvariants(Pass):
    """Compute once a request what depends on the prompt, once a timestep what depends on the timestep.

    ``need``: "keys" refuses a model in which no attention of the latent reads keys that depend on the prompt alone.
    """

    need: Literal["anything", "keys"] = "anything"

    contract = "exact"
    requires = ("canonicalize",)
    after = ("outline_blocks",)

    def run(self, program: Program, context: Context) -> Outcome:
        if any(m.name in MEMOS for m in program.memos):
            return Outcome(program, 0, ("what does not depend on the latent has left the loop already",))
        if program.decisions:
            return Outcome(program, 0, ("the program holds caches already; hoist before caching",))
        flat = flatten(program)
        binding = bind(flat)
        nodes = _free(flat, binding)
        if not any(is_matmul(n) or is_attention(n) for n in nodes):
            return Outcome(program, 0, ("no matrix product is free of the latent: hoisting would save nothing",))
        seen, free = free_keys(flat.step, binding)
        if self.need == "keys" and not free:
            return Outcome(program, 0, (_bound(seen, [i.name for i in flat.inputs if i.role == "latent"]),))
        found = len(nodes)
        flat, merged = merge_equal(flat, nodes, self.name)
        binding = bind(flat)
        nodes = _free(flat, binding)
        inputs = _inputs_of(flat.step)
        times = {i.name for i in flat.inputs if i.role == "timestep"}
        groups: dict[str, list[fx.Node]] = {name: [] for name in MEMOS}
        for n in nodes:
            timed = bool(binding[n] & Binding.TIMESTEP)
            alone = inputs[n] <= times if timed else not inputs[n]
            groups[(TIMESTEP if alone else SCHEDULE) if timed else (CONSTANT if alone else REQUEST)].append(n)
        moved, everything = set(nodes), flat.params
        memos: list[Memo] = []
        functions = dict(flat.functions)
        known: dict[fx.Node, str] = {}
        for name, part in groups.items():
            inside = set(part)
            values = [
                n for n in part if isinstance(n.meta["val"], torch.Tensor) and any(u not in inside for u in n.users)
            ]
            if not values:
                continue
            function = _memo_function(f"memo_{name}", values, known)
            functions[function.name] = function
            known |= {n: f"{name}.{k}" for k, n in enumerate(values)}
            keys = set().union(*(inputs[n] for n in values))
            keys |= {k for m in memos for k in m.keys if _reads(function, m)}  # what it reads changes with these
            ordered = tuple(i.name for i in flat.inputs if i.name in keys)
            lifetime = "schedule" if name in (TIMESTEP, SCHEDULE) else "request"
            memos.append(Memo(name, function.name, ordered, tuple(known[n] for n in values), lifetime))  # type: ignore[arg-type]
        with Editor(flat.step, self.name) as e:
            for node, value in known.items():
                if any(u not in moved for u in node.users):
                    read = e.placeholder(value.replace(".", "_"), Formal("memo", value), node.meta["val"])
                    e.replace(e[node], read, keep=[e[u] for u in node.users if u in moved])
            e.drop_dead()
        functions[flat.entry] = e.function()
        out = prune(flat.replace(functions=functions, memos=(*flat.memos, *memos)))
        if program.blocks():
            out = outline(out, self.name)
        kept = (f"{free} of {seen} attentions read keys that are computed once a request",) if free else ()
        equal = (f"{merged} of {found} operators compute what others compute, and are one with them",) if merged else ()
        return Outcome(out, found, notes=(_share(out, everything), *equal, *kept))

    @classmethod
    def example_applies(cls) -> Program:
        return example.tiny_dit()

    @classmethod
    def example_refuses(cls) -> Program:
        return example.tiny_dit(attention=False)


def _bound(seen: int, latents: Sequence[str]) -> str:
    if not seen:
        return "no attention sees the latent, so there are no keys to keep for it"
    other = f"; if one of {', '.join(latents)} stays the same within a request, say so with roles={{...: 'prompt'}}"
    return (
        f"in each of the {seen} attentions all keys see the latent or the timestep: the tokens of a condition attend "
        "to the latent's, share an attention with them, or are modulated by the time of the step"
        f"{other if len(latents) > 1 else ''}; lossless moves out of the loop what else it can"
    )


def _free(program: Program, binding: Mapping[fx.Node, Binding]) -> list[fx.Node]:
    """The operators of a flat program that do not depend on the latent."""
    return [n for n in trace(program.step) if not binding[n] & Binding.LATENT and not _random(n)]


def _random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _inputs_of(function: Function) -> dict[fx.Node, frozenset[str]]:
    """For each node, the names of the model's inputs that it is computed from."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node in function.graph.nodes:
        if node.op == "placeholder":
            found[node] = frozenset({formal(node).ref} if formal(node).kind == "input" else ())
        else:
            found[node] = frozenset().union(*(found[a] for a in node.all_input_nodes))
    return found


def _memo_function(name: str, values: Sequence[fx.Node], known: Mapping[fx.Node, str]) -> Function:
    """A function that returns ``values``, reading earlier memo values where it can."""
    graph = fx.Graph()
    local: dict[fx.Node, fx.Node] = {}
    needed: set[fx.Node] = set()
    todo = list(values)
    while todo:
        node = todo.pop()
        if node not in needed and node not in known:
            needed.add(node)
            todo += node.all_input_nodes
    order = [n for n in next(iter(values)).graph.nodes if n in needed]
    reads = [a for n in order for a in n.all_input_nodes if a in known]
    for node in [n for n in order if n.op == "placeholder"]:
        local[node] = graph.node_copy(node)
    for node in dict.fromkeys(reads):
        local[node] = graph.placeholder(known[node].replace(".", "_"))
        local[node].meta = {**node.meta, "formal": Formal("memo", known[node]), "region": ""}
    for node in order:
        if node.op != "placeholder":
            local[node] = graph.node_copy(node, local.__getitem__)
            local[node].meta["region"] = ""
    graph.output(tuple(local[v] for v in values))
    return Function(name, graph)


def _reads(function: Function, memo: Memo) -> bool:
    return any(formal(p).kind == "memo" and formal(p).ref in memo.values for p in function.placeholders)


def _share(program: Program, before: Mapping[str, torch.Tensor]) -> str:
    used = {formal(p).ref for p in program.step.placeholders if formal(p).kind == "param"}
    total = sum(t.numel() * t.element_size() for t in before.values())
    left = sum(t.numel() * t.element_size() for k, t in program.params.items() if k in used)
    return f"{1 - left / max(total, 1):.1%} of the weight bytes are no longer read inside the loop"
