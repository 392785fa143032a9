"""From a Program to a Plan: lower it, compile each step graph for a target, write down what the runtime must know."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from ditopt._torch import compile_graph
from ditopt.artifact import Executable, Manifest, StepGraph
from ditopt.codegen.claims import claimed, with_kernels
from ditopt.codegen.lower import Lowered, Lowering, lower, lower_memos
from ditopt.codegen.onnx.export import export_artifact
from ditopt.codegen.probe import NAME as PROBE
from ditopt.codegen.variants import Choices, combinations
from ditopt.errors import DitoptError
from ditopt.ir.edit import inline
from ditopt.ir.opening import opened, spelled
from ditopt.ir.program import Program
from ditopt.ops.call_module import calls


@dataclass(frozen=True)
class Built:
    """What a Session needs of a Program: its manifest, its executables, and where that is cheap a way to ``more``."""

    manifest: Manifest
    run: dict[str, Executable]
    more: Callable[[Mapping[str, str]], StepGraph | None] | None


def describe(program: Program, variants: Sequence[Lowered], memos: Sequence[Lowered], **more: Any) -> Manifest:
    """The manifest of a lowered Program; ``more`` are further Manifest fields."""
    slots = {f.ref for v in variants for f in v.graph.inputs if f.kind == "state"}
    slots |= {u.slot for v in variants for u in v.graph.updates if v.graph.name != PROBE}
    probe = next((v.graph for v in variants if v.graph.name == PROBE), None)
    return Manifest(
        inputs=program.inputs,
        outputs=program.outputs,
        state=tuple(s for s in program.state if s.name in slots),
        decisions=program.decisions,
        memos=opened(program).memos,
        graphs=tuple(v.graph for v in variants if v.graph is not probe),
        memo_graphs=tuple(m.graph for m in memos),
        probe=probe,
        **more,
    )


def build(program: Program, target: str, rows: Sequence[Choices] | None = None, **more: Any) -> Built:
    """Executables in this process, for ``target`` "eager" or "inductor"; ``rows``: the combinations of choices to make
    a graph of (lower.py).

    Graphs are compiled when they first run. Memo functions run eagerly: they run once a request or once a timestep,
    and in eager they are bit-equal to what the step would have computed.
    """
    program = with_kernels(claimed(program, target))
    made = combinations(program) if rows is None else list(rows)
    # any further combination may come: each is made when it does
    free = target == "eager" and rows is None and len(made) < 2 ** len(program.decisions)
    lowering = Lowering(program, None if free else made)
    steps, memos = lower(program, made, lowering), lower_memos(program)
    make = {"eager": eager, "inductor": inductor}[target]
    run = {s.graph.name: make(s) for s in steps} | {m.graph.name: eager(m) for m in memos}
    manifest = describe(program, steps, memos, target=target, **more)
    return Built(manifest, run, _on_demand(lowering, manifest, run) if target == "eager" else None)


def _on_demand(
    lowering: Lowering, manifest: Manifest, run: dict[str, Executable]
) -> Callable[[Mapping[str, str]], StepGraph | None]:
    """Makes further step graphs of an eager plan when a step first asks for their choices; None for those that read
    what no graph so far keeps."""
    given = {u.slot for u in manifest.probe.updates} if manifest.probe is not None else set()
    given |= {s.name for s in manifest.state}

    @functools.cache
    def one(choices: tuple[tuple[str, str], ...]) -> StepGraph | None:
        made = lowering.variant(dict(choices))
        if not {f.ref for f in made.graph.inputs if f.kind in ("carry", "state")} <= given:
            return None
        run[made.graph.name] = eager(made)
        return made.graph

    return lambda choices: one(tuple(sorted(choices.items())))


def export(
    program: Program,
    path: Path,
    schedule: list[dict[str, Any]] | None,
    rows: Sequence[Choices] | None = None,
    **more: Any,
) -> Manifest:
    """Write ``program`` as ONNX files beside ``path`` (codegen/onnx/export.py)."""
    program = claimed(spelled(opened(program)), "onnxruntime")
    refuse_modules(program, "become ONNX")
    lowered = [*lower(program, rows), *lower_memos(program)]
    split = len(lowered) - len(program.memos)
    manifest = describe(program, lowered[:split], lowered[split:], target="onnxruntime", **more)
    return export_artifact(
        manifest,
        {s.graph.name: flat_module(s) for s in lowered},
        {s.graph.name: _types(s) for s in lowered},
        program.params,
        path,
        schedule=schedule,
    )


def refuse_modules(program: Program, what: str) -> None:
    """DitoptError where the program calls Python of the model, which cannot ``what``."""
    for body in calls(f.graph for f in program.functions.values()):
        raise DitoptError(
            f"this model looks at values of the latent{body.line}, which stays Python in its graph and cannot {what}; "
            "run it in this process, with target eager or inductor"
        )


def flat_module(step: Lowered) -> fx.GraphModule:
    """A step graph as one GraphModule without calls."""
    function = inline(step.program)
    return fx.GraphModule({}, function.graph, class_name=step.graph.name)


def eager(step: Lowered) -> Executable:
    """The step graph as generated Python over ATen operators."""
    module = flat_module(step)
    return lambda inputs: module(*inputs)


def inductor(step: Lowered) -> Executable:
    """The step graph compiled by Inductor at its first call; shared block bodies are compiled once."""
    return _Compiled(lambda: compile_graph(step.program.module(), _types(step)), step.graph)


class _Compiled:
    """Compiles at the first call, and says so to ``on_compile`` (tests and reports count graphs)."""

    on_compile: Callable[[StepGraph], None] | None = None

    def __init__(self, make: Callable[[], Callable[..., Sequence[Tensor]]], graph: StepGraph) -> None:
        self._make, self._graph = make, graph
        self._run: Callable[..., Sequence[Tensor]] | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._run is None:
            self._run = self._make()
            if _Compiled.on_compile is not None:
                _Compiled.on_compile(self._graph)
        return self._run(*inputs)


def _types(step: Lowered) -> list[Any]:
    return [p.meta["val"] for p in step.program.step.placeholders]


def sizes(program: Program) -> Mapping[str, int]:
    """Bytes of weights that each lowered graph reads, by graph name."""
    return {
        s.graph.name: sum(program.params[f.ref].nbytes for f in s.graph.inputs if f.kind == "param")
        for s in lower(program)
    }
