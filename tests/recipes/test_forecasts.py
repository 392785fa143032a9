"""Forecasts on a static schedule, against transcriptions of their papers and published code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.recipes.oracle import DEPTH, STEPS, Array, Case, Step, agrees, exact, parts, run


class Hermite:
    """HiCache: differences of TaylorSeer, formed after step first - 2, under contracted Hermite polynomials."""

    sigma = 0.5

    def __init__(self, order: int, first: int = 0) -> None:
        self.order, self.first, self.at = order, first, 0
        self.g: list[Array] = []

    def push(self, y: Array, k: int) -> None:
        new = [y]
        for i in range(min(self.order, len(self.g)) if k > self.first - 2 else 0):
            new.append((new[i] - self.g[i]) / (k - self.at))
        self.g, self.at = new, k

    def forecast(self, k: int) -> Array:
        x = self.sigma * (k - self.at)
        terms = [1.0, self.sigma * 2 * x, self.sigma**2 * (4 * x * x - 2) / 2]
        return sum(g * term for g, term in zip(self.g, terms, strict=False))


class Taylor(Hermite):
    """TaylorSeer's taylor_utils: the same differences under powers of the distance."""

    def forecast(self, k: int) -> Array:
        x = k - self.at
        return sum(g * x**i / math.factorial(i) for i, g in enumerate(self.g))


class Newton:
    """The polynomial through the last values, by divided differences."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.values: list[tuple[int, Array]] = []

    def push(self, y: Array, k: int) -> None:
        self.values = [(k, y), *self.values][: self.order + 1]

    def forecast(self, k: int) -> Array:
        at, table = [a for a, _ in self.values], [y for _, y in self.values]
        told, basis = table[0], 1.0
        for i in range(1, len(at)):
            table = [(table[j] - table[j + 1]) / (at[j] - at[j + i]) for j in range(len(table) - 1)]
            basis *= k - at[i - 1]
            told = told + basis * table[0]
        return told


class FoCa:
    """FoCaState of cache-dit."""

    def __init__(self) -> None:
        self.full = self.full_before = self.now = self.before = None
        self.at = 0

    def push(self, y: Array, k: int) -> None:
        self.full_before, self.full, self.at = self.full, y, k
        self.before, self.now = self.now, y

    def forecast(self, k: int) -> Array:
        if self.full_before is None:
            return self.full
        elapsed = k - self.at
        slopes = (self.full - self.full_before) + (self.now - self.before)
        if elapsed <= 3:
            told = self.full + elapsed / 2 * slopes
        else:
            w = 3 / elapsed
            told = w * (self.full + 1.5 * slopes) + (1 - w) * self.full
        self.before, self.now = self.now, told
        return told


class AB2:
    """Adams-Bashforth with two slopes."""

    def __init__(self) -> None:
        self.values: list[tuple[int, Array]] = []

    def push(self, y: Array, k: int) -> None:
        self.values = [(k, y), *self.values][:3]

    def forecast(self, k: int) -> Array:
        (a, ya), (b, yb), (c, yc) = self.values
        newer, older = (ya - yb) / (a - b), (yb - yc) / (b - c)
        return ya + (k - a) * (1.5 * newer - 0.5 * older)


class DMD:
    """Dynamic mode decomposition by the singular vectors of the snapshots themselves."""

    def __init__(self) -> None:
        self.values: list[tuple[int, Array]] = []

    def push(self, y: Array, k: int) -> None:
        self.values = [*self.values, (k, y)][-6:]

    def forecast(self, k: int) -> Array:
        at, gap = self.values[-1][0], self.values[-1][0] - self.values[-2][0]
        even = [self.values[-1][1]]
        for (a, y), (b, _) in zip(self.values[-2::-1], self.values[:0:-1], strict=True):
            if b - a != gap:
                break
            even.insert(0, y)
        if len(even) < 4:
            hermite = Hermite(1)
            for step, y in self.values[-2:]:
                hermite.push(y, step)
            return hermite.forecast(k)
        v = np.stack([y.ravel() for y in even], 1)
        u, s, wh = np.linalg.svd(v[:, :-1], full_matrices=False)
        keep = s > 1e-4 * s[0]
        u, s, w = u[:, keep], s[keep], wh[keep].T
        values, y = np.linalg.eig(u.T @ v[:, 1:] @ w / s)
        modes = u @ y
        b = np.linalg.lstsq(modes, v[:, -1].astype(complex), rcond=None)[0]
        told = (modes @ ((values.astype(complex) ** ((k - at) / gap)) * b)).real
        outside = v[:, -1] - (modes @ b).real
        return (told + outside).reshape(even[-1].shape)


def _full(k: int, interval: int, first: int) -> bool:
    return k < first or (k - first + 1) % interval == 0


def on_modules(make: Callable[[], Any], interval: int, first: int) -> Step:
    """Every attention and MLP output forecast before its gate."""
    p, told = parts(), {(part, i): make() for part in ("attention", "mlp") for i in range(DEPTH)}

    def step(k: int, x: Array, t: float) -> tuple[list[str], Array]:
        h, full = p.begin(x, t), _full(k, interval, first)
        for i in range(DEPTH):
            for part, gate in zip(("attention", "mlp"), p.gates(i), strict=True):
                if full:
                    value = getattr(p, part)(i, h).astype(np.float64)
                    told[part, i].push(value, k)
                else:
                    value = told[part, i].forecast(k)
                h = (h + gate * value).astype(np.float32)
        return ["compute" if full else "reuse"], p.end(h)

    return step


def on_run(make: Callable[[], Any], interval: int, first: int) -> Step:
    """What all blocks add forecast."""
    p, told = parts(), make()

    def step(k: int, x: Array, t: float) -> tuple[list[str], Array]:
        h = p.begin(x, t)
        if _full(k, interval, first):
            out = p.blocks(h)
            told.push((out - h).astype(np.float64), k)
            return ["compute"], p.end(out)
        return ["reuse"], p.end(h + told.forecast(k))

    return step


CASES = {
    "taylorseer": Case("taylorseer{N=3,max_order=2,first_enhance=4}", lambda: on_modules(lambda: Taylor(2, 4), 3, 4)),
    "taylorseer_newton": Case(
        "taylorseer{interval=3,order=2,first=4,basis=newton}", lambda: on_modules(lambda: Newton(2), 3, 4)
    ),
    "hicache": Case("hicache{N=3,max_order=2,first_enhance=4}", lambda: on_modules(lambda: Hermite(2, 4), 3, 4)),
    "hicache_run": Case("hicache{interval=3,order=1,first=4,on=run}", lambda: on_run(lambda: Hermite(1, 4), 3, 4)),
    "foca": Case("foca{interval=6,first=4}", lambda: on_modules(FoCa, 6, 4)),
    "foca_run": Case("foca{interval=3,first=4,on=run}", lambda: on_run(FoCa, 3, 4)),
    "ab2": Case("ab2{interval=3,first=4}", lambda: on_modules(AB2, 3, 4)),
    "ab2_run": Case("ab2{interval=3,first=4,on=run}", lambda: on_run(AB2, 3, 4)),
    "dmd": Case("dmd{interval=3,first=4}", lambda: on_run(DMD, 3, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_session_does_what_the_paper_says(name):
    agrees(CASES[name])


@pytest.mark.parametrize("name", [n for n in CASES if n != "dmd"])
def test_a_static_schedule_reads_nothing(name):
    assert run(CASES[name].recipe).reads == run("lossless").reads


def test_dmd_reads_once_after_a_computed_step():
    found = run(CASES["dmd"].recipe)
    holds = sum(a == ("compute",) and b == ("reuse",) for a, b in zip(found.choices, found.choices[1:], strict=False))
    assert found.reads - run("lossless").reads == holds > 2


@pytest.mark.parametrize("name", ["hicache", "foca", "ab2", "dmd", "taylorseer"])
def test_interval_1_is_exact(name):
    exact(f"{name}{{interval=1}}")


def test_a_last_step_can_compute():
    assert run("foca{interval=6,first=4,last=2}").choices[-2:] == [("compute",), ("compute",)]
    assert STEPS - 2 not in [k for k in range(STEPS) if _full(k, 6, 4)]
