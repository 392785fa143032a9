"""Capture: the graph is the model bit for bit, the live model is left alone, and what cannot be a graph is said."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt import roles as role_rules
from ditopt._torch import pytree
from ditopt.capture import Captured, bind, capture, derive
from ditopt.errors import BadInput, CaptureError
from ditopt.ir.interpret import run_program
from ditopt.ir.program import Input, TensorType
from ditopt.ir.verify import verify
from tests.tiny_models import ZOO, Plain, captured, equal, leaves, noise, snapshot, snapshots

NAMES = list(ZOO)


def take(model: nn.Module, *args: Any, roles: Any = None, **kwargs: Any) -> Captured:
    spec, tensors = bind(model, args, kwargs)
    return capture(model, spec, tensors, roles)


def run(model: nn.Module, c: Captured, *args: Any, **kwargs: Any) -> Any:
    """One call through the graph, with the model's own calling convention."""
    spec, tensors = bind(model, args, kwargs)
    assert spec.key == c.spec.key
    outputs, _ = run_program(c.program, dict(zip(spec.names, tensors, strict=True)))
    return c.pack(outputs)


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and bits."""
    (x, xs), (y, ys) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return (
        type(a) is type(b)
        and xs == ys
        and all(
            p.dtype == q.dtype and torch.equal(p, q) if isinstance(p, Tensor) else p == q
            for p, q in zip(x, y, strict=True)
        )
    )


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
        return {"tensor": a, "tuple": (a, b), "list": [a, b], "dict": {"b": b, "a": a}, "nested": nested}[self.how]


@pytest.mark.parametrize(
    ("how", "structure"),
    [("tensor", "single"), ("tuple", "tuple"), ("list", "tuple"), ("dict", ("b", "a")), ("nested", ("a", "b"))],
)
def test_outputs_keep_their_type(how, structure):
    model = Packs(how)
    c = take(model, torch.randn(2, 4), torch.rand(2, 1))
    x, t = torch.randn(2, 4), torch.rand(2, 1)
    assert same(run(model, c, x, t), model(x, t))
    assert c.structure == structure


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


# -- refusals ----------------------------------------------------------------------------------------------------------


class Branches(Plain):
    def forward(self, x, t, y):
        if x.mean() > 0:
            x = x * 2
        return super().forward(x, t, y)


class Counts(Plain):
    step: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x, t, y):
        self.step += 1
        return super().forward(x, t, y) * self.step


class CountsInside(Plain):
    """The same, in a dictionary."""

    seen: dict[str, list[int]]

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"steps": [0]}

    def forward(self, x, t, y):
        self.seen["steps"][0] += 1
        return super().forward(x, t, y) * self.seen["steps"][0]


class Buffers(Plain):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, t, y):
        self.seen.add_(1)
        return super().forward(x, t, y) * self.seen


class Overwrites(Plain):
    def forward(self, x, t, y):
        x.mul_(2)
        return super().forward(x, t, y)


class Bakes(Plain):
    """What a model does that looks at values only where it is not traced."""

    def forward(self, x, t, y):
        scale = 2.0 if torch.compiler.is_compiling() or x.mean() > 0 else 1.0
        return super().forward(x, t, y) * scale


class Random(Plain):
    def forward(self, x, t, y):
        return super().forward(x, t, y) + torch.rand(())


class Breaks(Plain):
    nothing: int

    def forward(self, x, t, y):
        return super().forward(x, t, y)[:, :, self.nothing]


def line_of(cls: type, text: str) -> int:
    source, start = inspect.getsourcelines(cls)
    return start + next(i for i, line in enumerate(source) if text in line)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Branches, [lambda: f"{__file__}:{line_of(Branches, 'if x.mean')} (if x.mean() > 0:)", "torch.where"]),
        (Breaks, [lambda: f"{__file__}:{line_of(Breaks, 'self.nothing')}", "AttributeError", "nothing"]),
        (Counts, ["changes its attribute step during forward", "Make it an input of forward"]),
        (CountsInside, ["changes its attribute seen.steps.0 during forward"]),
        (Buffers, ["changes seen during forward", "Pass it in and return it"]),
        (Overwrites, ["changes its input x in place during forward", "clone the input first"]),
        (Bakes, ["differs from the model", "second input", "depends on tensor values"]),
        (Random, ["differs from the model", "not deterministic"]),
    ],
)
def test_what_cannot_be_a_graph_is_said_and_leaves_the_model_alone(cls, words):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = noise(cls())
    inputs = ZOO["plain"].inputs()
    inputs["x"] = inputs["x"].abs() * torch.tensor([1.0, -2.0])[:, None, None, None]  # mean below 0
    given = {k: v.clone() for k, v in inputs.items()}
    before = snapshot(model)
    with pytest.raises(CaptureError) as error:
        take(model, **inputs)
    message = str(error.value)
    for word in [cls.__name__, *words]:
        assert (word() if callable(word) else word) in message, message
    assert equal(before, snapshot(model))
    assert all(torch.equal(given[k], v) for k, v in inputs.items())


def test_the_checks_can_pass():
    """The same models without what is refused."""
    for cls in (Bakes, Random):
        model = noise(cls())
        with torch.random.fork_rng():
            inputs = ZOO["plain"].inputs()
            spec, tensors = bind(model, (), inputs)
            assert capture(model, spec, tensors, verify=False).program.params


def test_an_output_that_is_not_finite_proves_nothing_and_is_refused_nowhere():
    model = Packs("tensor")
    with torch.no_grad():
        model.line.weight.fill_(float("inf"))
    assert take(model, torch.randn(2, 4), torch.rand(2, 1)).program.params


# -- the second input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "tensor", "holds"),
    [
        ("latent", torch.randn(4, 5), lambda a, b: not torch.equal(a, b) and (a - b).std() < a.std()),
        ("latent", torch.full((3,), 2.0), lambda a, b: torch.equal(a, b)),
        ("prompt", torch.arange(9), lambda a, b: not torch.equal(a, b) and set(b.tolist()) <= set(a.tolist())),
        ("prompt", torch.ones(2, 5), lambda a, b: b.sum() == 8 and not b[:, -1].any()),
        ("prompt", torch.ones(2, 5, dtype=torch.bool), lambda a, b: b.sum() == 8),
        ("timestep", torch.tensor([500, 1]), lambda a, b: b.tolist() == [375, 0]),
        ("timestep", torch.tensor([0.5]), lambda a, b: b.tolist() == [0.375]),
        ("shape", torch.randn(4), torch.equal),
        ("latent", torch.zeros(0, 3), torch.equal),
    ],
)
def test_derive(role, tensor, holds):
    before = tensor.clone()
    (new,) = derive([Input("a", role, TensorType.of(tensor))], [tensor])
    assert (new.dtype, new.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(tensor, before)
    assert holds(tensor, new)
    assert torch.equal(new, derive([Input("a", role, TensorType.of(tensor))], [tensor])[0])


# -- roles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("latent", "hidden_states x img latents sample noisy_latents control controlnet_block_samples.0 L_kwargs_x_"),
        ("timestep", "timestep t timesteps sigma r_timestep noise_labels L_kwargs_timestep_"),
        (
            "prompt",
            "encoder_hidden_states encoder_hidden_states_image y c context txt prompt_embeds class_labels pooled "
            "pooled_projections guidance encoder_attention_mask cap_feats.1 added_cond_kwargs.text_embeds "
            "attention_mask L_kwargs_encoder_hidden_states_",
        ),
        ("shape", "img_ids txt_ids position_ids image_rotary_emb.0 resolution fps freqs_cis"),
    ],
)
def test_roles_by_name(role, names):
    for name in names.split():
        assert role_rules._by_name(name, torch.zeros(2, 3)) == role, name


def test_roles_by_shape():
    """Names that say nothing: the output's shape is the latent's, one number a row is the time, labels are prompts."""
    given = [("q", torch.zeros(2, 7)), ("u", torch.zeros(2, 4)), ("v", torch.zeros(2)), ("w", torch.zeros(2).long())]
    assert role_rules.infer(given, [torch.zeros(2, 4)]) == ["latent", "latent", "timestep", "prompt"]


@pytest.mark.parametrize("name", NAMES)
def test_roles_of_the_tiny_models(name):
    roles = {i.name: i.role for i in captured(name)[1].program.inputs}
    assert list(roles.values()).count("latent") == 1
    assert list(roles.values()).count("timestep") == 1
    shape = {n for n, r in roles.items() if r == "shape"}
    assert shape == ({"img_ids", "txt_ids"} if name == "flux" else set())


class Anonymous(nn.Module):
    """``Plain`` behind names that say nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, a: Tensor, b: Tensor, foo: Tensor) -> Tensor:
        return self.inner(a, b, foo)


def test_roles_can_be_given():
    inputs = dict(zip("ab", list(ZOO["plain"].inputs().values())[:2], strict=True)) | {"foo": torch.tensor([3, 7])}
    model = Anonymous(captured("plain")[0])
    assert [i.role for i in take(model, **inputs).program.inputs] == ["latent", "timestep", "prompt"]
    given = {"b": "shape", "foo": "timestep"}
    assert [i.role for i in take(model, roles=given, **inputs).program.inputs] == ["latent", "shape", "timestep"]


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ({"tt": "timestep"}, ["names the input 'tt'", "x, t, y", "did you mean 't'"]),
        ({"t": "time"}, ["'time'", "latent, timestep, prompt, shape"]),
    ],
)
def test_unknown_roles_and_names(roles, words):
    with pytest.raises(BadInput) as error:
        take(captured("plain")[0], roles=roles, **ZOO["plain"].inputs())
    assert all(w in str(error.value) for w in words)
