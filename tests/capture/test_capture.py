"""Capture: the graph is the model bit for bit, and the live model is left alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.capture import bind, capture
from ditopt.errors import BadInput, CaptureError
from ditopt.ir.verify import verify
from tests.capture.use import run, same, take
from tests.tiny_models import ZOO, Plain, captured, equal, leaves, snapshot, snapshots

NAMES = list(ZOO)


# -- the graph is the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_block_matters(name):
    """Else the tests below would pass for blocks that are the identity."""
    tiny, (plain, _) = ZOO[name], captured(name)
    with torch.no_grad():
        want = leaves(plain(**tiny.inputs()))[0]
        assert want.isfinite().all()
        for i, _block in enumerate(tiny.blocks(plain)):
            model = copy.deepcopy(plain)
            for p in tiny.blocks(model)[i].parameters():
                p.mul_(1.5)
            error = (leaves(model(**tiny.inputs()))[0] - want).norm() / want.norm()
            assert error > 1e-3, f"block {i} of {name} changes the output by {error:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_bit_equal_on_the_example_and_on_another_input(name):
    tiny, (model, c) = ZOO[name], captured(name)
    verify(c.program)
    results = []
    for seed in (0, 5):
        inputs = tiny.inputs(seed)
        with torch.no_grad():
            want = model(**inputs)
        assert same(run(model, c, **inputs), want)
        results.append(leaves(want)[0])
    assert not torch.equal(*results)


@pytest.mark.parametrize("name", ["dit", "plain", "joint"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(name, dtype):
    tiny = ZOO[name]
    model = tiny.model(dtype)
    c = take(model, **tiny.inputs(dtype=dtype))
    assert {p.dtype for p in c.program.params.values() if p.is_floating_point() and p.ndim > 1} == {dtype}
    for seed in (0, 5):
        inputs = tiny.inputs(seed, dtype)
        with torch.no_grad():
            assert same(run(model, c, **inputs), model(**inputs))


@pytest.mark.parametrize(("return_dict", "kind"), [(True, "Transformer2DModelOutput"), (False, "tuple")])
def test_outputs_of_diffusers_keep_their_type(return_dict, kind):
    model, _ = captured("dit")
    inputs = ZOO["dit"].inputs() | {"return_dict": return_dict}
    c = take(model, **inputs)
    out = run(model, c, **inputs)
    assert type(out).__name__ == kind
    assert c.structure == (("sample",) if return_dict else "tuple")
    assert out[0].shape == (2, 8, 8, 8)


class Packs(nn.Module):
    """Packs its output as told."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.line, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor, t: Tensor) -> Any:
        a, b = self.line(x) + t, x * t
        nested = {"a": [a, None], "b": (b, "text", 3)}
        packed: Any = {"tensor": a, "tuple": (a, b), "list": [a, b], "dict": {"b": b, "a": a}, "nested": nested}
        return (packed | {"record": Record(a, {"b": b}), "object": SimpleNamespace(a=a)})[self.how]


@dataclass(frozen=True)
class Record:
    """An output that pytree does not know; it derives an attribute."""

    a: Tensor
    more: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "double", self.a * 2)


@pytest.mark.parametrize(
    ("how", "structure"),
    [("tensor", "single"), ("tuple", "tuple"), ("list", "tuple"), ("dict", ("b", "a")), ("nested", ("a.0", "b.0"))],
)
def test_outputs_keep_their_type(how, structure):
    model = Packs(how)
    c = take(model, torch.randn(2, 4), torch.rand(2, 1))
    x, t = torch.randn(2, 4), torch.rand(2, 1)
    assert same(run(model, c, x, t), model(x, t))
    assert c.structure == structure


def test_a_dataclass_is_made_anew_with_all_that_it_holds():
    model = Packs("record")
    c = take(model, torch.randn(2, 4), torch.rand(2, 1))
    x, t = torch.randn(2, 4), torch.rand(2, 1)
    got, want = run(model, c, x, t), model(x, t)
    assert type(got) is Record
    assert same(vars(got), vars(want))
    assert set(vars(got)) == {"a", "more", "double"}
    assert c.structure == ("a", "more.b", "double")


def test_an_object_that_may_hide_tensors_is_refused():
    """Its tensors would be those of the trace for ever."""
    with pytest.raises(CaptureError, match=r"Packs returns a SimpleNamespace.*tuples, lists, dicts and dataclasses"):
        take(Packs("object"), torch.randn(2, 4), torch.rand(2, 1))


# -- calls -------------------------------------------------------------------------------------------------------------


def test_positional_and_keyword_calls_have_one_signature():
    model, _ = captured("plain")
    x, t, y = ZOO["plain"].inputs().values()
    calls = [bind(model, (x, t, y), {}), bind(model, (x,), {"y": y, "t": t}), bind(model, (), {"t": t, "y": y, "x": x})]
    assert len({spec.key for spec, _ in calls}) == 1
    assert all(all(a is b for a, b in zip(tensors, (x, t, y), strict=True)) for _, tensors in calls)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 4, 16, 16)},
        {"x": torch.zeros(2, 4, 8, 8, dtype=torch.float64)},
        {"t": torch.zeros(2, dtype=torch.int64)},
        {"y": None},
    ],
)
def test_other_shapes_dtypes_and_statics_are_another_signature(change):
    model, c = captured("plain")
    assert bind(model, (), ZOO["plain"].inputs() | change)[0].key != c.spec.key
    assert bind(model, (), ZOO["plain"].inputs(7))[0].key == c.spec.key


@pytest.mark.parametrize(("t", "dtype"), [(500, torch.int64), (500.0, torch.float32)])
def test_a_python_timestep_becomes_a_tensor(t, dtype):
    """Else every step would be captured anew, or the first step's time would be baked in."""
    model, _ = captured("plain")
    x, _, y = ZOO["plain"].inputs().values()
    c = take(model, x, t, y)
    (time,) = [i for i in c.program.inputs if i.role == "timestep"]
    assert (time.name, time.type.dtype, time.type.shape) == ("t", dtype, ())
    with torch.no_grad():
        for other in (t, t // 2):
            assert same(run(model, c, x, other, y), model(x, torch.tensor(other), y))


class Scalars(nn.Module):
    """Python values of every kind."""

    def forward(self, x: Tensor, sigma: Any, strength: Any, times: Any, mode: str, **more: Any) -> Tensor:
        if mode == "twice":
            x = x * 2
        return x * strength + sigma * times + (more["extra"]["shift"] or 0)


def test_floats_become_tensors_and_other_values_are_static():
    model = Scalars()
    x = torch.randn(2, 3)
    given = {"sigma": 0.5, "strength": 2.0, "times": 3, "mode": "twice", "extra": {"shift": None}}
    c = take(model, x, **given)
    assert c.spec.names == ("x", "sigma", "strength", "times")
    assert dict(c.spec.static_items()) == {"mode": "twice", "extra.shift": None}
    assert c.spec.labels == ("x", "sigma", "strength", "times", "mode", "extra.shift")
    again = given | {"sigma": 0.25, "strength": 3.0, "times": 4}
    assert torch.allclose(run(model, c, x, **again), model(x, **again))
    assert bind(model, (x,), given | {"mode": "once"})[0].key != c.spec.key


class Star(nn.Module):
    """Positional-only and variadic arguments."""

    def forward(self, x: Tensor, t: Tensor, /, *more: Tensor, scale: float = 1.0) -> Tensor:
        return (x + sum(more)) * t * scale


class Fills(nn.Module):
    """Makes tensors of a number, as people do where a timestep is one."""

    def forward(self, x: Tensor, timestep: Any) -> Tensor:
        rows = torch.full((2,), timestep) + torch.full([2], 3.0, dtype=torch.float64)
        return x * rows[:, None] + torch.tensor([[timestep, 2.0], [1.0, timestep]], dtype=torch.float32).sum()


@pytest.mark.parametrize("time", [9.7, 9, torch.tensor(9.7)])
def test_tensors_are_made_of_numbers_that_became_tensors(time):
    x = torch.randn(2, 4)
    c = take(Fills(), x, time)
    for factor in (1, 3):
        assert same(run(Fills(), c, x, time * factor), Fills()(x, time * factor))


def test_positional_only_and_variadic_arguments():
    model, x, t = Star(), torch.randn(2, 3), torch.rand(())
    c = take(model, x, t, x + 1, x + 2, scale=2.0)
    assert c.spec.names == ("x", "t", "more.0", "more.1", "scale")
    assert torch.equal(run(model, c, x, t, x + 1, x + 2, scale=3.0), model(x, t, x + 1, x + 2, scale=3.0))


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {}, ["missing a required argument", "'x'"]),
        ((1, 2, 3, 4), {}, ["too many positional arguments"]),
        ((), {"x": 0, "t": 0, "y": 0, "z": 0}, ["unexpected keyword argument 'z'"]),
    ],
)
def test_a_call_that_does_not_fit(args, kwargs, words):
    with pytest.raises(BadInput) as error:
        bind(captured("plain")[0], args, kwargs)
    assert all(w in str(error.value) for w in ["Plain.forward(x:", *words])


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, 1j])
def test_an_argument_of_an_unsupported_type(value):
    with pytest.raises(BadInput, match=f"argument y is a {type(value).__name__}; ditopt takes tensors, numbers"):
        bind(captured("plain")[0], (torch.zeros(1), 0.0, value), {})


class Mode(Enum):
    SLOW, FAST = 1, 2


class Chooses(nn.Module):
    """What is no tensor decides, by an enum and by numbers of NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)

    def forward(self, x: Tensor, t: float, mode: Mode, size: int = 1) -> Tensor:
        emb = self.time(torch.as_tensor(t).reshape(1, 1))
        return x * emb * size if mode is Mode.FAST else x - emb


def test_members_of_an_enum_and_numbers_of_numpy_are_arguments(tmp_path):
    model, x = Chooses(), torch.randn(2, 4)
    fast = ditopt.optimize(model, target="eager", example_inputs={"x": x, "t": np.float32(0.5), "mode": Mode.FAST})
    with torch.no_grad():
        for call in ((np.float32(0.5), Mode.FAST, np.int64(3)), (0.25, Mode.SLOW, 3), (np.float32(1), Mode.FAST, 1)):
            assert torch.equal(fast(x, *call), model(x, *call))
    ditopt.export_onnx(model, tmp_path / "a.onnx", example_inputs={"x": x, "t": 0.5, "mode": Mode.FAST})
    loaded = ditopt.load(tmp_path / "a.onnx")
    torch.testing.assert_close(loaded(x=x, t=np.float32(0.25), mode=Mode.FAST), model(x, 0.25, Mode.FAST).detach())
    with pytest.raises(BadInput, match=r"mode='Mode.SLOW' given, but .* was exported with mode='Mode.FAST'"):
        loaded(x=x, t=0.5, mode=Mode.SLOW)


# -- weights are handles, the model is left alone ----------------------------------------------------------------------


def test_the_snapshot_sees_changes():
    model = Plain()
    before = snapshot(model)
    assert equal(before, snapshot(model))
    for change in (
        lambda: model.head.weight.data.add_(1),
        lambda: setattr(model, "step", 1),
        lambda: model.head.register_forward_hook(lambda *a: None),
        lambda: model.train(not model.training),
        lambda: model.head.register_buffer("seen", torch.zeros(1)),
    ):
        before = snapshot(model)
        change()
        assert not equal(before, snapshot(model))


@pytest.mark.parametrize("name", NAMES)
def test_the_live_model_is_untouched(name):
    captured(name)
    before, after = snapshots[name]
    assert before[""]["training"], "capture takes a model as it is"
    assert len(before) > 20
    assert equal(before, after)


def test_hooks_stay():
    model, calls = ZOO["plain"].model(), []
    model.blocks[0].register_forward_hook(lambda *a: calls.append(a))
    before = snapshot(model)
    take(model, **ZOO["plain"].inputs())
    assert equal(before, snapshot(model))


@pytest.mark.parametrize("name", NAMES)
def test_params_are_handles(name):
    model, c = captured(name)
    live = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    named = [k for k in c.program.params if not k.startswith("const.")]
    assert len(named) >= 20
    assert all(c.program.params[k] is live[k] for k in named)


def test_a_change_in_place_is_seen():
    tiny = ZOO["plain"]
    model = tiny.model()
    c, inputs = take(model, **tiny.inputs()), tiny.inputs(3)
    with torch.no_grad():
        before = run(model, c, **inputs)
        model.get_parameter("blocks.1.out.weight").data.mul_(2)
        model.get_parameter("head.bias").add_(1)
        assert same(run(model, c, **inputs), model(**inputs))
        assert not torch.equal(before, model(**inputs))


def test_weights_given_as_arguments_are_params():
    """A graph from Dynamo takes its weights as arguments."""

    class Functional(nn.Module):
        def forward(self, x, t, w):
            return x @ w * t

    x, t, w = torch.randn(2, 4), torch.rand(2, 1), torch.randn(4, 4)
    spec, tensors = bind(Functional(), (x, t, w), {})
    program = capture(Functional(), spec, tensors, weights=["w"]).program
    assert program.params["w"] is w
    assert [i.name for i in program.inputs] == ["x", "t"]


class Sum(nn.Module):
    def forward(self, a: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return a * t - b


def test_one_tensor_given_twice_is_two_inputs():
    a, t, b = torch.randn(2, 4), torch.rand(2, 1), torch.randn(2, 4)
    c = take(Sum(), a, t, a)
    assert [i.name for i in c.program.inputs] == ["a", "t", "b"]
    assert torch.equal(run(Sum(), c, a, t, b), a * t - b)
