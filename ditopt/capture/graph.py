"""From what torch.export made to a Program: parameters by handle, inputs with roles, one flat graph of operators."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from ditopt import roles as role_rules
from ditopt._torch import OpOverload, is_fake, is_unbacked
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
    state = _state(exported, dict(placeholders), params)
    for item, node in zip(exported.graph_signature.output_specs, outputs, strict=True):
        if item.kind is OutputKind.USER_OUTPUT:
            results.append(values[node])
        elif item.kind not in _WRITES or str(item.target).removeprefix("model.") in state:
            raise CaptureError(_mutation(model, item, spec, node))
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


_WRITES = (OutputKind.PARAMETER_MUTATION, OutputKind.BUFFER_MUTATION)


def written(exported: Any) -> dict[str, fx.Node]:
    """What forward leaves in its own parameters and buffers, by their dotted names."""
    specs, outputs = exported.graph_signature.output_specs, exported.graph.output_node().args[0]
    pairs = zip(specs, outputs, strict=True)
    return {str(item.target).removeprefix("model."): node for item, node in pairs if item.kind in _WRITES}


def _state(exported: Any, formals: Mapping[fx.Node, Formal], params: Mapping[str, Tensor]) -> set[str]:
    """Names among those that are ``written`` that are state: one call leaves something there for the next. A write is
    none where it reads no input, writes the same when it is done again, and nothing was read before it was done: a
    limit put on a weight, a table filled in."""
    values = written(exported)
    needed = {name: _ancestors(node) for name, node in values.items()}
    given = {
        name
        for name, nodes in needed.items()
        if any(n.op == "placeholder" and (formals[n].kind != "param" or is_fake(params[formals[n].ref])) for n in nodes)
    }
    if given or not values:
        return given
    every = set[fx.Node]().union(*needed.values())
    read = {n: formals[n].ref for n in every if n.op == "placeholder"}
    old = {n: name for n, ref in read.items() if (name := ref.removeprefix("const.")) in values}
    now: dict[fx.Node, Any] = {n: params[ref] for n, ref in read.items()}
    runs = []
    for _ in range(2):
        found = dict(now)
        for node in exported.graph.nodes:
            if node in every and node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
                found[node] = node.target(*args, **kwargs)
        runs.append({name: found[node] for name, node in values.items()})
        now |= {n: runs[-1][name] for n, name in old.items()}
    changing = {name for name in values if not torch.equal(runs[0][name], runs[1][name])}
    early = {
        name
        for name, nodes in needed.items()
        for n in nodes - set(values.values())
        if not set(n.users) <= every and any(a in old for a in _ancestors(n))
    }
    before = {name: params[read[n]] for n, name in old.items()}
    return changing | {n for n in early if n not in before or not torch.equal(before[n], runs[0][n])}


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """``node`` and all that it is computed from."""
    found, pending = set[fx.Node](), [node]
    while pending:
        if (one := pending.pop()) not in found:
            found.add(one)
            pending += one.all_input_nodes
    return found


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
