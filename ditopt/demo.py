"""``ditopt demo`` and ``ditopt bench``: a shipped, trained model sampled plain, with fewer steps, and by recipes.

Both run the same comparison (``measure.compare``); the demo chooses what to run, explains what it printed, and writes a
report with pictures.
"""

from __future__ import annotations

import copy
import math
import os
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import ditopt
from ditopt import measure, zoo
from ditopt.errors import BadInput
from ditopt.measure import Comparison, Contender

DEMO = (
    ("lossless", "eager"),
    ("fora", "eager"),
    ("taylorseer", "eager"),
    ("forecast", "eager"),
    ("lossless", "inductor"),
    ("forecast", "inductor"),
    ("taylorseer", "onnxruntime"),
)
"""Recipe and target of the demo's rows: some recipes on eager (all would take minutes), each compiled target once."""

LIMIT = 190.0
"""Seconds after which the demo begins no further round."""

QUICK = (("lossless", "eager"), ("forecast", "eager"))
"""The rows of ``--quick``: nothing to compile."""


@dataclass(frozen=True)
class Shipped:
    """A shipped model and how to sample it: ``count`` samples a request.

    The prompts of a request depend on its seed, so that nothing that depends on them can be carried over from the
    request before.
    """

    name: str
    pipe: Any
    count: int

    def prompts(self, seed: int) -> Sequence[Any]:
        """The prompts of the request with this seed."""
        return zoo.package(self.name).prompts(self.count, seed)

    def sample(self, pipe: Any, seed: int, steps: int, /) -> Tensor:
        """One request on ``pipe`` (a Sampler): samples (count, C, H, W) or (count, C, frames, H, W) in [0, 1]."""
        settings = {**zoo.config(self.name)["sampling"], "num_inference_steps": steps}
        return cast(Tensor, pipe(self.prompts(seed), generator=torch.Generator().manual_seed(seed), **settings))

    def accuracy(self, samples: Tensor) -> float:
        """Share of what the prompts say that the shipped classifier sees in the samples of requests 0, 1, ..."""
        prompts = [p for seed in range(len(samples) // self.count) for p in self.prompts(seed)]
        return float(zoo.package(self.name).score(samples, prompts).mean())

    def pipeline(self) -> Any:
        """Another pipeline around the same weights, with a scheduler of its own."""
        parts = {**self.pipe.components, "scheduler": copy.deepcopy(self.pipe.scheduler)}
        made = type(self.pipe)(**parts)
        made.set_progress_bar_config(disable=True)
        return made


def shipped(name: str, count: int | None = None) -> Shipped:
    """A shipped model, ready for requests of ``count`` samples; BadInput where there is none of this name."""
    return Shipped(name, zoo.load(name), count or zoo.package(name).REQUEST)


def contenders(model: Shipped, wanted: Sequence[tuple[str, str]], steps: int, compiled: bool) -> list[Contender]:
    """A contender for each (recipe, target), after plain ``torch.compile`` where ``compiled``."""

    def recipe(text: str, target: str) -> Any:
        return ditopt.optimize(model.pipeline(), text, steps=steps, target=target)

    def compile_() -> Any:
        pipe = model.pipeline()
        pipe.transformer = torch.compile(pipe.transformer)
        return pipe

    out = [Contender("torch.compile", compile_, "inductor", "compile")] if compiled else []
    return out + [Contender(r, lambda r=r, t=t: recipe(r, t), t) for r, t in wanted]  # type: ignore[misc]


def runnable(wanted: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """What can run here, and one sentence for each target that cannot."""
    from ditopt.target import resolve

    why: dict[str, str] = {}
    for target in {t for _, t in wanted}:
        try:
            resolve(target, torch.device("cpu"))
        except BadInput as error:
            why[target] = f"skipped {target}: {error}"
        if target == "onnxruntime" and find_spec("onnxruntime") is None:
            why[target] = "skipped onnxruntime: it is not installed; run: pip install 'ditopt[cpu]'"
    return [(r, t) for r, t in wanted if t not in why], [why[t] for t in sorted(why)]


def bench(
    model: Shipped,
    wanted: Sequence[tuple[str, str]],
    *,
    steps: int,
    fewer: Sequence[int] = (),
    rounds: int = 3,
    compiled: bool = True,
    time_limit: float = math.inf,
    progress: bool = True,
) -> Comparison:
    """The comparison of ``wanted`` (recipe, target) on a shipped model over ``rounds`` requests each."""
    return measure.compare(
        model.sample,
        model.pipe,
        contenders(model, wanted, steps, compiled),
        steps=steps,
        fewer=fewer,
        seeds=range(rounds),
        extra={"accuracy": model.accuracy},
        time_limit=time_limit,
        progress=progress,
    )


def machine() -> dict[str, object]:
    """What a number depends on besides the code: columns of every CSV."""
    return {
        "ditopt": ditopt.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }


def demo(
    name: str = "digits", steps: int = 30, out: Path | None = None, quick: bool = False, progress: bool = True
) -> str:
    """Run the demo, write its report to ``out`` (None: no report), and return the text to print."""
    began = time.perf_counter()
    zoo.config(name)  # an unknown name is said before anything else
    if progress:
        print(f"loading {name} ...", file=sys.stderr)
    model = shipped(name)
    if quick:
        model = replace(model, count=model.count // 2)
    wanted, notes = runnable(QUICK if quick else DEMO)
    fewer = sorted({n for n in (steps * 2 // 3, steps // 2, steps // 3, steps // 5) if 1 <= n < steps})
    compiled = not quick and bool(runnable([("", "inductor")])[0])
    limit = LIMIT - (time.perf_counter() - began)
    found = bench(
        model,
        wanted,
        steps=steps,
        fewer=fewer,
        rounds=1 if quick else 3,
        compiled=compiled,
        time_limit=limit,
        progress=progress,
    )
    denoiser = model.pipe.transformer
    size = sum(p.numel() for p in denoiser.parameters()) / 1e6
    lines = [
        f"{name}: {type(denoiser).__name__}, {size:.2f} M parameters; {found.rounds} x {model.count} samples, "
        f"{steps} steps; torch {torch.__version__}, {torch.get_num_threads()} threads",
        "",
        measure.table(found.rows),
        *(_wrapped(t) for t in LEGEND),
        *notes,
    ]
    if out is not None:
        from ditopt.report import write

        fast = {k: f for k, m in found.models.items() if (f := measure.optimized(m)) is not None}
        order = sorted(range(model.count), key=model.prompts(0).__getitem__)
        pictures = {k: found.images[k][order] for k in map(measure.label, found.rows)}
        write(fast, out, pictures, found.rows)
        lines.append(f"Pictures, schedules and what each pass did: {out}")
    lines.append(f"({time.perf_counter() - began:.0f} s in all)")
    return "\n".join(lines) + "\n"


LEGEND = (
    "FLOPs: share of the plain model's that was executed (counted while sampling; all = with everything outside the "
    "blocks, and with the filling of hoisted values).",
    "speed: time of the plain eager model / own time, median over rounds, in turns; prepare: seconds of capture, "
    "passes and compilation, once.",
    "PSNR: to the plain samples of the same seed, median and 5th percentile over samples; inf means bit-equal. "
    "accuracy: share of what the prompts say that a classifier, trained on the model's own data, sees in the samples.",
    "A recipe that gives less than plain sampling with fewer steps for the same FLOPs is marked as losing.",
)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 110, subsequent_indent="  ")
