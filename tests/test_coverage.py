"""The coverage table stands: a core of denoisers and a rotating eighth of the others still do what it says.

The part changes each day; DITOPT_COVERAGE_PART=0..7 chooses one.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditopt.capture import capture
from ditopt.errors import CaptureError
from examples.bench import coverage
from examples.bench.probe import COLUMNS, YES, Row, as_near, one_line, probe
from tests.denoisers import REGISTRY

CORE = ("dit", "sd3", "flux", "z_image", "wan", "stable_audio")
"""One stream (exported too), two streams with a shorter last block, two lists, lists of tensors, video, sound."""

PARTS = 8
PART = int(os.environ.get("DITOPT_COVERAGE_PART", datetime.date.today().toordinal())) % PARTS
ROTATING = [name for name in REGISTRY if name not in CORE][PART::PARTS]

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def capture_once(monkeypatch):
    """Both recipes of a row start from one capture: it is most of the time, and the table's command makes two."""
    made = {}

    def once(model, spec, *rest):
        if spec.key not in made:
            made[spec.key] = capture(model, spec, *rest)
        return made[spec.key]

    monkeypatch.setattr("ditopt.capture.captures.capture", once)
    return made


def worse(row: Row, recorded: Row, columns: tuple[str, ...] = COLUMNS) -> list[str]:
    """The columns that the table has and the row has not."""
    lost = [c for c in columns if recorded.passed(c) and not row.passed(c)]
    return lost + ["hoisted"] * (row.hoisted < recorded.hoisted - 0.005)


@pytest.mark.parametrize("name", [*CORE, *ROTATING])
def test_a_row_is_no_worse_than_in_the_table(name, capture_once):
    print(f"DITOPT_COVERAGE_PART={PART}")
    recorded, full = coverage.read()[name], name == CORE[0]
    row = probe(name, full=full)
    assert len(capture_once) == row.passed("captured")
    assert worse(row, recorded, COLUMNS if full else COLUMNS[:-1]) == [], row.reasons()
    assert (row.bare > 0) == full


def test_the_table_has_every_denoiser():
    assert all(coverage.read()[name].passed("exact") for name in CORE[:3])
    assert list(coverage.read()) == list(REGISTRY)


def test_the_readme_shows_the_table():
    text = README.read_text()
    shown = text[text.index(coverage.BEGIN) :].split(coverage.END)[0]
    expected = f"{coverage.BEGIN}\n{coverage.markdown(list(coverage.read().values()))}\n"
    assert shown == expected, "run python -m examples.bench.coverage --readme and put what it prints into README.md"


# -- the command -------------------------------------------------------------------------------------------------------

GOOD = Row("flux", "export", 600, 6, 6, 2, 0.4, YES, YES, YES, 3.0, 1.5)
BAD = Row("wan", "export", 400, 2, 3, 2, 0.1, YES, "no: no site", "no: NaN", 2.0, 2.0)
TIMELESS = replace(GOOD, name="temporal", cached="none: it has no steps")
REFUSED = Row("dit", "refused: it looks at values", exact="no: no graph", cached="no: no graph", onnx="no: no graph")


def test_a_row_says_what_fails():
    assert GOOD.green
    assert GOOD.reasons() == []
    assert BAD.reasons() == ["blocks: 2 of 3", "cached: no site", "onnx: NaN"]
    assert REFUSED.reasons()[:2] == ["captured: it looks at values", "blocks: 0 of 0"]
    assert worse(BAD, GOOD) == ["blocks", "cached", "onnx", "hoisted"]
    assert worse(GOOD, BAD) == []


def test_rounding_counts_as_eager_rounds():
    exact = [[torch.tensor([1.0, 2.0], dtype=torch.float64)]]
    eager, near, far, none = ([[torch.tensor([1.0, 2.0 + d])]] for d in (2e-3, -3e-3, 5e-3, float("nan")))
    assert as_near(near, eager, exact)
    assert as_near(eager, eager, exact)
    assert not as_near(far, eager, exact)
    assert not as_near(none, eager, exact)
    assert not as_near([*near, *far], [*eager, *eager], [*exact, *exact])


def test_a_reason_names_no_folder_of_this_machine():
    error = CaptureError(
        "cannot be traced at /somewhere/lib/site-packages/diffusers/models/x.py:5 (a / b): see /tmp/q/y.z"
    )
    assert one_line(error) == "cannot be traced at diffusers/models/x.py:5 (a / b): see y.z"
    assert one_line(KeyError("k")) == "KeyError: 'k'"
    assert one_line(CaptureError("a" * 500 + "end")) == "a" * 200 + " ... " + "a" * 187 + "end"


def test_rows_are_written_in_the_order_of_the_registry_and_replaced(tmp_path):
    file = tmp_path / "table.csv"
    coverage.write([BAD, GOOD, REFUSED], file)
    assert coverage.read(file) == {"dit": REFUSED, "flux": GOOD, "wan": BAD}
    assert list(coverage.read(file)) == ["dit", "flux", "wan"]
    assert coverage.read(tmp_path / "none.csv") == {}


def test_the_markdown_counts_and_explains():
    text = coverage.markdown([REFUSED, GOOD, BAD])
    assert "**Of 3: captured 2, blocks 1, exact 2, cached 1, onnx 1; all five 1.**" in text
    assert "| flux | export | 6 | 2 | 40% | ✓ | ✓ | ✓ |" in text
    assert "| wan | export | ✗ 2 of 3 | 2 | 10% | ✓ | ✗ | ✗ |" in text
    assert "* wan: blocks: 2 of 3; cached: no site; onnx: NaN" in text
    assert "* flux" not in text


def test_a_question_that_does_not_apply_is_neither_passed_nor_failed():
    assert not TIMELESS.green
    assert TIMELESS.reasons() == []
    assert [c for c in COLUMNS if not TIMELESS.applies(c)] == ["cached"]
    text = coverage.markdown([GOOD, TIMELESS])
    assert "**Of 2: captured 2, blocks 2, exact 2, cached 1 of 1, onnx 2; all five 1.**" in text
    assert "| temporal | export | 6 | 2 | 40% | ✓ | n/a | ✓ |" in text
    assert "What fails" not in text
    assert "What does not apply, and why:\n\n* temporal: cached: it has no steps" in text


def test_what_is_measured_can_be_chosen():
    assert coverage.chosen(None, None) == list(REGISTRY)
    assert coverage.chosen(["wan", "dit"], None) == ["wan", "dit"]
    parts = [coverage.chosen(None, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(REGISTRY)
    for only, part, told in ((["waan"], None, "waan"), (None, "4/3", "4/3"), (None, "half", "K/N")):
        with pytest.raises(ValueError, match=told):
            coverage.chosen(only, part)


def test_a_denoiser_that_takes_too_long_is_a_row(monkeypatch):
    monkeypatch.setattr(coverage, "PRELOAD", [])
    row = coverage.measure("dit", limit=0.2)
    assert not row.green
    assert row.captured == "no: not done after 0 s"
    assert not row.passed("captured")
