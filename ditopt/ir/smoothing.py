"""Smoothing: channels of a layer's input divided by factors that the columns of its weight are multiplied with.

Outliers of activations move into the weight (SmoothQuant, arXiv 2211.10438). The division is nowhere in the loop: it is
done to what scales and shifts these channels just before the layer, the affine of a norm or the scale and shift of an
adaptive one. Those are values of the timestep and the prompt, so it is their table that is divided, or the weight of
the norm. Where the input comes from elsewhere (attention, an activation), or something else reads it too, no factor can
disappear, and the layer stays without.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx

from ditopt.errors import RecipeError
from ditopt.ir.binding import Binding, bind
from ditopt.ir.derived import Derived, Reads
from ditopt.ir.edit import Editor, replace_functions
from ditopt.ir.layers import Layer, latent_layer
from ditopt.ir.program import Formal, Function, Memo, Program, call_args, callee, formal
from ditopt.ir.words import CONST

aten = torch.ops.aten

Group = tuple[str, Sequence[fx.Node], Sequence[Layer]]
"""A body by the name that it will have, the calls of it, and the layers in it that are quantized."""

Table = dict[tuple[str, Formal], tuple[str, fx.Node]]
"""Of one memo: a value and the factors it is divided by -> the name of the result, and the factors as a node."""

_NORMS: dict[Any, tuple[int, ...]] = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,)}
"""Norms, and where the weight and the bias of their affine stand."""

_VIEWS = (aten.view.default, aten.reshape.default, aten._to_copy.default, aten.clone.default)

_SHAPES = (
    *_VIEWS,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    operator.getitem,
)


@dataclass(frozen=True)
class Place:
    """``node.args[index]`` scales or shifts channels: divided, it divides the value below. None there is the weight
    that a norm does not have, and stands for ones."""

    node: fx.Node
    index: int

    @property
    def operand(self) -> fx.Node | None:
        """What is divided."""
        args: Any = self.node.args
        return args[self.index] if self.index < len(args) else None

    def put(self, node: fx.Node, value: fx.Node) -> None:
        """``value`` in the place of the operand of ``node``, a copy of this node."""
        args = [*node.args, *[None] * (self.index + 1 - len(node.args))]
        args[self.index] = value
        node.args = tuple(args)


def places(x: fx.Node, readers: Collection[fx.Node], binding: Mapping[fx.Node, Binding]) -> list[Place] | str:
    """What to divide so that ``x``, which ``readers`` are to read divided, is divided along its last axis; or why there
    is nothing."""
    found: list[Place] = []
    why = _push(x, readers, binding, int(x.meta["val"].shape[-1]), found)
    return why or found


def _push(
    node: fx.Node, readers: Collection[fx.Node], binding: Mapping[fx.Node, Binding], width: int, found: list[Place]
) -> str:
    """Push a division of ``node`` up to the operands that do not see the latent; why that does not go, or ""."""
    if not {*node.users} <= {*readers}:
        return "something else reads their input too"

    def up(at: int) -> str:
        return _push(args[at], (node,), binding, width, found)

    def still(at: int) -> bool:
        """Whether an operand holds a number for each channel and does not see the latent."""
        a = args[at]
        return isinstance(a, fx.Node) and not binding[a] & Binding.LATENT and a.meta["val"].shape[-1:] == (width,)

    args: Any = node.args
    target: Any = node.target
    if node.op != "call_function":
        return "their input enters the block as it is"
    if target in _NORMS and list(args[1]) == [width]:
        weight, *bias = _NORMS[target]
        found += [Place(node, weight), *(Place(node, k) for k in bias if len(args) > k and args[k] is not None)]
        return ""
    plain = not node.kwargs or target is aten._to_copy.default
    if target in _VIEWS and plain and args[0].meta["val"].shape[-1] == width:
        return up(0)
    if target is aten.add.Tensor and plain and still(1):
        found.append(Place(node, 1))
        return up(0)
    if target is aten.add.Tensor and plain and still(0):
        found.append(Place(node, 0))
        return up(1)
    if target is aten.addcmul.default and plain and still(0) and (still(1) or still(2)):
        found += [Place(node, 0), Place(node, 1 if still(1) else 2)]
        return ""
    if target is aten.mul.Tensor and (still(0) or still(1)):
        found.append(Place(node, 0 if still(0) else 1))
        return ""
    return f"their input comes from {_maker(node)}, which takes no factor"


def _maker(node: fx.Node) -> str:
    """The operator that made a value, but for views of it."""
    while node.target in _SHAPES:
        node = node.all_input_nodes[0]
    if node.op != "call_function":
        return "outside of the block"
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0].replace("_", " ")


# -- recorded magnitudes -----------------------------------------------------------------------------------------------


def weight_name(weight: fx.Node, actual: Mapping[fx.Node, fx.Node]) -> str:
    """The parameters that a weight in a body is made of. The formals of the body are ``actual`` nodes of the entry."""
    refs, todo = set(), [weight]
    while todo:
        node = todo.pop()
        if node in actual:
            node = actual[node]
        if node.op == "placeholder":
            refs.add(formal(node).ref)
        todo += node.all_input_nodes
    return "+".join(sorted(refs))


def measured(program: Program) -> tuple[Program, tuple[str, ...]]:
    """``program`` that also returns the largest magnitude of each channel, (K,) float32, of every input of the linear
    layers of its blocks, and the names of these results: those of the weights that read the input, between "|"."""
    binding = bind(program)
    names: list[str] = []
    bodies: dict[str, Function] = {}
    e = Editor(program.step, "record")
    more: list[fx.Node] = []
    for call in program.calls():
        body = program.functions[callee(call)]
        found = [f for n in body.graph.nodes if (f := latent_layer(n, binding)) is not None]
        inputs = by_input(found)
        if not inputs:
            continue
        if body.name not in bodies:
            bodies[body.name] = _with_maxima(body, inputs)
        results = bodies[body.name].results
        made = e.call(
            body.name, [e[a] for a in call_args(call)], [r.meta["val"] for r in results], e[call], call.meta["region"]
        )
        for user in list(e[call].users):
            user.replace_all_uses_with(made[user.args[1]])  # type: ignore[index]
        more += made[body.n_results :]
        actual = dict(zip(body.placeholders, call_args(call), strict=True))
        names += ["|".join(dict.fromkeys(weight_name(f.weight, actual) for f in fs)) for fs in inputs.values()]
    count = program.step.n_results
    e.set_results([*e.results[:count], *more, *e.results[count:]])
    e.drop_dead(formals=False)
    changed = replace_functions(program, {**bodies, program.entry: e.function()})
    return changed, tuple(names)


def _with_maxima(body: Function, inputs: Iterable[fx.Node]) -> Function:
    with Editor(body, "record") as e:
        made = []
        for x in inputs:
            wide = _as(e.op, e.op(aten.abs.default, e[x]), torch.float32)
            made.append(e.op(aten.amax.default, wide, list(range(wide.meta["val"].ndim - 1))))
        e.set_results([*e.results, *made])
    return e.function()


def read_maxima(path: Path) -> dict[str, Tensor]:
    """The largest magnitude of each input of layers, by the name of their weight: float32 (K,)."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"the maxima {path} cannot be read ({error}); give a .safetensors file") from error
    wrong = [k for k, v in found.items() if v.ndim != 1 or not v.is_floating_point() or not bool((v >= 0).all())]
    if wrong or not found:
        told = f"{wrong[0]}{list(found[wrong[0]].shape)}" if wrong else "nothing"
        raise RecipeError(
            f"the maxima {path} hold {told}; expected one row of magnitudes for each weight, as smoothquant writes them"
        )
    return {k: v.float().contiguous() for k, v in found.items()}


def by_input(layers: Sequence[Layer]) -> dict[fx.Node, list[Layer]]:
    """Layers by what they read."""
    out: dict[fx.Node, list[Layer]] = {}
    for found in layers:
        out.setdefault(found.x, []).append(found)
    return out


# -- the plan ----------------------------------------------------------------------------------------------------------


class Smoothing:
    """Where the inputs of the layers of ``groups`` can be divided. ``alpha``: factors are activation^alpha /
    weight^(1 - alpha), of the largest magnitudes of each channel; ``maxima``: those of activations, which 0 does not
    ask for. ``refused``: a sentence on each kind of input that stays."""

    def __init__(
        self,
        program: Program,
        binding: Mapping[fx.Node, Binding],
        groups: Sequence[Group],
        alpha: float,
        maxima: Mapping[str, Tensor],
    ) -> None:
        self._program, self._binding, self._alpha, self._maxima = program, binding, alpha, maxima
        self.params: dict[str, Tensor] = {}
        self._factors: dict[tuple[fx.Node, ...], fx.Node] = {}
        self._tables: dict[str, Table] = {}
        self.total = self.done = 0
        self.refused: list[str] = []
        self._places = self._plan(groups)

    def places(self, name: str) -> dict[fx.Node, list[Place]]:
        """By input of layers of the body ``name``, what to divide."""
        return self._places.get(name, {})

    def _plan(self, groups: Sequence[Group]) -> dict[str, dict[fx.Node, list[Place]]]:
        found: dict[tuple[str, fx.Node], list[Place] | str] = {}
        weights: dict[tuple[str, fx.Node], set[frozenset[str]]] = {}
        for name, calls, layers in groups:
            for x, readers in by_input(layers).items():
                key = name, x
                weights[key] = {frozenset(self._names(call, readers)) for call in calls}
                found[key] = self._missing(key, weights[key]) or places(x, [f.node for f in readers], self._binding)
        # a weight that two calls read is one set of integers: what one cannot do, the other does not do either
        users: dict[str, set[tuple[str, fx.Node]]] = {}
        for key, sets in weights.items():
            for weight in frozenset[str]().union(*sets):
                users.setdefault(weight, set()).add(key)
        settled = False
        while not settled:
            settled = True
            for shared in users.values():
                wrong = any(isinstance(found[k], str) for k in shared) or self._differ([weights[k] for k in shared])
                for key in shared if wrong else ():
                    if not isinstance(found[key], str):
                        found[key] = "their weight is read elsewhere, where no factor can be"
                        settled = False
        why = Counter[tuple[str, str]]()
        calls_of = {name: len(calls) for name, calls, _ in groups}
        out: dict[str, dict[fx.Node, list[Place]]] = {}
        for (name, x), what in found.items():
            self.total += calls_of[name]
            if isinstance(what, str):
                why[name, what] += 1
            else:
                self.done += calls_of[name]
                out.setdefault(name, {})[x] = what
        self.refused = [
            f"{n} input{'s' if n > 1 else ''} of layers of {name} stay{'s' if n == 1 else ''} without smoothing: {text}"
            for (name, text), n in why.items()
        ]
        return out

    @staticmethod
    def _differ(sets: Sequence[set[frozenset[str]]]) -> bool:
        """Whether inputs that share a weight do not share all of them, call by call."""
        every = set[frozenset[str]]().union(*sets)
        return any(a != b and a & b for a in every for b in every)

    def _names(self, call: fx.Node, layers: Sequence[Layer]) -> list[str]:
        actual = self._actual(call)
        return [weight_name(f.weight, actual) for f in layers]

    def _actual(self, call: fx.Node) -> dict[fx.Node, fx.Node]:
        body = self._program.functions[callee(call)]
        return dict(zip(body.placeholders, call_args(call), strict=True))

    def _missing(self, key: tuple[str, fx.Node], sets: set[frozenset[str]]) -> str:
        if not self._alpha:
            return ""
        width = int(key[1].meta["val"].shape[-1])
        for name in frozenset[str]().union(*sets):
            if name not in self._maxima:
                return "their activations were not recorded"
            if self._maxima[name].numel() != width:
                return f"{self._maxima[name].numel()} channels of their input were recorded, and it has {width}"
        return ""

    # -- writing it ----------------------------------------------------------------------------------------------------

    def factors(self, derived: Derived, call: fx.Node, layers: Sequence[Layer]) -> fx.Node:
        """The factors (K,) float32 of the input that ``layers``, all of its readers, share, as a node of the memo."""
        actual, e = self._actual(call), derived.e
        weights = [derived.read(f.weight, actual) for f in layers]
        key = tuple(dict.fromkeys(weights))
        if key not in self._factors:
            most: fx.Node | None = None
            for weight, f in zip(weights, layers, strict=True):
                wide = e.op(aten._to_copy.default, e.op(aten.abs.default, weight), dtype=torch.float32)
                one = e.op(aten.amax.default, wide, [1 if f.turned else 0])
                most = one if most is None else e.op(aten.maximum.default, most, one)
            assert most is not None
            ones = e.op(aten.ones_like.default, most)
            known = e.op(aten.gt.Scalar, most, 0.0)
            made = e.op(aten.pow.Tensor_Scalar, most, self._alpha - 1)
            if self._alpha:
                recorded = self._recorded(derived, call, layers)
                made = e.op(aten.mul.Tensor, e.op(aten.pow.Tensor_Scalar, recorded, self._alpha), made)
                known = e.op(aten.logical_and.default, known, e.op(aten.gt.Scalar, recorded, 0.0))
            self._factors[key] = e.op(aten.where.self, known, made, ones)
        return self._factors[key]

    def _recorded(self, derived: Derived, call: fx.Node, layers: Sequence[Layer]) -> fx.Node:
        names = self._names(call, layers)
        device = layers[0].x.meta["val"].device
        row = torch.stack([self._maxima[n] for n in names]).amax(0).to(device)
        ref = f"{CONST}maxima.{names[0]}"
        self.params[ref] = row
        with derived.e.mode:
            value = torch.empty(row.shape, device=device)
        name = "".join(c if c.isalnum() else "_" for c in ref.removeprefix(CONST))
        return derived.e.placeholder(name, Formal("param", ref), value)

    def given(self, derived: Derived, e: Editor, reads: Reads, call: fx.Node, place: Place, lam: fx.Node) -> fx.Node:
        """What ``call``, of the entry that ``e`` edits, hands to its body for the operand of ``place``: the operand
        divided by ``lam`` where it comes from outside of the body, else ``lam``."""
        operand, actual = place.operand, self._actual(call)

        def kept(value: fx.Node) -> fx.Node:
            return reads.of(derived.keep(value), value.meta["val"])

        if operand is None:
            ones = derived.e.op(aten.reciprocal.default, lam)
            dtype = place.node.meta["val"].dtype
            return kept(_as(derived.e.op, ones, dtype))
        if operand not in actual:
            return kept(lam)
        value = actual[operand]
        if self._binding[value] == Binding.CONSTANT:
            return kept(divided(derived.e.op, derived.read(value), lam))
        if value.op == "placeholder" and formal(value).kind == "memo":
            like, by = value.meta["val"], lam.meta["val"]
            with e.mode:
                made = (like.float() / by).to(like.dtype)
            return reads.of(self._table(formal(value).ref, derived.keep(lam), lam), made)

        def op(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return e.op(target, *args, at=e[call], **kwargs)

        return divided(op, e[value], kept(lam))

    def _table(self, ref: str, lam: Formal, value: fx.Node) -> Formal:
        """The memo value ``ref`` divided, as another value of its memo."""
        memo = next(m for m in self._program.memos if ref in m.values)
        new = self._tables.setdefault(memo.name, {})
        if (ref, lam) not in new:
            free = 1 + max(int(v.rpartition(".")[2]) for v in memo.values) + len(new)
            new[ref, lam] = f"{memo.name}.{free}", value
        return Formal("memo", new[ref, lam][0])

    def added(self, program: Program) -> Program:
        """``program`` with the tables and constants that ``given`` named."""
        functions, memos = dict(program.functions), []
        for memo in program.memos:
            new = self._tables.get(memo.name)
            if new:
                memo, functions[memo.function] = _with_divided(memo, functions[memo.function], new)
            memos.append(memo)
        return program.replace(functions=functions, memos=tuple(memos), params={**program.params, **self.params})


def _with_divided(memo: Memo, function: Function, new: Table) -> tuple[Memo, Function]:
    results = dict(zip(memo.values, function.results, strict=True))
    with Editor(function, "quantize") as e:
        reads = Reads(e)
        made = [
            divided(e.op, e[results[ref]], reads.of(lam, value.meta["val"])) for (ref, lam), (_, value) in new.items()
        ]
        e.set_results([*e.results, *made])
    return replace(memo, values=(*memo.values, *(name for name, _ in new.values()))), e.function()


def divided(op: Callable[..., fx.Node], value: fx.Node, lam: fx.Node) -> fx.Node:
    """``value`` divided by ``lam`` in float32, with its own dtype."""
    dtype = value.meta["val"].dtype
    return _as(op, op(aten.div.Tensor, _as(op, value, torch.float32), lam), dtype)


def _as(op: Callable[..., fx.Node], value: fx.Node, dtype: torch.dtype) -> fx.Node:
    return value if value.meta["val"].dtype is dtype else op(aten._to_copy.default, value, dtype=dtype)
