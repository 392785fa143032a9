"""Complex arithmetic as real arithmetic: a complex value becomes a real one with a last dimension (real, imaginary).

Rotary position embeddings are often written as products of complex numbers. ONNX has no complex type and Inductor falls
back to eager for it, so compiled targets get this form; eager keeps its own complex product, whose last bits a compiler
is free to choose. Operators that move values get the same move one dimension up; sums and products are spelled out.
A complex input becomes a pair too: callers pass what the model takes, and what runs the program looks at it as pairs
(``TensorType.view``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ditopt._torch import OpOverload
from ditopt.errors import DitoptError
from ditopt.ir import example
from ditopt.ir.edit import Editor, replace_functions
from ditopt.ir.program import Function, Program, TensorType, is_call
from ditopt.ops import gather_tokens, scatter_tokens
from ditopt.pipeline import Context, Outcome, Pass

aten = torch.ops.aten

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}


@dataclass(frozen=True)
class LowerComplex(Pass):
    """Spell complex values as pairs of real ones. The same numbers up to the rounding of a complex product."""

    contract = "exact"
    legalizes = ("inductor", "onnxruntime")

    def run(self, program: Program, context: Context) -> Outcome:
        found = [n for f in program.functions.values() for n in f.graph.nodes if _is_complex(n.meta.get("val"))]
        if not found:
            return Outcome(program, 0, ("no value is complex",))
        results = program.step.results[: program.step.n_results]
        given = [o for o, r in zip(program.outputs, results, strict=True) if _is_complex(r.meta["val"])]
        if given:
            return Outcome(program, 0, (f"output {given[0]} is complex, and what the caller gets stays as it is",))
        functions = {name: _Real(f, self.name).function() for name, f in program.functions.items() if _concerned(f)}
        params = {k: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for k, t in program.params.items()}
        inputs = tuple(replace(i, type=_pairs(i.type)) for i in program.inputs)
        state = tuple(replace(s, type=_pairs(s.type)) for s in program.state)
        made = program.replace(params=params, inputs=inputs, state=state)
        return Outcome(replace_functions(made, functions), len(found))

    @classmethod
    def example_applies(cls) -> Program:
        return example.tiny_dit(rotary=True)

    @classmethod
    def example_refuses(cls) -> Program:
        return example.tiny_dit()


def _pairs(type_: TensorType) -> TensorType:
    """The type of the pairs behind complex numbers of a type; another type as it is."""
    if type_.dtype not in REAL:
        return type_
    stride = None if type_.stride is None else (*(2 * s for s in type_.stride), 1)
    return TensorType(REAL[type_.dtype], (*type_.shape, 2), stride)


def _is_complex(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_complex(v) for v in value)
    return isinstance(value, torch.Tensor) and value.is_complex()


def _concerned(function: Function) -> bool:
    return any(_is_complex(n.meta.get("val")) for n in function.graph.nodes)


class _Real:
    """One function in real arithmetic: nodes stay in their order, each complex one is replaced by what computes it."""

    def __init__(self, function: Function, origin: str) -> None:
        self.e = Editor(function, origin)
        self.names: list[fx.Node] = []  # what makes pairs complex or complex values pairs
        self.complex = {self.e[n] for n in function.graph.nodes if n.op != "output" and _is_complex(n.meta.get("val"))}

    def function(self) -> Function:
        results = list(self.e.results)
        for node in list(self.e.graph.nodes):
            if node.op == "placeholder" or (node.op == "call_function" and is_call(node)):
                node.meta["val"] = self._type(node.meta["val"])
            elif node.op == "call_function" and ({node, *node.all_input_nodes} & self.complex):
                new = self._laid_out(node, self._rewritten(node))
                node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
                results = [new if r is node else r for r in results]
                self.e.graph.erase_node(node)
                if node in self.complex:
                    self.complex.add(new)
        for node in self.names:  # by now a complex value and its pair are one thing
            pair = node.args[0]
            node.replace_all_uses_with(pair)  # type: ignore[arg-type]
            results = [pair if r is node else r for r in results]  # type: ignore[misc]
            self.e.graph.erase_node(node)
        self.e.set_results(results)
        return self.e.function()

    def _type(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(self._type(v) for v in value)
        if not _is_complex(value):
            return value
        with self.e.mode:
            return torch.view_as_real(value.resolve_conj())

    def _op(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.e.op(target, *args, at=node, region=str(node.meta["region"]), **kwargs)

    def _rewritten(self, node: fx.Node) -> fx.Node:
        if not isinstance(node.target, OpOverload):  # getitem: a part of a split or of a call
            return self._op(node, node.target, *node.args)
        rule = _RULES.get(node.target)
        if rule is not None:
            return rule(self, node)
        if node.target in _MOVES:
            return self._moved(node)
        raise DitoptError(f"{node.target} of complex values has no real form yet; run this model on target='eager'")

    def _laid_out(self, node: fx.Node, new: fx.Node) -> fx.Node:
        """``new`` with the strides that ``node`` had: a pair is packed anew, and a later view may need the old ones."""
        old, got = node.meta["val"], new.meta["val"]
        if not isinstance(old, torch.Tensor):  # the parts of a split; each is taken by a getitem
            return new
        strides = [*(2 * s for s in old.stride()), 1] if old.is_complex() else list(old.stride())
        if all(a == b for a, b, size in zip(strides, got.stride(), got.shape, strict=True) if size != 1):
            return new
        order = sorted(range(got.ndim), key=lambda d: -strides[d])
        packed = self._op(node, aten.permute.default, new, order)
        packed = self._op(node, aten.clone.default, packed, memory_format=torch.contiguous_format)
        return self._op(node, aten.permute.default, packed, [order.index(d) for d in range(got.ndim)])

    # -- operators that move values --------------------------------------------------------------------------------

    def _moved(self, node: fx.Node) -> fx.Node:
        """The same operator on pairs: dimensions count from the front, and sizes end with the pair."""
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
        source = next((a for a in node.all_input_nodes if a in self.complex), None)
        rank = source.meta["val"].ndim - 1 if source is not None else len(given["size"])
        out_rank = rank + (node.target in (aten.unsqueeze.default, aten.stack.default))
        if "dim" in given and isinstance(given["dim"], int):
            given["dim"] %= out_rank
        elif "dim" in given and given["dim"] is not None:
            given["dim"] = [d % rank for d in given["dim"]]
        elif any(a.name == "dim" and a.default_value == -1 for a in schema):
            given["dim"] = rank - 1
        for name, last in (("size", 2), ("repeats", 1)):
            if name in given:
                given[name] = [*given[name], last]
        if "dims" in given:
            given["dims"] = [*(d % rank for d in given["dims"]), rank]
        for name in ("dim0", "dim1"):
            if name in given:
                given[name] %= rank
        if isinstance(given.get("index"), fx.Node):  # gather; select counts with a number
            wide = self._op(node, aten.unsqueeze.default, given["index"], -1)
            given["index"] = self._op(node, aten.expand.default, wide, [*given["index"].meta["val"].shape, 2])
        if given.get("dtype") in REAL:
            given["dtype"] = REAL[given["dtype"]]
        positional = [given.pop(a.name) for a in schema if a.name in given and not a.kwarg_only]
        return self._op(node, node.target, *positional, **given)

    # -- arithmetic ------------------------------------------------------------------------------------------------

    def _parts(self, node: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        return tuple(self._op(node, aten.select.int, value, -1, i) for i in (0, 1))  # type: ignore[return-value]

    def _pair(self, node: fx.Node, real: fx.Node, imaginary: fx.Node) -> fx.Node:
        return self._op(node, aten.stack.default, [real, imaginary], -1)

    def multiplied(self, node: fx.Node) -> fx.Node:
        a, b = node.args
        both = [x for x in (a, b) if isinstance(x, fx.Node) and x in self.complex]
        if len(both) == 2:
            (p, q), (r, s) = self._parts(node, both[0]), self._parts(node, both[1])

            def times(x: fx.Node, y: fx.Node) -> fx.Node:
                return self._op(node, aten.mul.Tensor, x, y)

            real = self._op(node, aten.sub.Tensor, times(p, r), times(q, s))
            return self._pair(node, real, self._op(node, aten.add.Tensor, times(p, s), times(q, r)))
        scale = b if both[0] is a else a
        if isinstance(scale, fx.Node):
            scale = self._op(node, aten.unsqueeze.default, scale, -1)
        return self._op(node, aten.mul.Tensor, both[0], scale)

    def added(self, node: fx.Node) -> fx.Node:
        if not all(isinstance(a, fx.Node) and a in self.complex for a in node.args[:2]):
            raise DitoptError(f"{node.target} of a complex and a real value has no real form yet; use target='eager'")
        return self._op(node, node.target, *node.args, **node.kwargs)

    def polar(self, node: fx.Node) -> fx.Node:
        size, angle = node.args
        turned = (self._op(node, f, angle) for f in (aten.cos.default, aten.sin.default))
        return self._pair(node, *(self._op(node, aten.mul.Tensor, size, part) for part in turned))

    def conjugated(self, node: fx.Node) -> fx.Node:
        real, imaginary = self._parts(node, node.args[0])  # type: ignore[arg-type]
        return self._pair(node, real, self._op(node, aten.neg.default, imaginary))

    def same(self, node: fx.Node) -> fx.Node:
        self.names.append(self._op(node, aten.alias.default, node.args[0]))
        return self.names[-1]


_RULES: dict[Any, Callable[[_Real, fx.Node], fx.Node]] = {
    aten.mul.Tensor: _Real.multiplied,
    aten.add.Tensor: _Real.added,
    aten.sub.Tensor: _Real.added,
    aten.polar.default: _Real.polar,
    aten.complex.default: lambda self, node: self._pair(node, *node.args),  # type: ignore[arg-type]
    aten.view_as_complex.default: _Real.same,
    aten.view_as_real.default: _Real.same,
    aten.real.default: lambda self, node: self._parts(node, node.args[0])[0],  # type: ignore[arg-type]
    aten.imag.default: lambda self, node: self._parts(node, node.args[0])[1],  # type: ignore[arg-type]
    aten._conj.default: _Real.conjugated,
    aten.conj_physical.default: _Real.conjugated,
    **dict.fromkeys((gather_tokens, scatter_tokens), lambda self, node: self._op(node, node.target, *node.args)),
}

_MOVES: Sequence[Any] = {  # type: ignore[assignment]
    aten.alias.default,
    aten.cat.default,
    aten.clone.default,
    aten.copy.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.gather.default,
    aten.index.Tensor,
    aten.lift_fresh_copy.default,
    aten.pad_sequence.default,
    aten.permute.default,
    aten.repeat.default,
    aten.reshape.default,
    aten.select.int,
    aten.select_scatter.default,
    aten.slice.Tensor,
    aten.slice_scatter.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.stack.default,
    aten.transpose.int,
    aten._to_copy.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.view.default,
    aten.zeros.default,
    aten.unbind.int,
}
