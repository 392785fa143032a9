"""Hand-made plans through a Session: schedules executed, state kept apart, requests told apart, failures undone."""

import math
import weakref
from typing import Any

import pytest
import torch

from ditopt.artifact import Plan
from ditopt.errors import DitoptWarning, SessionError
from ditopt.ir.program import Interval, Predictor
from ditopt.runtime.session import Session
from tests.runtime.plans import NEGATIVE, PROMPT, SHAPE, WEIGHT, body, choices, equal, expected, make, sample


def test_the_table_is_what_runs():
    plan, calls = make()
    session = Session()
    sample(session, plan)
    assert (
        choices(session)
        == expected(plan, 9)
        == list(["compute"] * 2 + ["reuse", "reuse", "compute"] + ["reuse", "reuse", "compute", "reuse"])
    )
    stats = session.stats
    assert calls == {"full": 4, "reuse": 5} == stats.graphs
    assert stats.hits == {"cache": 5}
    assert (stats.calls, stats.steps, stats.requests) == (9, 9, 1)
    assert stats.share_flops == pytest.approx((4 * 10 + 5 * 2) / 90)
    assert stats.share_block_flops == pytest.approx(4 / 9)
    assert stats.syncs == 9  # the timestep, once a call


def test_prediction_is_the_formula():
    plan, _ = make(Interval(4, 2), Predictor("taylor", 2))
    session = Session()
    xs = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(s)) for s in range(8)]
    ys = [session.call(plan, [x, torch.tensor([9.0 - i]), PROMPT])[0] for i, x in enumerate(xs)]
    value = {i: body(xs[i], torch.tensor([9.0 - i]), PROMPT, WEIGHT) for i in (0, 1, 5)}
    torch.testing.assert_close(ys[4], value[1] + 3 * (value[1] - value[0]) + 0.1 * xs[4])
    first, before = (value[5] - value[1]) / 4, value[1] - value[0]
    torch.testing.assert_close(ys[7], value[5] + 2 * first + 2 * (first - before) / 4 + 0.1 * xs[7])


def test_every_one_is_exact():
    plan, _ = make(Interval(1))
    session = Session()
    with pytest.warns(DitoptWarning, match="computes every step"), session.open(steps=9):
        cached = sample(session, plan)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(range(900, 0, -100)):
        x = x - 0.05 * (body(x, torch.tensor([float(t)]), PROMPT, WEIGHT) + 0.1 * x)
        assert torch.equal(x, cached[i])


@pytest.mark.parametrize(
    "before",
    [
        {},
        {"stop": 1, "seed": 5},
        {"stop": 4, "seed": 5},
        {"times": range(700, 0, -100), "prompts": (NEGATIVE,)},
        {"hook": True},
        {"hook": True, "stop": 4},
        {"prompts": (PROMPT, NEGATIVE), "stop": 3},
    ],
    ids=[
        "whole",
        "cancelled at once",
        "cancelled midway",
        "another prompt",
        "hooked",
        "hooked and cancelled",
        "guidance",
    ],
)
@pytest.mark.parametrize("hook", [False, True], ids=["guessed", "hooked"])
@pytest.mark.parametrize("memo", [False, True], ids=["plain", "memos"])
def test_a_second_request_equals_a_fresh_session(before, hook, memo):
    plan, _ = make(memo=memo)
    used = Session()
    sample(used, plan, **before)
    fresh = Session()
    for prompts in [(PROMPT, NEGATIVE), (PROMPT,)]:
        second = sample(used, plan, prompts=prompts, hook=hook, seed=1)
        assert equal(second, sample(fresh, plan, prompts=prompts, hook=hook, seed=1))
        assert choices(used) == choices(fresh) == expected(plan, 9)
    assert fresh.stats.hits["cache"] == 15


@pytest.mark.parametrize("hook", [False, True])
def test_guidance_branches_are_apart_in_either_order(hook):
    plan, _ = make()
    both = Session()
    xs = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(s)) for s in range(6)]

    def run(session, prompts):
        out = []
        if hook:
            session.begin(6, range(6))
        for i, x in enumerate(xs):
            out.append([session.call(plan, [x, torch.tensor([9.0 - i]), p])[0] for p in prompts])
            if hook:
                session.advance(i)
        return out

    pairs = run(both, (PROMPT, NEGATIVE))
    swapped = run(Session(), (NEGATIVE, PROMPT))
    alone = run(Session(), (PROMPT,)), run(Session(), (NEGATIVE,))
    for i in range(6):
        assert torch.equal(pairs[i][0], swapped[i][1])
        assert torch.equal(pairs[i][1], swapped[i][0])
        assert torch.equal(pairs[i][0], alone[0][i][0])
        assert torch.equal(pairs[i][1], alone[1][i][0])
    assert choices(both, 0) == choices(both, 1) == expected(plan, 6)
    assert both.stats.requests == 1


def test_a_guidance_interval_begins_with_empty_state():
    plan, _ = make()
    session = Session()
    x = torch.zeros(SHAPE)
    for i in range(8):
        session.call(plan, [x + i, torch.tensor([9.0 - i]), PROMPT])
        if 3 <= i <= 4 or i == 7:
            session.call(plan, [x + i, torch.tensor([9.0 - i]), NEGATIVE])
    assert session.stats.requests == 1
    # begins at a step that would reuse; comes back after a step at which it should have computed
    assert [(r.step, r.choices["cache"]) for r in session.schedule_rows if r.branch == 1] == [
        (3, "compute"),
        (4, "compute"),
        (7, "compute"),
    ]
    assert choices(session) == expected(plan, 8)


def test_contexts_keep_branches_apart():
    plan, _ = make()
    session = Session()
    for i in range(6):
        for name in ("cond", "uncond") if i % 2 else ("uncond", "cond"):
            with session.context(name):
                session.call(plan, [torch.full(SHAPE, i / 7), torch.tensor([9.0 - i]), PROMPT])
    assert choices(session, 0) == choices(session, 1) == expected(plan, 6)
    assert session.clock.context is None


def test_a_doubled_batch_is_one_branch():
    plan, _ = make(rows=2)
    session = Session()
    for i in range(6):
        session.call(plan, [torch.full((4, 3), i / 7), torch.tensor([9.0 - i]), PROMPT])
    assert choices(session) == expected(plan, 6)
    assert {r.branch for r in session.schedule_rows} == {0}


def test_prompts_made_again_each_step():
    plan, _ = make(memo=True)
    session = Session()
    trace = sample(session, plan, prompts=(PROMPT, NEGATIVE), again=True)
    assert equal(trace, sample(Session(), plan, prompts=(PROMPT, NEGATIVE)))
    assert session.stats.hits["cache"] == 10
    assert session.stats.memo_fills == 9 + 2


def test_heun_counts_evaluations():
    plan, _ = make()
    session = Session()
    times = [9, 8, 8, 7, 7, 6, 6]
    hooked = Session()
    assert equal(sample(session, plan, times), sample(hooked, plan, times, hook=True))
    assert choices(session) == choices(hooked) == expected(plan, 7)
    assert session.stats.requests == 1
    assert session.stats.hits["cache"] > 0


def test_heun_in_timesteps():
    plan, _ = make(Interval(3, 3), Predictor("lagrange", 2, "timestep"))
    session = Session()
    trace = sample(session, plan, [9, 8, 8, 7, 7, 6, 6])
    assert session.stats.hits["cache"] == 3
    assert all(t.isfinite().all() for t in trace)
    bad, _ = make(Interval(3, 3), Predictor("lagrange", 2, "timestep"))
    session.reset()
    with pytest.raises(SessionError, match="timestep is nan"):
        sample(session, bad, [math.nan])


def test_a_new_resolution_is_another_planand_another_request():
    plan, _ = make()
    wide, _ = make(rows=2)
    session = Session()
    sample(session, plan, stop=4)
    rows = []
    for i in range(5):
        rows.append(session.call(wide, [torch.full((4, 3), i / 7), torch.tensor([500.0 - i]), PROMPT])[0])
    assert session.stats.requests == 2
    assert choices(session) == expected(wide, 5)
    session.reset()
    assert equal(sample(session, plan), sample(Session(), plan))


def test_hooks_read_the_timestep_only_before_the_first_step_ends():
    plan, _ = make()
    session = Session()
    sample(session, plan, hook=True)
    assert session.stats.syncs == 1
    assert choices(session) == expected(plan, 9)


def test_memos_are_filled_once_and_serve_the_next_request():
    plan, calls = make(memo=True)
    session = Session()
    sample(session, plan, prompts=(PROMPT, NEGATIVE))
    assert calls["hoisted"] == 2  # prompts
    assert calls["tabled"] == 9  # steps
    assert session.stats.memo_fills == 11
    # the timestep of each call, the weights once a request, the new prompt against the known one (clock and memo)
    assert session.stats.syncs == 2 * 9 + 1 + 2
    sample(session, plan, prompts=(PROMPT.clone(), NEGATIVE), seed=3)
    assert session.stats.memo_fills == 11
    assert session.stats.memo_hits == 4 * 9 - 11 + 4 * 9
    assert session.stats.memo_drops == 0


def test_a_data_write_between_requests_drops_the_memos():
    weight = torch.tensor([0.7])
    plan, _ = make(memo=True, weight=weight)
    events = []
    session = Session(on_event=lambda kind, fields: events.append(kind))
    sample(session, plan)
    version = weight._version
    weight.data.mul_(1.5)  # as a LoRA merge is written
    assert weight._version == version
    trace = sample(session, plan)
    assert session.stats.memo_drops == 10
    assert "weights" in events
    fresh, _ = make(memo=True, weight=weight)
    assert equal(trace, sample(Session(), fresh))


def test_a_memo_does_not_live_in_the_prompt():
    plan, _ = make(memo=True)
    plan = Plan(plan.manifest, {**plan.run, "hoisted": lambda args: [args[0][:3]]}, plan.params)
    session, prompt = Session(), PROMPT.clone()
    first = sample(session, plan, prompts=(prompt,))
    prompt.fill_(7)
    assert equal(sample(session, plan, prompts=(PROMPT.clone(),)), first)
    assert session.stats.memo_fills == 10


@pytest.mark.parametrize("hook", [False, True])
def test_a_request_frees_the_state_of_the_one_before(hook):
    plan, _ = make()
    made: list[Any] = []
    alive: list[int] = []

    def full(args):
        alive.append(sum(r() is not None for r in made))
        outputs = plan.run["full"](args)
        made.append(weakref.ref(outputs[1]))
        return outputs

    session, watched = Session(), Plan(plan.manifest, {**plan.run, "full": full}, plan.params)
    for _ in range(2):
        sample(session, watched, prompts=(PROMPT, NEGATIVE), hook=hook, stop=2)
    assert alive == [0, 1, 2, 3, 0, 1, 2, 3]


def test_inference_mode():
    plan, _ = make(memo=True)
    session = Session()
    with torch.inference_mode():
        prompts = (PROMPT.clone(), NEGATIVE.clone())
        traces = [sample(session, plan, prompts=prompts), sample(session, plan, prompts=prompts)]
        prompts[0].add_(1)  # nobody counts this write
        changed = sample(session, plan, prompts=prompts)
    assert equal(*traces)
    assert equal(traces[0], sample(Session(), plan, prompts=(PROMPT, NEGATIVE)))
    assert equal(changed, sample(Session(), plan, prompts=(PROMPT + 1, NEGATIVE)))
    assert session.stats.hits["cache"] == 30


@pytest.mark.parametrize("at", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("hook", [False, True])
def test_a_failed_call_leaves_nothing_behind(at, hook):
    failing = iter(i == at for i in range(100))
    plan, _ = make(memo=True, fail=lambda: next(failing))
    session = Session()
    xs = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(s)) for s in range(7)]
    good, _ = make(memo=True)
    reference = Session()
    for s in (session, reference):
        if hook:
            s.begin(7, range(7))
    failures = 0
    for i, x in enumerate(xs):
        args = [x, torch.tensor([9.0 - i]), PROMPT]
        try:
            y = session.call(plan, args)[0]
        except RuntimeError:
            failures += 1
            y = session.call(plan, args)[0]
        assert torch.equal(y, reference.call(good, args)[0])
        if hook:
            session.advance(i)
            reference.advance(i)
    assert failures == 1
    assert session.schedule_rows == reference.schedule_rows
    assert session.stats.hits == reference.stats.hits == {"cache": 4}


@pytest.mark.parametrize("at", [0, 1, 2, 5])
@pytest.mark.parametrize("hook", [False, True])
def test_a_call_counts_when_what_it_is_part_of_succeeds(at, hook):
    plan, _ = make(memo=True)
    session, reference = Session(), Session()
    xs = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(s)) for s in range(7)]

    def fails(args):
        with session.whole():
            session.call(plan, args)
            raise RuntimeError("afterwards")

    for s in (session, reference):
        if hook:
            s.begin(7, range(7))
    for i, x in enumerate(xs):
        args = [x, torch.tensor([9.0 - i]), PROMPT]
        if i == at:
            with pytest.raises(RuntimeError, match="afterwards"):
                fails(args)
        with session.whole():
            y = session.call(plan, args)[0]
            assert len(session.schedule_rows) == i
        assert torch.equal(y, reference.call(plan, args)[0])
        if hook:
            session.advance(i)
            reference.advance(i)
    assert session.schedule_rows == reference.schedule_rows
    assert session.stats.hits == reference.stats.hits == {"cache": 4}
    assert session.stats.calls == 7
