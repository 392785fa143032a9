"""The last resort of capture: a run recorded at the dispatcher, under the guards of replayed values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ditopt
from ditopt.capture import Captured, bind, chain
from ditopt.capture.check import check
from ditopt.capture.job import Job
from ditopt.errors import CaptureError
from ditopt.ir.verify import verify
from ditopt.pipeline import PassManager
from tests.capture.test_replay import Bool, Lengths, Looks, Masked, Nested, Written, inputs, line_of, make
from tests.capture.use import run, same, take
from tests.roads.tiny import example, small
from tests.tiny_models import equal, snapshot


class Unique(Looks):
    """The size of the result depends on values, and so do those of what is computed from it."""

    def look(self, x, t, text, mask):
        lengths = torch.unique(mask.sum(1))
        return text.sum(1) * lengths.float().mean() + len(lengths)


class Padded(Looks):
    """PyTorch itself reads the number, below its functions."""

    def look(self, x, t, text, mask):
        return F.pad(text, (0, 0, 0, mask.sum())).cumsum(1)[:, -1] * mask.sum(1)[:, None]


class Counted(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) * torch.bincount(mask.sum(1)).shape[0]


class Chosen(Looks):
    """One-hot vectors of as many classes as there are."""

    def look(self, x, t, text, mask):
        return text.sum(1) * F.one_hot(mask.sum(1)).shape[1]


class Array(Looks):
    def look(self, x, t, text, mask):
        lengths = np.asarray(mask.sum(1))
        return text.sum(1) * torch.from_numpy(np.cumsum(lengths)).float()[:, None]


def recorded(model: nn.Module, **kwargs: Tensor) -> Captured:
    """By the last resort, whether or not another way would do; checked like every capture."""
    spec, tensors = bind(model, (), kwargs)
    c = chain._recorded(Job(model, spec, tensors, {}, ()), ["asked for"])
    check(model, spec, c.program, c.guard, tensors)
    return c


def right(model: nn.Module, c: Captured, **given: Tensor) -> bool:
    with torch.no_grad():
        return same(run(model, c, **given), model(**given))


@pytest.mark.parametrize("cls", [Unique, Padded, Chosen])
def test_what_defeats_torch_export_is_recorded_under_a_guard(cls):
    model = make(cls)
    before = snapshot(model)
    c = take(model, **inputs())
    assert equal(before, snapshot(model))
    verify(c.program)
    assert c.notes[0].startswith(f"torch.export alone: {cls.__name__} cannot be traced at ")
    assert c.notes[1].startswith("torch.export with values as constants: ")
    assert c.notes[2].startswith("captured by recording a run at the dispatcher, with ")
    assert f", from mask, read at {__file__}:" in c.notes[3]
    assert c.guard is not None
    for seed in (0, 1):
        assert not c.guard.broken(c.guard.arguments(inputs(seed)))
        assert right(model, c, **inputs(seed))
    assert c.guard.broken(c.guard.arguments(inputs(lengths=(5, 1)))).startswith(
        f"its Python reads a value at {__file__}:"
    )


@pytest.mark.parametrize("cls", [Bool, Lengths, Masked, Nested, Written, Array, Counted])
def test_what_others_replay_is_recorded_as_well(cls):
    model = make(cls)
    c = recorded(model, **inputs())
    assert c.guard is not None
    assert c.guard.inputs == ("mask",)
    assert right(model, c, **inputs(1))
    assert c.guard.broken(c.guard.arguments(inputs(lengths=(5, 5))))


class OfLatent(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) * len(torch.unique(x > 0))


class OfTime(Looks):
    def look(self, x, t, text, mask):
        return F.pad(text, (0, 0, 0, (t * 1000).sum().long())).cumsum(1)[:, -1]


class OfLatentInPart(Looks):
    """The number comes from the mask in one operand only."""

    def look(self, x, t, text, mask):
        return text.sum(1) * torch.bincount(mask.sum(1) + (x[:, 0] > 0)).shape[0]


@pytest.mark.parametrize(
    ("cls", "line", "role"),
    [(OfLatent, "unique", "latent"), (OfTime, "F.pad", "timestep"), (OfLatentInPart, "bincount", "latent")],
)
def test_what_changes_every_step_is_refused_with_its_line(cls, line, role):
    model = make(cls)
    before = snapshot(model)
    with pytest.raises(CaptureError) as error:
        take(model, **inputs())
    said = str(error.value)
    assert f"{cls.__name__} cannot be traced at {__file__}:{line_of(cls, line)} (" in said
    assert f"depends on the {role}" in said
    assert equal(before, snapshot(model))


class HidesLatent(Looks):
    """Python gets at the latent by a way that nothing watches."""

    def look(self, x, t, text, mask):
        return text.sum(1) * len(torch.unique(mask.sum(1))) * (2 if np.from_dlpack(x)[0, 0] > 0 else 3)


def test_a_value_that_nobody_saw_is_found_by_the_check():
    given = inputs()
    given["x"][0, 0] = -0.01  # the derived input is on the other side
    with pytest.raises(CaptureError, match="differs from the model by"):
        take(make(HidesLatent), **given)


class Inside(Looks):
    """Weights by another handle, a constant, a write in place, and attention."""

    def look(self, x, t, text, mask):
        text = F.linear(text, self.b.weight.data)
        text[:, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        text = F.scaled_dot_product_attention(text, text, text)
        return text.sum(1) * len(torch.unique(mask))


def test_weights_stay_weights_and_operators_whole():
    model = make(Inside)
    c = take(model, **inputs())
    assert "recording" in c.notes[2]
    assert c.program.params["b.weight"] is model.b.weight
    assert [n for n in c.program.params if n.startswith("const.")] == ["const.constant0"]
    targets = [str(n.target) for n in c.program.step.graph.nodes if n.op == "call_function"]
    assert targets.count("aten.linear.default") == 4
    assert targets.count("aten.scaled_dot_product_attention.default") == 1
    assert not any(t.split(".")[1].endswith("_") for t in targets)
    paths = [n.meta["path"] for n in c.program.step.graph.nodes if str(n.target) == "aten.linear.default"]
    assert sorted(paths) == ["", "a", "a", "b"]
    with torch.no_grad():
        model.b.weight.mul_(2)  # seen: nothing of it is held
    assert right(model, c, **inputs(1))


class Writes(Looks):
    def look(self, x, t, text, mask):
        text.mul_(2)
        mask.logical_or_(torch.unique(mask)[0])
        return text.sum(1)


def test_a_model_that_writes_into_its_inputs_is_refused_and_writes_nothing():
    given = inputs()
    before = {k: v.clone() for k, v in given.items()}
    spec, tensors = bind(make(Writes), (), given)
    with pytest.raises(CaptureError, match="changes its input mask in place during forward"):
        chain._recorded(Job(make(Writes), spec, tensors, {}, ()), [])
    assert all(torch.equal(before[k], given[k]) for k in given)


def test_a_record_has_the_structure_of_an_export():
    model = small()
    c, plain = recorded(model, **example()), take(model, **example())
    kinds = [sorted(str(n.target) for n in p.program.step.graph.nodes if n.op == "call_function") for p in (c, plain)]
    assert kinds[0] == kinds[1]
    found = [PassManager("outline_blocks").run(p.program)[-1].program for p in (c, plain)]
    aliases = [[r.alias for r in p.blocks()] for p in found]
    assert aliases[0] == aliases[1] == ["blocks.0", "blocks.1", "blocks.2"]
    assert len({r.function for r in found[0].blocks()}) == 1


def test_optimize_captures_again_where_the_guard_breaks():
    model = make(Unique)
    fast = ditopt.optimize(model, "canonicalize", target="eager")
    with torch.no_grad():
        for lengths in ((3, 2), (3, 3)):
            given = inputs(4, lengths)
            if lengths == (3, 3):
                with pytest.warns(ditopt.DitoptWarning, match="captured again"):
                    got = fast(**given)
            else:
                got = fast(**given)
            assert torch.equal(got, model(**given))
    text = ditopt.explain(fast, "canonicalize", example_inputs=inputs(4), target="eager")
    assert "captured by recording a run at the dispatcher" in text
