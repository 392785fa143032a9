"""Fidelity, executed work and speed, always beside the honest baseline: the same sampler with fewer steps.

A cached step is worth something only where it beats a step that was never taken. So ``compare`` runs the plain model at
fewer steps too, among them the number that costs what each recipe costs, and a recipe that loses to that is shown as
losing. Work is what the Session counted while sampling, never a formula; time is measured side by side in turns.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ditopt.errors import BadInput, require
from ditopt.optimized import OptimizedModule

Kind = Literal["plain", "compile", "fewer", "recipe"]

EXACT = 90.0
"""dB of PSNR from which on a difference is the rounding of float32 and nothing else."""

NEARLY_ALL = 0.9
"""From this share of the work on, a recipe does not ask for plain steps of its own to be compared with."""


class Sampler(Protocol):
    """One request: ``sampler(model, seed, steps)`` -> images (N, ...) in [0, 1]. The same seed gives the same noise and
    prompts at any number of steps. ``model`` is whatever was handed to ``compare``: a denoiser or a pipeline."""

    def __call__(self, model: Any, seed: int, steps: int, /) -> Tensor: ...


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each sample in dB: (N, ...) and (N, ...), both in [0, 1] -> (N,) float64.

    Identical samples give inf. BadInput where shapes differ, a value is not finite or lies outside [0, 1].
    """
    for name, given in (("images", images), ("reference", reference)):
        if given.ndim < 2 or not given.numel():
            raise BadInput(f"psnr: {name} has shape {tuple(given.shape)}; expected (N, ...) with at least one sample")
    if images.shape != reference.shape:
        raise BadInput(f"psnr: images {tuple(images.shape)} and reference {tuple(reference.shape)} differ in shape")
    a, b = images.detach().double().cpu(), reference.detach().double().cpu()
    for name, given in (("images", a), ("reference", b)):
        low, high = float(given.min()), float(given.max())
        if not (low >= -1e-6 and high <= 1 + 1e-6):  # NaN compares false
            raise BadInput(f"psnr: {name} lie in [{low:.4g}, {high:.4g}]; scale them to [0, 1] (NaN means they broke)")
    return -10 * torch.log10((a - b).square().flatten(1).mean(1))


@dataclass(frozen=True)
class Row:
    """One line of a comparison. Shares are relative to the plain model at the full number of steps.

    ``share``: FLOPs executed inside blocks. ``share_total``: all FLOPs, the filling of hoisted values included.
    ``seconds``: median of a request. ``speed``: seconds of plain eager / own, median over rounds; ``speed_compiled``:
    likewise to ``torch.compile`` (nan where that did not run). ``psnr``, ``psnr_low``: median and 5th percentile over
    samples, dB, to plain. ``prepare``: seconds of capture, passes and compilation, before the first request is as fast
    as the others. ``loses``: a sentence where fewer steps give more for at most the same compute, else "".
    """

    name: str
    kind: Kind
    target: str
    steps: int
    share: float
    share_total: float
    seconds: float
    speed: float
    psnr: float
    psnr_low: float
    speed_compiled: float = math.nan
    extra: Mapping[str, float] = field(default_factory=dict)
    prepare: float = 0.0
    loses: str = ""

    @property
    def cost(self) -> float:
        """The share by which rows are compared: the larger one, so that no work is left out."""
        return max(self.share, self.share_total)


@dataclass(frozen=True)
class Contender:
    """Something to compare with plain eager. ``make`` prepares the model that the sampler gets, inside the measured
    preparation time."""

    name: str
    make: Callable[[], Any]
    target: str = "eager"
    kind: Kind = "recipe"


@dataclass(frozen=True)
class Comparison:
    """Rows in the order plain, compiled, fewer steps, recipes; and by row label the images of the first seed, and the
    optimized models. ``rounds``: measured requests of each row."""

    rows: tuple[Row, ...]
    images: Mapping[str, Tensor]
    models: Mapping[str, Any]
    rounds: int


def label(row: Row) -> str:
    """What a row is called among others."""
    return _label(row.kind, row.name, row.target, row.steps)


def _label(kind: Kind, name: str, target: str, steps: int) -> str:
    return f"{steps} steps" if kind == "fewer" else f"{name} on {target}" if kind == "recipe" else name


def optimized(model: Any) -> OptimizedModule | None:
    """The OptimizedModule that ``model`` is, or that a pipeline holds; None for a plain one."""
    if isinstance(model, OptimizedModule):
        return model
    parts = getattr(model, "components", None)
    values = parts.values() if isinstance(parts, Mapping) else ()
    return next((v for v in values if isinstance(v, OptimizedModule)), None)


def matching_steps(cost: float, steps: int) -> int:
    """The most plain steps that cost at most ``cost`` (a share of ``steps`` plain ones), at least 1."""
    return max(1, math.floor(cost * steps + 1e-9))


def compare(
    sampler: Sampler,
    plain: Any,
    contenders: Sequence[Contender],
    *,
    steps: int,
    fewer: Iterable[int] = (),
    seeds: Sequence[int] = (0, 1, 2),
    extra: Mapping[str, Callable[[Tensor], float]] | None = None,
    time_limit: float = math.inf,
    progress: bool = True,
) -> Comparison:
    """Measure ``contenders`` against ``plain`` and against ``plain`` with fewer steps.

    Every model first runs one request that nothing is measured on (it compiles); then, for each seed, all run in turns,
    in an order that rotates. ``fewer``: numbers of steps besides the ones that cost what each contender costs (unless
    that is nearly all). ``extra``: further metrics of all images of a model. ``time_limit``: seconds after which no
    further round begins that would exceed them (one always runs). ``progress``: a bar on stderr.
    """
    began = time.perf_counter()
    if steps < 2 or not seeds:
        raise BadInput(f"steps={steps} and {len(seeds)} seeds given; expected at least 2 steps and one seed")
    bad = [n for n in fewer if not 1 <= n < steps]
    if bad:
        raise BadInput(f"fewer steps {bad} given; expected numbers from 1 to {steps - 1}")
    runs = [_Run(Contender("plain", lambda: plain, "eager", "plain"), steps), *(_Run(c, steps) for c in contenders)]
    names = [r.label for r in runs]
    if len(set(names)) != len(names):
        raise BadInput(f"two contenders have the same name among {names}; name them apart")
    with require("tqdm", None).tqdm(total=len(runs), disable=not progress, leave=False, unit="request") as bar:
        for run in runs:
            bar.set_description(f"preparing {run.label}")
            run.prepare(sampler, max(seeds) + 1)  # prompts of its own: what it hoists must not be found again later
            bar.update()
        costs = [r.cost() for r in runs if r.of.kind == "recipe"]
        counts = {*fewer, *(matching_steps(c, steps) for c in costs if c < NEARLY_ALL)}
        few = [_Run(Contender("fewer steps", lambda: plain, "eager", "fewer"), n) for n in sorted(counts, reverse=True)]
        for run in few:
            run.model = plain
        everything = [runs[0], *few, *runs[1:]]
        bar.total = len(runs) + len(everything) * len(seeds)
        for turn, seed in enumerate(seeds):
            round_began = time.perf_counter()
            start = turn * len(everything) // len(seeds)
            for run in [*everything[start:], *everything[:start]]:
                bar.set_description(f"round {turn + 1} of {len(seeds)}: {run.label}")
                run.sample(sampler, seed)
                bar.update()
            now = time.perf_counter()
            if now - began + (now - round_began) > time_limit:
                break
    base = runs[0]
    compiled = next((r for r in runs if r.of.kind == "compile"), None)
    rows = [run.row(base, compiled, steps, extra or {}) for run in everything]
    order = {"plain": 0, "compile": 1, "fewer": 2, "recipe": 3}
    rows.sort(key=lambda row: order[row.kind])
    return Comparison(
        judged(rows),
        {r.label: r.images[seeds[0]] for r in everything},
        {r.label: r.model for r in runs if optimized(r.model) is not None},
        len(base.images),
    )


def judged(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows, each recipe's ``loses`` filled in: it loses where a plain row of at most its cost has a higher median
    PSNR, unless it equals plain up to rounding."""
    plain = [r for r in rows if r.kind in ("plain", "fewer")]
    out = []
    for row in rows:
        if row.kind == "recipe" and row.psnr < EXACT:
            best = max((p for p in plain if p.cost <= row.cost + 1e-9), key=lambda p: p.psnr, default=None)
            lost = best is not None and best.psnr > row.psnr
            why = f"loses to {best.steps} steps: {_db(row.psnr)} vs {_db(best.psnr)} dB" if best and lost else ""
            row = replace(row, loses=why)
        out.append(row)
    return tuple(out)


class _Run:
    """One contender while it is measured."""

    def __init__(self, of: Contender, steps: int) -> None:
        self.of, self.steps = of, steps
        self.label = _label(of.kind, of.name, of.target, steps)
        self.model: Any = None
        self.images: dict[int, Tensor] = {}
        self.seconds: list[float] = []
        self.first = 0.0
        self._before = (0, 0, 0, 0)

    def prepare(self, sampler: Sampler, seed: int) -> None:
        start = time.perf_counter()
        self.model = self.of.make()
        sampler(self.model, seed, self.steps)
        self.first = time.perf_counter() - start

    def sample(self, sampler: Sampler, seed: int) -> None:
        if not self.seconds:
            self._before = self._counted()  # the shares are of the measured requests
        start = time.perf_counter()
        images = sampler(self.model, seed, self.steps)
        self.seconds.append(time.perf_counter() - start)
        self.images[seed] = images.detach().float().cpu()

    def _counted(self) -> tuple[int, int, int, int]:
        fast = optimized(self.model)
        if fast is None:
            return (0, 0, 0, 0)
        s = fast.stats
        return (s.block_flops, s.full_block_flops, s.flops, s.full_flops)

    def shares(self) -> tuple[float, float]:
        """Executed / plain FLOPs, in blocks and in all: of the measured requests, before these of the first one."""
        if optimized(self.model) is None:
            return (1.0, 1.0)
        blocks, all_blocks, total, all_total = (b - a for a, b in zip(self._before, self._counted(), strict=True))
        return (blocks / all_blocks if all_blocks else 1.0, total / all_total if all_total else 1.0)

    def cost(self) -> float:
        return max(self.shares())

    def row(self, base: _Run, compiled: _Run | None, steps: int, extra: Mapping[str, Callable[[Tensor], float]]) -> Row:
        images = torch.cat([self.images[s] for s in base.images])
        db = psnr(images, torch.cat(list(base.images.values())))
        part = self.steps / steps if self.of.kind == "fewer" else 1.0
        share, total = self.shares()
        middle = statistics.median(self.seconds)
        return Row(
            name=self.of.name,
            kind=self.of.kind,
            target=self.of.target,
            steps=self.steps,
            share=share * part,
            share_total=total * part,
            seconds=middle,
            speed=_ratio(base.seconds, self.seconds),
            psnr=_quantile(db, 0.5),
            psnr_low=_quantile(db, 0.05),
            speed_compiled=_ratio(compiled.seconds, self.seconds) if compiled else math.nan,
            extra={name: float(metric(images)) for name, metric in extra.items()},
            prepare=max(0.0, self.first - min(self.seconds)) if self.of.kind in ("recipe", "compile") else 0.0,
        )


def _ratio(theirs: Sequence[float], own: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, own, strict=True))


def _quantile(values: Tensor, q: float) -> float:
    """The value that a share ``q`` of the samples stays at or below; never interpolated, so that inf stays inf."""
    return float(values.sort().values[math.ceil(q * len(values)) - 1 if q else 0])


# -- printing ----------------------------------------------------------------------------------------------------------


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table of ``rows``, as text; a column that says nothing is left out."""
    compiled, lost = any(not math.isnan(r.speed_compiled) for r in rows), any(r.loses for r in rows)
    extra = list(dict.fromkeys(k for r in rows for k in r.extra))
    header = ["recipe", "target", "steps", "block FLOPs", "all FLOPs", "speed"]
    header += [
        *(["vs compile"] if compiled else []),
        "PSNR dB",
        "5th pct.",
        *extra,
        "prepare s",
        *([""] if lost else []),
    ]
    out = []
    for r in rows:
        line = [r.name, r.target, str(r.steps), f"{r.share:.1%}", f"{r.share_total:.1%}", f"{r.speed:.2f}x"]
        line += [f"{r.speed_compiled:.2f}x"] if compiled else []
        line += [_db(r.psnr), _db(r.psnr_low), *(f"{r.extra[k]:.1%}" if k in r.extra else "" for k in extra)]
        line.append(f"{r.prepare:.1f}" if r.kind in ("recipe", "compile") else "")
        out.append([*line, *([r.loses] if lost else [])])
    return header, out


def table(rows: Sequence[Row]) -> str:
    """The rows as plain text, one a line under a header; numbers stand right."""
    header, body = cells(rows)
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]

    def show(line: Sequence[str]) -> str:
        words = (0, 1, *(i for i, title in enumerate(header) if not title))
        parts = [c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * w for w, title in zip(widths, header, strict=True) if title)
    kinds = [r.kind for r in rows]
    lines = [show(header), rule]
    for i, line in enumerate(body):
        if i and kinds[i] != kinds[i - 1] and "recipe" in kinds[i - 1 : i + 1]:
            lines.append("")
        lines.append(show(line))
    return "\n".join(lines) + "\n"


def to_csv(rows: Sequence[Row], **constant: object) -> str:
    """The rows as CSV at full precision; ``constant`` columns come first and repeat in each row."""
    out = io.StringIO()
    extra = list(dict.fromkeys(k for r in rows for k in r.extra))
    plain = ["kind", "name", "target", "steps", "share", "share_total", "seconds", "speed", "speed_compiled"]
    plain += ["psnr", "psnr_low", "prepare", "loses"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*constant, *plain, *extra])
    for row in rows:
        values = [getattr(row, f) for f in plain] + [row.extra.get(k, math.nan) for k in extra]
        writer.writerow([*constant.values(), *(f"{v:.6g}" if isinstance(v, float) else v for v in values)])
    return out.getvalue()


def _db(value: float) -> str:
    return f"{value:.1f}"  # inf prints as inf
