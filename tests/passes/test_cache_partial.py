"""A cache that decides three ways by one sum: hold the output, run part of the tokens, run all."""

from __future__ import annotations

import re

import pytest

import ditopt
from ditopt.errors import RecipeError
from ditopt.explanation import decision_text
from ditopt.pipeline import Context, PassManager
from ditopt.recipe import Recipe
from tests.recipes.test_hetcache import STEPS, example, model, run
from tests.tiny_models import captured

LIMIT = 0.2
TOKENS = "canonicalize, outline_blocks, edit_tokens{mask=x:0,margin=0,ratio=0.5,first=1,last=1}, "
SUM = f"cache{{region=model,first=1,last=1,signal=modulated,test=sum,threshold={LIMIT},partial=1.5"


@pytest.mark.parametrize("restart", ["full", "any"])
def test_the_sum_decides_how_a_step_runs(restart):
    recipe = f"{TOKENS.replace('x:0', 'hidden_states:4').replace('0.5', '0.9')}{SUM},restart={restart}}}"
    fast = ditopt.optimize(model(), recipe, target="eager", example_inputs=example())
    run(fast)
    session = fast.engine.session
    assert session.measured["tokens0"] == session.measured["cache1"], "one number decides"
    assert len(session.measured["cache1"]) == STEPS - 2
    total, expected = 0.0, ["full"]
    for change in session.measured["cache1"]:
        total += change
        way = "hold" if total < LIMIT else "partial" if total < 1.5 * LIMIT else "full"
        expected.append(way)
        total = 0.0 if way == "full" or (restart, way) == ("any", "partial") else total
    found = [
        "hold" if row.choices["cache1"] == "reuse" else "partial" if row.choices["tokens0"] == "reuse" else "full"
        for row in session.schedule_rows
    ]
    assert found == [*expected, "full"]
    assert set(expected) == {"hold", "partial", "full"}


def passed(recipe):
    return PassManager(Recipe.parse(recipe), Context("eager")).run(captured("plain")[1].program)[-1]


def test_explanations_say_what_the_sum_is_of():
    tokens, hold = passed(f"{TOKENS}{SUM}}}").program.decisions
    assert "and reuses while its sum since the last step that tokens0 computed is below 0.2" in decision_text(hold)[-1]
    assert "and reuses while its sum since the last step that it computed is below 0.3" in decision_text(tokens)[-1]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("cache{region=model,partial=1.5}", "partial=.* says how to read a signal: give signal="),
        (f"{TOKENS}{SUM.replace('1.5', '0.9')}}}", "partial=0.9.: expected a number above 1"),
        (f"{TOKENS}{SUM.replace('test=sum,', '')}}}", "is a limit of a sum: give test=sum as well"),
        (f"{TOKENS.replace('last=1', 'last=2')}{SUM}}}", "share a sum, so the same steps must begin it anew"),
    ],
)
def test_settings_that_make_no_sense(recipe, said):
    with pytest.raises(RecipeError, match=said):
        passed(recipe)


def test_without_a_choice_of_tokens():
    last = passed(f"{SUM}}}")
    assert last.applied == 0
    assert [re.sub(r" +", " ", s) for s in last.refused] == [
        "partial=1.5 needs edit_tokens in the recipe: a part of the tokens to run on"
    ]
