from __future__ import annotations

import csv
import dataclasses
import io
import math

import pytest
import torch

import ditopt
from ditopt import measure
from ditopt.errors import BadInput
from ditopt.measure import Comparison, Contender, Row, compare, judged, matching_steps, psnr
from tests import tiny_sampler

STEPS = 6


# -- psnr --------------------------------------------------------------------------------------------------------------


def test_psnr_is_per_sample_and_of_known_size():
    reference = torch.full((3, 1, 4, 4), 0.5)
    images = reference.clone()
    images[1] += 0.1
    images[2, 0, 0, 0] += 0.4  # mean square error 0.16 / 16
    found = psnr(images, reference)
    assert found.shape == (3,)
    assert math.isinf(found[0])
    assert found[1].item() == pytest.approx(20.0, abs=1e-4)
    assert found[2].item() == pytest.approx(20.0, abs=1e-4)


def test_psnr_takes_half_precision_and_any_rank():
    a, b = torch.zeros(2, 5), torch.full((2, 5), 0.25)
    assert psnr(a.half(), b.half())[0].item() == pytest.approx(-20 * math.log10(0.25), abs=1e-6)
    videos, other = torch.zeros(2, 3, 4, 5, 5), torch.zeros(2, 3, 4, 5, 5)
    other[1, :, 2] = 0.5  # one frame of four: mean square error 0.25 / 4
    assert psnr(other, videos).tolist() == pytest.approx([math.inf, -10 * math.log10(0.0625)], abs=1e-6)


@pytest.mark.parametrize(
    ("images", "reference", "said"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 3), "differ in shape"),
        (torch.zeros(2, 3), torch.full((2, 3), 1.5), r"reference lie in \[1.5, 1.5\]"),
        (torch.full((2, 3), -0.5), torch.zeros(2, 3), "scale them"),
        (torch.full((2, 3), math.nan), torch.zeros(2, 3), "NaN means they broke"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "at least one sample"),
        (torch.zeros(3), torch.zeros(3), "expected"),
    ],
)
def test_psnr_refuses(images, reference, said):
    with pytest.raises(BadInput, match=said):
        psnr(images, reference)


# -- fewer steps -------------------------------------------------------------------------------------------------------


def row(name: str, kind: measure.Kind, steps: int, share: float, db: float, **more) -> Row:
    return Row(name, kind, "eager", steps, share, share, 1.0, 1.0, db, db, **more)


PLAIN = [
    row("plain", "plain", 30, 1.0, math.inf),
    row("fewer steps", "fewer", 20, 2 / 3, 45.0),
    row("fewer steps", "fewer", 10, 1 / 3, 35.0),
]


@pytest.mark.parametrize(
    ("share", "db", "lost"),
    [
        (0.34, 34.9, "loses to 10 steps: 34.9 vs 35.0 dB"),
        (0.34, 35.1, ""),
        (0.32, 20.0, ""),  # nothing plain is that cheap
        (0.70, 44.0, "loses to 20 steps: 44.0 vs 45.0 dB"),
        (0.60, 40.0, ""),
        (1.0, 80.0, "loses to 30 steps: 80.0 vs inf dB"),
        (1.0, 140.0, ""),  # another backend's rounding
    ],
)
def test_a_recipe_loses_to_the_best_plain_row_of_at_most_its_cost(share, db, lost):
    assert judged([*PLAIN, row("r", "recipe", 30, share, db)])[-1].loses == lost


def test_work_outside_the_blocks_counts_for_the_verdict():
    cheap = row("r", "recipe", 30, 0.1, 30.0)
    assert judged([*PLAIN, cheap])[-1].loses == ""
    assert judged([*PLAIN, dataclasses.replace(cheap, share_total=0.4)])[-1].loses.startswith("loses to 10 steps")


def test_plain_rows_never_lose():
    assert not any(r.loses for r in judged([*PLAIN, row("fewer steps", "fewer", 15, 0.5, 1.0)]))


@pytest.mark.parametrize(
    ("cost", "steps", "expected"), [(1 / 3, 30, 10), (0.3297, 30, 9), (0.3355, 30, 10), (0.001, 30, 1)]
)
def test_matching_steps_never_cost_more(cost, steps, expected):
    assert matching_steps(cost, steps) == expected


# -- a comparison ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Comparison:
    plain = tiny_sampler.model()

    def fast(recipe: str) -> Contender:
        example = tiny_sampler.example()
        return Contender(
            recipe, lambda: ditopt.optimize(plain, recipe, example_inputs=example, steps=STEPS, target="eager")
        )

    return compare(
        tiny_sampler.sample,
        plain,
        [fast("lossless"), fast("forecast{interval=3,order=0,first=1}")],
        steps=STEPS,
        fewer=[4],
        seeds=(0, 1),
        extra={"mean": lambda images: float(images.mean())},
        progress=False,
    )


def by_label(found: Comparison) -> dict[str, Row]:
    return {measure.label(r): r for r in found.rows}


def test_rows_are_plain_then_fewer_then_recipes(found):
    kinds = [r.kind for r in found.rows]
    assert kinds == sorted(kinds, key=["plain", "compile", "fewer", "recipe"].index)
    # 4 was asked for; 2 is what the forecast's two computed steps of six cost
    assert [r.steps for r in found.rows if r.kind == "fewer"] == [4, 2]


def test_plain_is_the_unit(found):
    plain = found.rows[0]
    assert (plain.share, plain.share_total, plain.speed) == (1.0, 1.0, 1.0)
    assert math.isinf(plain.psnr)
    assert plain.seconds > 0


def test_fewer_steps_cost_their_share_and_differ(found):
    few = by_label(found)["4 steps"]
    assert few.share == few.share_total == pytest.approx(4 / STEPS)
    assert math.isfinite(few.psnr)
    assert few.speed > 0


def test_executed_work_is_what_the_session_counted(found):
    forecast = by_label(found)["forecast{interval=3,order=0,first=1} on eager"]
    assert forecast.share == pytest.approx(2 / STEPS, abs=0.06)  # a little less: modulation is hoisted
    assert forecast.share < 2 / STEPS < forecast.share_total + 0.06
    lossless = by_label(found)["lossless on eager"]
    assert lossless.share < lossless.share_total <= 1.0 + 1e-9, "hoisted values must be paid for in every request"
    assert math.isinf(lossless.psnr)
    assert lossless.loses == ""


def test_further_metrics_see_the_images_of_all_seeds(found):
    images = found.images["plain"]
    assert images.shape == (tiny_sampler.ROWS, 1, tiny_sampler.TOKENS, tiny_sampler.WIDTH)
    assert 0 < found.rows[0].extra["mean"] < 1


def test_optimized_models_are_kept_for_reports(found):
    assert set(found.models) == {"lossless on eager", "forecast{interval=3,order=0,first=1} on eager"}


def test_preparation_is_not_part_of_the_speed(found):
    lossless = by_label(found)["lossless on eager"]
    assert lossless.prepare > lossless.seconds  # capture takes far longer than six steps of a toy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fewer": [6]}, "from 1 to 5"),
        ({"fewer": [0]}, "from 1 to 5"),
        ({"seeds": ()}, "one seed"),
        ({"steps": 1}, "at least 2 steps"),
        ({"contenders": [Contender("a", tiny_sampler.model)] * 2}, "same name"),
    ],
)
def test_compare_refuses(change, said):
    given = {"contenders": [], "steps": 6, "progress": False, **change}
    with pytest.raises(BadInput, match=said):
        compare(tiny_sampler.sample, tiny_sampler.model(), given.pop("contenders"), **given)


def test_a_time_limit_ends_the_rounds_but_not_the_first():
    calls = []

    def sample(model, seed, steps):
        calls.append((seed, steps))
        return torch.full((2, 1, 2, 2), steps / 10)

    found = compare(sample, None, [], steps=4, fewer=[2], seeds=(5, 6, 7), time_limit=0.0, progress=False)
    assert found.rounds == 1
    assert calls == [(8, 4), (5, 4), (5, 2)]  # the preparation has a seed of its own
    assert compare(sample, None, [], steps=4, seeds=(5, 6, 7), progress=False).rounds == 3


# -- printing ----------------------------------------------------------------------------------------------------------


def test_table_lines_up_and_shows_the_loser():
    rows = judged([*PLAIN, row("cheap", "recipe", 30, 0.4, 20.0, extra={"accuracy": 0.975})])
    lines = measure.table(rows).splitlines()
    assert lines[0].split()[:3] == ["recipe", "target", "steps"]
    assert "vs compile" not in lines[0], "torch.compile did not run"
    assert "loses" not in measure.table(PLAIN)
    last = lines[-1]
    assert last.startswith("cheap")
    assert "97.5%" in last
    assert last.endswith("loses to 10 steps: 20.0 vs 35.0 dB")
    column = lines[0].index("PSNR dB") + len("PSNR dB")
    assert {line[column - 1 : column] for line in lines[2:] if line} <= set("0123456789f")


def test_table_compares_with_compile_where_it_ran():
    rows = [dataclasses.replace(r, speed_compiled=0.5) for r in PLAIN]
    assert "vs compile" in measure.table(rows)
    assert "0.50x" in measure.table(rows)


def test_csv_reads_back():
    rows = judged([*PLAIN, row("a, b", "recipe", 30, 0.4, 20.0, extra={"accuracy": 0.5})])
    read = list(csv.DictReader(io.StringIO(measure.to_csv(rows, torch="x", full_steps=30))))
    assert [r["name"] for r in read] == ["plain", "fewer steps", "fewer steps", "a, b"]
    assert read[0]["full_steps"] == "30"
    assert float(read[3]["accuracy"]) == 0.5
    assert float(read[0]["psnr"]) == math.inf
    assert read[3]["loses"].startswith("loses to 10 steps")
