"""The manager: discovery, order, requirements, errors, bisect. Passes here are small files in a temporary folder."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from torch import fx

import ditopt.passes
from ditopt import pipeline
from ditopt._torch import FakeTensorMode
from ditopt.errors import BadInput, PassError, RecipeError, VerifyError
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.program import Formal, Function, Input, Program, TensorType
from ditopt.pipeline import Context, PassManager, bisect

aten = torch.ops.aten

HEAD = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from ditopt.errors import RecipeError
from ditopt.ir.edit import Editor, replace_functions
from ditopt.pipeline import Context, Outcome, Pass

aten = torch.ops.aten

@dataclass(frozen=True)
class Stub(Pass):
"""

# "mend" removes additions of zero; "scale" multiplies the output; the others are the ways in which a pass can fail.
STUBS = {
    "mend": """
    contract = "exact"
    def run(self, program, context):
        with Editor(program.step, "mend") as e:
            found = [n for n in program.step.graph.nodes if n.target is aten.add.Scalar and n.args[1] == 0]
            for node in found:
                e.replace(e[node], e[node].args[0])
            e.drop_dead(formals=False)
        if not found:
            return Outcome(program, 0, ("nothing adds zero",))
        return Outcome(replace_functions(program, {program.entry: e.function()}), len(found))
""",
    "scale": """
    contract = "approximate"
    requires = ("mend",)
    factor: float = 2.0
    def validate(self):
        if self.factor <= 0:
            raise RecipeError(f"factor={self.factor}: expected more than 0")
    def run(self, program, context):
        with Editor(program.step, "scale") as e:
            e.set_results([e.op(aten.mul.Scalar, r, self.factor) for r in e.results])
        changed = replace_functions(program, {program.entry: e.function()})
        return Outcome(changed, 1, notes=(f"target {context.target}",))
""",
    "last": """
    contract = "exact"
    after = ("scale", "absent")
    def run(self, program, context):
        return Outcome(program, 0, ("never does anything",))
""",
    "crash": """
    contract = "exact"
    def run(self, program, context):
        return {}["key"]
""",
    "picky": """
    contract = "exact"
    def run(self, program, context):
        raise RecipeError("the region matches nothing")
""",
    "silent": """
    contract = "exact"
    def run(self, program, context):
        return Outcome(program, 0)
""",
    "spoil": """
    contract = "exact"
    def run(self, program, context):
        with Editor(program.step, "spoil") as e:
            for node in e.graph.nodes:
                node.meta.pop("val", None)
        return Outcome(replace_functions(program, {program.entry: e.function()}), 1)
""",
    "round_a": """
    contract = "exact"
    after = ("round_b",)
""",
    "round_b": """
    contract = "exact"
    after = ("round_a",)
""",
}


@pytest.fixture
def add_pass(tmp_path, monkeypatch):
    """Adds a file to ``ditopt.passes`` for the length of a test."""
    monkeypatch.setattr(ditopt.passes, "__path__", [*ditopt.passes.__path__, str(tmp_path)])
    added = []

    def add(name: str, body: str, head: str = HEAD) -> None:
        (tmp_path / f"{name}.py").write_text(head + textwrap.dedent(body) if head != HEAD else head + body)
        added.append(name)

    yield add
    for name in added:
        sys.modules.pop(f"ditopt.passes.{name}", None)
        vars(ditopt.passes).pop(name, None)


@pytest.fixture
def stubs(add_pass):
    for name, body in STUBS.items():
        add_pass(name, body)
    return add_pass


def program() -> Program:
    """y = (x + 0) * 3"""
    with FakeTensorMode() as mode:
        val = mode.from_tensor(torch.empty(2, 3))
        graph = fx.Graph()
        x = graph.placeholder("x")
        zero = graph.call_function(aten.add.Scalar, (x, 0))
        y = graph.call_function(aten.mul.Scalar, (zero, 3.0))
        graph.output((y,))
    for node in (x, zero, y):
        node.meta = {"val": val, "region": "", "origin": "test"}
    x.meta["formal"] = Formal("input", "x")
    step = Function("step", graph)
    return Program({"step": step}, "step", {}, (Input("x", "latent", TensorType(torch.float32, (2, 3))),), ("y",))


def names(results) -> list[str]:
    return [r.name for r in results]


def test_a_pass_is_found_by_its_file(stubs):
    found = pipeline.discover()
    assert set(STUBS) <= set(found)
    assert found["scale"].name == "scale"
    assert found["scale"].options() == {"factor": (float, 2.0)}
    assert pipeline.get("scale").make({"factor": "3"}).text == "scale{factor=3.0}"
    assert pipeline.get("scale").make({"factor": 2}).text == "scale", "canonical text leaves defaults out"


def test_looking_for_names_imports_nothing(stubs):
    assert "crash" in pipeline.names()
    pipeline.get("mend")
    assert "ditopt.passes.crash" not in sys.modules


def test_an_unknown_pass_is_said(stubs):
    with pytest.raises(RecipeError, match=r"no pass is called 'scal'; did you mean 'scale'\? \(there are: .*crash"):
        pipeline.get("scal")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "must hold exactly one Pass, it holds 0"),
        (HEAD + '    contract = "exact"\n@dataclass(frozen=True)\nclass B(Stub):\n    pass', "it holds 2"),
        (HEAD.replace("(frozen=True)", "") + '    contract = "exact"', "frozen=True"),
        (HEAD + "    pass", "must declare contract"),
        (HEAD + '    contract = "exact"\n    name = "other"', "is called 'other'"),
        (HEAD + '    contract = "exact"\n    a: list = None', "int, float, str, bool"),
        (HEAD + '    contract = "exact"\n    a: int', "a needs a default"),
        (HEAD + '    contract = "exact"\n    name: str = ""', "an option cannot be called 'name'"),
    ],
)
def test_a_malformed_pass_file_is_named(add_pass, text, said):
    add_pass("odd", text, head="")
    with pytest.raises(PassError, match=said) as error:
        pipeline.get("odd")
    assert "passes/odd.py" in str(error.value)


def test_a_run_is_verified_timed_and_recorded(stubs):
    seen: list[pipeline.PassResult] = []
    before = program()
    first, second = PassManager("mend, scale{factor=4}", Context(target="t"), seen.append).run(before)
    assert (first.applied, second.applied) == (1, 1)
    assert (first.text, second.text) == ("mend", "scale{factor=4.0}")
    assert second.program.applied == ("mend", "scale{factor=4.0}")
    assert before.applied == ()
    assert second.before is first.program
    assert second.notes == ("target t",)
    assert first.ms > 0
    assert seen == [first, second]
    assert "mul" in second.diff()
    assert "add" in first.diff()
    x = random_inputs(before)
    (y,), _ = run_program(second.program, x)
    assert torch.equal(y, x["x"] * 3 * 4)


def test_requirements_are_added_once_and_not_again(stubs):
    results = PassManager("scale, scale{factor=3}").run(program())
    assert [(r.name, r.asked) for r in results] == [("mend", False), ("scale", True), ("scale", True)]
    again = PassManager("scale{factor=5}").run(results[-1].program)
    assert names(again) == ["scale"], "mend has run on this program already"


def test_order_follows_requires_and_after_else_the_recipe(stubs):
    assert names(PassManager("last, scale, mend").run(program())) == ["mend", "scale", "last"]
    assert names(PassManager("last, mend").run(program())) == ["last", "mend"], "nothing says otherwise"
    with pytest.raises(PassError, match="each want to run after another: round_a, round_b"):
        PassManager("round_a, round_b").run(program())


def test_an_approximate_pass_is_not_applied_twice(stubs):
    once = PassManager("scale").run(program())[-1].program
    (again,) = PassManager("scale").run(once)
    assert again.applied == 0
    assert again.refused == ("already applied with the same options",)
    assert again.program is once
    (other,) = PassManager("scale{factor=3}").run(once)
    assert other.applied == 1


def test_an_exact_pass_may_find_new_work(stubs):
    results = PassManager("mend, mend").run(program())
    assert [r.applied for r in results] == [1, 0]
    assert results[1].refused == ("nothing adds zero",)


def test_a_crash_keeps_the_last_good_program(stubs):
    with pytest.raises(PassError, match=r"pass crash failed \(after mend, scale\): KeyError: 'key'") as error:
        PassManager("scale, crash").run(program())
    assert error.value.earlier == ("mend", "scale")
    assert error.value.program.applied == ("mend", "scale")
    assert isinstance(error.value.__cause__, KeyError)


def test_a_deliberate_error_keeps_its_type_and_says_where(stubs):
    with pytest.raises(RecipeError, match="matches nothing") as error:
        PassManager("mend, picky").run(program())
    assert str(error.value) == "picky: the region matches nothing"
    assert error.value.__notes__ == ["raised by pass picky, after mend"]


def test_silence_is_an_error(stubs):
    with pytest.raises(PassError, match=r"pass silent \(as the first pass\) applied nothing and gave no reason"):
        PassManager("silent").run(program())


def test_a_malformed_program_is_the_fault_of_its_pass(stubs):
    with pytest.raises(PassError, match=r"pass spoil .*not well formed") as error:
        PassManager("mend, spoil").run(program())
    assert error.value.program.applied == ("mend",)
    assert isinstance(error.value.__cause__, VerifyError)


def test_a_program_that_was_malformed_before_is_nobodys_fault(stubs):
    broken = program()
    next(iter(broken.step.graph.nodes)).meta.pop("val")
    with pytest.raises(VerifyError):
        PassManager("mend").run(broken)


def test_options_are_checked_before_anything_runs(stubs):
    ran: list[pipeline.PassResult] = []
    with pytest.raises(RecipeError, match="expected more than 0"):
        PassManager("mend, scale{factor=-1}", after_each=ran.append).run(program())
    assert ran == []


def test_an_error_of_the_hook_is_not_the_fault_of_a_pass(stubs):
    def hook(result):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        PassManager("mend", after_each=hook).run(program())


def test_an_empty_recipe_does_nothing():
    assert PassManager("none").run(program()) == []


def test_bisect_names_the_first_pass_that_fails(stubs):
    before = program()
    x = random_inputs(before)
    (expected,), _ = run_program(before, x)

    def good(p: Program) -> bool:
        return torch.equal(run_program(p, x)[0][0], expected)

    culprit = bisect(before, "mend, scale{factor=1}, scale{factor=3}, scale{factor=0.5}", good)
    assert culprit is not None
    assert culprit.text == "scale{factor=3.0}"
    assert bisect(before, "mend, scale{factor=1}", good) is None
    with pytest.raises(BadInput, match="before any pass"):
        bisect(culprit.program, "mend", good)
