"""The laws that every pass obeys. No pass is named here: each ships one Program on which it applies and one on which it
refuses, and is held to the laws by being a file in ditopt.passes.

Programs are interpreted, where every decision computes. That an approximate pass is exact at its neutral setting over
a whole request is for the runtime's tests; here its rewrite must be.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ditopt import pipeline
from ditopt.ir.edit import Editor, replace_functions
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.program import Program
from ditopt.ir.verify import verify
from ditopt.pipeline import Context, Outcome, Pass, PassManager
from ditopt.recipe import Recipe

NAMES = pipeline.names()


def run(pass_: Pass, program: Program) -> Outcome:
    """The pass itself, without the manager; its input is well formed and stays as it was."""
    verify(program)
    before = str(program)
    outcome = pass_.run(program, Context())
    assert str(program) == before, "a pass must not change its input"
    verify(outcome.program)
    return outcome


def law_applies(cls: type[Pass]) -> None:
    program = cls.example_applies()
    outcome = run(cls(), program)
    assert outcome.applied > 0
    assert str(outcome.program) != str(program)


def law_refuses(cls: type[Pass]) -> None:
    outcome = run(cls(), cls.example_refuses())
    assert outcome.applied == 0
    assert outcome.refused


def law_honest(cls: type[Pass]) -> None:
    """Nothing applied if and only if the text is unchanged, and then there is a reason."""
    for program in (cls.example_applies(), cls.example_refuses()):
        outcome = run(cls(), program)
        assert (outcome.applied == 0) == (str(outcome.program) == str(program))
        assert outcome.applied > 0 or outcome.refused
        assert all(s.strip() for s in outcome.refused)


def law_neutral(cls: type[Pass]) -> None:
    """Bit-equal before and after, over three steps that hand on their state."""
    setting = cls() if cls.contract == "exact" else cls.neutral()
    assert setting is not None, "an approximate pass has a setting at which it is exact"
    before = cls.example_applies()
    after = run(setting, before).program
    assert [(i.name, i.type) for i in after.inputs] == [(i.name, i.type) for i in before.inputs]
    assert after.outputs == before.outputs
    states: list[dict[str, torch.Tensor]] = [{}, {}]
    for step in range(3):
        inputs = random_inputs(before, seed=step)
        results = []
        for k, program in enumerate((before, after)):
            outputs, states[k] = run_program(program, inputs, states[k])
            results.append(outputs)
        assert len(results[0]) > 0
        for a, b in zip(*results, strict=True):
            assert a.isfinite().all(), "an example whose output is not finite proves nothing"
            assert a.abs().max() > 0, "an example whose output is zero proves nothing"
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def law_shares_weights(cls: type[Pass]) -> None:
    program = cls.example_applies()
    after = run(cls(), program).program
    assert all(after.params[k] is v for k, v in program.params.items() if k in after.params)


def law_idempotent(cls: type[Pass]) -> None:
    """Exact passes find by themselves that nothing is left."""
    once = run(cls(), cls.example_applies()).program
    again = run(cls(), once)
    assert again.applied == 0
    assert str(again.program) == str(once)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("law", [law_applies, law_refuses, law_honest, law_neutral, law_shares_weights])
def test_law(law, name):
    law(pipeline.get(name))


@pytest.mark.parametrize("name", NAMES)
def test_idempotent(name):
    cls = pipeline.get(name)
    if cls.contract == "exact":
        law_idempotent(cls)
    recipe = Recipe.parse(name)
    once = PassManager(recipe).run(cls.example_applies())[-1].program
    again = PassManager(recipe).run(once)[-1]
    assert (again.name, again.applied) == (name, 0)
    assert str(again.program) == str(once)


@pytest.mark.parametrize("name", NAMES)
def test_text(name):
    cls = pipeline.get(name)
    for pass_ in filter(None, (cls(), cls.neutral())):
        (step,) = Recipe.parse(pass_.text).steps
        assert pipeline.get(step.name).make(step.options) == pass_
    assert cls.__doc__, "a pass says what it does"


def test_there_are_passes():
    assert len(NAMES) >= 4
    assert {pipeline.get(n).contract for n in NAMES} == {"exact", "approximate"}


# -- the laws can fail -------------------------------------------------------------------------------------------------

aten = torch.ops.aten


def changed(program: Program, factor: float) -> Program:
    with Editor(program.step, "stub") as e:
        e.set_results([e.op(aten.mul.Scalar, r, factor) for r in e.results])
    return replace_functions(program, {program.entry: e.function()})


@dataclass(frozen=True)
class _Stub(Pass):
    """Does what it should not, as told."""

    name = "stub"
    contract = "exact"
    says: int = 1
    factor: float = 1.0
    reason: str = ""

    def run(self, program: Program, context: Context) -> Outcome:
        out = changed(program, self.factor) if self.factor else program
        return Outcome(out, self.says, (self.reason,) if self.reason else ())

    @classmethod
    def example_applies(cls) -> Program:
        return pipeline.get(NAMES[0]).example_applies()

    example_refuses = example_applies


@dataclass(frozen=True)
class _Wrong(_Stub):
    factor: float = 1.5


@dataclass(frozen=True)
class _Boasts(_Stub):
    factor: float = 0.0


@dataclass(frozen=True)
class _Hides(_Stub):
    says: int = 0
    reason: str = "nothing to do"


@dataclass(frozen=True)
class _Silent(_Stub):
    says: int = 0
    factor: float = 0.0


@dataclass(frozen=True)
class _NoNeutral(_Stub):
    contract = "approximate"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("law", "cls"),
    [
        (law_neutral, _Wrong),
        (law_neutral, _NoNeutral),
        (law_honest, _Boasts),
        (law_honest, _Hides),
        (law_honest, _Silent),
        (law_applies, _Boasts),
        (law_applies, _Silent),
        (law_refuses, _Stub),
        (law_refuses, _Silent),
        (law_idempotent, _Stub),
    ],
)
def test_a_law_catches_its_offender(law, cls):
    with pytest.raises(AssertionError):
        law(cls)


def test_an_offender_breaks_no_other_law():
    law_neutral(_Stub)
    law_applies(_Stub)
    law_shares_weights(_Stub)
