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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import ditopt
from ditopt import measure, zoo
from ditopt.errors import BadInput
from ditopt.measure import Comparison, Contender
from ditopt.pipeline import suggest

DEMO = (
    ("lossless", "eager"),
    ("fora", "eager"),
    ("taylorseer", "eager"),
    ("forecast", "eager"),
    ("lossless", "inductor"),
    ("forecast", "inductor"),
    ("taylorseer", "onnxruntime"),
)
"""Recipe and target of the demo's rows: every recipe on eager, and each compiled target at least once."""

LIMIT = 190.0
"""Seconds after which the demo begins no further round."""

QUICK = (("lossless", "eager"), ("forecast", "eager"))
"""The rows of ``--quick``: nothing to compile."""


@dataclass(frozen=True)
class Shipped:
    """A shipped model and how to sample it: ``per_class`` images of each class a request, ordered by rank, then class.

    The order of the classes in a request depends on the seed, so that each request has prompts of its own and nothing
    that depends on them can be carried over from the request before.
    """

    name: str
    pipe: Any
    per_class: int

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.pipe.transformer.config.num_embeds_ada_norm)

    @property
    def labels(self) -> Tensor:
        """Class of each image that ``sample`` returns."""
        return torch.arange(self.classes).repeat(self.per_class)

    def sample(self, pipe: Any, seed: int, steps: int, /) -> Tensor:
        """One request on ``pipe`` (a Sampler): images (classes * per_class, C, H, W) in [0, 1]."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        settings = {**zoo.config(self.name)["sampling"], "num_inference_steps": steps}
        images = pipe(self.labels[order].tolist(), generator=torch.Generator().manual_seed(seed), **settings)
        return cast(Tensor, images)[order.argsort()]

    def accuracy(self, images: Tensor) -> float:
        """Share of images, of any number of requests, that the shipped classifier recognises."""
        labels = self.labels.repeat(len(images) // len(self.labels))
        return float((zoo.classify(self.name, images) == labels).float().mean())

    def pipeline(self) -> Any:
        """Another pipeline around the same weights, with a scheduler of its own."""
        parts = {**self.pipe.components, "scheduler": copy.deepcopy(self.pipe.scheduler)}
        made = type(self.pipe)(**parts)
        made.set_progress_bar_config(disable=True)
        return made


def shipped(name: str, per_class: int = 2) -> Shipped:
    """A shipped model, ready to sample; BadInput where there is none of this name."""
    _check(name)
    return Shipped(name, zoo.load(name), per_class)


def _check(name: str) -> None:
    if name not in zoo.names():
        raise BadInput(f"no shipped model is called {name!r}; {suggest(name, zoo.names())}")


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
    _check(name)
    if progress:
        print(f"loading {name} ...", file=sys.stderr)
    model = shipped(name, per_class=1 if quick else 2)
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
        f"{name}: {type(denoiser).__name__}, {size:.2f} M parameters; {found.rounds} x {len(model.labels)} images, "
        f"{steps} steps; torch {torch.__version__}, {torch.get_num_threads()} threads",
        "",
        measure.table(found.rows),
        *(_wrapped(t) for t in LEGEND),
        *notes,
    ]
    if out is not None:
        from ditopt.report import write

        fast = {k: f for k, m in found.models.items() if (f := measure.optimized(m)) is not None}
        write(fast, out, _pictures(found), found.rows)
        lines.append(f"Pictures, schedules and what each pass did: {out}")
    lines.append(f"({time.perf_counter() - began:.0f} s in all)")
    return "\n".join(lines) + "\n"


LEGEND = (
    "FLOPs: share of the plain model's that was executed (counted while sampling; all = with everything outside the "
    "blocks, and with the filling of hoisted values).",
    "speed: time of the plain eager model / own time, median over rounds, in turns; prepare: seconds of capture, "
    "passes and compilation, once.",
    "PSNR: to the plain images of the same seed, median and 5th percentile over samples; inf means bit-equal. "
    "accuracy: share of samples that a classifier trained on real images recognises.",
    "A recipe that gives less than plain sampling with fewer steps for the same FLOPs is marked as losing.",
)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 110, subsequent_indent="  ")


def _pictures(found: Comparison) -> dict[str, Tensor]:
    """The images of plain, of the fewer-steps rows, and of each recipe."""
    return {k: found.images[k] for k in (measure.label(r) for r in found.rows)}
