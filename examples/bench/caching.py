"""Caching systems side by side: error against executed work, beside fewer steps, better solvers, and other libraries.

    python -m examples.bench.caching --model digits --out examples/bench/caching_digits.csv
    python -m examples.bench.caching --model digits --only ditopt,steps --levels 0.3,0.5
    python -m examples.bench.caching --model digits --keep --out examples/bench/caching_digits.csv

Every contestant samples the same requests (a shipped model, its own scheduler and guidance). Work is what torch's own
counter sees executed, for all contestants alike, over one request, as a share of the plain model's. Error is the mean
PSNR over samples to the plain samples of the same seed, and to a run of 200 steps. The contestants:

    steps          the plain model with fewer steps
    solver         the plain model with fewer steps of diffusers' multistep solvers
    ditopt         recipes
    guidance       recipes that leave out a branch of guidance
    fitted         recipes of ditopt that are fitted, on other seeds than those they are judged by
    learned        lesa, which is trained, on other seeds as well
    pace           ERTACache, fitted in the same way: with and without its correction and its changed steps
    diffusers      its cache hooks, in a cache context
    cache-dit      where it is installed (pip install --no-deps cache-dit)

A contestant that fails to run is a row with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import importlib
import io
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ditopt
from ditopt import demo, measure

FIRST_JUDGED = 1000
"""Seeds of judged requests begin here; calibration uses 0, 1, ..."""

REFERENCE_STEPS = 200


@dataclass(frozen=True)
class Contestant:
    """``make(pipe)`` prepares a pipeline of its own; ``steps``: of its requests."""

    family: str
    name: str
    steps: int
    make: Callable[[Any], Any]


@dataclass(frozen=True)
class Row:
    """``share``: executed FLOPs / plain, all of the model's. ``psnr``, ``psnr_reference``: dB, mean over samples."""

    model: str
    family: str
    name: str
    steps: int
    share: float
    psnr: float
    psnr_reference: float
    error: str = ""


# -- contestants -------------------------------------------------------------------------------------------------------


def steps(levels: Sequence[float], full: int) -> Iterator[Contestant]:
    for n in sorted({max(2, round(level * full)) for level in levels}):
        yield Contestant("steps", "Euler", n, lambda pipe: pipe)


def solvers(levels: Sequence[float], full: int) -> Iterator[Contestant]:
    def use(name: str, **options: Any) -> Callable[[Any], Any]:
        def make(pipe: Any) -> Any:
            shift = pipe.scheduler.config.shift
            made = getattr(importlib.import_module("diffusers"), name)
            pipe.scheduler = made(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **options)
            return pipe

        return make

    for n in sorted({max(2, round(level * full)) for level in levels}):
        yield Contestant("solver", "DPM-Solver++ 2M", n, use("DPMSolverMultistepScheduler"))
        yield Contestant("solver", "UniPC 2", n, use("UniPCMultistepScheduler", solver_order=2))


def recipes(full: int) -> Iterator[Contestant]:
    texts = [f"forecast{{interval={n},order={o}}}" for n in (2, 3, 4, 5) for o in (1, 2)]
    texts += [f"taylorseer{{interval={n},order={o}}}" for n in (2, 3, 4) for o in (1, 2, 3)]
    texts += [f"fora{{interval={n}}}" for n in (2, 3, 4)]
    for text in texts:
        yield Contestant("ditopt", text, full, optimized(text, full))


def guidance(full: int) -> Iterator[Contestant]:
    """Systems that leave out a branch of guidance: of what each step runs, half at most."""
    texts = [f"cfg_cache{{interval={n}}}" for n in (2, 3, 5)]
    texts += ["fastercache", "interval_guidance"]
    texts += ["forecast, cache_guidance{every=3,first=2,predictor=taylor,order=1}"]
    for text in texts:
        yield Contestant("guidance", text, full, optimized(text, full))


def fitted(levels: Sequence[float], full: int, sample: Any, trials: int) -> Iterator[Contestant]:
    """Systems that are fitted to the model, on the requests of seeds 0 to 3."""
    texts = [f"searched{{share={level},trials={trials}}}" for level in levels]
    texts += [f"magcache{{threshold={t}}}" for t in (0.03, 0.06, 0.12, 0.24)]
    texts += [f"smoothcache{{alpha={a}}}" for a in (0.08, 0.18, 0.35)]
    yield from (_calibrated("ditopt", text, full, sample) for text in texts)


def pace(levels: Sequence[float], full: int, sample: Any) -> Iterator[Contestant]:
    """ERTACache as published, without its correction, without its pace, and with neither."""
    for level in levels:
        for corrected in (True, False):
            for adjust in ("true", "false"):
                text = f"ertacache{{share={level},adjust={adjust}{',table=' if corrected else ''}}}"
                yield _calibrated("pace", text, full, sample)


def _calibrated(family: str, text: str, full: int, sample: Any) -> Contestant:
    """``text`` fitted on the requests of seeds 0 to 3; ``table=`` without a name takes a file that is gone later."""

    def make(pipe: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            named = text.replace("table=", f"table={folder}/table.safetensors")
            recipe = ditopt.calibrate(pipe, named, sample, steps=full, seeds=range(4), progress=False)
            fast = ditopt.optimize(pipe, recipe, steps=full, target="eager")
            sample(fast, 0, full)  # captures, while the file is there
        return fast

    return Contestant(family, f"{text} fitted", full, make)


def learned(full: int, name: str) -> Iterator[Contestant]:
    """Predictors trained on the requests of seeds 0 to 3, four samples each, whatever is judged."""
    folder = tempfile.TemporaryDirectory()  # for as long as a contestant may read it
    for n in (2, 3, 4):

        def make(pipe: Any, n: int = n) -> Any:
            own = demo.shipped(name, 4)
            asked = f"lesa{{interval={n},table={folder.name}/{n}.safetensors}}"
            recipe = ditopt.calibrate(own.pipe, asked, own.sample, steps=full, seeds=range(4), progress=False)
            return ditopt.optimize(pipe, recipe, steps=full, target="eager")

        yield Contestant("learned", f"lesa{{interval={n}}} trained", full, make)


def optimized(recipe: Any, full: int) -> Callable[[Any], Any]:
    def make(pipe: Any) -> Any:
        return ditopt.optimize(pipe, recipe, steps=full, target="eager")

    return make


def diffusers_hooks(full: int) -> Iterator[Contestant]:
    d = importlib.import_module("diffusers")

    def hook(name: str, kind: str, **options: Any) -> Contestant:
        told = ",".join(f"{k}={v}" for k, v in options.items())

        def make(pipe: Any) -> Any:
            given = dict(options)
            if kind == "MagCache":
                given |= {"num_inference_steps": full, "mag_ratios": _ratios(pipe, full)}
            if kind == "PyramidAttentionBroadcast":
                given["current_timestep_callback"] = lambda: pipe.transformer.bench_time
            _enable(pipe.transformer, kind, getattr(d, f"{kind}Config")(**given))
            return pipe

        return Contestant("diffusers", f"{name}{{{told}}}", full, make)

    for t in (0.05, 0.1, 0.2, 0.4):
        yield hook("first block", "FirstBlockCache", threshold=t)
    for n in (2, 3, 4, 5):
        yield hook("TaylorSeer", "TaylorSeerCache", cache_interval=n, disable_cache_before_step=2, max_order=1)
    for t in (0.03, 0.06, 0.12, 0.24):
        yield hook("MagCache", "MagCache", threshold=t, max_skip_steps=4, retention_ratio=0.1)
    for n in (2, 4):
        ranges = {"spatial_attention_block_skip_range": n, "spatial_attention_timestep_skip_range": (0, 900)}
        yield hook("PAB", "PyramidAttentionBroadcast", **ranges)


APPLY = {
    "FirstBlockCache": "apply_first_block_cache",
    "TaylorSeerCache": "apply_taylorseer_cache",
    "MagCache": "apply_mag_cache",
    "PyramidAttentionBroadcast": "apply_pyramid_attention_broadcast",
}
"""The functions of diffusers behind ``enable_cache``, for classes that lack it."""


def _enable(model: Any, kind: str, config: Any) -> None:
    """Apply a hook of diffusers, and run each call in a cache context: the second call of a step is another branch."""
    hooks, mixin = importlib.import_module("diffusers.hooks"), importlib.import_module("diffusers").CacheMixin
    getattr(hooks, APPLY[kind])(model, config)
    forward = model.forward
    calls = {"n": 0, "time": float("nan")}

    def in_context(*args: Any, **kwargs: Any) -> Any:
        now = float(torch.as_tensor(kwargs["timestep"]).flatten()[0])
        calls["n"] = calls["n"] + 1 if calls["time"] == now else 0
        calls["time"] = now
        model.bench_time = now if now > 1 else now * 1000
        with mixin.cache_context(model, f"branch{calls['n']}"):
            return forward(*args, **kwargs)

    model.forward = in_context
    model.bench_reset = lambda: hooks.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(True)


def _ratios(pipe: Any, full: int) -> list[float]:
    """MagCache's magnitude ratios as diffusers measures and prints them, on a request that is not judged."""
    probe = type(pipe)(**{**pipe.components, "transformer": copy.deepcopy(pipe.transformer)})
    probe.set_progress_bar_config(disable=True)
    config = importlib.import_module("diffusers").MagCacheConfig(calibrate=True, num_inference_steps=full)
    _enable(probe.transformer, "MagCache", config)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), torch.no_grad():
        zoo = importlib.import_module("ditopt.zoo")
        name = next(n for n in zoo.names() if type(zoo.load(n)) is type(pipe))
        settings = {**zoo.config(name)["sampling"], "num_inference_steps": full}
        probe(zoo.package(name).prompts(8, 0), generator=torch.Generator().manual_seed(0), **settings)
    listed = re.findall(r"\[([-+\d., e]+)\]", said.getvalue())
    return [float(x) for x in listed[0].split(",")]


def cache_dit(full: int) -> Iterator[Contestant]:
    try:
        lib = importlib.import_module("cache_dit")
    except ImportError:
        return
    plain: list[tuple[str, Any]] = [("DBCache", None)]
    plain += [(f"DBCache+TaylorSeer{o}", lib.TaylorSeerCalibratorConfig(taylorseer_order=o)) for o in (1, 2)]
    plain += [("DBCache+DMD", lib.DMDCalibratorConfig()), ("DBCache+FoCa", lib.FoCaCalibratorConfig())]
    for name, calibrator in plain:
        for threshold in (0.08, 0.15, 0.25, 0.4, 0.8):

            def make(pipe: Any, threshold: float = threshold, calibrator: Any = calibrator) -> Any:
                config = lib.DBCacheConfig(
                    num_inference_steps=full,
                    Fn_compute_blocks=1,
                    Bn_compute_blocks=0,
                    max_warmup_steps=2,
                    residual_diff_threshold=threshold,
                )
                lib.enable_cache(pipe.transformer, cache_config=config, calibrator_config=calibrator)
                model = pipe.transformer
                model.bench_reset = lambda: lib.refresh_context(model, num_inference_steps=full)
                return pipe

            yield Contestant("cache-dit", f"{name}{{threshold={threshold}}}", full, make)


# -- measuring ---------------------------------------------------------------------------------------------------------


class Bench:
    """The judged requests of one shipped model, and what the plain model makes of them; ``reference``: of 200 steps."""

    def __init__(self, name: str, full: int, requests: int, samples: int, *, reference: bool = True) -> None:
        self.shipped = demo.shipped(name, samples)
        self.full = full
        self.seeds = range(FIRST_JUDGED, FIRST_JUDGED + requests)
        self.plain, self.flops = self.run(self.pipeline(), full)
        self.reference = self.run(self.pipeline(), REFERENCE_STEPS, count=False)[0] if reference else self.plain

    def pipeline(self) -> Any:
        """A pipeline whose denoiser is its own: other libraries patch it in place."""
        pipe = self.shipped.pipeline()
        pipe.transformer = copy.deepcopy(pipe.transformer)
        return pipe

    def run(self, pipe: Any, steps: int, count: bool = True) -> tuple[Tensor, int]:
        """All samples, and the FLOPs of the second request (the first one may compile or fill tables)."""
        made, flops = [], 0
        for i, seed in enumerate(self.seeds):
            reset = getattr(pipe.transformer, "bench_reset", None)
            if reset is not None:
                reset()
            counter = FlopCounterMode(display=False) if count and i == min(1, len(self.seeds) - 1) else nullcontext()
            with counter, torch.no_grad():
                made.append(self.shipped.sample(pipe, seed, steps).float())
            if isinstance(counter, FlopCounterMode):
                flops = counter.get_total_flops()
        return torch.cat(made), flops

    def row(self, c: Contestant) -> Row:
        """What a contestant is worth."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                images, flops = self.run(c.make(self.pipeline()), c.steps)
            near, far = (float(measure.psnr(images.clamp(0, 1), r).mean()) for r in (self.plain, self.reference))
            return Row(self.shipped.name, c.family, c.name, c.steps, flops / self.flops, near, far)
        except Exception as error:  # another library may raise anything; that it does is the result
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
            return Row(self.shipped.name, c.family, c.name, c.steps, float("nan"), float("nan"), float("nan"), said)


FAMILIES: dict[str, Callable[[Sequence[float], int], Iterator[Contestant]]] = {
    "steps": steps,
    "solver": solvers,
    "ditopt": lambda levels, full: recipes(full),
    "guidance": lambda levels, full: guidance(full),
    "diffusers": lambda levels, full: diffusers_hooks(full),
    "cache-dit": lambda levels, full: cache_dit(full),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="samples of a request")
    parser.add_argument("--levels", default="0.2,0.27,0.33,0.4,0.5,0.6,0.7,0.8", help="shares of plain work")
    parser.add_argument(
        "--only", default=",".join([*FAMILIES, "fitted", "learned", "pace"]), help="families, with commas between"
    )
    parser.add_argument("--name", default="", help="a regular expression: only contestants whose name has it")
    parser.add_argument("--trials", type=int, default=10, help="masks that a search runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", action="store_true", help="rows that --out holds stay, and are not measured again")
    args = parser.parse_args()
    levels = [float(x) for x in args.levels.split(",")]
    began = time.time()
    bench = Bench(args.model, args.steps, args.requests, args.samples)
    only = args.only.split(",")
    wanted = [c for family in only if family in FAMILIES for c in FAMILIES[family](levels, args.steps)]
    if "fitted" in only:
        wanted += fitted(levels, args.steps, bench.shipped.sample, args.trials)
    if "learned" in only:
        wanted += learned(args.steps, args.model)
    if "pace" in only:
        wanted += pace(levels, args.steps, bench.shipped.sample)
    rows = read(args.out) if args.keep and args.out and args.out.exists() else []
    there = {(r.family, r.name, r.steps) for r in rows}
    wanted = [c for c in wanted if (c.family, c.name, c.steps) not in there and re.search(args.name, c.name)]
    with contextlib.suppress(KeyboardInterrupt):  # what was measured by then is written
        for c in tqdm(wanted, unit="contestant", mininterval=5):
            rows.append(bench.row(c))
            write(rows, args.out)
    write(rows, args.out, sys.stdout)
    print(f"{len(wanted)} contestants in {time.time() - began:.0f} s", file=sys.stderr)


def read(path: Path) -> list[Row]:
    """The rows of a table that ``write`` wrote."""
    with path.open(newline="") as file:
        return [
            Row(d["model"], d["family"], d["name"], int(d["steps"]), *_numbers(d), d["error"])
            for d in csv.DictReader(file)
        ]


def _numbers(row: dict[str, str]) -> tuple[float, float, float]:
    return float(row["share"]), float(row["psnr"]), float(row["psnr_reference"])


def write(rows: Sequence[Row], path: Path | None, to: Any = None) -> None:
    """The rows as CSV, into a file or to an open one, by what they execute; errors last."""
    if path is None and to is None:
        return
    with path.open("w", newline="") if path else nullcontext(to) as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(Row.__dataclass_fields__)
        for r in sorted(rows, key=lambda r: (r.error != "", r.share)):
            numbers = [f"{x:.4f}" for x in (r.share, r.psnr, r.psnr_reference)]
            writer.writerow([r.model, r.family, r.name, r.steps, *numbers, r.error])


if __name__ == "__main__":
    main()
