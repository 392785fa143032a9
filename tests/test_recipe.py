"""Recipes: text, files, names; what is wrong is said with its place and with what would be right."""

from __future__ import annotations

import pickle
import sys
import textwrap
from pathlib import Path

import pytest

import ditopt.passes
from ditopt import pipeline
from ditopt import recipe as recipes
from ditopt.errors import RecipeError
from ditopt.recipe import Recipe, Step, available, named

STUB = """
from __future__ import annotations
from dataclasses import dataclass
from typing import Literal
from ditopt.errors import RecipeError
from ditopt.pipeline import Pass

@dataclass(frozen=True)
class Stub(Pass):
    contract = "approximate"
    region: str = "model"
    every: int = 2
    share: float = 0.5
    residual: bool = False
    basis: Literal["hold", "taylor"] = "hold"

    def validate(self) -> None:
        if self.every < 1:
            raise RecipeError(f"every={self.every}: expected 1 or more")
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A pass called stub_options, found as every pass is: by its file."""
    (tmp_path / "stub_options.py").write_text(STUB)
    monkeypatch.setattr(ditopt.passes, "__path__", [*ditopt.passes.__path__, str(tmp_path)])
    yield pipeline.get("stub_options")
    sys.modules.pop("ditopt.passes.stub_options", None)
    vars(ditopt.passes).pop("stub_options", None)


ROUND_TRIPS = [
    "stub_options",
    "stub_options{every=3}",
    "stub_options{residual=true,every=3}",  # given order is kept
    "stub_options{region=blocks.10%:90%,every=3}, stub_options{region=blocks.*.attn|blocks.*.mlp}",
    'stub_options{region="[1,2,-3]"}',
    'stub_options{region="a{b}, c"}',
    'stub_options{region="say \\"so\\" \\\\ there"}',
    'stub_options{region=""}',
    "stub_options{share=0.25,basis=taylor}",
    "none",
]


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_text_round_trip(stub, text):
    recipe = Recipe.parse(text)
    assert str(recipe) == text
    assert Recipe.parse(str(recipe)) == recipe
    assert hash(Recipe.parse(str(recipe))) == hash(recipe)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_values_take_the_type_of_the_option(stub):
    (step,) = Recipe.parse("stub_options { every = 3 , share=1, residual=True, region='4', basis=taylor }").steps
    assert step == Step("stub_options", {"every": 3, "share": 1.0, "residual": True, "region": "4", "basis": "taylor"})
    assert type(step.options["share"]) is float
    assert Recipe.parse(Recipe((Step("stub_options", {"every": "7"}),))).steps[0].options == {"every": 7}


def test_commas_in_brackets_are_part_of_a_value(stub):
    (step,) = Recipe.parse("stub_options{region=[1,2,-3],every=3}").steps
    assert step.options == {"region": "[1,2,-3]", "every": 3}


def test_options_are_a_copy():
    given = {"every": 3}
    step = Step("x", given)
    given["every"] = 4
    assert step.options == {"every": 3}


BAD = [
    ("stub_option", "did you mean 'stub_options'"),
    ("stub_options{evry=3}", "did you mean 'every'"),
    ("stub_options{every=three}", "expected a whole number, got 'three'"),
    ("stub_options{every=2.5}", "expected a whole number"),
    ("stub_options{every=0}", "expected 1 or more"),
    ("stub_options{share=lots}", "expected a number"),
    ("stub_options{residual=1}", "expected true or false"),
    ("stub_options{basis=tailor}", "did you mean 'taylor'"),
    ("stub_options{every=3,every=4}", "position 21"),
    ("stub_options{region={x}}", "position 20"),
    ("stub_options{every=}", "expected a value for every"),
    ("stub_options{every}", "expected '=' after every"),
    ("stub_options{every=3", "found the end"),
    ("stub_options{region='x}", "expected a closing '"),
    ("stub_options every=3", "position 13"),
    ("stub_options,", "expected the name of a pass or recipe, found the end"),
    ("", "expected the name of a pass or recipe, found the end"),
    ("taylorser", "did you mean 'taylorseer'"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_what_is_wrong_is_said(stub, text, said):
    with pytest.raises(RecipeError) as error:
        Recipe.parse(text)
    assert said in str(error.value)


def test_an_unknown_name_lists_what_exists(stub):
    with pytest.raises(RecipeError, match=r"there are: .*fora.*taylorseer.*stub_options"):
        Recipe.parse("qqqq")


def test_values_that_are_not_text_are_checked_too(stub):
    for options in ({"every": 2.0}, {"every": True}, {"residual": 1}, {"region": 3}, {"basis": "x"}):
        with pytest.raises(RecipeError, match=r"stub_options\{"):
            Recipe.parse(Recipe((Step("stub_options", options),)))


def test_another_type_is_refused():
    with pytest.raises(RecipeError, match="not int"):
        Recipe.parse(3)  # type: ignore[arg-type]


# -- files -------------------------------------------------------------------------------------------------------------

FILE = """
name = "mine"
passes = "stub_options{every={interval},share={share}}, stub_options{region=model}"
[parameters.interval]
default = 4
min = 2
doc = "how often"
aliases = ["N"]
[parameters.share]
default = 0.5
doc = "how much"
"""


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def test_toml_and_json_files(stub, tmp_path):
    recipe = Recipe.parse(write(tmp_path, FILE))
    assert str(recipe) == "stub_options{every=4,share=0.5}, stub_options{region=model}"
    assert recipe.name == "mine"
    assert Recipe.parse(str(tmp_path / "mine.toml")) == recipe
    assert Recipe.parse(write(tmp_path, recipe.to_json(), "mine.json")) == recipe


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "mine"', "", "the field name"),
        ("passes =", "pases =", "did you mean 'passes'"),
        ("{interval}", "3", "[parameters.interval] is nowhere in passes"),
        ("{share}", "{shar}", "[parameters.share] is nowhere in passes"),
        ("every={interval}", "every={interval},region={where}", "passes uses {where}"),
        ("min = 2", "most = 2", "[parameters.interval] needs"),
        ('doc = "how much"', 'doc = "how much"\nchoices = {a = "4"}', "the default 0.5 is none of its choices a"),
        ('doc = "how much"', 'doc = "how much"\nchoices = [3]', "choices is a table of words"),
        ('doc = "how often"', "", "[parameters.interval] needs"),
        ("default = 4", "default = [4]", "not [4]"),
        ('name = "mine"', 'name = "mine"\ntitle = 3', "the field title is text"),
        ('name = "mine"', 'name = "mine"\nnotes = "one"', "the field notes is a list"),
        ('name = "mine"', 'name = "mine"\ncontract = "close"', "'close'"),
        ('name = "mine"', 'name = "mine"\ncalibration = 3', "the field calibration is text"),
        ('name = "mine"', "name = ", "is not TOML"),
        ("stub_options{every", "stub_option{every", "recipe mine: no recipe and no pass"),
    ],
)
def test_a_broken_file_is_named(stub, tmp_path, old, new, said):
    assert old in FILE
    with pytest.raises(RecipeError) as error:
        Recipe.parse(write(tmp_path, FILE.replace(old, new)))
    assert said in str(error.value)
    assert "mine" in str(error.value)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"ditopt_recipe": 2, "steps": []}', "{", '{"ditopt_recipe": 1, "steps": [1]}']
)
def test_a_broken_json_is_named(tmp_path, text):
    with pytest.raises(RecipeError, match=r"bad\.json"):
        Recipe.parse(write(tmp_path, text, "bad.json"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.toml cannot be read"):
        Recipe.parse(tmp_path / "nowhere.toml")


CHOICES = """
name = "mine"
passes = "stub_options{{how},share={share}}"
[parameters.how]
default = "often"
doc = "how"
choices = {often = "every={interval}", once = "region=model"}
[parameters.interval]
default = 4
min = 2
max = 9
doc = "how often"
[parameters.share]
default = 0.5
doc = "how much"
"""


@pytest.fixture
def mine(stub, monkeypatch):
    """A system whose parameter has choices, under its name."""
    monkeypatch.setattr(recipes, "available", lambda: {"mine": recipes._system(CHOICES, "mine.toml")})


def test_a_choice_stands_for_recipe_text(mine):
    assert str(Recipe.parse("mine")) == "stub_options{every=4,share=0.5}"
    assert str(Recipe.parse("mine{interval=9}")) == "stub_options{every=9,share=0.5}"
    assert str(Recipe.parse("mine{how=once,share=1}")) == "stub_options{region=model,share=1.0}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mine{how=offen}", "got 'offen'; did you mean 'often'"),
        ("mine{how=once,interval=3}", "recipe mine: interval has no effect with how=once; leave it out"),
        ("mine{interval=10}", "expected at most 9, got 10"),
        ("mine{interval=1}", "expected at least 2, got 1"),
    ],
)
def test_a_choice_or_a_number_that_does_not_fit(mine, text, said):
    with pytest.raises(RecipeError) as error:
        Recipe.parse(text)
    assert said in str(error.value)


def test_a_choice_holds_no_other_choice(stub, tmp_path):
    text = CHOICES.replace("every={interval}", "every={how}").replace("{share}", "{share},every={interval}")
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=r"the choice 'every=\{how\}' uses \{how\}, which is no parameter without"):
        Recipe.parse(path)


# -- what ships --------------------------------------------------------------------------------------------------------

FITTED = tuple(name for name, system in available().items() if system.calibration and not system.passes)
SHIPPED = tuple(name for name in available() if name not in FITTED)


def test_recipes_are_named_apart():
    assert {"lossless", "fora", "taylorseer", "forecast"} <= set(SHIPPED)
    assert {"magcache", "smoothcache"} <= set(FITTED)
    assert not set(available()) & set(pipeline.names()), "a recipe and a pass share a name"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_complete(name):
    system = available()[name]
    recipe = Recipe.parse(name)
    assert system.name == recipe.name == name
    assert system.title
    assert system.source
    assert all(p.doc for p in system.parameters)
    assert Recipe.parse(str(recipe)) == recipe
    contracts = {pipeline.get(s.name).contract for s in recipe.steps}
    assert system.contract == ("exact" if contracts == {"exact"} else "approximate")


@pytest.mark.parametrize("name", FITTED)
def test_a_fitted_system_is_complete(name):
    system = available()[name]
    assert system.name == name
    assert system.title
    assert system.source
    assert not system.passes
    assert all(p.doc for p in system.parameters)
    first = system.parameters[0]
    for text in (
        name,
        f"{name}{{{first.name}={pipeline.print_value(first.default)}}}",
        f"lossless, {name}",
    ):
        with pytest.raises(RecipeError, match=rf"{name} is fitted to a model: r = ditopt\.calibrate\(model, '{name}'"):
            Recipe.parse(text)


def test_a_system_with_its_parameters():
    system, values = named("magcache{K=5,thresh=0.24}")
    assert (system.name, system.calibration) == ("magcache", "magcache")
    assert values == {"threshold": 0.24, "max_skip_steps": 5, "retention_ratio": 0.2}
    for text, said in (
        ("magcach", "did you mean 'magcache'"),
        ("magcache{K=-1}", "expected at least 0, got -1"),
        ("magcache{k=1}", "no parameter 'k'"),
        ("lossless, magcache", "names 2 recipes or passes; expected one system"),
        ("nowhere.toml", r"nowhere.toml cannot be read"),
        (3, "a int was given; expected the name of a system"),
    ):
        with pytest.raises(RecipeError, match=said):
            named(text)  # type: ignore[arg-type]


def test_what_a_recipe_was_fitted_to_stays_with_it(stub, tmp_path):
    key = {"steps": "30", "latent": "4x8x8"}
    recipe = Recipe(Recipe.parse("stub_options{every=4}").steps, "mine", key)
    key["steps"] = "another"
    assert recipe.calibrated == {"steps": "30", "latent": "4x8x8"}, "a copy"
    for again in (
        Recipe.parse(recipe),
        Recipe.from_json(recipe.to_json()),
        Recipe.parse(write(tmp_path, recipe.to_json(), "fitted.json")),
        pickle.loads(pickle.dumps(recipe)),
    ):
        assert again == recipe
        assert (again.name, again.calibrated) == ("mine", recipe.calibrated)
    assert str(recipe) == "stub_options{every=4}"
    assert Recipe.parse(str(recipe)) == recipe
    assert hash(Recipe.parse(str(recipe))) == hash(recipe)
    assert "calibrated" not in Recipe.parse("stub_options").to_json()
    with pytest.raises(RecipeError, match="recipe is not a recipe that"):
        Recipe.from_json('{"ditopt_recipe": 1, "steps": [], "calibrated": 3}')


def test_parameters_land_where_the_file_says():
    assert Recipe.parse("fora{interval=5}").steps[-1] == Step(
        "cache", {"region": "blocks.*.attn|blocks.*.mlp", "every": 5, "first": 1, "predictor": "hold"}
    )
    assert Recipe.parse("fora{N=5}") == Recipe.parse("fora{interval=5}")
    cache = Recipe.parse("taylorseer{cache_interval=4,max_order=2,first=3}").steps[-1].options
    assert (cache["predictor"], cache["every"], cache["order"], cache["first"]) == ("taylor", 4, 2, 3)
    cache = Recipe.parse("forecast").steps[-1].options
    assert (cache["region"], cache["predictor"], cache["time"]) == ("model", "lagrange", "timestep")
    assert (cache["every"], cache["order"], cache["first"]) == (2, 1, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fora{interva=3}", "did you mean 'interval'"),
        ("fora{interval=0}", "expected at least 1, got 0"),
        ("fora{interval=often}", "expected a whole number"),
        ("fora{N=3,interval=4}", "one parameter"),
    ],
)
def test_a_wrong_parameter_is_said_in_the_users_words(text, said):
    with pytest.raises(RecipeError) as error:
        Recipe.parse(text)
    assert said in str(error.value)


def test_recipes_and_passes_mix():
    mixed = Recipe.parse("lossless, fora{interval=3}")
    names = [s.name for s in mixed.steps]
    assert names.count("canonicalize") == names.count("hoist_invariants") == names.count("outline_blocks") == 1
    assert names[-1] == "cache"
    assert mixed.name == ""
    assert Recipe.parse("canonicalize, canonicalize").steps[1:], "what is written twice runs twice"
