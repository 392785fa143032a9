"""LESA, trained on the small denoiser: against a transcription of its formula in NumPy, with the weights that the
training wrote."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import ditopt
from ditopt.errors import DitoptWarning, RecipeError, SessionError
from tests.recipes.oracle import (
    STEPS,
    Array,
    Case,
    Step,
    agrees,
    captures_shared,
    differs,
    drive,
    error,
    exact,
    model,
    on,
    parts,
    request,
    run,
)

SETTING = "interval=3,first=3,windows=2 4,rank=8,iterations=40"


@functools.cache
def trained(system: str = "lesa", setting: str = SETTING, sampler: str = "euler") -> ditopt.Recipe:
    folder = Path(tempfile.mkdtemp())
    with on(sampler=sampler), captures_shared(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DitoptWarning)  # interval=1 reuses nothing
        return ditopt.calibrate(
            model(),
            f"{system}{{{setting},table={folder / 'weights.safetensors'}}}",
            lambda running, seed: request(drive(running), seed),
            steps=STEPS,
            seeds=[11, 12],
            progress=False,
        )


def cached(recipe: ditopt.Recipe) -> dict[str, Any]:
    (step,) = [s for s in recipe.steps if s.name == "cache"]
    return dict(step.options)


def lesa(recipe: ditopt.Recipe) -> Step:
    """h0 + gate (mix . h + up down concat(h) + bias): the newest K features, computed or predicted, newest first."""
    mask, w = str(cached(recipe)["mask"]), load_file(cached(recipe)["table"])
    p, window = parts(), list[Array]()

    def step(k: int, x: Array, t: float) -> tuple[list[str], Array]:
        h = p.begin(x, t)
        if mask[k] == "1":
            new = p.blocks(h)
        else:
            s, n = w["stage"][k], w["reads"][k]
            matrix = (w["up"][s] @ w["down"][s])[:, : n * h.shape[-1]]
            z = np.concatenate(window[:n], -1) @ matrix.T + w["bias"][s]
            z = z + sum(w["mix"][s, i] * window[i] for i in range(n))
            new = window[0] + w["gate"][k] * z
        window.insert(0, new)
        return ["compute" if mask[k] == "1" else "reuse"], p.end(new)

    return step


def case(sampler: str = "euler") -> Case:
    recipe = trained(sampler=sampler)
    return Case(str(recipe), lambda: lesa(recipe))


def test_predicted_steps_follow_the_formula():
    assert cached(trained())["mask"] == "1110010010010011"
    assert cached(trained())["region"] == "blocks"
    tables = load_file(cached(trained())["table"])
    assert tables["reads"].tolist() == [0, 0, 0, 2, 2, 0, 2, 2, 0, 4, 4, 0, 4, 4, 0, 0]
    assert tables["stage"].tolist() == [0] * 8 + [1] * 8
    agrees(case())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    with on(dtype=dtype):
        agrees(case())


@pytest.mark.parametrize("sampler", ["doubled", "calls"])
def test_guidance(sampler):
    """Trained and run with it; each of two calls has a window of its own."""
    one = case(sampler)
    with on(sampler=sampler):
        agrees(one)


def test_another_file_fails():
    """Other weights, the schedule of another interval, and another fitted system of the same interval."""
    other = trained(setting=SETTING.replace("iterations=40", "iterations=0"))
    assert cached(other)["mask"] == cached(trained())["mask"]
    assert differs(case(), str(other))
    assert differs(case(), str(trained(setting=SETTING.replace("interval=3", "interval=2"))))
    assert differs(case(), str(trained("cachequant", "interval=3")))
    assert differs(case(), f"lossless, cache{{region=blocks,residual=no,mask={cached(trained())['mask']}}}")
    assert not differs(case(), str(trained()))


def test_it_errs_less_than_reuse_and_extrapolation_on_the_same_steps():
    """On a request that it was not trained on."""
    plain = run("lossless").outputs
    other = "lossless, cache{{region=blocks,residual=no,mask={},predictor={},order={}}}".format
    hold, line = (other(cached(trained())["mask"], *p) for p in (("hold", 0), ("newton", 1)))
    errors = [float(np.abs(run(r).outputs - plain).mean()) for r in (str(trained()), hold, line)]
    assert errors[0] < 0.8 * min(errors[1:])


def test_interval_one_is_exact():
    recipe = trained(setting=SETTING.replace("interval=3", "interval=1"))
    assert "cache" not in [s.name for s in recipe.steps]
    assert error(run(str(recipe)).outputs, run("lossless").outputs) == 0
    exact(str(trained()).replace(str(cached(trained())["mask"]), "1" * STEPS))


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_branch_that_begins_late_computes_until_its_window_is_full():
    """A second call joins at step 2: it lacks values at step 3, and one at step 4."""
    fast = ditopt.optimize(model(), trained(), steps=STEPS, target="eager")
    with captures_shared(), fast.session(steps=STEPS):
        for k in range(STEPS):
            t = 3.0 * (1 - k / STEPS)
            for branch in range(1 + (k >= 2)):
                x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(k))
                label = torch.tensor([3, 7]) * (1 - branch)
                fast(x=x, t=torch.full((2,), t), y=label)
    mask = str(cached(trained())["mask"])
    chosen = {b: "".join("01"[r.graph == "full"] for r in fast.schedule_rows if r.branch == b) for b in (0, 1)}
    assert chosen == {0: mask, 1: "11" + mask[4:]}


def test_requests_of_other_lengths_and_schedulers_are_told():
    recipe = trained()
    fast = ditopt.optimize(model(), recipe, target="eager")
    said = "its mask has 16 entries and this request runs 12 steps"
    with captures_shared(), fast.session(steps=12), pytest.raises(SessionError, match=said):
        request(drive(fast), stop=1)
    said = "latent was 4x8x8 and is 4x12x12"
    with captures_shared(), on(size=12), fast.session(steps=STEPS), pytest.warns(DitoptWarning, match=said):
        request(drive(fast))


def test_tables_end_before_the_request():
    """By a schedule without a number of steps."""
    text = str(trained()).replace(f"mask={cached(trained())['mask']}", "every=2")
    fast = ditopt.optimize(model(), text, target="eager")

    def go():
        for k in range(STEPS + 4):
            fast(x=torch.randn(2, 4, 8, 8), t=torch.full((2,), 3.0 - k * 0.1), y=torch.tensor([3, 7]))

    said = "its predictor is for 16 steps and this is step 17"
    with captures_shared(), fast.session(steps=STEPS + 4), pytest.raises(SessionError, match=said):
        go()
    assert [r.graph for r in fast.schedule_rows][:6] == ["full", "full", "full", "reuse", "full", "full"]


def test_it_is_described():
    said = ditopt.explain(model(), trained(), example_inputs=_example(), steps=STEPS, target="eager")
    assert "predicted by a trained module of the last 4 values, for 16 steps" in said


def _example():
    return {"x": torch.zeros(2, 4, 8, 8), "t": torch.ones(2), "y": torch.tensor([3, 7])}


# -- what cannot be used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("lesa", r"lesa is fitted to a model: r = ditopt\.calibrate"),
        ("cache{region=blocks,predictor=learned}", r"needs table=.*ditopt\.calibrate\(model, 'lesa'"),
        ("cache{region=blocks,table=a.safetensors}", "give predictor=learned as well"),
        ("cache{predictor=learned,table=a,time=timestep}", "leave time out"),
        ("cache{predictor=learned,table=a,correction=b}", "give one of both"),
        ("cache{predictor=learned,table=a,order=2}", "learned has no order to choose"),
        ("cache_guidance{predictor=learned}", "choose one without a window"),
    ],
)
def test_what_does_not_fit_together(recipe, said):
    with pytest.raises(RecipeError, match=said):
        ditopt.Recipe.parse(recipe)


def damaged(tables, what):
    if what == "names":
        del tables["gate"]
    elif what == "sizes":
        tables["bias"] = tables["bias"][:, 1:]
    elif what == "numbers":
        tables["mix"][0, 0] = np.nan
    elif what == "stages":
        tables["stage"][3] = 7
    elif what == "channels":
        tables["up"], tables["bias"] = tables["up"][:, 1:], tables["bias"][:, 1:]
        tables["down"] = tables["down"][:, :, 4:]
    return tables


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("names", r"holds .*; expected reads \(steps\), stage \(steps\), gate \(steps\)"),
        ("sizes", "whose sizes do not agree; calibrate again"),
        ("numbers", "numbers that are not finite; calibrate again"),
        ("stages", "names stages or lengths of its window that it does not have"),
        ("channels", "the predictor has 31 channels, the predicted value .* has 32; calibrate again for this region"),
        ("missing", "cannot be read"),
    ],
)
def test_files_that_do_not_fit(tmp_path, what, said):
    from safetensors.numpy import save_file

    path = tmp_path / "weights.safetensors"
    if what != "missing":
        tables = damaged(load_file(cached(trained())["table"]), what)
        save_file({k: np.ascontiguousarray(v) for k, v in tables.items()}, path)
    text = str(trained()).replace(str(cached(trained())["table"]), str(path))
    fast = ditopt.optimize(model(), text, steps=STEPS, target="eager")
    with captures_shared(), pytest.raises(RecipeError, match=said):
        request(drive(fast), stop=1)
