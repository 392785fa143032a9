"""Systems that decide a step by one number, against transcriptions of their papers and published code."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tests.recipes.oracle import DEPTH, STEPS, Array, Case, Step, agrees, change, exact, parts, run


def firstblock(threshold: float) -> Step:
    """First-Block Cache (diffusers, hooks/first_block_cache.py)."""
    p = parts()
    kept: dict[str, Array] = {}

    def step(k: int, x: Array, t: float) -> tuple[list[str], Array]:
        h0 = p.begin(x, t)
        h1 = p.block(0, h0)
        added = p.seen(h1 - h0)
        if kept and change(added, kept["added"]) < threshold:
            return ["reuse"], p.end(h1 + kept["tail"])
        h = p.blocks(h1, 1)
        kept.update(added=added, tail=h - h1)  # only where everything was computed
        return ["compute"], p.end(h)

    return step


class Ladder:
    """The differences of TaylorSeer, as its code keeps them, and its series."""

    def __init__(self, order: int) -> None:
        self.order, self.at = order, 0
        self.g: list[Array] = []

    def push(self, value: Array, step: int) -> None:
        new = [value.astype(np.float64)]
        for i in range(min(self.order, len(self.g))):
            new.append((new[i] - self.g[i]) / (step - self.at))
        self.g, self.at = new, step

    def at_step(self, step: int) -> Array:
        return sum(g * (step - self.at) ** i / math.factorial(i) for i, g in enumerate(self.g))


def dbcache(
    front: int,
    back: int,
    threshold: float,
    warmup: int,
    order: int = 0,
    most: int = 0,
    longest: int = 0,
    budget: float = math.inf,
    mask: str = "",
    static: bool = False,
) -> Step:
    """DBCache (cache-dit, CachedContextManager.can_cache), with the Taylor calibrator."""
    p, middle = parts(), Ladder(order)
    kept: dict[str, Array] = {}
    total = in_a_row = 0
    spent = 0.0

    def can_cache(k: int, added: Array) -> bool:
        nonlocal spent
        if k < warmup or not kept:
            return False
        if mask:
            if mask[k] == "1":
                return False
            if static:
                return True
        if (most and total >= most) or (longest and in_a_row >= longest):
            return False
        far = change(added, kept["added"])
        if spent + far > budget or far >= threshold:
            return False
        spent += far
        return True

    def step(k: int, x: Array, t: float) -> tuple[list[str], Array]:
        nonlocal total, in_a_row, spent
        h0 = p.begin(x, t)
        h = p.blocks(h0, 0, front)
        added = p.seen(h - h0, front)
        if can_cache(k, added):
            total, in_a_row = total + 1, in_a_row + 1
            return ["reuse"], p.end(p.blocks(h + middle.at_step(k), DEPTH - back))
        in_a_row, spent = 0, 0.0
        after = p.blocks(h, front, DEPTH - back)
        middle.push(after - h, k)
        kept["added"] = added
        return ["compute"], p.end(p.blocks(after, DEPTH - back))

    return step


def cg_taylor(threshold: float, watch: int, order: int, first: int) -> Step:
    """CG-Taylor (models.py of its DiT code)."""
    p, block, last = parts(), Ladder(watch), Ladder(order)

    def step(k: int, x: Array, t: float) -> tuple[list[str], Array]:
        h1 = p.block(0, p.begin(x, t))
        if first <= k < STEPS - 1:
            told, true = p.seen(block.at_step(k)), p.seen(h1)
            if np.abs(told - true).mean() / np.abs(true).mean() < threshold:
                return ["reuse"], p.end(last.at_step(k))
        block.push(h1, k)
        h = p.blocks(h1, 1)
        last.push(h, k)
        return ["compute"], p.end(h)

    return step


def teacache(threshold: float, polynomial: Callable[[float], float], domain: tuple[float, float]) -> Step:
    """TeaCache (TeaCache4FLUX/teacache_flux.py), with the domain of the fit."""
    p = parts()
    kept: dict[str, Array] = {}
    total = 0.0

    def step(k: int, x: Array, t: float) -> tuple[list[str], Array]:
        nonlocal total
        h = p.begin(x, t)
        m = p.modulated(h)
        compute = k in (0, STEPS - 1)
        if compute:
            total = 0.0
        else:
            total += max(0.0, polynomial(min(max(change(m, kept["m"]), domain[0]), domain[1])))
            if total >= threshold:
                compute, total = True, 0.0
        kept["m"] = m  # every step
        if not compute:
            return ["reuse"], p.end(h + kept["r"])
        out = p.blocks(h)
        kept["r"] = out - h
        return ["compute"], p.end(out)

    return step


def easycache(threshold: float, first: int) -> Step:
    """EasyCache (EasyCache4HunyuanVideo/easycache_sample_video.py)."""
    p = parts()
    before = old_x = old_o = np.zeros(())
    rate = total = 0.0

    def step(k: int, x: Array, t: float) -> tuple[list[str], Array]:
        nonlocal before, old_x, old_o, rate, total
        compute = k < first or k >= STEPS - 1
        if not compute:
            total += rate * np.abs(x - before).mean() / np.abs(old_o).mean()
            compute = total >= threshold
        before = x
        if not compute:
            return ["reuse"], x + (old_o - old_x)
        total = 0.0
        o = p.end(p.blocks(p.begin(x, t)))
        if k:
            rate = np.abs(o - old_o).mean() / np.abs(x - old_x).mean()
        old_x, old_o = x, o
        return ["compute"], o

    return step


def adacache(book: dict[float, int]) -> Step:
    """AdaCache (opensora/models/stdit/stdit3.py), on values before their gates; steps count from 1 there."""
    p = parts()
    kept: dict[tuple[str, int], Array] = {}
    rate, computed = 1, 0

    def step(k: int, x: Array, t: float) -> tuple[list[str], Array]:
        nonlocal rate, computed
        now, h = k + 1, p.begin(x, t)
        active = now == computed + rate or now in (1, STEPS - 1, STEPS)
        for i in range(DEPTH):
            gate, gate_mlp = p.gates(i)
            old = kept.get(("attn", i))
            if active:
                kept["attn", i] = p.attention(i, h)
                if old is not None and i == DEPTH // 2:
                    far = change(kept["attn", i], old) / rate
                    new_rate = next(r for bound, r in book.items() if far < bound)
            h = h + gate * kept["attn", i]
            if active:
                kept["mlp", i] = p.mlp(i, h)
            h = h + gate_mlp * kept["mlp", i]
        if active:
            rate, computed = (new_rate if k else 1), now
        return ["compute" if active else "reuse"], p.end(h)

    return step


MASK = "1110100100100100"
CASES = {
    "firstblock": Case("firstblock{threshold=0.08}", lambda: firstblock(0.08)),
    "dbcache": Case("dbcache{F=2,B=1,R=0.1,W=3}", lambda: dbcache(2, 1, 0.1, 3)),
    "dbcache_taylor": Case(
        "dbcache{F=2,B=0,R=0.2,W=4,MC=3,predictor=taylorseer,order=2}", lambda: dbcache(2, 0, 0.2, 4, 2, 0, 3)
    ),
    "dbcache_caps": Case(
        "dbcache{F=1,B=2,R=0.3,W=2,M=5,max_accumulated_residual_diff_threshold=0.25}",
        lambda: dbcache(1, 2, 0.3, 2, most=5, budget=0.25),
    ),
    "dbcache_mask": Case(f"dbcache{{F=2,B=1,R=0.07,SCM={MASK}}}", lambda: dbcache(2, 1, 0.07, 1, mask=MASK)),
    "dbcache_static": Case(
        f"dbcache{{F=2,B=1,policy=static,mask={MASK},predictor=taylorseer,O=1}}",
        lambda: dbcache(2, 1, 0.0, 1, 1, mask=MASK, static=True),
    ),
    "cg_taylor": Case(
        "cg_taylor{threshold=0.02,first_block_order=2,order=1,first=4}", lambda: cg_taylor(0.02, 2, 1, 4)
    ),
    "teacache": Case(
        'teacache{threshold=0.3,coefficients="-4 2 0.01",domain="0.02 0.2"}',
        lambda: teacache(0.3, np.poly1d([-4, 2, 0.01]), (0.02, 0.2)),
    ),
    "easycache": Case("easycache{tau=0.2,ret_steps=3}", lambda: easycache(0.2, 3)),
    "adacache": Case(
        'adacache{codebook="0.055:5 0.07:4 0.085:3 inf:2"}',
        lambda: adacache({0.055: 5, 0.07: 4, 0.085: 3, math.inf: 2}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_session_does_what_the_paper_says(name):
    agrees(CASES[name])


@pytest.mark.parametrize("name", [n for n in CASES if n != "dbcache_static"])
def test_one_read_a_step_decides(name):
    """Beside the reads of the time, which every recipe has."""
    found, plain = run(CASES[name].recipe), run("lossless")
    assert 0 < found.reads - plain.reads <= STEPS - 1


def test_a_static_mask_reads_nothing():
    assert run(CASES["dbcache_static"].recipe).reads == run("lossless").reads


@pytest.mark.parametrize(
    "recipe",
    [
        "firstblock{threshold=0}",
        "dbcache{F=2,B=1,R=0,W=1,predictor=taylorseer}",
        "cg_taylor{threshold=0}",
        "teacache{threshold=0}",
        "easycache{threshold=0}",
        "adacache{codebook=inf:1}",
    ],
)
def test_threshold_0_is_exact(recipe):
    exact(recipe)
