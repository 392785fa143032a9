"""Systems that decide every block by itself, against transcriptions."""

from __future__ import annotations

import pytest

from tests.recipes.oracle import DEPTH, STEPS, Array, Case, Step, agrees, change, exact, parts, run


def dbprune(front: int, back: int, threshold: float, warmup: int, longest: int = 0) -> Step:
    """DBPrune, decided as the recipe says: by the sum of how far a block's input moved each step since the block was
    computed, the newest of them standing for the step to come."""
    p = parts()
    ids = range(front, DEPTH - back)
    before: dict[int, Array] = {}
    moved, total, in_a_row = dict.fromkeys(ids, 0.0), dict.fromkeys(ids, 0.0), dict.fromkeys(ids, 0)
    added: dict[int, Array] = {}

    def step(k: int, x: Array, t: float) -> tuple[list[str], Array]:
        h, chosen = p.begin(x, t), []
        for i in range(DEPTH):
            if i not in ids:
                h = p.block(i, h)
                continue
            at = total[i] + moved[i]
            skip = k >= warmup and at < threshold and not (longest and in_a_row[i] >= longest)
            total[i], in_a_row[i] = (at, in_a_row[i] + 1) if skip else (0.0, 0)
            moved[i] = change(p.seen(h, i), before[i]) if k else 0.0
            before[i] = p.seen(h, i)
            if not skip:
                added[i] = p.block(i, h) - h
            h = h + added[i]
            chosen.append("reuse" if skip else "compute")
        return chosen, p.end(h)

    return step


def tdc(threshold: float, longest: int, budget: float) -> Step:
    """Temporal Delta Cache of 6Bit-Diffusion."""
    p = parts()
    close, in_a_row = [1e9] * DEPTH, [0] * DEPTH
    added: list[Array] = [None] * DEPTH

    def step(k: int, x: Array, t: float) -> tuple[list[str], Array]:
        h, chosen = p.begin(x, t), []
        for i in range(DEPTH):
            spent = close[i] * (in_a_row[i] + 1)
            skip = 2 <= k < STEPS - 1 and close[i] < threshold and in_a_row[i] < longest and spent <= budget
            in_a_row[i] = in_a_row[i] + 1 if skip else 0
            if not skip:
                new = p.block(i, h) - h
                if k:
                    close[i] = change(p.seen(new, i + 1), p.seen(added[i], i + 1))
                added[i] = new
            h = h + added[i]
            chosen.append("reuse" if skip else "compute")
        return chosen, p.end(h)

    return step


CASES = {
    "dbprune": Case("dbprune{F=1,B=1,R=0.19,W=3,MC=4}", lambda: dbprune(1, 1, 0.19, 3, 4)),
    "tdc": Case("tdc{threshold=0.1,longest=2,budget=0.15}", lambda: tdc(0.1, 2, 0.15)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_session_does_what_the_transcription_says(name):
    agrees(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_blocks_decide_for_themselves_from_one_read_a_step(name):
    found = run(CASES[name].recipe)
    assert any(len(set(row)) == 2 for row in found.choices), "some blocks reuse where others compute"
    assert 0 < found.reads - run("lossless").reads <= STEPS - 1


def test_a_block_that_never_reuses_beside_others_is_no_warning():
    found = run("tdc{threshold=0.07}")
    never = {i for i in range(DEPTH) if all(row[i] == "compute" for row in found.choices)}
    assert 0 < len(never) < DEPTH
    assert not found.told


@pytest.mark.parametrize("recipe", ["dbprune{F=1,W=1,R=0}", "tdc{threshold=0}"])
def test_threshold_0_is_exact(recipe):
    exact(recipe)
