"""ProfilingDiT: labels, runs and refreshes, against a transcription; and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import ditopt
from ditopt.calibration import Profile, fit
from ditopt.calibration.focus import focus, foreground, numbers_of
from ditopt.errors import BadInput, DitoptWarning, RecipeError
from ditopt.ir.program import Program, Region
from ditopt.ir.select import select_regions
from tests.calibration.use import Pipe, sampler

STEPS, BLOCKS, TOKENS, WIDTH, RUNS = 20, 6, 10, 4, 2
MOVING = [{1, 4, 5}, {0, 2, 9}]
"""The tokens that move, in each recording."""
BACKGROUND = [0, 2, 3]


def recorded() -> dict[str, np.ndarray]:
    """Attention outputs: tokens of MOVING change at every step, in all blocks; background blocks give most of their
    output to the other tokens."""
    rng = np.random.default_rng(3)
    out = {}
    for block in range(BLOCKS):
        values = np.repeat(rng.normal(size=(RUNS, 1, TOKENS, WIDTH)), STEPS, axis=1)
        values /= np.linalg.norm(values, axis=-1, keepdims=True)
        for n, moving in enumerate(MOVING):
            for p in range(TOKENS):
                here = p in moving
                values[n, :, p] *= (0.5 if here else 2.0) if block in BACKGROUND else (2.0 if here else 0.5)
                values[n, :, p] += rng.normal(size=(STEPS, WIDTH)) * (0.1 if here else 0.001)
        out[f"blocks.{block}.attn"] = values.astype(np.float32)
    return out


VALUES = recorded()


def profile(steps: int = STEPS) -> Profile:
    cut = {name: values[:, :steps] for name, values in VALUES.items()}
    times = np.arange(steps, dtype=np.float64)
    return Profile({"steps": str(steps)}, times, cut, {"blocks.*.attn": tuple(cut)})


def cache(recipe: str, steps: int = STEPS) -> dict[str, str]:
    (step,) = [s for s in fit(recipe, profile(steps)).steps if s.name == "cache"]
    assert step.options["residual"] == "yes"
    return {"region": str(step.options["region"]), "mask": str(step.options["mask"])}


def test_moving_tokens_are_the_foreground():
    found = foreground(list(VALUES.values()))
    assert found.shape == (RUNS, TOKENS)
    for n, moving in enumerate(MOVING):
        assert moving <= set(np.flatnonzero(found[n]))
        assert found[n].sum() == TOKENS / 2


def transcribed(block: str) -> float:
    """The focus of a block, token by token."""
    moved = np.zeros((RUNS, TOKENS))
    for values in VALUES.values():
        own = np.zeros((RUNS, TOKENS))
        for n in range(RUNS):
            for p in range(TOKENS):
                own[n, p] = sum(np.sqrt(((values[n, t, p] - values[n, t - 1, p]) ** 2).sum()) for t in range(1, STEPS))
            own[n] /= own[n].sum()
        moved += own
    given: dict[bool, list[float]] = {True: [], False: []}
    for n in range(RUNS):
        middle = sorted(moved[n])[TOKENS // 2 - 1 : TOKENS // 2 + 1]
        for p in range(TOKENS):
            sizes = [np.sqrt((VALUES[block][n, t, p].astype(float) ** 2).sum()) for t in range(STEPS)]
            given[moved[n, p] > sum(middle) / 2].append(float(np.mean(sizes)))
    return float(np.mean(given[True]) / np.mean(given[False]))


def test_focus_is_the_formula():
    found = focus(list(VALUES.values()))
    assert found == pytest.approx([transcribed(name) for name in VALUES], rel=1e-5)
    assert [b for b, f in enumerate(found) if f <= 1] == BACKGROUND


def test_runs_of_background_blocks_refresh_together():
    found = cache("profiling_dit")
    assert found["region"] == "blocks.0:1|blocks.2:4"
    program = Program({}, "step", {}, (), (), regions=tuple(Region(f"blocks.{i}", "block", "") for i in range(BLOCKS)))
    selected = [i for s in select_regions(program, found["region"]) for i in s.ids]
    assert selected == [f"blocks.{b}" for b in BACKGROUND]
    want = "".join("1" if t < 6 or (t - 6) % 6 == 0 else "0" for t in range(STEPS))
    assert found["mask"] == want == "11111110000010000010"


def test_published_lists():
    found = cache("profiling_dit{refresh=8 9 15,start=4,background=1 3-5}")
    assert found["region"] == "blocks.1:2|blocks.3:6"
    assert found["mask"] == "".join("1" if t < 4 or t in (8, 9, 15) else "0" for t in range(STEPS))
    assert numbers_of("0 2 4-7 10", 11) == [0, 2, 4, 5, 6, 7, 10] == numbers_of("10,4-7,2,0", 11)


def test_no_other_recipe_gives_this():
    """On a recording that has what all of them ask for."""
    mlps = {name.replace("attn", "mlp"): 2 * values for name, values in VALUES.items()}
    runs = dict.fromkeys(("blocks", "blocks.1:-1", "blocks.:-1"), VALUES["blocks.1.attn"])
    regions = {"blocks.*.attn": tuple(VALUES), "blocks.*.mlp": tuple(mlps), **{run: (run,) for run in runs}}
    whole = dataclasses.replace(profile(), values={**VALUES, **mlps, **runs}, regions=regions)
    mine = fit("profiling_dit", whole)
    others = ["bac", "cachequant", "ddt_sharing", "magcache", "smoothcache"]
    assert [name for name in others if fit(name, whole).steps == mine.steps] == []
    assert fit("profiling_dit{refresh=6}", whole).steps == mine.steps, "the comparison can be passed"


def test_streams_are_compared_with_their_like():
    """Blocks of two streams hold other tokens than blocks that join them."""
    half = TOKENS // 2
    values = dict(VALUES)
    for block in (0, 1):
        whole = values.pop(name := f"blocks.{block}.attn")
        values |= {name: whole[:, :, half:], f"{name}/1": whole[:, :, :half]}
    order = sorted(values)
    other = dataclasses.replace(profile(), values=values, regions={"blocks.*.attn": tuple(order)})
    (step,) = [s for s in fit("profiling_dit", other).steps if s.name == "cache"]
    assert step.options["region"] == "blocks.0:1|blocks.2:4"


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("profiling_dit{focus=0}", RecipeError, "no block is background-focused at focus=0"),
        ("profiling_dit{refresh=often}", RecipeError, "expected an interval, or a list of steps"),
        ("profiling_dit{refresh=3 9}", BadInput, "refresh step 3 given; expected steps from 6 to 19"),
        ("profiling_dit{background=2-}", BadInput, "expected numbers of blocks and ranges"),
        ("profiling_dit{background=4-7}", BadInput, "block 6 given in '4-7'; the model has 6 blocks, 0 to 5"),
        ("profiling_dit{start=0}", RecipeError, "expected at least 1, got 0"),
    ],
)
def test_bad_parameters(text, error, said):
    with pytest.raises(error, match=said):
        fit(text, profile())


def test_a_request_shorter_than_its_start_reuses_nothing_and_says_so():
    with pytest.warns(DitoptWarning, match="reuses nothing: start=6 and refresh leave none of the 5 steps"):
        made = fit("profiling_dit", profile(5))
    assert not [s for s in made.steps if s.name == "cache"]


def test_it_is_fitted_and_runs():
    """What is labelled background is reused between refreshes; the labels of a recording run too."""
    given = "profiling_dit{start=3,refresh=3,background=0 2}"
    recipe = ditopt.calibrate(Pipe(), given, sampler, steps=9, seeds=[1], progress=False)
    assert str(recipe).endswith("cache{region=blocks.0:1|blocks.2:3,mask=111100100,residual=yes}")
    plain, pipe = Pipe()(5, 9), ditopt.optimize(Pipe(), recipe, target="eager")
    assert 0 < float((pipe(5, 9) - plain).abs().max()) < 0.1
    (engine,) = [pipe.transformer.engine]
    assert [row.choices["cache0"][0] for row in engine.session.schedule_rows] == list("ccccrrcrr")
    fitted = ditopt.calibrate(Pipe(), "profiling_dit{start=3,focus=9}", sampler, steps=9, seeds=[1], progress=False)
    assert "region=blocks.0:3," in str(fitted)
