"""Attention in every spelling becomes one operator.

Fused calls, a softmax between two products (scaled before or after, masked by numbers or by truth, cast to float32,
batched in any layout) and linear attention with its divisor are written as ``ditopt::attention`` and
``ditopt::linear_attention``: queries, keys and values as (*batch, tokens, channels), one mask, one scale. A pass that
replaces attention then has one thing to look for. Exact: an operator carries how the model wrote it, and computes that;
lowering writes it out again, operator by operator (ir/opening.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from ditopt.ir import example
from ditopt.ir.attention import Found, Refused, put
from ditopt.ir.binding import Binding, bind
from ditopt.ir.cost import is_attention
from ditopt.ir.edit import Editor, prune, replace_functions
from ditopt.ir.linear import find_linear
from ditopt.ir.mixing import VARIES, mixes
from ditopt.ir.program import Function, Program
from ditopt.ir.reach import Reach
from ditopt.ir.residual import find_branches
from ditopt.ir.softmax import find_softmax, is_recognized
from ditopt.pipeline import Context, Outcome, Pass


@dataclass(frozen=True)
class RecognizeAttention(Pass):
    """Write attention, however the model spells it, as one operator."""

    contract = "exact"
    requires = ("canonicalize",)

    def run(self, program: Program, context: Context) -> Outcome:
        binding = bind(program)
        functions, count, refused = {}, 0, []
        for name, function in program.functions.items():
            new, made, why = _rewritten(function, binding, self.name, formals=name == program.entry)
            count += made
            refused += [f"attention in {name} stays as it is: {w}" for w in why]
            if made:
                functions[name] = new
        if count:
            return Outcome(prune(replace_functions(program, functions)), count, tuple(refused))
        done = sum(is_recognized(n) for f in program.functions.values() for n in f.graph.nodes)
        nothing = f"all attention is written as operators already ({done})" if done else "nothing attends"
        return Outcome(program, 0, tuple(refused) or (nothing,))

    @classmethod
    def example_applies(cls) -> Program:
        return example.tiny_dit()

    @classmethod
    def example_refuses(cls) -> Program:
        return example.tiny_dit(attention=False)


def _rewritten(
    function: Function, binding: Mapping[fx.Node, Binding], origin: str, formals: bool
) -> tuple[Function, int, list[str]]:
    count, refused = 0, []
    now: dict[fx.Node, fx.Node] = {}
    seen: set[fx.Node] = set()
    with Editor(function, origin) as e:
        for _, found in (*find_softmax(function), *find_linear(function)):
            try:
                if isinstance(found, Refused):
                    seen.update(found.nodes)
                    raise found
                seen.update(found.inside)
                if _attends(found, binding):
                    put(e, found, now)
                    count += 1
            except Refused as refusal:
                refused.append(str(refusal))
        e.drop_dead(formals)
    refused += _unknown(function, seen, binding)
    return e.function() if count else function, count, refused


def _unknown(function: Function, seen: set[fx.Node], binding: Mapping[fx.Node, Binding]) -> list[str]:
    """A sentence for each kind of operator that mixes tokens and is no part of any attention that was looked at."""
    left = [n for n in function.graph.nodes if n in binding and n not in seen and not is_attention(n)]
    left = [n for n in left if n.op == "call_function" and mixes(n, binding)]
    if not left:
        return []
    reach = Reach(function)
    mixing = 0
    for branch in find_branches(function, binding, reach):
        mixing |= branch.attention
    kinds = Counter(str(n.target) for n in left if mixing >> reach.place[n] & 1)
    return [f"{n} x {kind} with no softmax over the keys and no divisor" for kind, n in kinds.items()]


def _attends(found: Found, binding: Mapping[fx.Node, Binding]) -> bool:
    """Whether keys and values are activations: a table of weights that a softmax picks from is no stream. In memo
    functions, which have no binding, everything is."""
    return found.plain or all(binding.get(x.node, VARIES) & VARIES for x in (found.key, found.value))
