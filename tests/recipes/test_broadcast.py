"""Pyramid attention broadcast against a transcription, on a video model with all three kinds of attention."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import ditopt
from ditopt.errors import DitoptWarning, RecipeError
from ditopt.recipe import Recipe
from tests.foreign import ZOO
from tests.foreign.base import BATCH, randn, sinusoid
from tests.recipes.oracle import FAR, NEAR, Array, error
from tests.tiny_models import ZOO as TINY

STEPS, PACE = 20, 0.25
TIMES = [1000.0 * (1 - k / STEPS) for k in range(STEPS)]
KINDS = ("spatial", "temporal", "cross")

Result = tuple[list[tuple[str, ...]], Array]
"""A row of decisions a step, spatial, temporal and cross; the outputs (steps, ...)."""


@functools.cache
def model() -> Any:
    return ZOO["spacetime"].model().requires_grad_(False)


TEXT = randn(BATCH, 5, 12, seed=99)


def start() -> torch.Tensor:
    return randn(BATCH, 3, 4, 6, 4, seed=7)


@dataclass
class Broadcast:
    """What VideoSys keeps of one attention: how often it was asked, and its last output. Inside the window (without its
    ends) it is computed when the count is a multiple of the range, outside of it always; what is computed is kept."""

    every: int
    window: tuple[float, float]
    count: int = 0
    last: Array = field(default=None)

    def reuses(self, t: float) -> bool:
        skip = self.count % self.every != 0 and self.window[0] < t < self.window[1]
        self.count += 1
        return skip


@functools.cache
def transcribed(ranges: tuple[int, int, int], window: tuple[float, float]) -> Result:
    m, x = model(), start().numpy()
    told = {(i, k): Broadcast(r, window) for i in range(len(m.trunk)) for k, r in zip(KINDS, ranges, strict=True)}
    chosen: list[tuple[str, ...]] = []
    outputs = []
    text = m.words(TEXT)
    for t in TIMES:
        emb, h = m.time(sinusoid(torch.full((BATCH,), t), m.width)), m.tokens(torch.from_numpy(x)).numpy()
        row: dict[str, str] = {}
        for i, block in enumerate(m.trunk):
            parameters = block.parameters_of(emb)
            for k, kind in enumerate(KINDS):
                kept, (scale, gate) = told[i, kind], parameters[2 * k : 2 * k + 2]
                reuse = kept.reuses(t)
                if not reuse:
                    of = (torch.from_numpy(h), *([text] if kind == "cross" else []), scale)
                    kept.last = getattr(block, kind)(*of).numpy()
                h = h + gate.numpy() * kept.last
                row[kind] = "reuse" if reuse else "compute"
            h = h + (parameters[7] * block.feed(torch.from_numpy(h), parameters[6])).numpy()
        v = m.video(torch.from_numpy(h), torch.from_numpy(x)).numpy()
        chosen.append(tuple(row[k] for k in KINDS))
        outputs.append(v)
        x = x - np.float32(PACE) * v
    return chosen, np.stack(outputs)


@functools.cache
def run(recipe: str, steps: int | None = None) -> tuple[list[tuple[str, ...]], Array, int, tuple[str, ...]]:
    """Decisions, outputs, host reads and warnings of a request; of the second one, which must equal the first."""
    call = {"a": start(), "t": torch.full((BATCH,), TIMES[0]), "text": TEXT}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", DitoptWarning)
        fast = ditopt.optimize(model(), recipe, example_inputs=call, target="eager", steps=steps)
        made = []
        for _ in range(2):
            x, outputs = start(), []
            with fast.session(steps=steps):
                for t in TIMES:
                    v = fast(a=x, t=torch.full((BATCH,), t), text=TEXT)
                    outputs.append(v.numpy().copy())
                    x = x - PACE * v
                rows = [tuple(row.choices.values()) for row in fast.schedule_rows]
            made.append(np.stack(outputs))
    assert np.array_equal(*made)
    return rows, made[0], fast.stats.reads, tuple(str(w.message) for w in told)


CASES = {
    "pab": ((2, 4, 6), (100.0, 800.0)),
    "pab{spatial_range=3,temporal_range=2,cross_range=5,low=250,high=900}": ((3, 2, 5), (250.0, 900.0)),
}


@pytest.mark.parametrize("recipe", CASES)
def test_the_session_does_what_the_paper_says(recipe):
    with torch.no_grad():
        choices, outputs = transcribed(*CASES[recipe])
    found, got, _, told = run(recipe)
    assert found == choices
    assert error(got, outputs) < NEAR
    assert error(got, run("lossless")[1]) > FAR, "reuse that changes nothing is no test"
    assert all("reuse" in column and "compute" in column for column in zip(*choices, strict=True))
    assert not told
    # Steps outside of the window compute, whatever their number; the last value before the window is used inside.
    low, high = CASES[recipe][1]
    assert all(row == ("compute",) * 3 for row, t in zip(found, TIMES, strict=True) if not low < t < high)
    first = next(k for k, t in enumerate(TIMES) if t < high)
    assert found[first] != ("compute",) * 3


OTHERS = [
    "pab{spatial=3,temporal=4,cross=6}",
    "pab{spatial=2,temporal=4,cross=6,high=700}",
    "pab{spatial=4,temporal=2,cross=6}",
    "fora{interval=2}",
    "canonicalize, outline_blocks, hoist_invariants, cache{region=blocks.*.attn,every=2,low=100,high=800}",
    "canonicalize, outline_blocks, hoist_invariants, cache{region=blocks.*.attn.spatial,every=2,since=0.2,until=0.9},"
    "cache{region=blocks.*.attn.temporal,every=4,since=0.2,until=0.9},"
    "cache{region=blocks.*.attn.cross,every=6,since=0.2,until=0.9}",
]


@pytest.mark.parametrize("other", OTHERS)
def test_nothing_else_does_the_same(other):
    with torch.no_grad():
        _, outputs = transcribed(*CASES["pab"])
    assert error(run(other, STEPS)[1], outputs) > FAR


def test_only_the_time_is_read():
    assert run("pab")[2] == run("lossless")[2]


def test_a_window_that_the_times_never_meet_is_told():
    rows, outputs, _, told = run("pab{low=2000,high=3000}", STEPS)
    assert all(row == ("compute",) * 3 for row in rows)
    assert np.array_equal(outputs, run("lossless")[1])
    assert len([t for t in told if "the model's time was not between 2000 and 3000" in t]) >= 3


def test_a_model_that_lacks_kinds_is_told_which():
    tiny = TINY["plain"]
    with pytest.warns(DitoptWarning) as told:
        fast = ditopt.optimize(tiny.model(), "pab", target="eager", example_inputs=tiny.inputs())
    said = [str(w.message) for w in told]
    assert len(said) == 2
    assert "changed nothing: no attention of this model is temporal; there is self" in said[0]
    assert "changed nothing: no attention of this model is cross; there is self" in said[1]
    assert [d.regions for d in fast.program.decisions] == [tuple(f"blocks.{i}.attn.self" for i in range(4))]


def test_onnx_follows_the_times(tmp_path):
    call = {"a": start(), "t": torch.full((BATCH,), TIMES[0]), "text": TEXT}
    with pytest.raises(ditopt.DitoptError, match="reuses at times between 100 and 800: pass the timesteps"):
        ditopt.export_onnx(model(), tmp_path / "a.onnx", "pab", example_inputs=call, steps=STEPS)
    manifest = ditopt.export_onnx(model(), tmp_path / "b.onnx", "pab", example_inputs=call, timesteps=TIMES)
    by_name = {g.name: g.choices for g in manifest.graphs}
    rows = [tuple(by_name[row["graph"]].values()) for row in manifest.extra["schedule"]]
    assert rows == transcribed(*CASES["pab"])[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pab{spatial=0}", "expected at least 1, got 0"),
        ("pab{low=800,high=100}", r"cache\{low=800,high=100\}: expected low < high"),
        ("pab{low=-5}", "expected at least 0, got -5"),
        ("pab{interval=2}", "no parameter 'interval'"),
    ],
)
def test_bad_parameters(text, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.parse(text)
