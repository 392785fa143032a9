"""What a Session keeps: values that no later step reads are freed, and nobody could tell by the outputs."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from ditopt.codegen import lower
from ditopt.runtime import session as session_module
from ditopt.runtime.session import Session
from tests.runtime.loops import LABELS, plan, request

PREDICTORS = ("hold", "taylor,order=1", "newton,order=2", "hermite,order=1", "ab2", "ramp", "foca", "dmd")


def cases(count: int, seed: int = 0):
    """Recipes with random masks: one region, two, or every block for itself."""
    rng = random.Random(seed)

    def options():
        mask = "1" + "".join(rng.choice("0001") for _ in range(7))
        return f"mask={mask},predictor={rng.choice(PREDICTORS)}"

    for k in range(count):
        yield (
            f"cache{{region=blocks.1:-1,{options()}}}",
            f"cache{{region=blocks.0:2,{options()}}}, cache{{region=blocks.2:4,residual=no,{options()}}}",
            f"cache{{region=blocks,each=block,residual={rng.choice(('yes', 'no'))},{options()}}}",
        )[k % 3]


def keep_everything(patch):
    patch.setattr(session_module, "still_used", lambda ready, rules, memory, step: (memory, set()))
    patch.setattr(lower, "live_state", lambda program, rows, host=(): {s.name for s in program.state})


def ran(recipe, absent=()):
    """Latents and graphs of two requests with two branches."""
    session, made = Session(), plan(recipe)
    out = [request(session, made, seed, labels=LABELS, absent=absent) for seed in (0, 1)]
    assert torch.equal(request(Session(), made, 1, labels=LABELS, absent=absent)[-1], out[1][-1])  # as a fresh one
    return list(itertools.chain(*out)), [(r.step, r.branch, r.graph) for r in session.schedule_rows]


@pytest.mark.filterwarnings("ignore:cache .* was never reused")
@pytest.mark.parametrize("late", [0, 3])
def test_outputs_do_not_depend_on_what_is_freed(late, monkeypatch):
    """``late``: the step at which the second branch is called first (a guidance interval)."""
    absent = {(k, 1) for k in range(late)}
    reused = 0
    for recipe in cases(6, seed=late):
        got, graphs = ran(recipe, absent)
        with monkeypatch.context() as patch:
            keep_everything(patch)
            want, expected = ran(recipe, absent)
        assert graphs == expected, recipe
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), recipe
        reused += sum(g != "full" for *_, g in graphs)
    assert reused > 30


@pytest.mark.filterwarnings("ignore:cache .* was never reused")
def test_a_branch_that_misses_steps_reuses_as_often_as_if_all_were_kept(monkeypatch):
    rng = random.Random(1)
    for recipe in cases(6, seed=7):
        absent = {(k, 1) for k in range(8) if rng.random() < 0.3}
        got, graphs = ran(recipe, absent)
        with monkeypatch.context() as patch:
            keep_everything(patch)
            _, expected = ran(recipe, absent)
        assert graphs == expected, recipe
        assert all(x.isfinite().all() for x in got)


def slots(recipe, steps=8):
    """How many slots are held after each step."""
    session, made, held = Session(), plan(recipe), []
    session._on_event = lambda kind, _: held.append(len(next(iter(session._branches.values())).slots))
    request(session, made, steps=steps, calls=8)
    return held[1:]  # the first event opens the request


def test_slots_are_freed_after_their_last_reader():
    assert slots("cache{region=blocks.1:-1,mask=11010011,predictor=newton,order=1}") == [1, 2, 1, 2, 2, 0, 0, 0]
    assert slots("cache{region=blocks.1:-1,mask=11100111,predictor=hold}") == [0, 0, 1, 1, 0, 0, 0, 0]
    assert slots("cache{region=blocks.1:-1,every=4,predictor=hold}", steps=None) == [1] * 8  # how long is unknown


def test_a_step_that_computes_more_than_it_wants_keeps_what_it_computed():
    """Compiled targets have few graphs: a step without its own runs one that computes more, and goes on from there."""
    recipe = "cache{region=blocks.0:2,mask=11010000}, cache{region=blocks.2:4,mask=10000000}"
    both = {"cache0": "compute", "cache1": "compute"}, {"cache0": "reuse", "cache1": "reuse"}
    session, made = Session(), plan(recipe, rows=both)
    object.__setattr__(made, "more", None)
    request(session, made)
    assert [r.graph for r in session.schedule_rows] == ["full", "full", "reuse", "full", *["reuse"] * 4]
