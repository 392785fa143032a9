"""What codegen hands to the runtime: a manifest (data only) and, for each step graph, something that runs it.

The manifest is JSON. It is all that a driver needs: examples/onnx_numpy.py drives an exported model from it with NumPy
and onnxruntime alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ditopt.errors import ArtifactError
from ditopt.ir.program import Decision, Formal, Input, Interval, Memo, Predictor, Rule, StateSlot, TensorType

VERSION = 1

Executable = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Runs one step graph or memo function: tensors in the order of ``inputs`` -> results, then the graph's new state."""


@runtime_checkable
class Tabular(Protocol):
    """An Executable that fills many rows of a table in one go."""

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """One row."""

    def table(self, rows: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        """What calling each of ``rows`` would give."""


@dataclass(frozen=True)
class Update:
    """The new content of state slot ``slot`` after a step: output number ``output`` of the graph, or, where that is
    -1, what slot ``source`` held before the step (a rename, no copy)."""

    slot: str
    output: int = -1
    source: str = ""


@dataclass(frozen=True)
class StepGraph:
    """One compiled variant of the step, or one memo function.

    ``choices``: decision name -> "compute" | "reuse" | "bypass" (compute and keep nothing). ``inputs``: what to pass,
    in order. ``results``: number of model outputs (or memo values), the first outputs of the graph. ``flops`` and
    ``block_flops``: matmul, convolution and attention really executed by one call, in all and inside blocks. ``file``:
    its file in a saved artifact.
    """

    name: str
    choices: Mapping[str, str]
    inputs: tuple[Formal, ...]
    results: int
    updates: tuple[Update, ...] = ()
    flops: int = 0
    block_flops: int = 0
    file: str = ""


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about one optimized signature of a model.

    ``graphs[0]`` computes everything (the "full" variant). ``memos`` run before a step graph, in order, each by the
    graph of its function's name. ``probe``, where there is one, runs at every step before the step graph is chosen: its
    ``results`` are what the rules of ``decisions`` read, in their order; its ``updates`` name its further outputs,
    which step graphs read as "carry". ``full_flops`` is what the plain model executes in a step, ``full_block_flops``
    that inside its blocks. ``structure``: how model outputs are packed: "tuple", or the keys of a dict.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    state: tuple[StateSlot, ...]
    decisions: tuple[Decision, ...]
    memos: tuple[Memo, ...]
    graphs: tuple[StepGraph, ...]
    memo_graphs: tuple[StepGraph, ...] = ()
    probe: StepGraph | None = None
    full_flops: int = 0
    full_block_flops: int = 0
    recipe: str = ""
    target: str = "eager"
    structure: str | tuple[str, ...] = "tuple"
    steps: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def every_graph(self) -> tuple[StepGraph, ...]:
        """The step graphs, the memo functions, the probe."""
        return (*self.graphs, *self.memo_graphs, *([self.probe] if self.probe is not None else []))

    @property
    def measured(self) -> tuple[str, ...]:
        """State slots of what the probe measures, in the order of its results."""
        rules = [d.rule for d in self.decisions if d.rule is not None and not d.rule.lag]
        return tuple(dict.fromkeys(r.signal for r in rules))


@dataclass(frozen=True)
class Plan:
    """A manifest with its executables: what a Session runs. ``params()`` gives the current weights by name (they may be
    empty where graphs carry their own). ``stale()`` is asked once a request, after the weights that memos read were
    looked at: whether weights that the graphs carry have changed since in the model they were copied from. ``more``
    makes a step graph for further choices, adding its executable to ``run``, where that costs next to nothing; None
    where it would read what the others do not keep."""

    manifest: Manifest
    run: Mapping[str, Executable]
    params: Callable[[], Mapping[str, Tensor]] = dict
    stale: Callable[[], bool] = bool
    more: Callable[[Mapping[str, str]], StepGraph | None] | None = None


def to_json(manifest: Manifest) -> str:
    """Manifest -> JSON text."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        if isinstance(value, float) and math.isinf(value):
            return str(value)  # JSON has no word for it
        return value

    return json.dumps({"ditopt_artifact": VERSION, **plain(manifest)}, indent=1)


def from_json(text: str, where: str = "manifest") -> Manifest:
    """JSON text -> Manifest; every fault is one ArtifactError that names ``where``."""
    try:
        data = json.loads(text)
        version = data.pop("ditopt_artifact")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{where} is not a ditopt manifest ({error!r}); export the model again") from error
    if version != VERSION:
        raise ArtifactError(
            f"{where} has artifact version {version}, this ditopt reads version {VERSION}; export the model again"
        )
    try:
        return _manifest(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{where} is damaged ({error!r}); export the model again") from error


def _type(d: dict[str, Any]) -> TensorType:
    dtype = getattr(torch, d["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {d['dtype']}")
    return TensorType(dtype, tuple(d["shape"]), None if d["stride"] is None else tuple(d["stride"]))


def _graph(d: dict[str, Any]) -> StepGraph:
    return StepGraph(
        **{**d, "inputs": tuple(Formal(**f) for f in d["inputs"]), "updates": tuple(Update(**u) for u in d["updates"])}
    )


def _rule(d: dict[str, Any]) -> Rule:
    lists = {k: tuple(map(float, d[k])) for k in ("polynomial", "domain")}
    numbers = {k: float(d[k]) for k in ("limit", "budget", "room")}  # where infinite, text
    book = tuple((float(bound), float(steps)) for bound, steps in d["book"])
    predictor = _predictor(d["predictor"])
    return Rule(**{**d, **lists, **numbers, "slots": tuple(d["slots"]), "book": book, "predictor": predictor})


def _predictor(d: dict[str, Any]) -> Predictor:
    return Predictor(**{**d, "fitted": tuple(tuple(float(c) for c in row) for row in d["fitted"])})


def _manifest(d: dict[str, Any]) -> Manifest:
    decisions = tuple(
        Decision(
            name=x["name"],
            regions=tuple(x["regions"]),
            schedule=Interval(**x["schedule"]),
            predictor=_predictor(x["predictor"]),
            slots=tuple(tuple(s) for s in x["slots"]),
            weights=x["weights"],
            rule=None if x["rule"] is None else _rule(x["rule"]),
            row=x["row"],
            rows=x["rows"],
            gram=x["gram"],
            guidance=x["guidance"],
            reads=tuple(x.get("reads", ())),
            needs=tuple(x.get("needs", ())),
        )
        for x in d["decisions"]
    )
    return Manifest(
        **{
            **d,
            "inputs": tuple(Input(x["name"], x["role"], _type(x["type"])) for x in d["inputs"]),
            "outputs": tuple(d["outputs"]),
            "state": tuple(StateSlot(x["name"], _type(x["type"]), x["lifetime"]) for x in d["state"]),
            "decisions": decisions,
            "memos": tuple(
                Memo(x["name"], x["function"], tuple(x["keys"]), tuple(x["values"]), x["lifetime"]) for x in d["memos"]
            ),
            "graphs": tuple(_graph(g) for g in d["graphs"]),
            "memo_graphs": tuple(_graph(g) for g in d["memo_graphs"]),
            "probe": None if d["probe"] is None else _graph(d["probe"]),
            "structure": d["structure"] if isinstance(d["structure"], str) else tuple(d["structure"]),
        }
    )


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file."""
    try:
        return from_json(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); give the path that export or save wrote") from error


def constant(value: Any) -> Any:
    """An argument that is no tensor as a manifest holds it: dtypes, devices and members of an enum as text (a member
    that is a text or a number, as in ``class Mode(str, Enum)``, stays it)."""
    named = isinstance(value, Enum) and not isinstance(value, (str, int, float))
    return str(value) if named or isinstance(value, (torch.dtype, torch.device)) else value
