"""Writes a QuantScheme into a Program: explicit quantize and dequantize operators around linear layers.

A layer ``x @ W^T + b`` becomes ``dequantize(quantize(x)) @ dequantize(quantize(W))^T + b``. What is made of W stands in
a memo that depends on weights alone, so that it is computed once, and again when a weight changed. Blocks that share a
body go on sharing it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ditopt.ir.binding import Binding, bind
from ditopt.ir.cost import flops
from ditopt.ir.derived import Derived, Reads
from ditopt.ir.edit import Editor, prune
from ditopt.ir.layers import Layer, latent_layer
from ditopt.ir.program import Formal, Function, Program, call_args, callee, formal, is_call
from ditopt.ir.scheme import QuantScheme, Smooth
from ditopt.ir.smoothing import Group, Place, Smoothing, divided
from ditopt.ops import dequantize, int4_linear, int8_linear, low_rank, packed_linear, quantize

aten = torch.ops.aten


@dataclass
class Quantized:
    """What was done: layers quantized, counted once a block; sentences on what was not; FLOPs a step of the layers that
    are quantized, and of all that multiply a weight inside blocks; bytes of their weights before and after; inputs of
    layers that were smoothed, and of how many, counted once a block."""

    program: Program
    layers: int = 0
    refused: list[str] = field(default_factory=list)
    flops: int = 0
    of: int = 0
    before: int = 0
    after: int = 0
    smoothed: int = 0
    inputs: int = 0


Known = dict[tuple[fx.Node, bool], list[fx.Node]]
"""A weight, and whether it is turned -> what is kept of it."""


def quantized(
    program: Program,
    scheme: QuantScheme,
    keep: Collection[str],
    origin: str,
    maxima: Mapping[str, Tensor] | None = None,
) -> Quantized:
    """``program`` with the layers that ``scheme`` is for quantized, except in the regions ``keep``. ``maxima``: of the
    activations (ir/smoothing.py), for a scheme that smooths by them."""
    out = Quantized(program)
    binding = bind(program)
    derived = Derived(program, "weights", origin)
    groups = []
    for name, calls in _alike(program, keep):
        body = program.functions[callee(calls[0])]
        found = list(_layers(body, binding, scheme, _kept(str(calls[0].meta["region"]), keep), out, len(calls)))
        if found:
            groups.append((name, calls, found))
    smoothing = _smoothing(program, binding, groups, scheme, maxima or {}, out)
    bodies: dict[str, Function] = {}
    known: Known = {}
    with Editor(program.step, origin) as e:
        reads = Reads(e)
        for name, calls, found in groups:
            made = _Body(program.functions[callee(calls[0])], name, scheme, found, smoothing, origin)
            for call in calls:
                parts = made.derive(derived, call, known)
                out.layers += len(found)
                out.flops += sum(flops(x.node) for x in found)
                actuals = [reads.of(derived.keep(p), p.meta["val"]) for group in parts for p in group]
                made.recall(e, e[call], parts, actuals, made.smoothed(derived, e, reads, call))
            bodies[name] = made.function()
        e.drop_dead()
    out.before = sum(weight.meta["val"].nbytes for weight, _ in known)
    out.after = sum(p.meta["val"].nbytes for parts in known.values() for p in parts)
    if not out.layers:
        return out
    step = e.function()
    called = {str(n.meta["region"]): callee(n) for n in step.graph.nodes if is_call(n)}
    regions = tuple(dataclasses.replace(r, function=called[r.id]) if r.id in called else r for r in program.regions)
    changed = program.replace(functions={**program.functions, **bodies, program.entry: step}, regions=regions)
    if smoothing is not None:
        changed = smoothing.added(changed)
    out.program = prune(derived.added(changed))
    return out


def _smoothing(
    program: Program,
    binding: Mapping[fx.Node, Binding],
    groups: Sequence[Group],
    scheme: QuantScheme,
    maxima: Mapping[str, Tensor],
    out: Quantized,
) -> Smoothing | None:
    """How inputs of the layers of ``groups`` are smoothed; None for a scheme that does not."""
    smooth = next((t for t in scheme.transforms if isinstance(t, Smooth)), None)
    if smooth is None:
        return None
    made = Smoothing(program, binding, groups, smooth.alpha, maxima)
    out.smoothed, out.inputs = made.done, made.total
    out.refused += made.refused
    return made


def _alike(program: Program, keep: Collection[str]) -> list[tuple[str, list[fx.Node]]]:
    """The calls that can go on sharing a body, with its name: those of one body in which the same is kept."""
    groups: dict[tuple[str, frozenset[str]], list[fx.Node]] = {}
    for call in program.calls():
        groups.setdefault((callee(call), _kept(str(call.meta["region"]), keep)), []).append(call)
    alone = Counter(name for name, _ in groups)
    taken = set(program.functions)
    out = []
    for (name, _), calls in groups.items():
        # where some calls keep the body as it is, the others cannot have its name
        new = name if alone[name] == 1 else next(n for k in itertools.count(2) if (n := f"{name}_{k}") not in taken)
        taken.add(new)
        out.append((new, calls))
    return out


def _kept(region: str, keep: Collection[str]) -> frozenset[str]:
    """The roles of a block that stay as they are; "*" for all of it."""
    if region in keep or "model" in keep:
        return frozenset(("*",))
    return frozenset(k.removeprefix(f"{region}.") for k in keep if k.startswith(f"{region}."))


def _layers(
    body: Function,
    binding: Mapping[fx.Node, Binding],
    scheme: QuantScheme,
    kept: Collection[str],
    out: Quantized,
    calls: int,
) -> Iterator[Layer]:
    """The layers of a body that ``scheme`` is for; what it cannot do goes to ``out.refused``."""
    why: Counter[str] = Counter()
    for node in body.graph.nodes:
        found = latent_layer(node, binding)
        if found is None:
            continue
        out.of += calls * flops(node)
        module = str(node.meta["region"]).removeprefix(".")  # such as attn.joint
        role = module.partition(".")[0]
        if role not in scheme.policy.roles or {"*", role, module} & {*kept}:
            continue
        reason = _why_not(found, scheme)
        if reason:
            why[reason] += 1
        else:
            yield found
    out.refused += [
        f"{n} linear layer{'s' if n > 1 else ''} of {body.name} stay: {reason}" for reason, n in why.items()
    ]


def _why_not(found: Layer, scheme: QuantScheme) -> str:
    value = found.x.meta["val"]
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"their input is {value.dtype}; expected float32, float16 or bfloat16"
    if found.weight.meta["val"].dtype is not value.dtype:
        return f"their input is {value.dtype} and their weight {found.weight.meta['val'].dtype}"
    for f in (scheme.weight, scheme.activation):
        if f is not None and f.group and found.width % f.group:
            return f"groups of {f.group} do not divide their {found.width} inputs"
    if scheme.packed and found.width % 2:
        return f"two values go in a byte, and they have {found.width} inputs"
    if scheme.branch is not None and scheme.branch.rank > min(found.weight.meta["val"].shape):
        return f"rank {scheme.branch.rank} is more than a weight {list(found.weight.meta['val'].shape)} has"
    return ""


class _Body:
    """A block body being quantized, and the calls of it."""

    def __init__(
        self,
        body: Function,
        name: str,
        scheme: QuantScheme,
        layers: Sequence[Layer],
        smoothing: Smoothing | None,
        origin: str,
    ) -> None:
        self.body, self.scheme = body, scheme
        self.layers, self.smoothing = layers, smoothing
        turned = {x.weight: x.turned for x in layers}
        self.weights = list(turned)
        self._turned = [turned[w] for w in self.weights]
        self.e = Editor(Function(name, body.graph), origin)
        self._formals: list[list[fx.Node]] = []
        self._left: list[int] = []
        self._places = smoothing.places(name) if smoothing is not None else {}

    def _readers(self, x: fx.Node) -> list[Layer]:
        return [f for f in self.layers if f.x is x]

    def derive(self, derived: Derived, call: fx.Node, known: Known) -> list[list[fx.Node]]:
        """For each weight what the loop reads of it, as nodes of the memo. A weight that is ``known`` (a block may run
        on all tokens and on part of them) is quantized once."""
        actual = dict(zip(self.body.placeholders, call_args(call), strict=True))
        inputs = {f.weight: f.x for f in self.layers}
        out = []
        for weight, turned in zip(self.weights, self._turned, strict=True):
            key = derived.read(weight, actual), turned
            if key not in known:
                known[key] = self._parts(derived, *key, self._factors(derived, call, inputs[weight]))
            out.append(known[key])
        return out

    def _factors(self, derived: Derived, call: fx.Node, x: fx.Node) -> fx.Node | None:
        """What ``x`` is divided by, and the weights of its readers multiplied with."""
        if self.smoothing is None or x not in self._places:
            return None
        return self.smoothing.factors(derived, call, self._readers(x))

    def smoothed(self, derived: Derived, e: Editor, reads: Reads, call: fx.Node) -> list[fx.Node]:
        """What ``call`` hands to the body for the places that are divided, in their order."""
        out = []
        for x, found in self._places.items():
            lam = self._factors(derived, call, x)
            assert self.smoothing is not None
            assert lam is not None
            out += [self.smoothing.given(derived, e, reads, call, place, lam) for place in found]
        return out

    def _parts(self, derived: Derived, weight: fx.Node, turned: bool, lam: fx.Node | None) -> list[fx.Node]:
        e, scheme = derived.e, self.scheme
        if turned:
            weight = e.op(aten.t.default, weight)
        if lam is not None:
            dtype = weight.meta["val"].dtype
            weight = e.op(aten.mul.Tensor, weight, lam)
            if scheme.branch is not None and weight.meta["val"].dtype is not dtype:
                weight = e.op(aten._to_copy.default, weight, dtype=dtype)  # that of the branch
        thin: list[fx.Node] = []
        if scheme.branch is not None:
            branch = scheme.branch
            split = e.op(low_rank, weight, branch.rank, scheme.weight.bits, scheme.weight.group, branch.rounds)
            down, up, weight = (e.op(operator.getitem, split, k) for k in range(3))
            thin = [down, up]
        made = e.op(quantize, weight, scheme.weight.bits, scheme.weight.group, scheme.packed)
        return [*(e.op(operator.getitem, made, k) for k in range(2)), *thin]

    def recall(
        self,
        e: Editor,
        call: fx.Node,
        parts: Sequence[Sequence[fx.Node]],
        actuals: Sequence[fx.Node],
        smoothed: Sequence[fx.Node],
    ) -> None:
        """``call`` calls the quantized body, with ``actuals`` for ``parts`` and ``smoothed`` for what is divided."""
        if not self._formals:
            self._rewrite(parts, smoothed)
        args = [*(a for i, a in enumerate(call_args(call)) if i in self._left), *actuals, *smoothed]
        values: Any = call.meta["val"]
        results = e.call(self.e._name, args, values, call, str(call.meta["region"]))
        for user in list(call.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]

    def _rewrite(self, parts: Sequence[Sequence[fx.Node]], smoothed: Sequence[fx.Node]) -> None:
        """The layers of the body, with formals for ``parts`` and ``smoothed``."""
        e = self.e
        names = ("values", "scale", "down", "up")
        for k, group in enumerate(parts):
            made = [self._formal(f"w{k}_{n}", p.meta["val"]) for n, p in zip(names, group, strict=False)]
            self._formals.append(made)
        divided_places = [place for found in self._places.values() for place in found]
        for k, (place, actual) in enumerate(zip(divided_places, smoothed, strict=True)):
            self._divide(place, self._formal(f"smooth{k}", actual.meta["val"]))
        inputs: dict[fx.Node, fx.Node] = {}
        for found in self.layers:
            new = self._layer(found, self._formals[self.weights.index(found.weight)], inputs)
            e.replace(e[found.node], new)
        before = [formal(p).ref for p in self.body.placeholders]
        e.drop_dead()
        after = {formal(p).ref for p in e.graph.nodes if p.op == "placeholder"}
        self._left = [i for i, ref in enumerate(before) if ref in after]

    def _formal(self, name: str, value: Any) -> fx.Node:
        return self.e.placeholder(name, Formal("formal", name), value)

    def _divide(self, place: Place, given: fx.Node) -> None:
        """``given`` (``Smoothing.given``) in the body, where ``place`` is."""
        node, operand = self.e[place.node], place.operand
        if operand is not None and operand not in self.body.placeholders:
            op = functools.partial(self.e.op, at=node, region=str(node.meta["region"]))
            given = divided(op, self.e[operand], given)
        place.put(node, given)

    def _layer(self, found: Layer, parts: Sequence[fx.Node], inputs: dict[fx.Node, fx.Node]) -> fx.Node:
        e, scheme = self.e, self.scheme
        at = e[found.node]
        where: dict[str, Any] = {"at": at, "region": str(at.meta["region"])}
        x, dtype = e[found.x], found.x.meta["val"].dtype
        if scheme.activation is not None:
            if x not in inputs:
                made = e.op(quantize, x, scheme.activation.bits, scheme.activation.group, **where)
                both = [e.op(operator.getitem, made, k, **where) for k in range(2)]
                inputs[x] = e.op(dequantize, *both, dtype, **where)
            given = inputs[x]
        else:
            given = x
        weight = e.op(dequantize, *parts[:2], dtype, **where)
        bias = [e[found.bias]] if found.bias is not None else []
        new = e.op(aten.linear.default, given, weight, *bias, **where)
        if scheme.branch is not None:
            thin = e.op(aten.linear.default, x, parts[2], **where)
            new = e.op(aten.add.Tensor, new, e.op(aten.linear.default, thin, parts[3], **where), **where)
        return new

    def function(self) -> Function:
        """The quantized body."""
        return self.e.function()


def quantized_nodes(program: Program) -> Iterator[fx.Node]:
    """The products of the entry and of the bodies that it calls whose weight is small integers, once a call."""
    for node in program.step.graph.nodes:
        inside = program.functions[callee(node)].graph.nodes if is_call(node) else [node]
        yield from (n for n in inside if is_quantized(n))


def is_quantized(node: fx.Node) -> bool:
    """Whether ``node`` multiplies by a weight of small integers."""
    args: Any = node.args
    dequantized = node.target is aten.linear.default and args[1].target is dequantize
    return node.target in (int4_linear, int8_linear, packed_linear) or dequantized
