"""Training of LESA's predictors: what it must recover, what the two stages are for, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ditopt.calibration import Profile, fit
from ditopt.calibration.learned import _experts, plan, splines, train
from ditopt.errors import BadInput, DitoptWarning, RecipeError
from ditopt.ir.learned import SHAPES

STEPS, CHANNELS = 18, 6
TIMES = np.linspace(1.0, 0.05, STEPS) ** 1.5


def rolled(values: np.ndarray, tables: dict[str, np.ndarray], mask: str) -> np.ndarray:
    """A request in closed loop: (T, rows, C), the formula of the paper on recorded computed steps."""
    out = list(values.astype(np.float64))
    for t in (t for t in range(len(mask)) if mask[t] == "0"):
        s, n = tables["stage"][t], tables["reads"][t]
        window = [out[t - 1 - i] for i in range(n)]
        z = np.concatenate(window, -1) @ tables["down"][s].T[: n * window[0].shape[-1]] @ tables["up"][s].T
        z = z + sum(m * h for m, h in zip(tables["mix"][s], window, strict=False)) + tables["bias"][s]
        out[t] = window[0] + tables["gate"][t] * z
    return np.stack(out)


def error(values: np.ndarray, tables: dict[str, np.ndarray], mask: str) -> float:
    """Relative to plain reuse."""
    held = [max(c for c in range(t + 1) if mask[c] == "1") for t in range(len(mask))]
    return float(np.abs(rolled(values, tables, mask) - values).mean() / np.abs(values[held] - values).mean())


def mask(interval: int, first: int = 4) -> str:
    return "".join(str(int(t < first or (t - first + 1) % interval == 0)) for t in range(STEPS))


def turning(seed: int, rows: int = 60, noise: float = 0.0) -> np.ndarray:
    """(1, T, rows, C): each channel turns into another one at a rate of its own, half way at twice the rate."""
    rng = np.random.default_rng(seed)
    mixer = np.linalg.qr(np.random.default_rng(5).normal(size=(CHANNELS, CHANNELS)))[0]
    start, out = rng.normal(size=(rows, CHANNELS)), []
    angle = np.zeros(CHANNELS // 2)
    for t in range(STEPS):
        angle = angle + np.array([0.1, 0.2, 0.3]) * (1 + (t >= STEPS // 2))
        c, s = np.cos(angle), np.sin(angle)
        a, b = start[:, ::2], start[:, 1::2]
        out.append(np.concatenate([a * c - b * s, a * s + b * c], 1) @ mixer)
    made = np.stack(out)[None]
    return (made + noise * rng.normal(size=made.shape)).astype(np.float32)


def test_linear_dynamics_of_each_stage_are_recovered():
    """Rotations are linear in the window: with enough rank nothing is left, on rows that were not trained on."""
    m = mask(3)
    tables = train(turning(0), TIMES, m, (2, 2), CHANNELS, 0)
    assert error(turning(1)[0], tables, m) < 0.35
    better = train(turning(0), TIMES, m, (2, 2), CHANNELS, 400)
    assert error(turning(1)[0], better, m) < 0.05
    one = train(turning(0), TIMES, m, (2,), CHANNELS, 400)  # one stage for two rates
    assert error(turning(1)[0], one, m) > 2 * error(turning(1)[0], better, m)


def test_the_second_training_is_for_closed_loops():
    """What fits recorded steps best goes wrong on its own predictions; closed loop mends that."""
    m = mask(6)
    first = train(turning(0, noise=0.05), TIMES, m, (4, 4), 2, 0)
    second = train(turning(0, noise=0.05), TIMES, m, (4, 4), 2, 150)
    values = turning(1, noise=0.05)[0]
    assert error(values, second, m) < 0.75 * error(values, first, m)


def test_what_is_written_is_what_was_trained():
    m, values = mask(3), turning(0)
    made, experts = _experts(values, TIMES, m, (3, 4), 3, 30, 0)
    features = torch.from_numpy(values[0])
    out = list(features)
    for t in made.predicted:
        s = made.stage[t]
        with torch.no_grad():
            out[t] = experts[s]([out[t - 1 - i] for i in range(made.lengths[s])], t)
    want = rolled(values[0], train(values, TIMES, m, (3, 4), 3, 30), m)
    np.testing.assert_allclose(torch.stack(out).numpy(), want, atol=2e-4)


def test_tables():
    m = mask(3)
    tables = train(turning(0), TIMES, m, (2, 9, 5), 3, 5)
    assert list(tables) == list(SHAPES)
    assert tables["stage"].tolist() == [0] * 6 + [1] * 6 + [2] * 6
    # the second stage first predicts step 7: there are 7 values before
    assert tables["reads"].tolist() == [0, 0, 0, 0, 2, 2, 0, 7, 7, 0, 7, 7, 0, 5, 5, 0, 5, 5]
    assert tables["mix"].shape == (3, 9)
    assert tables["down"].shape == (3, 3, 9 * CHANNELS)
    assert not tables["mix"][0, 2:].any()
    assert not tables["down"][1, :, 7 * CHANNELS :].any()
    assert tables["gate"][6] == 1
    assert len({round(float(g), 6) for g in tables["gate"][[7, 8, 10, 11]]}) == 4, "the gate follows the gaps"
    even = train(turning(0), np.arange(STEPS), m, (2, 2, 2), 3, 5)
    assert len({round(float(g), 5) for g in even["gate"][[7, 8, 10, 11]]}) == 1, "equal gaps, one gate"


def test_the_same_seed_gives_the_same_tables():
    one, two, other = (train(turning(0, 300), TIMES, mask(3), (2, 2), 2, 5, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(one[k], two[k]) for k in one)
    assert not np.array_equal(one["up"], other["up"])


def test_splines_are_cubic_and_sum_to_one():
    bases, gaps = splines(TIMES, 3)
    assert bases.shape == (STEPS, 3, 8)
    np.testing.assert_allclose(bases.sum(-1), 1, atol=1e-9)
    assert bases.min() >= 0
    assert (gaps.min(), gaps.max()) == (0, 1)
    own = -np.diff(TIMES)
    assert gaps[7, 1] == pytest.approx((own[5] - own.min()) / (own.max() - own.min()))
    knot = np.array([1 / 6, 2 / 3, 1 / 6])  # a cubic B-spline at its knots
    np.testing.assert_allclose(splines(np.cumsum([0, 0, 1]), 1)[0][1, 0, :3], knot, atol=1e-9)


def test_a_feature_that_does_not_move_is_held():
    still = np.ones((1, STEPS, 4, CHANNELS), np.float32)
    tables = train(still, TIMES, mask(3), (2, 2), 2, 5)
    np.testing.assert_allclose(rolled(still[0], tables, mask(3)), still[0], atol=1e-5)


# -- the source --------------------------------------------------------------------------------------------------------


def profile(steps: int = STEPS) -> Profile:
    values = turning(0)[:, :steps]
    return Profile({"steps": str(steps)}, TIMES[:steps], {"head": values}, {"head": ("head",)})


def test_the_recipe_and_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = fit("lesa{interval=3,first=2,last=2,windows=2 3,rank=2,iterations=3}", profile())
    (step,) = [s for s in made.steps if s.name == "cache"]
    assert step.options["mask"] == "110010010010010011"
    assert (step.options["region"], step.options["residual"], step.options["predictor"]) == ("blocks", "no", "learned")
    (path,) = tmp_path.iterdir()
    assert step.options["table"] == path.name
    assert path.name.startswith("lesa-")
    want = train(profile().values["head"], TIMES, "110010010010010011", (2, 3), 2, 3)
    assert all(np.array_equal(v, want[k]) for k, v in load_file(path).items())
    fit("lesa{interval=3,first=2,last=2,windows=2 3,rank=2,iterations=4}", profile())
    assert len(list(tmp_path.iterdir())) == 2, "another fit has a file of its own"


def test_interval_one_computes_every_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(DitoptWarning, match="reuses nothing: interval=1 computes every step"):
        made = fit("lesa{interval=1}", profile())
    assert "cache" not in [s.name for s in made.steps]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "steps", "said"),
    [
        ("lesa{interval=19}", STEPS, "interval=19.*this request has 18 steps"),
        ("lesa{interval=2}", 2, "windows=4 6 8.*3 stages given and this request has 2 steps"),
        ("lesa{windows=4 x}", STEPS, "expected a whole number from 1 on for each stage, as in '4 6 8'"),
        ("lesa{windows=0}", STEPS, "expected a whole number from 1 on"),
        ("lesa{rank=0}", STEPS, "expected at least 1, got 0"),
        ("lesa{table=nowhere/w.safetensors}", STEPS, "there is no folder .*nowhere; make it first"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, monkeypatch, recipe, steps, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=said):
        fit(recipe, profile(steps))
    assert not list(tmp_path.iterdir())


def test_fewer_steps_than_stages():
    with pytest.raises(BadInput, match="3 windows given for 2 steps"):
        plan("10", (2, 2, 2))
