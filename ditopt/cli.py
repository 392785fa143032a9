"""The ``ditopt`` command. Results go to stdout, progress and warnings to stderr; an error is one line and exit code 2.

Importing this module imports neither torch nor diffusers: every command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ditopt.errors import BadInput, DitoptError, DitoptWarning

EXAMPLES = """\
examples:
  ditopt demo                                          sample the digits model by every recipe; writes report.html
  ditopt demo --model sprites --out sprites.html       the same on another shipped model, here of videos
  ditopt recipes taylorseer                            what a recipe is, where it comes from, its parameters
  ditopt explain digits --recipe taylorseer            structure, binding times, what each pass does and why not more
  ditopt show digits --recipe lossless --after outline_blocks
  ditopt diff digits --recipe "fora{interval=4}" --pass cache
  ditopt export digits dit.onnx --recipe forecast --steps 30
  ditopt calibrate digits --recipe "smoothcache{alpha=0.2}" --steps 30 --out digits.json
  ditopt bench --recipes fora "taylorseer{interval=4}" --targets eager inductor --out bench.csv

<model> is the name of a shipped model, or module:function where the function takes no arguments and returns
(an nn.Module, a dict of keyword arguments to call it with).
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code: 0, 2 after an error (one line on stderr), 130 when interrupted."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            _say_warnings()
            args = _parser().parse_args(argv)
            args.run(args)
            sys.stdout.flush()
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough. What the interpreter flushes at exit must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        print(f"ditopt: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    text = " ".join(lines) or type(error).__name__
    if isinstance(error, (DitoptError, OSError)):
        return text
    return f"{type(error).__name__}: {text} (this may be a bug of ditopt; --debug shows where it happened)"


def _say_warnings() -> None:
    """Warnings of ditopt are for the user, and each is one line; the others stay as they are."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, DitoptWarning):
            print(f"ditopt: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            shown(message, category, *rest, **named)

    warnings.showwarning = show
    warnings.simplefilter("default", DitoptWarning)


# -- arguments ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ditopt",
        description="A graph optimizer for diffusion transformers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        # repeated here so that it may stand behind the command; SUPPRESS keeps what stood before it
        made.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        made.set_defaults(run=run)
        return made

    demo = command("demo", _demo, "sample a shipped model plain, with fewer steps and by recipes, and write a report")
    demo.add_argument("--model", default="digits", help="a shipped model (default: digits)")
    demo.add_argument("--steps", type=_count, default=30, help="denoising steps (default: 30)")
    demo.add_argument("--out", default="report.html", metavar="FILE", help="the report (default: report.html)")
    demo.add_argument("--quick", action="store_true", help="two recipes on eager, few samples")

    recipes = command("recipes", _recipes, "list the recipes, or describe one")
    recipes.add_argument("name", nargs="?", metavar="NAME")

    explain = command("explain", _explain, "structure, binding times and costs of a model, and what each pass does")
    explain.add_argument("--kernels", action="store_true", help="run a step: which integer kernels, by its own profile")
    explain.add_argument("--dynamic", action="store_true", help="capture one graph for all shapes")
    show = command("show", _show, "print a model's program as text")
    show.add_argument("--after", metavar="PASS", help="stop after this pass; 'capture' shows what was captured")
    diff = command("diff", _diff, "print what the passes of a recipe change")
    diff.add_argument("--pass", dest="which", metavar="NAME", help="only this pass")
    export = command("export", _export, "write a model as ONNX files, its cache among their inputs and outputs")
    for parser_ in (explain, show, diff, export):
        parser_.add_argument("model", metavar="MODEL", help="a shipped model, or module:function")
        if parser_ is export:
            export.add_argument("out", metavar="OUT.onnx")
            export.add_argument("--timesteps", type=_numbers, metavar="T,T,...", help="the model's time at each step")
        parser_.add_argument("--recipe", default="lossless", help="a name, a text or a file (default: lossless)")
        parser_.add_argument("--steps", type=_count, help="denoising steps of a request")
        if parser_ is not export:
            parser_.add_argument("--target", default="eager", help="what would run it (default: eager)")

    calibrate = command("calibrate", _calibrate, "fit a recipe to a shipped model and the way it is sampled")
    calibrate.add_argument("model", metavar="MODEL", help="a shipped model")
    calibrate.add_argument("--recipe", required=True, help="a system that is fitted, with its parameters, or its file")
    calibrate.add_argument("--steps", type=_count, default=30, help="denoising steps of a request (default: 30)")
    calibrate.add_argument("--seeds", type=_count, default=4, metavar="N", help="requests to record (default: 4)")
    calibrate.add_argument("--samples", type=_count, default=4, help="samples in a request (default: 4)")
    calibrate.add_argument("--tokens", type=_count, default=256, help="token positions to look at (default: 256)")
    calibrate.add_argument("--out", metavar="FILE.json", help="write the recipe here instead of to stdout")

    bench = command("bench", _bench, "measure recipes on a shipped model, beside fewer steps, as CSV")
    bench.add_argument("--model", default="digits", help="a shipped model (default: digits)")
    bench.add_argument("--recipes", nargs="+", default=["lossless", "fora", "taylorseer", "forecast"], metavar="R")
    bench.add_argument("--targets", nargs="+", default=["eager"], metavar="T")
    bench.add_argument("--steps", type=_count, default=30, help="denoising steps (default: 30)")
    bench.add_argument("--fewer", type=_count, nargs="*", default=[], metavar="N", help="more plain step counts")
    bench.add_argument("--samples", type=_count, help="samples in a request (default: what the model's demo takes)")
    bench.add_argument("--rounds", type=_count, default=3, help="measured requests of each row (default: 3)")
    bench.add_argument("--compile", action="store_true", help="measure torch.compile of the plain model too")
    bench.add_argument("--out", metavar="FILE", help="write here instead of stdout")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        import ditopt

        print(f"ditopt {ditopt.__version__}")
        parser.exit()


def _count(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected a whole number from 1 on")
    return value


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected numbers with commas between them") from None


# -- commands ----------------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> None:
    from pathlib import Path

    out = Path(args.out)
    _writable(out)  # said now, not after three minutes
    from ditopt.demo import demo

    sys.stdout.write(demo(args.model, args.steps, out, args.quick))


def _bench(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ditopt import measure
    from ditopt.recipe import Recipe

    if args.out:
        _writable(Path(args.out))
    for recipe in args.recipes:
        Recipe.parse(recipe)  # an error of the third should not wait for the first two
    from ditopt import demo

    wanted, skipped = demo.runnable([(r, t) for t in args.targets for r in args.recipes])
    if skipped:
        raise BadInput("; ".join(skipped))
    model = demo.shipped(args.model, args.samples)
    found = demo.bench(model, wanted, steps=args.steps, fewer=args.fewer, rounds=args.rounds, compiled=args.compile)
    text = measure.to_csv(found.rows, **demo.machine(), model=args.model, full_steps=args.steps)
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")
        print(measure.table(found.rows), end="", file=sys.stderr)
    else:
        sys.stdout.write(text)


def _calibrate(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ditopt import demo
    from ditopt.calibration import calibrate
    from ditopt.recipe import named

    if args.out:
        _writable(Path(args.out))
        if not args.out.endswith(".json"):
            raise BadInput(f"{args.out} given; the recipe is read again by its ending, so the name must end in .json")
    named(args.recipe)  # a wrong name is said before the model is loaded
    model = demo.shipped(args.model, args.samples)
    recipe = calibrate(
        model.pipe, args.recipe, model.sample, steps=args.steps, seeds=range(args.seeds), tokens=args.tokens
    )
    print(recipe, file=sys.stderr)
    for key, value in recipe.calibrated.items():
        print(f"  {key}: {value}", file=sys.stderr)
    if args.out:
        Path(args.out).write_text(recipe.to_json() + "\n", encoding="utf-8")
    else:
        print(recipe.to_json())


def _recipes(args: argparse.Namespace) -> None:
    from ditopt.pipeline import suggest
    from ditopt.recipe import available

    systems = available()
    if args.name is None:
        width = max(len(n) for n in systems)
        for name, system in systems.items():
            options = ", ".join(f"{p.name}={p.default}" for p in system.parameters)
            options += f"; {'can be ' if system.passes else ''}fitted to a model" if system.calibration else ""
            print(f"{name:<{width}}  {system.contract:<11}  {system.title}" + (f"  [{options}]" if options else ""))
        return
    if args.name not in systems:
        raise BadInput(f"no recipe is called {args.name!r}; {suggest(args.name, systems)}")
    system = systems[args.name]
    print(f"{system.name}: {system.title}")
    _paragraph("contract", system.contract)
    _paragraph("source", system.source)
    _paragraph("claim", system.claim or "none published")
    for p in system.parameters:
        also = f" Also called {', '.join(p.aliases)}." if p.aliases else ""
        _paragraph(f"{p.name}={p.default}", p.doc + also)
    for note in system.notes:
        _paragraph("note", note)
    if system.calibration:
        _paragraph(
            "can be fitted by" if system.passes else "fitted by",
            f"ditopt.calibrate(model, {system.name!r}, sampler, steps=...), or ditopt calibrate",
        )
    if system.passes:
        _paragraph("passes", " ".join(system.passes.split()))


def _paragraph(title: str, text: str) -> None:
    import textwrap

    lines = textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False) or [""]
    for i, line in enumerate(lines):
        print(f"  {title if i == 0 else '':<12}  {line}")


def _explain(args: argparse.Namespace) -> None:
    import ditopt

    model, kwargs, _ = _load(args.model)
    dynamic = True if args.dynamic else None
    sys.stdout.write(
        ditopt.explain(model, args.recipe, example_inputs=kwargs, steps=args.steps, target=args.target, dynamic=dynamic)
    )
    if args.kernels:
        fast = ditopt.optimize(model, args.recipe, steps=args.steps, target=args.target, dynamic=dynamic)
        print(f"\n{fast.integer_share(**kwargs)}")


def _show(args: argparse.Namespace) -> None:
    captured, history = _history(args)
    if args.after is None:
        print(history[-1].program if history else captured, end="")
    elif args.after == "capture":
        print(captured, end="")
    else:
        print(_chosen(history, args.after)[-1].program, end="")


def _diff(args: argparse.Namespace) -> None:
    _, history = _history(args)
    for result in _chosen(history, args.which) if args.which else history:
        print(result)
        if result.applied:
            print(result.diff())


def _export(args: argparse.Namespace) -> None:
    import ditopt

    model, kwargs, times = _load(args.model)
    at = args.timesteps
    if at is None and args.steps and times is not None:
        at = times(args.steps)
    made = ditopt.export_onnx(model, args.out, args.recipe, example_inputs=kwargs, steps=args.steps, timesteps=at)
    for graph in made.every_graph:
        slots = len({f.ref for f in graph.inputs if f.kind == "state"})
        print(
            f"{graph.file or graph.name}: {len(graph.inputs)} inputs ({slots} of them state), {graph.results} results"
        )


# -- helpers -----------------------------------------------------------------------------------------------------------


def _writable(path: Any) -> None:
    if not path.absolute().parent.is_dir():
        raise BadInput(f"{path} cannot be written: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise BadInput(f"{path} is a folder; give the name of a file")


def _history(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The captured Program and what each pass of the recipe made of it."""
    import torch

    from ditopt.capture import bind, capture
    from ditopt.pipeline import Context, PassManager
    from ditopt.target import resolve

    target = resolve(args.target, torch.device("cpu"))
    model, kwargs, _ = _load(args.model)
    spec, tensors = bind(model, (), kwargs)
    program, given = capture(model, spec, tensors).program, dict(zip(spec.names, tensors, strict=True))
    return program, PassManager(args.recipe, Context(target, args.steps, given=given)).run(program)


def _chosen(history: Sequence[Any], name: str) -> list[Any]:
    from ditopt.pipeline import suggest

    found = [r for r in history if name in (r.name, r.text)]
    if not found:
        raise BadInput(f"this recipe runs no pass {name!r}; {suggest(name, [r.name for r in history])}")
    return found


def _load(spec: str) -> tuple[Any, dict[str, Any], Callable[[int], list[float]] | None]:
    """A model, keyword arguments to call it with, and for a shipped model steps -> the timesteps of its scheduler."""
    if ":" in spec:
        return (*_from_function(spec), None)
    from ditopt import zoo
    from ditopt.pipeline import suggest

    if spec not in zoo.names():
        raise BadInput(f"no shipped model is called {spec!r}; {suggest(spec, zoo.names())}; or give module:function")
    pipe = zoo.load(spec)

    def times(steps: int) -> list[float]:
        pipe.scheduler.set_timesteps(steps)
        return [float(t) for t in pipe.scheduler.timesteps]

    return pipe.transformer, _first_call(pipe, zoo.package(spec).prompts(1, 0), zoo.config(spec)["sampling"]), times


class _Called(Exception):
    """The denoiser was called with ``kwargs``."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.kwargs = kwargs


def _first_call(pipe: Any, prompts: Sequence[Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which the pipeline calls its denoiser, as its own code makes them."""
    from ditopt.capture import bind

    def stop(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        spec, tensors = bind(module, args, kwargs)
        raise _Called(spec.unflatten(tensors))

    handle = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        pipe(prompts, **sampling)
    except _Called as called:
        return called.kwargs
    finally:
        handle.remove()
    raise BadInput("the pipeline ended without calling its denoiser")


def _from_function(spec: str) -> tuple[Any, dict[str, Any]]:
    import importlib

    import torch

    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the installed command does not look into the current folder, python -m does
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"{spec!r} cannot be loaded: {error}") from error
    made = function()
    pair = isinstance(made, tuple) and len(made) == 2
    if not (pair and isinstance(made[0], torch.nn.Module) and isinstance(made[1], dict)):
        raise BadInput(f"{spec} returned {type(made).__name__}; expected (an nn.Module, a dict of keyword arguments)")
    return made
