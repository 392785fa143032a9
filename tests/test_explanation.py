"""What explain says of a schedule: every part of it that changes when steps compute."""

import dataclasses
from typing import Any

import pytest

from ditopt.explanation import decision_text
from ditopt.ir.program import Decision, Interval, Predictor


def said(schedule):
    return decision_text(Decision("cache0", ("model",), schedule, Predictor(), (), ""))[1].strip()


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Interval(3, 2), "computes the first 2 steps, then one step in 3"),
        (Interval(0, 4, 1, resets="40% 73%"), "computes the first 4 steps, steps 40%, 73%, the last step"),
        (
            Interval(2, since=0.25, until=0.75, outside="reuse"),
            "computes the first step, then one step in 2; so from 25% to 75% of the request, outside of which every "
            "step reuses",
        ),
        (
            Interval(2, low=100, high=800),
            "computes the first step, then one step in 2; so while the model's time is between 100 and 800, else at "
            "every step",
        ),
        (Interval(mask="110"), "computes where the mask is 1: 110"),
    ],
)
def test_a_schedule_in_words(schedule, text):
    assert said(schedule) == text


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Interval)])
def test_no_field_of_a_schedule_is_left_out(field):
    plain = Interval(3, since=0.1, low=1.0, high=2.0)
    other: Any = {"mask": "101", "resets": "7", "outside": "reuse"}.get(
        field, 0.5 if field in ("since", "until") else 5
    )
    other = 1.5 if field in ("low", "high") else other
    assert said(dataclasses.replace(plain, **{field: other})) != said(plain)
