"""From a live model and one call to a Program.

``CallSpec`` says how a call maps to flat tensors and back; ``capture`` exports a copy of the model (the live one is not
touched, its weights are shared by handle), functionalises it with a decomposition table that keeps attention, norms,
linears and activations whole, and checks the graph against the model on a second, derived input.

``aten`` inventory: ``run_decompositions({})`` (torch 2.11-2.13) functionalises and keeps composite operators; the
default table would turn each attention into softmax and matmuls.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from ditopt import roles as role_rules
from ditopt._torch import OpOverload, is_fake, pytree
from ditopt.errors import BadInput, CaptureError
from ditopt.ir.edit import drop_dead
from ditopt.ir.program import Formal, Function, Input, Program, Role, TensorType
from ditopt.offload import keep_shared, strip

_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class CallSpec:
    """How one call of a model maps to flat tensors and back.

    ``key`` identifies the signature: structure, shapes, dtypes, devices and static values. Python floats, and an
    integer timestep, become tensors; every other Python value is static. ``names``: dotted names of the tensors;
    ``arguments``: the parameters of forward; ``labels``: dotted names of all leaves.
    """

    key: tuple[Any, ...]
    names: tuple[str, ...]
    positions: tuple[int, ...]
    statics: tuple[Any, ...]
    tree: pytree.TreeSpec

    arguments: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def static_items(self) -> list[tuple[str, Any]]:
        """(dotted name, value) of the arguments that are no tensors."""
        taken = set(self.positions)
        return [(n, v) for i, (n, v) in enumerate(zip(self.labels, self.statics, strict=True)) if i not in taken]

    def unflatten(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The bound arguments of a call, with ``tensors`` in their places."""
        leaves = list(self.statics)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        bound: dict[str, Any] = pytree.tree_unflatten(leaves, self.tree)
        return bound


def bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[CallSpec, list[Tensor]]:
    """The CallSpec of a call, and its tensors in order. A call that does not fit ``model.forward`` is BadInput."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise BadInput(f"the call does not fit {type(model).__name__}.forward{signature}: {error}") from None
    arguments: dict[str, Any] = {}
    for name, value in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    leaves, tree = pytree.tree_flatten_with_path(arguments)
    names: list[str] = []
    positions: list[int] = []
    statics: list[Any] = []
    tensors: list[Tensor] = []
    key: list[Any] = [tree]
    for i, (path, leaf) in enumerate(leaves):
        name = _dotted(path)
        if isinstance(leaf, float) or (type(leaf) is int and role_rules.is_time(name)):
            leaf = torch.tensor(leaf, device=_device(model))
        if isinstance(leaf, Tensor):
            names.append(name)
            positions.append(i)
            statics.append(None)
            tensors.append(leaf)
            key.append((tuple(leaf.shape), leaf.dtype, leaf.device))
        elif isinstance(leaf, (*_SCALARS, torch.dtype, torch.device, torch.Size)):
            statics.append(leaf)
            key.append(leaf)
        else:
            raise BadInput(
                f"argument {name} is a {type(leaf).__name__}; ditopt takes tensors, numbers, strings, None and "
                "nested tuples, lists and dicts of them"
            )
    labels = tuple(_dotted(path) for path, _ in leaves)
    spec = CallSpec(
        tuple(key), tuple(names), tuple(positions), tuple(statics), tree, tuple(signature.parameters), labels
    )
    return spec, tensors


def arguments_of(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional and keyword arguments of a call, from a dict of keyword arguments or a tuple; BadInput otherwise."""
    if isinstance(example, Mapping):
        return (), example
    if isinstance(example, (tuple, list)):
        return example, {}
    raise BadInput(f"example_inputs is a {type(example).__name__}; expected a dict of keyword arguments or a tuple")


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")


@dataclass(frozen=True)
class Captured:
    """A captured signature: the Program, how calls map to it, how its outputs are packed, and what capture did."""

    program: Program
    spec: CallSpec
    pack: Callable[[Sequence[Tensor]], Any]
    structure: str | tuple[str, ...]
    notes: tuple[str, ...] = ()


class _Packing:
    """How the model's output was packed in its last run. A plain object: export restores a module's own containers."""

    def __init__(self) -> None:
        self.marks: list[tuple[bool, Any]] = []
        self.tree: Any = None
        self.structure: str | tuple[str, ...] = "tuple"
        self.changed: list[str] = []  # attributes of the model that the run changed


class _Flat(nn.Module):
    """The model as a function of flat tensors. The packing of its output is learned while it runs."""

    def __init__(self, model: nn.Module, spec: CallSpec) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.packing = _Packing()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        bound = self.spec.unflatten(tensors)
        args, kwargs = _split(self.model, bound)
        before = _python_state(self.model)  # compared here: torch.export puts attributes back when it is done
        out = self.model(*args, **kwargs)
        self.packing.changed = [k for k, v in _python_state(self.model).items() if before.get(k, v) != v]
        leaves, tree = pytree.tree_flatten(out)
        self.packing.marks = [(isinstance(leaf, Tensor), None if isinstance(leaf, Tensor) else leaf) for leaf in leaves]
        self.packing.tree = tree
        self.packing.structure = (
            tuple(out) if isinstance(out, dict) else "single" if isinstance(out, Tensor) else "tuple"
        )
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _split(model: nn.Module, bound: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Bound arguments as positional and keyword ones (``forward(self, *xs)`` and positional-only need the former)."""
    args: list[Any] = []
    kwargs = dict(bound)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in kwargs and parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            args.extend(kwargs.pop(name))
        elif name in kwargs and parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            args.append(kwargs.pop(name))
    return args, kwargs


def shared_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the module structure around the same tensors, without the offload hooks of accelerate."""
    kept: dict[int, Any] = {**keep_shared(model), **{id(t): t for t in [*model.parameters(), *model.buffers()]}}
    twin = copy.deepcopy(model, kept)
    strip(twin)
    return twin


def capture(
    model: nn.Module,
    spec: CallSpec,
    tensors: Sequence[Tensor],
    roles: Mapping[str, Role] | None = None,
    weights: Collection[str] = (),
    verify: bool = True,
) -> Captured:
    """Export ``model`` for the signature of ``spec``.

    ``tensors`` are example values in the order of ``spec.names``; those named in ``weights`` become parameters of the
    Program instead of inputs (a graph from Dynamo takes its weights as arguments). Raises CaptureError when the model
    cannot be traced (with the model's own line) or when the graph does not compute what the model computes on a derived
    input.
    """
    twin = shared_copy(model).eval()
    flat = _Flat(twin, spec)
    try:
        with _quiet(), torch.no_grad():
            exported = torch.export.export(flat, tuple(tensors), strict=False).run_decompositions({})
    except Exception as error:
        raise CaptureError(_explain(model, error, _fails(_Flat(shared_copy(model).eval(), spec), tensors))) from error
    packing = flat.packing
    if packing.changed:
        raise CaptureError(
            f"{type(model).__name__} changes its attribute {packing.changed[0]} during forward; a graph would keep one "
            "value for ever. Make it an input of forward."
        )
    program = _program(model, exported, spec, tensors, roles or {}, weights)

    def pack(values: Sequence[Tensor]) -> Any:
        rest = iter(values)
        return pytree.tree_unflatten(
            [next(rest) if is_tensor else static for is_tensor, static in packing.marks], packing.tree
        )

    captured = Captured(program, spec, pack, packing.structure)
    if verify and not any(is_fake(t) for t in [*tensors, *program.params.values()]):
        _check(shared_copy(model).eval(), captured, tensors)
    return captured


def _python_state(model: nn.Module) -> dict[str, Any]:
    """The Python values among the attributes of all modules, in containers too, by dotted name."""
    return {
        f"{name}.{_dotted(path)}" if name else _dotted(path): v
        for name, module in model.named_modules()
        for path, v in pytree.tree_flatten_with_path(vars(module))[0]
        if isinstance(v, _SCALARS)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch.export says about its internals: warnings, and where tracing stops the graph so far, printed."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _fails(flat: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether the model itself raises for these inputs."""
    try:
        with torch.no_grad():
            flat(*tensors)
    except Exception:
        return True
    return False


def _explain(model: nn.Module, error: Exception, fails: bool) -> str:
    """One sentence that names the line of the model where tracing stopped. ``fails``: the model itself raises there."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not any(part in f.filename for part in ("/torch/", "ditopt/capture", "<"))
    ]
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({(frames[-1].line or '').strip()})" if frames else ""
    if fails:
        return (
            f"{type(model).__name__} itself fails for these inputs{where}: {type(error).__name__}: {first}. Call it as "
            "the plain model can be called."
        )
    return (
        f"{type(model).__name__} cannot be traced{where}: {type(error).__name__}: {first}. Python that looks at tensor "
        "values cannot become part of a graph; compute it outside forward and pass it in, or use torch.where."
    )


def _program(
    model: nn.Module,
    exported: Any,
    spec: CallSpec,
    tensors: Sequence[Tensor],
    roles: Mapping[str, Role],
    weights: Collection[str],
) -> Program:
    live = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    graph, values = fx.Graph(), {}
    params: dict[str, Tensor] = {}
    given = iter(zip(spec.names, tensors, strict=True))
    placeholders: list[tuple[fx.Node, Formal]] = []
    by_name = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    for item in exported.graph_signature.input_specs:
        node = by_name[item.arg.name]
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
        placeholders.append((node, what))
    for node, what in sorted(placeholders, key=lambda p: p[1].kind != "input"):
        if not node.users:
            continue
        new = graph.placeholder(_identifier(what.ref))
        new.meta = {"val": node.meta["val"], "formal": what, "region": "", "origin": "capture"}
        values[node] = new
    for node in exported.graph.nodes:
        if node.op == "call_function":
            if str(node.target).startswith("aten._assert"):
                continue
            if not isinstance(node.target, OpOverload) and getattr(node.target, "__name__", "") != "getitem":
                raise CaptureError(
                    f"{type(model).__name__} uses {node.target}, a higher-order operator that ditopt cannot rewrite yet"
                )
            new = graph.node_copy(node, values.__getitem__)
            new.meta = {"val": node.meta["val"], "region": "", "origin": "capture", "path": _path(node)}
            if isinstance(new.meta["val"], list):
                new.meta["val"] = tuple(new.meta["val"])
            values[node] = new
        elif node.op == "get_attr":
            raise CaptureError(
                f"{type(model).__name__} uses {node.target}, a higher-order region that ditopt cannot rewrite yet"
            )
    results = []
    outputs = exported.graph.output_node().args[0]
    for item, node in zip(exported.graph_signature.output_specs, outputs, strict=True):
        if item.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(_mutation(model, item, spec))
        results.append(values[node])
    graph.output(tuple(results))
    free = [(n, t) for n, t in zip(spec.names, tensors, strict=True) if n not in weights]
    found = role_rules.infer(free, [r.meta["val"] for r in results], roles)
    inputs = tuple(Input(n, r, TensorType.of(t)) for (n, t), r in zip(free, found, strict=True))
    used = {n.meta["formal"].ref for n in graph.nodes if n.op == "placeholder" and n.meta["formal"].kind == "param"}
    program = Program(
        functions={"step": Function("step", graph)},
        entry="step",
        params={k: v for k, v in params.items() if k in used},
        inputs=inputs,
        outputs=tuple(f"out{i}" for i in range(len(results))),
    )
    return program.replace(functions={"step": drop_dead(program.step, "capture")})


def _mutation(model: nn.Module, item: Any, spec: CallSpec) -> str:
    """The sentence for a result of the graph that is a side effect of forward."""
    target = str(item.target)
    if item.kind is OutputKind.USER_INPUT_MUTATION:
        name = spec.names[int(target.rpartition("_")[2])]  # arguments of _Flat: tensors_0, tensors_1, ...
        return (
            f"{type(model).__name__} changes its input {name} in place during forward; a graph leaves its inputs "
            "alone. Write the result to a new tensor, or clone the input first."
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


def derive(inputs: Sequence[Input], tensors: Sequence[Tensor]) -> list[Tensor]:
    """A second input of the same signature: floats perturbed, integers resampled, masks shortened."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for item, tensor in zip(inputs, tensors, strict=True):
        cpu = tensor.detach().to("cpu")
        if item.role == "shape" or cpu.numel() == 0:
            new = cpu.clone()
        elif item.role == "timestep":
            new = cpu * 0.75 if cpu.is_floating_point() else (cpu * 3) // 4
        elif cpu.dtype is torch.bool or (cpu.ndim >= 2 and bool(((cpu == 0) | (cpu == 1)).all())):
            new = cpu.clone()
            new[..., -1:] = 0
        elif cpu.is_floating_point():
            scale = cpu.float().std() if cpu.numel() > 1 else cpu.float().abs().mean()
            new = (cpu.float() + 0.5 * scale * torch.randn(cpu.shape, generator=generator)).to(cpu.dtype)
        else:
            order = torch.randint(cpu.numel(), cpu.shape, generator=generator)
            new = cpu.flatten()[order]
        out.append(new.to(tensor.device))
    return out


def _check(model: nn.Module, captured: Captured, tensors: Sequence[Tensor]) -> None:
    """Raise CaptureError where the graph and the model differ on a derived input."""
    program = captured.program
    by_name = dict(zip(captured.spec.names, tensors, strict=True))
    by_name |= zip(
        (i.name for i in program.inputs), derive(program.inputs, [by_name[i.name] for i in program.inputs]), strict=True
    )
    flat = _Flat(model, captured.spec)
    with torch.no_grad():
        want = flat(*(by_name[name] for name in captured.spec.names))
        module = program.module()
        args = []
        for p in program.step.placeholders:
            what: Formal = p.meta["formal"]
            args.append(by_name[what.ref] if what.kind == "input" else program.params[what.ref])
        got = module(*args)
    for name, a, b in zip(program.outputs, want, got, strict=True):
        if a.shape != b.shape:
            raise CaptureError(
                f"on a second input the graph of {type(model).__name__} gives {name} the shape {list(b.shape)}, "
                f"the model {list(a.shape)}"
            )
        if not torch.isfinite(a.float()).all():
            continue  # the derived input left the model's domain: it says nothing about the graph
        error = (a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-12)
        limit = 1e-5 if a.dtype in (torch.float32, torch.float64) else 2e-2
        if not error <= limit:
            raise CaptureError(
                f"the graph of {type(model).__name__} differs from the model by {float(error):.1e} (relative) on a "
                f"second input; the model's Python depends on tensor values, or it is not deterministic"
            )
