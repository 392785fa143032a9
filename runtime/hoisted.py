"""The hoisted values of a call: found among what is remembered, or computed, one row or the rest of a table at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ditopt.artifact import Executable, StepGraph, Tabular
from ditopt.ir.program import Memo
from ditopt.runtime.ahead import ahead, clock_bits
from ditopt.runtime.plan import Ready


@dataclass(frozen=True)
class _Row:
    """What the memo functions of one step read: the model's inputs, the bits of the timestep ones, earlier values."""

    inputs: Mapping[str, Tensor]
    clock: Mapping[str, bytes]
    values: dict[str, Tensor] = field(default_factory=dict)

    def put(self, memo: Memo, values: Sequence[Tensor]) -> None:
        """Values are read by their own names."""
        self.values.update(zip(memo.values, values, strict=True))


def hoisted(
    ready: Ready,
    inputs: Mapping[str, Tensor],
    clock: Mapping[str, bytes],
    params: Mapping[str, Tensor],
    announced: Sequence[float] | Tensor | None,
) -> tuple[dict[str, Tensor], list[tuple[Memo, StepGraph]]]:
    """The values by name, and the memo functions that ran for them, once for each row.

    ``announced``: the scheduler's times of the request. A function that fills tables (``Tabular``) fills the rows of
    all steps from this one on.
    """
    memos, now = ready.memos, _Row(inputs, clock)
    groups: dict[str, int | None] = {}
    filled: list[tuple[Memo, StepGraph]] = []
    for memo in memos.memos:
        found, groups[memo.name] = memos.find(memo, inputs, clock)
        if found is None:
            graph, run = ready.graphs[memo.function], ready.plan.run[memo.function]
            rows = [now, *(_later(ready, memo, now, groups, announced) if isinstance(run, Tabular) else ())]
            made = _run(run, [[_value(ready, f.kind, f.ref, row, params) for f in graph.inputs] for row in rows])
            table = [(row.clock, out[: graph.results]) for row, out in zip(rows, made, strict=True)]
            found, groups[memo.name] = memos.add(memo, inputs, groups[memo.name], table)
            filled += [(memo, graph)] * len(rows)
        now.put(memo, found)
    return now.values, filled


def _later(
    ready: Ready,
    memo: Memo,
    now: _Row,
    groups: Mapping[str, int | None],
    announced: Sequence[float] | Tensor | None,
) -> list[_Row]:
    """The rows that the steps after this one will ask ``memo`` for, as far as they can be told and computed now."""
    times = [k for k in memo.keys if k in ready.names["timestep"]]
    if len(times) != 1:
        return []
    rows = []
    for timestep in ahead(announced, now.inputs[times[0]]):
        row = _Row({**now.inputs, times[0]: timestep}, {**now.clock, times[0]: clock_bits(timestep)})
        for earlier in ready.memos.memos:
            if earlier is memo:
                rows.append(row)
                break
            known = ready.memos.peek(earlier, groups[earlier.name], row.clock)
            if known is None:
                break
            row.put(earlier, known)
    return rows


def _value(ready: Ready, kind: str, name: str, row: _Row, params: Mapping[str, Tensor]) -> Tensor:
    if kind == "param":
        return ready.param(params, name)
    return row.inputs[name] if kind == "input" else row.values[name]


def _run(run: Executable, rows: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    return run.table(rows) if isinstance(run, Tabular) else [run(row) for row in rows]
