"""Real programs, small enough for hundreds of requests: the example DiT after a recipe, built for eager."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ditopt.artifact import Plan
from ditopt.codegen.build import build
from ditopt.ir import example
from ditopt.ir.program import Program
from ditopt.pipeline import PassManager
from ditopt.runtime.session import Session

LABELS = ((1, 2), (0, 0))
"""Class labels of a branch with and one without a condition."""


@functools.cache
def program(recipe: str, blocks: int = 4) -> Program:
    """The example DiT after a recipe."""
    before = PassManager("outline_blocks").run(example.tiny_dit(blocks))[-1].program
    return PassManager(recipe).run(before)[-1].program


def plan(recipe: str, rows: Sequence[Mapping[str, str]] | None = None, blocks: int = 4, steps: int = 0) -> Plan:
    made = program(recipe, blocks)
    built = build(made, "eager", rows, steps=steps)
    return Plan(built.manifest, built.run, lambda: made.params, more=built.more)


@torch.no_grad()
def request(
    session: Session,
    plan: Plan,
    seed: int = 0,
    steps: int | None = 8,
    *,
    labels: Sequence[tuple[int, int]] = LABELS[:1],
    absent: Collection[tuple[int, int]] = (),
    calls: int = 8,
    rate: float = 0.1,
) -> list[Tensor]:
    """The latents of a request of ``calls`` steps; ``absent``: (step, branch) that is not called."""
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed))
    out = []
    with session.open(steps=steps):
        for k in range(calls):
            for i, label in enumerate(labels):
                if (k, i) not in absent:
                    t = torch.full((2,), 1000.0 - 100 * k)
                    x = x - rate * session.call(plan, [x, t, torch.tensor(label)])[0] / (i + 1)
            out.append(x)
    return out
