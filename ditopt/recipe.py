"""Recipes: which passes to run with which options, as one line of text, a file, or the name of a published system.

    hoist_invariants, cache{region=blocks.1:-1,every=3,predictor=taylor,order=2}
    lossless, fora{interval=3}
    my_recipe.toml

A Recipe is intent and nothing else: frozen, hashable, and ``Recipe.parse(str(r)) == r``.
"""

from __future__ import annotations

import functools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ditopt import pipeline
from ditopt.errors import RecipeError
from ditopt.pipeline import Value, print_call, read_value, suggest
from ditopt.recipes import cache_dit

__all__ = ["Parameter", "Recipe", "Step", "System", "available"]


@dataclass(frozen=True)
class Step:
    """One pass of a recipe and the options that were given for it, in the order given."""

    name: str
    options: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", dict(self.options))  # a copy: the caller's dict may change

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.options.items())))

    def __str__(self) -> str:
        return print_call(self.name, self.options)


@dataclass(frozen=True)
class Recipe:
    """Steps in order. ``name`` is the published system or file that they came from, for display only. ``calibrated``
    says what the steps were fitted to (``ditopt.calibrate``; ditopt/fitted.py), by key; the text form leaves it out."""

    steps: tuple[Step, ...] = ()
    name: str = field(default="", compare=False)
    calibrated: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibrated", dict(self.calibrated))  # a copy: the caller's dict may change

    @staticmethod
    def parse(source: str | Path | Recipe) -> Recipe:
        """A recipe from a name, a line of text, a path to a .toml or .json file or a .yaml file of cache-dit, or a
        Recipe.

        The result is checked: every pass exists, every option has its type and range. RecipeError otherwise.
        """
        if isinstance(source, Recipe):
            return Recipe(tuple(_checked(s) for s in source.steps), source.name, source.calibrated)
        if isinstance(source, Path) or (isinstance(source, str) and source.strip().endswith(_ENDINGS)):
            return _from_file(Path(str(source).strip()))
        if isinstance(source, str):
            return _from_text(source)
        raise RecipeError(f"a recipe is a name, a line of text, a path or a Recipe, not {type(source).__name__}")

    def __str__(self) -> str:
        return ", ".join(map(str, self.steps)) if self.steps else NOTHING

    def to_json(self) -> str:
        """JSON text that ``Recipe.parse`` reads from a .json file."""
        steps = [{"pass": s.name, "options": dict(s.options)} for s in self.steps]
        fitted = {"calibrated": dict(self.calibrated)} if self.calibrated else {}
        return json.dumps({"ditopt_recipe": 1, "name": self.name, "steps": steps, **fitted}, indent=1)

    @staticmethod
    def from_json(text: str, where: str = "recipe") -> Recipe:
        """The reverse; RecipeError names ``where``."""
        try:
            data = json.loads(text)
            if data["ditopt_recipe"] != 1:
                raise RecipeError(f"{where}: recipe version {data['ditopt_recipe']}, this ditopt reads version 1")
            steps = tuple(Step(s["pass"], s.get("options", {})) for s in data["steps"])
            name = str(data.get("name", ""))
            calibrated = {str(k): str(v) for k, v in data.get("calibrated", {}).items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"{where} is not a recipe that Recipe.to_json wrote ({error!r})") from error
        return Recipe.parse(Recipe(steps, name, calibrated))


_ENDINGS = (".toml", ".json", ".yaml", ".yml")
NOTHING = "none"
"""The text of a recipe without passes. Empty text is more often a mistake than a wish."""


def _checked(step: Step) -> Step:
    """``step`` with its values typed by the pass."""
    made = pipeline.get(step.name).make(step.options)
    return Step(step.name, {k: getattr(made, k) for k in step.options})


# -- text --------------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z_]\w*")
_SPACE = re.compile(r"\s*")


class _Reader:
    """Reads ``name{key=value,...}, ...``; every error shows the text and the place."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r"\s", " ", text)  # one line, so that the caret of an error stands under its place
        self.at = 0

    def fail(self, expected: str) -> RecipeError:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        return RecipeError(
            f"recipe text, position {self.at}: expected {expected}, found {found}\n  {self.text}\n  {' ' * self.at}^"
        )

    def peek(self) -> str:
        match = _SPACE.match(self.text, self.at)
        assert match is not None  # it matches the empty string
        self.at = match.end()
        return self.text[self.at : self.at + 1]

    def name(self, what: str) -> str:
        self.peek()
        match = _NAME.match(self.text, self.at)
        if match is None:
            raise self.fail(what)
        self.at = match.end()
        return match.group()

    def calls(self) -> Iterator[tuple[str, dict[str, str]]]:
        while True:
            name = self.name("the name of a pass or recipe")
            yield name, self.options(name)
            if not self.peek():
                return
            if self.peek() != ",":
                raise self.fail("',' and another pass, '{' and options, or the end")
            self.at += 1

    def options(self, of: str) -> dict[str, str]:
        out: dict[str, str] = {}
        if self.peek() != "{":
            return out
        self.at += 1
        if self.peek() == "}":
            self.at += 1
            return out
        while True:
            start = self.at
            key = self.name(f"the name of an option of {of}")
            if key in out:
                self.at = start
                raise self.fail(f"every option once ({key} is there already)")
            if self.peek() != "=":
                raise self.fail(f"'=' after {key}")
            self.at += 1
            out[key] = self.value(key)
            if self.peek() not in (",", "}") or not self.peek():
                raise self.fail("',' or '}'")
            self.at += 1
            if self.text[self.at - 1] == "}":
                return out

    def value(self, key: str) -> str:
        quote = self.peek()
        if quote in ("'", '"') and quote:
            return self.quoted(quote)
        start, depth = self.at, 0
        while self.at < len(self.text):
            c = self.text[self.at]
            if c == "{":
                raise self.fail("a value; braces do not nest, put the value in quotes if it holds one")
            if c == "}" or (c == "," and depth == 0):
                break
            depth += (c == "[") - (c == "]")
            self.at += 1
        value = self.text[start : self.at].strip()
        if not value:
            raise self.fail(f"a value for {key}")
        return value

    def quoted(self, quote: str) -> str:
        self.at += 1
        out = ""
        while self.at < len(self.text):
            c = self.text[self.at]
            self.at += 1
            if c == quote:
                return out
            if c == "\\" and self.at < len(self.text):
                c = self.text[self.at]
                self.at += 1
            out += c
        raise self.fail(f"a closing {quote}")


def _from_text(text: str) -> Recipe:
    if text.strip() == NOTHING:
        return Recipe()
    calls = list(_Reader(text).calls())
    systems = available()
    steps: list[Step] = []
    for name, options in calls:
        if name in systems:
            # Two systems share their exact passes; one run of each is what is meant.
            steps += [s for s in systems[name].recipe(options).steps if s not in steps]
        elif name in pipeline.names():
            steps.append(_checked(Step(name, options)))
        else:
            near = suggest(name, [*systems, *pipeline.names()])
            raise RecipeError(f"no recipe and no pass is called {name!r}; {near}")
    return Recipe(tuple(steps), calls[0][0] if len(calls) == 1 and calls[0][0] in systems else "")


# -- files -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A knob of a published system, under the name its users know, and the other names they know it by.

    ``min``, ``max``: of a number. ``choices``: the words that a text may be, and for each the recipe text that stands
    in ``passes`` in its place (it may hold parameters without choices).
    """

    name: str
    default: Value
    doc: str
    aliases: tuple[str, ...] = ()
    min: float | None = None
    max: float | None = None
    choices: Mapping[str, str] = field(default_factory=dict)

    def read(self, what: str, value: Value) -> Value:
        """``value`` as the parameter's type; RecipeError names ``what`` where it is none, or out of range."""
        typed = read_value(what, type(self.default), value)
        if self.choices and typed not in self.choices:
            raise RecipeError(f"{what}: got {typed!r}; {suggest(str(typed), self.choices)}")
        if isinstance(typed, str):
            return typed
        if self.min is not None and not typed >= self.min:  # NaN is neither
            raise RecipeError(f"{what}: expected at least {self.min:g}, got {typed}")
        if self.max is not None and not typed <= self.max:
            raise RecipeError(f"{what}: expected at most {self.max:g}, got {typed}")
        return typed


@dataclass(frozen=True)
class System:
    """A recipe file: a published system as data. ``passes`` is recipe text with ``{parameter}`` in it.

    ``calibration`` names what fits the system to a model (a file of ditopt/calibration/sources); such a system may have
    no ``passes``, and then can only be used through ``ditopt.calibrate``.
    """

    name: str
    title: str
    passes: str
    contract: Literal["exact", "approximate"]
    source: str = ""
    seed: str = ""
    claim: str = ""
    notes: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    calibration: str = ""

    def recipe(self, given: Mapping[str, Value] | None = None) -> Recipe:
        """The recipe with some parameters changed; text values are read as the parameter's type."""
        values, words = self._read(given)
        if not self.passes:
            raise RecipeError(
                f"{self.name} is fitted to a model: r = ditopt.calibrate(model, {self.name!r}, sampler, steps=...), "
                "then pass r as recipe"
            )
        text = self._filled(values, words)
        try:
            return Recipe(_from_text(text).steps, self.name)
        except RecipeError as error:
            raise RecipeError(f"recipe {self.name}: {error}") from error

    def values(self, given: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """The value of every parameter by its name, some of them ``given`` under any of their names."""
        return self._read(given)[0]

    def _read(self, given: Mapping[str, Value] | None) -> tuple[dict[str, Value], dict[str, str]]:
        """The values by name, and the words under which some were given."""
        values: dict[str, Value] = {p.name: p.default for p in self.parameters}
        known = {alias: p for p in self.parameters for alias in (p.name, *p.aliases)}
        seen: dict[str, str] = {}
        for word, value in (given or {}).items():
            if word not in known:
                raise RecipeError(f"recipe {self.name} has no parameter {word!r}; {suggest(word, known)}")
            p = known[word]
            if p.name in seen:
                raise RecipeError(f"recipe {self.name}: {seen[p.name]} and {word} are one parameter; give it once")
            seen[p.name] = word
            values[p.name] = p.read(f"{self.name}{{{word}=...}}", value)
        return values, seen

    def _filled(self, values: Mapping[str, Value], given: Mapping[str, str]) -> str:
        """``passes`` with ``values`` in place. RecipeError where the word for a ``given`` one has no place there."""
        choices = {p.name: p.choices for p in self.parameters if p.choices}
        used: dict[str, Value] = {}

        def put(match: re.Match[str]) -> str:
            name = match.group(1)
            used[name] = value = values[name]
            return _PARAMETER.sub(put, choices[name][str(value)]) if name in choices else pipeline.print_value(value)

        text = _PARAMETER.sub(put, self.passes)
        for name, word in given.items():
            if name not in used:
                chosen = " and ".join(f"{n}={v}" for n, v in used.items() if n in choices)
                where = f"with {chosen}" if chosen else "unless the recipe is fitted (ditopt.calibrate)"
                raise RecipeError(f"recipe {self.name}: {word} has no effect {where}; leave it out")
        return text


_PARAMETER = re.compile(r"\{(\w+)\}")
_KEYS = {"name", "title", "source", "seed", "claim", "contract", "notes", "passes", "parameters", "calibration"}
_PARAMETER_KEYS = {"default", "doc", "aliases", "min", "max", "choices"}


def _system(text: str, where: str) -> System:
    """A recipe file's text as a System; RecipeError names ``where`` and the field."""
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where} is not TOML: {error}") from error
    for key in data:
        if key not in _KEYS:
            raise RecipeError(f"{where}: no field is called {key!r}; {suggest(key, sorted(_KEYS))}")
    fitted = bool(data.get("calibration"))
    for key in ("name", "passes"):
        if not isinstance(data.get(key, "" if key == "passes" and fitted else None), str):
            raise RecipeError(f"{where}: the field {key} (text) is missing")
    for key in ("title", "source", "seed", "claim", "calibration"):
        if not isinstance(data.get(key, ""), str):
            raise RecipeError(f"{where}: the field {key} is text, not {data[key]!r}")
    notes = data.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(n, str) for n in notes):
        raise RecipeError(f"{where}: the field notes is a list of texts, not {notes!r}")
    specs = data.get("parameters", {})
    texts = [data.get("passes", "").strip(), *_choice_texts(specs)]
    parameters = [_parameter(name, specs[name], "" if fitted else " ".join(texts), where) for name in specs]
    plain = {p.name for p in parameters if not p.choices}
    for i, text in enumerate(texts):
        for name in _PARAMETER.findall(text):
            if i == 0 and name not in specs:
                raise RecipeError(f"{where}: passes uses {{{name}}}, which [parameters] does not declare")
            if i and name not in plain:
                raise RecipeError(
                    f"{where}: the choice {text!r} uses {{{name}}}, which is no parameter without choices"
                )
    contract = data.get("contract", "approximate")
    if contract not in ("exact", "approximate"):
        raise RecipeError(f"{where}: contract is 'exact' or 'approximate', not {contract!r}")
    return System(
        name=data["name"],
        title=data.get("title", data["name"]),
        passes=texts[0],
        contract=contract,
        source=data.get("source", ""),
        seed=data.get("seed", ""),
        claim=data.get("claim", ""),
        notes=tuple(notes),
        parameters=tuple(parameters),
        calibration=data.get("calibration", ""),
    )


def _parameter(name: str, spec: Any, passes: str, where: str) -> Parameter:
    where = f"{where}: [parameters.{name}]"
    if not isinstance(spec, dict) or not {"default", "doc"} <= set(spec) <= _PARAMETER_KEYS:
        raise RecipeError(f"{where} needs default and doc, and may have aliases, min, max and choices")
    if not isinstance(spec["default"], (int, float, str, bool)):
        raise RecipeError(f"{where}: a default is a number, text, true or false, not {spec['default']!r}")
    if passes and f"{{{name}}}" not in passes:
        raise RecipeError(f"{where} is nowhere in passes; write {{{name}}} where it goes")
    choices = spec.get("choices", {})
    if not isinstance(choices, dict) or not all(isinstance(t, str) for t in choices.values()):
        raise RecipeError(f"{where}: choices is a table of words and the recipe text for each, not {choices!r}")
    if choices and spec["default"] not in choices:
        raise RecipeError(f"{where}: the default {spec['default']!r} is none of its choices {', '.join(choices)}")
    aliases = tuple(spec.get("aliases", ()))
    return Parameter(name, spec["default"], spec["doc"], aliases, spec.get("min"), spec.get("max"), choices)


def _choice_texts(specs: Any) -> list[str]:
    """The recipe text of every choice of every parameter."""
    tables = [s.get("choices") for s in specs.values() if isinstance(s, dict)]
    return [str(t) for table in tables if isinstance(table, dict) for t in table.values()]


def _from_file(path: Path) -> Recipe:
    if path.suffix in (".yaml", ".yml"):
        name, values = cache_dit.DBCacheSettings.read(path).system(str(path))
        return available()[name].recipe(values)
    text = _read(path)
    if path.suffix == ".json":
        return Recipe.from_json(text, str(path))
    return _system(text, str(path)).recipe()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe file {path} cannot be read ({error})") from error


def named(source: str | Path) -> tuple[System, dict[str, Value]]:
    """The one system that ``source`` names, as ``name{parameter=value,...}`` or as a .toml file, and its parameters'
    values. RecipeError for anything else."""
    if not isinstance(source, (str, Path)):
        raise RecipeError(
            f"a {type(source).__name__} was given; expected the name of a system, or the path of its file"
        )
    if isinstance(source, Path) or source.strip().endswith(".toml"):
        path = Path(str(source).strip())
        system = _system(_read(path), str(path))
        return system, system.values()
    calls = list(_Reader(source).calls())
    (name, options), systems = calls[0], available()
    if len(calls) > 1:
        raise RecipeError(f"{source!r} names {len(calls)} recipes or passes; expected one system, with its parameters")
    if name not in systems:
        raise RecipeError(f"no recipe is called {name!r}; {suggest(name, list(systems))}")
    return systems[name], systems[name].values(options)


def available() -> dict[str, System]:
    """The recipes that ship with ditopt, by name."""
    return dict(_shipped())


@functools.cache
def _shipped() -> dict[str, System]:
    folder = resources.files("ditopt.recipes")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): _system(f.read_text(encoding="utf-8"), f"recipes/{f.name}") for f in files}
