"""From what torch.export made to a Program: parameters by handle, inputs with roles, one flat graph of operators."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from ditopt import roles as role_rules
from ditopt._torch import OpOverload, is_unbacked
from ditopt.capture import where
from ditopt.capture.spec import CallSpec
from ditopt.errors import CaptureError
from ditopt.ir.edit import drop_dead, prune
from ditopt.ir.program import Formal, Function, Input, Program, Role, TensorType


class Untraceable(CaptureError):
    """Tracing stopped, or left something that is no operator; another way of capture may still work."""


def to_program(
    model: nn.Module,
    exported: Any,
    spec: CallSpec,
    tensors: Sequence[Tensor],
    roles: Mapping[str, Role],
    weights: Collection[str] = (),
    more: int = 0,
) -> Program:
    """The Program of ``exported`` (a functionalised ExportedProgram of ``Flat(model)``). Its last ``more`` results are
    not the model's: they do not count where roles are inferred, and are outputs like the others."""
    placeholders, params = formals(model, exported, spec, tensors, weights)
    graph, values = fx.Graph(), {}
    for node, what in sorted(placeholders, key=lambda p: p[1].kind != "input"):
        if not node.users:
            continue
        new = graph.placeholder(_identifier(what.ref))
        new.meta = {"val": node.meta["val"], "formal": what, "region": "", "origin": "capture"}
        values[node] = new
    for node in _operators(model, exported.graph):
        new = graph.node_copy(node, values.__getitem__)
        new.meta = {"val": node.meta["val"], "region": "", "origin": "capture", "path": _path(node)}
        if isinstance(new.meta["val"], list):
            new.meta["val"] = tuple(new.meta["val"])
        values[node] = new
    results = []
    outputs = exported.graph.output_node().args[0]
    for item, node in zip(exported.graph_signature.output_specs, outputs, strict=True):
        if item.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(_mutation(model, item, spec, node))
        results.append(values[node])
    graph.output(tuple(results))
    free = [(n, t) for n, t in zip(spec.names, tensors, strict=True) if n not in weights]
    found = role_rules.infer(
        free,
        [r.meta["val"] for r in results[: len(results) - more]],
        roles,
        guess=bool(weights),  # a graph from Dynamo may be a piece of a model, with names that say nothing
    )
    inputs = tuple(Input(n, r, TensorType.of(t)) for (n, t), r in zip(free, found, strict=True))
    program = Program(
        functions={"step": Function("step", graph)},
        entry="step",
        params=params,
        inputs=inputs,
        outputs=tuple(f"out{i}" for i in range(len(results))),
    )
    return prune(program.replace(functions={"step": drop_dead(program.step, "capture")}))


def formals(
    model: nn.Module, exported: Any, spec: CallSpec, tensors: Sequence[Tensor], weights: Collection[str] = ()
) -> tuple[list[tuple[fx.Node, Formal]], dict[str, Tensor]]:
    """What each placeholder of ``exported`` stands for, and the tensors of those that are parameters."""
    live = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    params: dict[str, Tensor] = {}
    given = iter(zip(spec.names, tensors, strict=True))
    placeholders: list[tuple[fx.Node, Formal]] = []
    by_name = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    for item in exported.graph_signature.input_specs:
        if item.kind is InputKind.USER_INPUT:
            name, value = next(given)
            what = Formal("param" if name in weights else "input", name)
            if name in weights:
                params[name] = value
        elif item.kind in (InputKind.PARAMETER, InputKind.BUFFER) and item.target.removeprefix("model.") in live:
            name = item.target.removeprefix("model.")
            params[name] = live[name]
            what = Formal("param", name)
        elif item.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            name = "const." + str(item.target).removeprefix("model.")
            source = exported.constants.get(item.target)
            params[name] = (source if source is not None else exported.state_dict[item.target]).detach()
            what = Formal("param", name)
        else:
            raise CaptureError(f"{type(model).__name__} has an input of a kind that is not supported: {item.kind.name}")
        placeholders.append((by_name[item.arg.name], what))
    return placeholders, params


def refuse_symbols(name: str, graph: fx.Graph) -> None:
    """Untraceable, with the line of the model (a ``name``), where a size or a number depends on values of tensors."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if any(is_unbacked(s) for s in (value.shape if isinstance(value, Tensor) else (value,))):
            raise Untraceable(
                f"{name} cannot be traced{line_of(node)}: a size depends on the values of a tensor. Compute it outside "
                "forward and pass it in."
            )


def _operators(model: nn.Module, graph: fx.Graph) -> Iterator[fx.Node]:
    """The operators of a graph, without assertions; Untraceable where there is anything else."""
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or str(node.target).startswith("aten._assert"):
            continue
        if not isinstance(node.target, OpOverload) and getattr(node.target, "__name__", "") != "getitem":
            raise Untraceable(
                f"{type(model).__name__} uses {node.target}{line_of(node)}, a higher-order operator that ditopt cannot "
                "rewrite"
            )
        yield node


def line_of(node: fx.Node) -> str:
    """ " at file:line (code)" of the line of the model that a node comes from, or ""."""
    return where.of_trace(node.meta.get("stack_trace") or "")


def _mutation(model: nn.Module, item: Any, spec: CallSpec, node: fx.Node) -> str:
    """The sentence for a result of the graph that is a side effect of forward."""
    target = str(item.target)
    if item.kind is OutputKind.USER_INPUT_MUTATION:
        name = spec.names[int(target.rpartition("_")[2])]  # arguments of Flat: tensors_0, tensors_1, ...
        return (
            f"{type(model).__name__} changes its input {name} in place during forward{line_of(node)}; a graph leaves "
            "its inputs alone. Write the result to a new tensor, or clone the input first."
        )
    return (
        f"{type(model).__name__} changes {target.removeprefix('model.')} during forward ({item.kind.name.lower()}); "
        "state inside a model cannot be captured. Pass it in and return it."
    )


def _identifier(name: str) -> str:
    word = "".join(c if c.isalnum() else "_" for c in name)
    return word if word[:1].isalpha() else f"p_{word}"


def _path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("model").removeprefix(".") if stack else ""
