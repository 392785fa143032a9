"""Each recipe is told apart from every other: the transcription of one fails on what the file of another one does."""

import pytest

from ditopt import recipe as recipes
from ditopt.recipe import Recipe, available
from tests.recipes.oracle import differs
from tests.recipes.test_blocks import CASES as BLOCKS
from tests.recipes.test_forecasts import CASES as FORECASTS
from tests.recipes.test_gates import CASES as GATES

CASES = {**GATES, **BLOCKS, **FORECASTS}
NAMES = {name: str(case.recipe).split("{")[0] for name, case in CASES.items()}


def test_every_online_recipe_and_forecast_has_a_transcription():
    assert set(NAMES.values()) == {
        "ab2", "adacache", "cg_taylor", "dbcache", "dbprune", "dmd", "easycache", "firstblock", "foca", "hicache",
        "taylorseer", "tdc", "teacache",
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_no_other_recipe_does_the_same(name):
    others = [other for other in CASES if other != name]
    assert [o for o in others if not differs(CASES[name], CASES[o].recipe)] == []
    assert not differs(CASES[name], CASES[name].recipe), "the comparison can be passed"


@pytest.mark.parametrize(("name", "other"), [("hicache", "foca"), ("foca", "ab2"), ("ab2", "dmd"), ("dmd", "hicache")])
def test_another_file_under_the_same_name_and_parameters_fails(name, other, monkeypatch):
    text = f"{name}{{interval=3,first=4,on=run}}"
    case = next(c for c in FORECASTS.values() if Recipe.parse(c.recipe) == Recipe.parse(text))
    systems = {**available(), name: available()[other]}
    monkeypatch.setattr(recipes, "available", lambda: systems)
    swapped = str(Recipe.parse(text))  # a line of passes, so that the cached runs of ``text`` stay as they are
    assert differs(case, swapped)
