"""What a Session is given and gives, its limits, and what it warns of."""

import warnings

import pytest
import torch

from ditopt.artifact import Manifest, Plan, StepGraph, Update
from ditopt.errors import DitoptWarning, SessionError
from ditopt.ir.program import Input, Interval, Predictor, StateSlot, TensorType
from ditopt.runtime.ahead import clock_bits
from ditopt.runtime.session import Session
from tests.runtime.plans import PROMPT, SHAPE, F, choices, equal, expected, make, sample


def test_the_caller_may_write_into_what_it_passed_and_got():
    plan, _ = make(Interval(3, 2), Predictor())
    aliased = dict(plan.run)
    aliased["full"] = lambda args: [args[0], args[0]]  # result and slot are the latent itself
    aliased["reuse"] = lambda args: [args[2]]  # the result is the slot itself
    plan = Plan(plan.manifest, aliased, plan.params)
    session = Session()
    x = torch.ones(SHAPE)
    session.call(plan, [x, torch.tensor([9.0]), PROMPT])
    x.fill_(2)
    session.call(plan, [x, torch.tensor([8.0]), PROMPT])
    x.fill_(3)
    for t in (7.0, 6.0):
        y = session.call(plan, [x, torch.tensor([t]), PROMPT])[0]
        assert torch.equal(y, torch.full(SHAPE, 2.0))
        y.fill_(9)
    assert session.stats.hits["cache"] == 2


def test_a_slot_that_was_never_written_is_zeros_of_its_strides():
    type_ = TensorType(torch.float32, SHAPE, (1, 2))
    seen = []
    manifest = Manifest(
        (Input("x", "latent", TensorType(torch.float32, SHAPE)),),
        ("y",),
        (StateSlot("s", type_), StateSlot("r", type_), StateSlot("n", TensorType(torch.float32, ()), "model")),
        (),
        (),
        (
            StepGraph(
                "full", {}, tuple(F("input", "x") + F("state", "s", "n")), 1, (Update("s", -1, "r"), Update("n", 1))
            ),
        ),
    )

    def full(args):
        seen.append(args[1].stride())
        return [args[0] + args[1] + args[2], args[2] + 1]

    session = Session()
    plan = Plan(manifest, {"full": full})
    for i in range(3):  # each call is a request: there is no timestep. A model slot outlives them.
        (y,) = session.call(plan, [torch.ones(SHAPE)])
        assert torch.equal(y, torch.full(SHAPE, 1.0 + i))
    assert seen == [(1, 2)] * 3


def test_what_does_not_fit_the_plan():
    plan, _ = make()
    session = Session()
    x, t = torch.zeros(SHAPE), torch.zeros(1)
    for args, match in [
        ([x, t], "2 inputs given, 3 expected"),
        ([x.double(), t, PROMPT], r"'x' is torch.float64.*optimize the model again"),
        ([x[:1], t, PROMPT], r"'x' is torch.float32\[1, 3\]"),
        ([x.to("meta"), t.to("meta"), PROMPT.to("meta")], "device|meta"),
    ]:
        if x.device != args[0].device:
            session.call(plan, [x, t, PROMPT])
        with pytest.raises(SessionError, match=match):
            session.call(plan, args)
    assert session.stats.calls == 1


def test_strides_are_those_of_the_plan():
    plan, _ = make()
    x = torch.randn(3, 2).t()
    assert not x.is_contiguous()
    full = dict(plan.run)["full"]
    contiguous = []

    def watched(args):
        contiguous.append(args[0].is_contiguous())
        return full(args)

    run = {**plan.run, "full": watched}
    Session().call(Plan(plan.manifest, run, plan.params), [x, torch.zeros(1), PROMPT])
    assert contiguous == [True]


def test_ten_branches_at_once():
    plan, _ = make()
    session = Session()
    session.begin(6, range(6))
    prompts = [PROMPT + k for k in range(10)]
    for i in range(6):
        for k, p in enumerate(prompts):
            with session.context(str(k)):
                session.call(plan, [torch.full(SHAPE, i / 7), torch.tensor([9.0 - i]), p])
        session.advance(i)
    assert len(session._branches) == 8
    assert session.stats.hits["cache"] == 8 * 3  # the last two compute and keep nothing


def test_too_few_steps_is_said():
    plan, _ = make(Interval(4, 3))
    session = Session()
    with pytest.warns(DitoptWarning, match="ran 3 steps and its schedule first reuses at step 3"), session.open():
        sample(session, plan, range(3, 0, -1))
    sample(session, plan, [2, 1])
    with pytest.warns(DitoptWarning, match="ran 2 steps"):
        session.reset()
    session.begin(3, [3, 2, 1])
    sample(session, plan, [3, 2, 1])
    with pytest.warns(DitoptWarning, match="leave none of the 3 steps"):
        session.begin(2, [2, 1])
    with pytest.warns(DitoptWarning, match="leave none of the 4 steps"), Session().open(steps=4) as other:
        sample(other, make(Interval(4, 3, last=1))[0], range(4, 0, -1))


def test_a_request_that_hits_is_silent():
    plan, _ = make()
    session = Session()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with session.open(steps=9):
            sample(session, plan)
        sample(session, plan, hook=True)
        sample(session, plan, hook=True, stop=1)  # cancelled
        sample(session, plan, hook=True)
        session.reset()
        sample(session, plan, stop=1)
        sample(session, plan)


def test_a_loop_that_breaks_every_guess_is_told_once():
    plan, _ = make(Interval(3, 1))
    session = Session()

    def calls():
        for i in range(30):
            session.call(plan, [torch.full(SHAPE, i / 7), torch.tensor([90.0 - i]), PROMPT + i])

    with pytest.warns(DitoptWarning, match=r"8 calls.*the prompt changed.*session\(steps") as caught:
        calls()
    assert len(caught) == 1
    assert session.stats.hits["cache"] == 0


def test_a_missing_variant_is_the_reason():
    plan, _ = make()
    only = Plan(Manifest(**{**vars(plan.manifest), "graphs": plan.manifest.graphs[:1]}), plan.run, plan.params)
    session = Session()
    with pytest.warns(DitoptWarning, match="no compiled variant"), session.open(9):
        sample(session, only)
    assert choices(session) == ["compute"] * 9


def test_more_steps_than_declared():
    plan, _ = make()
    session = Session()
    with (
        pytest.warns(DitoptWarning, match="step 4 of a request that was declared to have 4") as caught,
        session.open(4),
    ):
        sample(session, plan)
    assert len(caught) == 1
    assert choices(session) == expected(plan, 4) + ["compute"] * 5


def test_another_number_of_steps_than_optimized_for():
    plan, _ = make(Interval(3, 1, last=1), steps=6)
    session = Session()
    with pytest.warns(DitoptWarning, match="runs 9 steps and the model was optimized for 6"):
        sample(session, plan, hook=True)
    assert choices(session) == expected(plan, 9)
    assert choices(session)[-1] == "compute"
    bare = Session()
    sample(bare, plan, range(6, 0, -1))  # the manifest's number lets `last` be honoured
    assert choices(bare) == expected(plan, 6)


def test_a_mask_fixes_the_number_of_steps():
    plan, _ = make(Interval(mask="110100100"), steps=9)
    session = Session()
    sample(session, plan)
    assert choices(session) == [{"1": "compute", "0": "reuse"}[c] for c in "110100100"]
    with pytest.raises(SessionError, match="9 entries and this request runs 5"):
        sample(session, plan, [5, 4, 3, 2, 1], hook=True)


def test_an_exception_inside_a_session_is_a_cancelled_request():
    plan, _ = make()
    session = Session()

    def cancelled():
        with session.open(9):
            sample(session, plan, stop=1)
            raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyboardInterrupt):
            cancelled()
    assert not session._branches
    assert equal(sample(session, plan), sample(Session(), plan))


def test_the_key_of_a_long_time_is_its_hash():
    time = torch.randn(1000)
    other = time.clone()
    other[-1] += 1
    assert clock_bits(time) == clock_bits(time.clone()) != clock_bits(other)
    assert len(clock_bits(time)) == 32
    assert clock_bits(torch.tensor([1.0])) == b"\0\0\x80?"
