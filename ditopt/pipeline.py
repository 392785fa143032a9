"""Passes and the manager that runs them.

A pass is one file of ``ditopt.passes`` holding one frozen dataclass. Its fields *are* its options, its file name is its
name, so every pass can be named on a command line, in a recipe and in a bug report; adding one edits no other file.
The manager orders passes, verifies the Program after each, keeps the last good one, and lets no pass be silent.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ditopt.errors import BadInput, DitoptError, PassError, RecipeError, VerifyError

if TYPE_CHECKING:
    from torch import Tensor

    from ditopt.ir.program import Program
    from ditopt.recipe import Recipe

Value = int | float | str | bool
"""What an option can hold."""


@dataclass(frozen=True)
class Guidance:
    """``copies``: how often the batch of a call holds each latent, as guidance by a doubled batch does;
    ``unconditional``: which half of it has one prompt for all of its samples, "" where both halves or none have."""

    copies: int = 1
    unconditional: Literal["", "first", "second"] = ""


@dataclass(frozen=True)
class Context:
    """What a pass may know besides the Program.

    ``target``: what will run the result, as ``ditopt.target.resolve`` gives it. ``steps``: steps of a request where
    the caller knows them. ``guidance()``: what the first call shows of guidance. ``given``: its inputs by name, where
    they are known. ``report``: called with a line of text where a pass has something slow to tell.
    """

    target: str = "eager"
    steps: int | None = None
    guidance: Callable[[], Guidance] = lambda: Guidance()
    given: Mapping[str, Tensor] = field(default_factory=dict)
    report: Callable[[str], None] = lambda line: None

    def check_mask(self, mask: str) -> None:
        """RecipeError where ``mask`` (one digit a step, or "") is not as long as the request."""
        if mask and self.steps and len(mask) != self.steps:
            raise RecipeError(f"mask has {len(mask)} steps, the request has {self.steps}: give one digit a step")


@dataclass(frozen=True)
class Outcome:
    """What a pass did: the new Program, sites changed, one sentence for each thing refused, and notes.

    ``applied == 0`` if and only if ``program`` prints as before, and then ``refused`` is not empty.
    """

    program: Program
    applied: int
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Pass:
    """Base of every pass; a subclass is a frozen dataclass whose fields (int, float, str, bool or a Literal of str, all
    with defaults) are its options. No option is called like an attribute of this class (``name``, ``text`` ...).

    ``contract``: "exact", or "approximate" with a neutral setting. ``requires``: passes that must have run before; the
    manager adds them where absent. ``after``: passes that run earlier where both are asked for. ``legalizes``: targets
    that cannot run what this pass removes; for these the manager runs it last, asked for or not.
    """

    name: ClassVar[str] = ""
    contract: ClassVar[Literal["exact", "approximate"]]
    requires: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    legalizes: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.rpartition(".")[2]

    def run(self, program: Program, context: Context) -> Outcome:
        """A new Program; ``program`` itself is never changed."""
        raise NotImplementedError

    def validate(self) -> None:
        """RecipeError with a sentence where an option is out of range."""

    @classmethod
    def neutral(cls) -> Self | None:
        """A setting at which an approximate pass computes what the plain model computes; None for exact passes."""
        return None

    @classmethod
    def example_applies(cls) -> Program:
        """A small Program on which the pass, at its defaults, applies."""
        raise NotImplementedError

    @classmethod
    def example_refuses(cls) -> Program:
        """A small Program on which the pass, at its defaults, applies nothing and says why."""
        raise NotImplementedError

    @property
    def pace(self) -> tuple[float, ...]:
        """What the pass asks of the sampler: factors of its steps (ir/pacing.py), () where it leaves them alone."""
        return ()

    @property
    def text(self) -> str:
        """Canonical text: the options that differ from their defaults, in field order."""
        given = {f.name: getattr(self, f.name) for f in _fields(type(self)) if getattr(self, f.name) != f.default}
        return print_call(self.name, given)

    @classmethod
    def options(cls) -> dict[str, tuple[Any, Value]]:
        """Option name -> (type, default), in order."""
        types = typing.get_type_hints(cls)
        return {f.name: (types[f.name], typing.cast(Value, f.default)) for f in _fields(cls)}

    @classmethod
    def make(cls, given: Mapping[str, Value]) -> Self:
        """The pass with these options; text values are read as the option's type. RecipeError where that fails."""
        known = cls.options()
        values = {}
        for option, value in given.items():
            if option not in known:
                raise RecipeError(f"{cls.name} has no option {option!r}; {suggest(option, known)}")
            values[option] = read_value(f"{cls.name}{{{option}=...}}", known[option][0], value)
        made = cls(**values)
        made.validate()
        return made


def _fields(cls: type[Pass]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)  # type: ignore[arg-type]


# -- options as text ---------------------------------------------------------------------------------------------------

_NEEDS_QUOTES = set(" \t\n,{}\"'=\\")


def print_value(value: Value) -> str:
    """An option's value as recipe text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value)
    if value and not _NEEDS_QUOTES & set(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def print_call(name: str, options: Mapping[str, Value]) -> str:
    """``name{option=value,...}``, or ``name`` where no option is given."""
    inside = ",".join(f"{k}={print_value(v)}" for k, v in options.items())
    return f"{name}{{{inside}}}" if inside else name


def read_value(what: str, type_: Any, value: Value) -> Value:
    """``value`` as ``type_``: text is parsed, other values must already be of the type. RecipeError names ``what``."""
    wrong = RecipeError(f"{what}: expected {describe_type(type_)}, got {value!r}")
    if typing.get_origin(type_) is Literal:
        choices = typing.get_args(type_)
        if value not in choices:
            raise RecipeError(f"{what}: got {value!r}; {suggest(str(value), choices)}")
        return value
    if type_ is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if type_ is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool) or (type_ is int and isinstance(value, float)):
        raise wrong
    try:
        return int(value) if type_ is int else float(value)
    except ValueError:
        raise wrong from None


def describe_type(type_: Any) -> str:
    """A type in a user's words."""
    if typing.get_origin(type_) is Literal:
        return "one of " + ", ".join(typing.get_args(type_))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[type_]


def suggest(word: str, known: Iterable[str]) -> str:
    """What an unknown ``word`` may have meant, and what exists."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(word, names, 1)
    listed = f"there are: {', '.join(names)}" if names else "there are none"
    return f"did you mean {close[0]!r}? ({listed})" if close else listed


# -- discovery ---------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """Names of all passes: the files of ``ditopt.passes``. Imports none of them."""
    package = importlib.import_module("ditopt.passes")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def get(name: str) -> type[Pass]:
    """The pass of this name; RecipeError with a suggestion where there is none."""
    if name not in names():
        raise RecipeError(f"no pass is called {name!r}; {suggest(name, names())}")
    module = importlib.import_module(f"ditopt.passes.{name}")
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Pass) and c.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise PassError(f"passes/{name}.py must hold exactly one Pass, it holds {len(found)}")
    _check_shape(name, found[0])
    return found[0]


def discover() -> dict[str, type[Pass]]:
    """Every pass by name."""
    return {name: get(name) for name in names()}


def _check_shape(name: str, cls: type[Pass]) -> None:
    """PassError, addressed to the author of the pass, where the class is not what ``Pass`` asks for."""
    where = f"passes/{name}.py: {cls.__name__}"
    params = cls.__dict__.get("__dataclass_params__")
    if params is None or not params.frozen:
        raise PassError(f"{where} must be a @dataclass(frozen=True)")
    for f in _fields(cls):
        if hasattr(Pass, f.name):
            raise PassError(
                f"{where}: an option cannot be called {f.name!r}, which every pass has; choose another word"
            )
        if f.default is dataclasses.MISSING:
            raise PassError(f"{where}.{f.name} needs a default")
    if cls.name != name:
        raise PassError(f"{where} is called {cls.name!r}; the name of a pass is that of its file")
    if getattr(cls, "contract", None) not in ("exact", "approximate"):
        raise PassError(f'{where} must declare contract = "exact" or "approximate"')
    for option, (type_, _) in cls.options().items():
        if type_ not in (int, float, str, bool) and typing.get_origin(type_) is not Literal:
            raise PassError(f"{where}.{option}: an option is an int, float, str, bool or Literal, not {type_}")


# -- running -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PassResult:
    """One entry of a history: what one pass did to ``before``. ``asked`` is False for a pass that the manager added."""

    name: str
    text: str
    before: Program
    program: Program
    applied: int
    refused: tuple[str, ...]
    notes: tuple[str, ...]
    ms: float
    asked: bool = True

    def diff(self) -> str:
        """What the pass changed, as text."""
        from ditopt.ir.text import diff

        return diff(self.before, self.program)

    def __str__(self) -> str:
        said = "".join(f"\n  refused: {s}" for s in self.refused) + "".join(f"\n  note: {s}" for s in self.notes)
        return f"{self.text}: applied {self.applied} ({self.ms:.1f} ms){said}"


class PassManager:
    """Runs a recipe over a Program.

    Every result is verified and timed, and passed to ``after_each`` (snapshots, differential tests). A pass that
    raises becomes a PassError that holds the last good Program; what a pass raises on purpose (a DitoptError, such as
    a selector that matches nothing) keeps its type and says which pass it came from.
    """

    def __init__(
        self,
        recipe: Recipe | str,
        context: Context | None = None,
        after_each: Callable[[PassResult], None] | None = None,
    ) -> None:
        from ditopt.recipe import Recipe

        self.recipe = Recipe.parse(recipe)
        self.context = context or Context()
        self.after_each = after_each

    def plan(self, program: Program) -> list[tuple[Pass, bool]]:
        """The passes in the order in which they will run, each with whether the recipe asked for it."""
        todo = [(get(s.name).make(s.options), True) for s in self.recipe.steps]
        ordered = _in_order(_with_requirements(todo, {_name_of(text) for text in program.applied}))
        asked = {p.name for p, _ in ordered}
        legal = [c for n, c in discover().items() if self.context.target in c.legalizes and n not in asked]
        return [*ordered, *((c.make({}), False) for c in legal)]

    def run(self, program: Program) -> list[PassResult]:
        """One result a pass, in order; the last one holds the final Program (an empty recipe gives none)."""
        return list(self.iterate(program))

    def iterate(self, program: Program) -> Iterator[PassResult]:
        """The same, one pass at a time. VerifyError where ``program`` is not well formed to begin with."""
        from ditopt.ir.verify import verify

        verify(program)  # else the first pass would be blamed
        earlier: list[str] = []
        for pass_, asked in self.plan(program):
            result = self._one(pass_, asked, program, tuple(earlier))
            if not asked and not result.applied and pass_.legalizes:
                continue  # the target runs the program as it is
            program = result.program
            earlier.append(pass_.text)
            if self.after_each is not None:
                self.after_each(result)
            yield result

    def _one(self, pass_: Pass, asked: bool, program: Program, earlier: tuple[str, ...]) -> PassResult:
        from ditopt.ir.verify import verify

        start = time.perf_counter()
        history = f"after {', '.join(earlier)}" if earlier else "as the first pass"
        try:
            # Exact passes find for themselves that nothing is left, and may find new work that a later pass made.
            # An approximate pass would find its sites again and apply its error twice.
            if pass_.contract == "approximate" and pass_.text in program.applied:
                outcome = Outcome(program, 0, ("already applied with the same options",))
            else:
                outcome = pass_.run(program, self.context)
            verify(outcome.program)
        except VerifyError as error:
            message = f"pass {pass_.text} ({history}) made a Program that is not well formed: {error}"
            raise PassError(message, program, earlier) from error
        except PassError:
            raise
        except DitoptError as error:
            if len(error.args) == 1:
                error.args = (f"{pass_.text}: {error.args[0]}",)
            error.add_note(f"raised by pass {pass_.text}, {history}")
            raise
        except Exception as error:
            message = f"pass {pass_.text} failed ({history}): {type(error).__name__}: {error}"
            raise PassError(message, program, earlier) from error
        if outcome.applied == 0 and not outcome.refused:
            raise PassError(f"pass {pass_.text} ({history}) applied nothing and gave no reason", program, earlier)
        ms = (time.perf_counter() - start) * 1e3
        after = outcome.program
        if outcome.applied:
            after = after.replace(applied=(*after.applied, pass_.text))
        return PassResult(
            pass_.name, pass_.text, program, after, outcome.applied, outcome.refused, outcome.notes, ms, asked
        )


def legalize(program: Program, target: str) -> list[PassResult]:
    """What it takes that ``target`` can run ``program``, which was made for another one."""
    from ditopt.recipe import Recipe

    return PassManager(Recipe(), Context(target)).run(program)


def bisect(
    program: Program, recipe: Recipe | str, good: Callable[[Program], bool], context: Context | None = None
) -> PassResult | None:
    """The first pass after which ``good`` says False, or None. ``program`` itself must be good."""
    if not good(program):
        raise BadInput("bisect: the check fails before any pass has run; look at the capture, or at the check")
    for result in PassManager(recipe, context).iterate(program):
        if not good(result.program):
            return result
    return None


def _name_of(text: str) -> str:
    return text.partition("{")[0]


def _with_requirements(todo: list[tuple[Pass, bool]], done: set[str]) -> list[tuple[Pass, bool]]:
    """``todo`` with absent requirements put in front of the pass that first needs them. ``done`` need not run again."""
    present = done | {p.name for p, _ in todo}
    out: list[tuple[Pass, bool]] = []

    def add(pass_: Pass, asked: bool) -> None:
        for name in pass_.requires:
            if name not in present:
                present.add(name)
                add(get(name).make({}), False)
        out.append((pass_, asked))

    for pass_, asked in todo:
        add(pass_, asked)
    return out


def _in_order(todo: list[tuple[Pass, bool]]) -> list[tuple[Pass, bool]]:
    """``todo`` with every pass behind those that it requires or comes after; otherwise as given."""
    waiting = list(todo)
    out: list[tuple[Pass, bool]] = []
    while waiting:
        for item in waiting:
            before = {*item[0].requires, *item[0].after} - {item[0].name}
            if not any(other.name in before for other, _ in waiting):
                break
        else:
            raise PassError(f"these passes each want to run after another: {', '.join(p.name for p, _ in waiting)}")
        waiting.remove(item)
        out.append(item)
    return out
