"""Who runs the operators that several could run, and why: a registry of one file for each of them.

On each target an operator is either run as it is, by a kernel, or written out as the operators that it stands for. A
file of this folder offers ``ENTRIES``: what it says of its operators. Adding a kernel adds such a file and edits no
other.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ditopt.codegen.claims._entry import Claim, Entry, Form, on_gpu
from ditopt.ir.cost import flops
from ditopt.ir.edit import Editor, replace_functions
from ditopt.ir.program import Function, Program, callee, is_call
from ditopt.ir.quantizing import quantized_nodes

__all__ = [
    "Claim",
    "Entry",
    "Form",
    "Product",
    "claim",
    "claimed",
    "claims",
    "products",
    "registry",
    "translations",
    "with_kernels",
]

ORIGIN = "claims"


@functools.cache
def registry() -> Mapping[Any, Entry]:
    """What is said of each operator, from the files of this folder. ValueError where two speak of the same."""
    found: dict[Any, Entry] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        for entry in importlib.import_module(f"{__name__}.{module.name}").ENTRIES:
            if entry.op in found:
                raise ValueError(f"{module.name}.py of {__name__} speaks of {entry.op}, of which another file does too")
            found[entry.op] = entry
    return found


def claim(node: fx.Node, target: str) -> Claim | None:
    """Who runs ``node`` on ``target``; None for operators that nobody competes for."""
    entry = registry().get(node.target)
    return None if entry is None else Claim(str(node.target).split(".")[1], *entry.claim(node, target))


def claims(program: Program, target: str) -> tuple[Claim, ...]:
    """What runs such operators in one step of ``program``, each kind once, with its count."""
    found: Counter[Claim] = Counter()
    for node in program.step.graph.nodes:
        inside = program.functions[callee(node)].graph.nodes if is_call(node) else [node]
        found.update(c for n in inside if (c := claim(n, target)) is not None)
    return tuple(dataclasses.replace(c, count=n) for c, n in found.items())


@dataclass(frozen=True)
class Product:
    """``flops`` a step of products with quantized weights that a target computes in ``integer`` kernels, or does not,
    because of ``reason``."""

    integer: bool
    reason: str
    flops: int


def products(program: Program, target: str) -> tuple[Product, ...]:
    """The layers of a step whose weights are quantized, by how ``target`` multiplies them: what is planned. What ran is
    the engine's to say (ditopt/kernels.py)."""
    found: Counter[tuple[bool, str]] = Counter()
    for node in quantized_nodes(program):
        entry = registry().get(node.target)
        said = entry.integer(node, target) if entry is not None and entry.integer is not None else _DEQUANTIZED
        found[said] += flops(node)
    return tuple(Product(integer, reason, n) for (integer, reason), n in found.items())


_DEQUANTIZED = False, "no integer product takes their formats; they are multiplied dequantized"


def claimed(program: Program, target: str) -> Program:
    """``program`` with what no kernel of ``target`` runs written out; memo functions, which run eagerly, stay."""
    memos = {m.function for m in program.memos}
    changed = {
        name: _open(f, target, formals=name == program.entry)
        for name, f in program.functions.items()
        if name not in memos and any(_writes(n, target) is not None for n in f.graph.nodes)
    }
    return replace_functions(program, changed) if changed else program


def with_kernels(program: Program) -> Program:
    """``program``; where it computes on a GPU, with the kernels for it in place. MissingExtra without Triton where an
    operator needs it."""
    for function in program.functions.values():
        for node in function.graph.nodes:
            entry = registry().get(node.target)
            if entry is not None and entry.install is not None and on_gpu(node):
                entry.install(node)
    return program


def translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """For torch.onnx: how each operator that is left for onnxruntime is written."""
    return {op: made(opset) for entry in registry().values() for op, made in entry.onnx.items()}


def _writes(node: fx.Node, target: str) -> Callable[..., Any] | None:
    """How ``node`` is written out on ``target``; None where it stays (or is left to ir/opening.py)."""
    entry = registry().get(node.target)
    if entry is None or entry.write is None or entry.claim(node, target)[0] == "kernel":
        return None
    return entry.write


def _open(function: Function, target: str, formals: bool) -> Function:
    with Editor(function, ORIGIN) as e:
        for node in list(e.graph.nodes):
            write = _writes(node, target)
            if write is None:
                continue

            def emit(op: Any, *args: Any, at: fx.Node = node, **kwargs: Any) -> fx.Node:
                return e.op(op, *args, at=at, region=str(at.meta["region"]), **kwargs)

            made = write(emit, node, target)
            if isinstance(made, (tuple, list)):
                for user in list(node.users):
                    user.replace_all_uses_with(made[user.args[1]])
            else:
                node.replace_all_uses_with(made)
        e.drop_dead(formals)
    return e.function()
