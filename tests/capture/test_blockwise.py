"""Models of which only the blocks are captured: what forward may do around them, and what is refused."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.capture.deferred import Deferred
from ditopt.errors import BadInput, CaptureError, DitoptError, DitoptWarning, SessionError
from tests.capture.use import take
from tests.tiny_models import equal, noise, snapshot

WIDTH, TOKENS = 16, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.ada = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q, k, v = self.qkv(x * (1 + self.ada(c)[:, None])).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.ff(x)


class Model(nn.Module):
    """The time decides in forward; the methods are what the tests exchange."""

    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.time, self.head = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([self.block() for _ in range(3)])

    def forward(self, x: Tensor, t: Tensor) -> Any:
        c = self.time(t[:, None])
        h = x * 2 if float(t[0]) > 0.5 else x
        return self.end(self.run(h, c, t), t)

    def run(self, h: Tensor, c: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, c)
        return h

    def end(self, h: Tensor, t: Tensor) -> Any:
        return self.head(h)


def make(cls: type[nn.Module] = Model) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noise(cls())


def inputs(step: int = 0, seed: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step if seed is None else seed)
    return {"x": torch.randn(2, TOKENS, WIDTH, generator=generator), "t": torch.full((2,), 0.9 - step / 10)}


@torch.no_grad()
def exact(fast: Any, model: Any, steps: int = 8) -> list[bool]:
    """Whether each step of a request gives the bits of ``model``."""
    with fast.session(steps=steps):
        return [torch.equal(fast(**inputs(k)), model(**inputs(k))) for k in range(steps)]


HALF = [True, False] * 4


def test_blocks_are_a_graph_of_weights_by_the_models_names():
    c = take(make(), **inputs())
    assert [(i.name, i.role) for i in c.program.inputs] == [
        ("x", "latent"),
        ("t", "timestep"),
        ("blocks.0.x", "latent"),
        ("blocks.0.c", "timestep"),
    ]
    assert {n.split(".")[0] for n in c.program.params} == {"blocks"}
    assert "3 calls" in c.notes[3]
    assert c.notes[-1] == "the blocks: captured by torch.export"


class Turned(Block):
    def forward(self, x: Tensor, c: Tensor, turn: nn.Module) -> Tensor:  # type: ignore[override]
        return super().forward(turn(x), c)


class Turn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + x.roll(1, -1)


class Hands(Model):
    """Its blocks are given a module, as a rotary embedding that all of them share."""

    block = Turned

    def __init__(self) -> None:
        super().__init__()
        self.turns = nn.ModuleList([Turn(), Turn()])

    def run(self, h: Tensor, c: Tensor, t: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            h = block(h, c, self.turns[i % 2 if float(t[0]) > 0.25 else 0])
        return h


def test_blocks_may_be_given_a_module_of_the_model():
    """It runs with its own weights; where it is another one, that call is the model's."""
    model = make(Hands)
    fast = ditopt.optimize(model, "lossless", target="eager", example_inputs=inputs(), steps=8)
    assert any(n.startswith("captured by blocks") for n in fast.compiled.captured.notes)
    assert "turns.1.scale" in fast.compiled.captured.program.params
    assert exact(fast, model, 6) == [True] * 6
    with torch.no_grad():
        model.turns[1].scale.mul_(2)
    assert exact(fast, model, 6) == [True] * 6
    assert fast.stats.calls == 12
    with pytest.warns(DitoptWarning):
        assert exact(fast, model) == [True] * 8


@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_caches_and_changed_weights(target):
    model = make()
    fast = ditopt.optimize(model, "fora{interval=2}", target=target, example_inputs=inputs(), steps=8)

    @torch.no_grad()
    def close() -> list[bool]:
        with fast.session(steps=8):
            return [torch.allclose(fast(**inputs(k)), model(**inputs(k)), atol=1e-4) for k in range(8)]

    assert close() == HALF
    assert fast.stats.hits["cache0"] == 4
    with torch.no_grad():
        model.blocks[1].ff[0].weight.mul_(3)
        model.time.weight.mul_(2)
    model.head.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))
    assert close() == HALF


def test_the_model_is_as_it_was():
    model = make().train()
    model.blocks[0].register_forward_hook(lambda module, args, out: out * 1.5)
    before, hooks = snapshot(model), [dict(m._forward_hooks) for m in model.modules()]
    fast = ditopt.optimize(model, "lossless", target="eager", example_inputs=inputs())
    assert exact(fast, model) == [True] * 8
    assert model.training
    assert equal(before, snapshot(model))
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert not any("forward" in vars(m) for m in model.modules())


@torch.inference_mode()
def test_nothing_of_a_call_is_kept():
    """In inference mode too, where nobody counts what is written."""
    model = make()
    fast = ditopt.optimize(model, "lossless", target="eager", example_inputs=inputs())
    gc.collect()
    gc.disable()
    try:
        for k in range(3):
            assert torch.equal(fast(**inputs(k)), model(**inputs(k)))
        assert not [o for o in gc.get_objects() if type(o) is Deferred]
    finally:
        gc.enable()


class Looks(Block):
    def forward(self, x, c):
        return super().forward(x, c) * (2.0 if x.mean() > 0 else 1.0)


class LooksItself(Model):
    block = Looks


class Bakes(Block):
    """What nobody sees: Python that looks only where it is not traced."""

    def forward(self, x, c):
        return super().forward(x, c) * (2.0 if torch.compiler.is_compiling() or x.mean() > 0.05 else 1.0)


class BakesItself(Model):
    block = Bakes


class Counts(Model):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def end(self, h, t):
        self.count += 1
        return super().end(h, t)


class Remembers(Model):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def end(self, h, t):
        self.seen.add_(1)
        return super().end(h, t)


class Between(Model):
    """Python looks after each block."""

    def run(self, h, c, t):
        for block in self.blocks:
            h = block(h, c)
            if h.mean() > 100:
                h = h * 0.5
        return h


class Overwrites(Model):
    def run(self, h, c, t):
        for block in self.blocks:
            h = block(h, c)
            c.mul_(2)
        return h


class Single(Model):
    """No blocks repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.blocks[:1]


class Fickle(Model):
    """Another way at every call."""

    calls, step = 0, 1

    def run(self, h, c, t):
        Fickle.calls += self.step
        for block in self.blocks:
            h = block(h, c) * float(1 + self.calls)
        return h


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (
            LooksItself,
            ["if float(t[0])", "Nor can its blocks", "if x.mean() > 0 else"],
        ),
        (BakesItself, ["Nor can its blocks be captured alone: the graph of the run of blocks of BakesItself differs"]),
        (Counts, ["changes its attribute count during forward"]),
        (Remembers, ["changes seen during forward"]),
        (Fickle, ["its forward does other things around them when it is called with the same inputs again"]),
        (Between, ["between any two of its blocks Python looks at values at ", "if h.mean() > 100"]),
        (Overwrites, ["forward writes into blocks.1.c between two blocks that read it"]),
        (Single, ["it calls no two submodules of one class, or such do less than 25% of its work"]),
    ],
)
def test_what_cannot_be_captured_is_said(cls, says):
    model = make(cls)
    before = snapshot(model)
    with pytest.raises(CaptureError) as error:
        take(model, **{**inputs(), "x": inputs()["x"] - 0.5})
    for words in says:
        assert words in str(error.value), str(error.value)
    assert equal(before, snapshot(model))
    assert not any("forward" in vars(m) for m in model.modules())


class Detours(Model):
    """Late steps do something else between the blocks."""

    def run(self, h, c, t):
        for i, block in enumerate(self.blocks):
            h = block(h, c)
            if i == 1 and float(t[0]) < 0.35:
                h = torch.cat([h[:, 1:], h[:, :1] + 1], dim=1)
        return h


class Shortens(Model):
    def run(self, h, c, t):
        for block in self.blocks[: 2 if float(t[0]) < 0.35 else 3]:
            h = block(h, c)
        return h


class Returns(Model):
    """Late steps read what the first block gave."""

    def run(self, h, c, t):
        self_ = [h := block(h, c) for block in self.blocks]
        return h + self_[0] if float(t[0]) < 0.35 else h


@pytest.mark.parametrize("cls", [Detours, Shortens, Returns])
def test_forward_that_goes_another_way_is_captured_again(cls):
    model = make(cls)
    fast = ditopt.optimize(model, "fora{interval=2}", target="eager", example_inputs=inputs(), steps=8)
    with pytest.warns(DitoptWarning, match="captured again: around its blocks forward does other things"):
        first = exact(fast, model)
    assert first == [True, False, True, False, True, False, True, False]
    assert len(fast.engine.compiled) == 2
    assert exact(fast, model) == first  # nothing is captured a third time
    assert len(fast.engine.compiled) == 2
    assert fast.stats.calls == 16


class Again(Model):
    """One block over and over; Python looks at what it gave the second time."""

    def run(self, h, c, t):
        for i in range(6):
            h = self.blocks[0](h, c)
            h = h * (0.5 if i == 1 and h.mean() > 0 else 0.75)
        return h


def test_the_longest_run_is_taken_where_python_looks_in_between():
    model = make(Again)
    fast = ditopt.optimize(model, "fora{interval=2}", target="eager", example_inputs=inputs(), steps=8)
    said = next(n for n in fast.compiled.captured.notes if n.startswith("captured by blocks"))
    assert "blocks.0 (4 calls and 3 functions between them) are a graph, with 65% of the FLOPs" in said
    assert len(fast.history[1].program.blocks()) == 4
    assert exact(fast, model) == HALF


class Fails(Model):
    fail = False

    def end(self, h, t):
        if self.fail:
            raise RuntimeError("out of luck")
        return super().end(h, t)


@torch.no_grad()
def test_a_failure_after_the_blocks_leaves_the_session_alone(monkeypatch):
    model = make(Fails)
    fast = ditopt.optimize(model, "fora{interval=2}", target="eager", example_inputs=inputs(), steps=8)
    found = []
    with fast.session(steps=8):
        for k in range(8):
            if k in (1, 2):
                monkeypatch.setattr(Fails, "fail", True)
                with pytest.raises(RuntimeError, match="out of luck"):
                    fast(**inputs(k))
                monkeypatch.setattr(Fails, "fail", False)
            found.append(torch.equal(fast(**inputs(k)), model(**inputs(k))))
    assert found == HALF
    assert fast.stats.calls == 8


@torch.no_grad()
def test_forward_that_is_no_function_is_refused(monkeypatch):
    model = make(Fickle)
    monkeypatch.setattr(Fickle, "step", 0)
    fast = ditopt.optimize(model, target="eager", example_inputs=inputs())
    calls = Fickle.calls
    monkeypatch.setattr(Fickle, "step", 1)
    with (
        pytest.warns(DitoptWarning, match="captured again"),
        pytest.raises(CaptureError, match="with the same inputs again"),
    ):
        fast(**inputs())
    monkeypatch.setattr(Fickle, "step", 0)
    monkeypatch.setattr(Fickle, "calls", calls)
    assert torch.equal(fast(**inputs()), model(**inputs()))


class Typed(Model):
    """Python numbers are tensors to a graph; this forward sees the difference."""

    def forward(self, x, t):
        number = isinstance(t, float)
        t = torch.full((2,), float(t))
        h = self.run(x * 2 if float(t[0]) > 0.5 else x, self.time(t[:, None]), torch.zeros(1) if number else t)
        return self.end(h, t)

    def run(self, h, c, t):
        for block in self.blocks:
            h = block(h, c)
            h = h + 0 if t[0] == 0 else h
        return h


@torch.no_grad()
def test_forward_that_goes_two_ways_for_one_call_is_refused():
    fast = ditopt.optimize(make(Typed), target="eager", example_inputs={"x": inputs()["x"], "t": 0.9})
    with (
        pytest.warns(DitoptWarning, match="captured again"),
        pytest.raises(SessionError, match=r"Typed goes two ways for one call at .*\(h = h \+ 0"),
    ):
        fast(x=inputs()["x"], t=0.9)


class Lengths(Block):
    """Python reads a mask: of the prompt."""

    def forward(self, x, c, mask):  # type: ignore[override]
        count = int(mask.sum())
        return super().forward(x, c) + x[:, :count].mean(1, keepdim=True)


class Masks(Model):
    block = Lengths

    def forward(self, x, t, mask):  # type: ignore[override]
        c = self.time(t[:, None])
        h = x * 2 if float(t[0]) > 0.5 else x
        for block in self.blocks:
            h = block(h, c, mask)
        return self.head(h)


@torch.no_grad()
def test_values_that_blocks_read_of_the_prompt_are_guarded():
    model = make(Masks)
    masks = [torch.arange(TOKENS) < n for n in (3, 5, 3)]
    fast = ditopt.optimize(model, "lossless", target="eager", example_inputs={**inputs(), "mask": masks[0]})
    assert any(n.startswith("the blocks: guarded") for n in fast.compiled.captured.notes)

    def exact(mask: Tensor) -> bool:
        return all(torch.equal(fast(**inputs(k), mask=mask), model(**inputs(k), mask=mask)) for k in range(3))

    assert exact(masks[0])
    with pytest.warns(DitoptWarning, match=r"captured again: .* at .*int\(mask.sum\(\)\)"):
        assert exact(masks[1])
    assert exact(masks[2])
    assert len(fast.engine.compiled) == 2


def test_what_needs_the_whole_model_is_refused(tmp_path):
    model = make()
    fast = ditopt.optimize(model, "fora", target="eager", example_inputs=inputs(), steps=4)
    for write in (ditopt.save, ditopt.export_onnx):
        with pytest.raises(DitoptError, match=r"only its blocks are graphs, .* Python at .*float\(t\[0\]\)"):
            write(fast, tmp_path / "a.onnx")
    with pytest.raises(BadInput, match="cannot be exported: only its blocks"):
        ditopt.export_onnx(model, tmp_path / "a.onnx", example_inputs=inputs())
    with pytest.raises(BadInput, match="cannot be run by onnxruntime: only its blocks"):
        ditopt.optimize(model, target="onnxruntime", example_inputs=inputs())
    with pytest.raises(BadInput, match="release='offload' given, and of this model only the blocks are compiled"):
        ditopt.optimize(model, target="eager", release="offload", example_inputs=inputs())
    assert not list(tmp_path.iterdir())


class Unnamed(Model):
    def forward(self, foo, bar, baz):  # type: ignore[override]
        return super().forward(foo, bar) * (1 + baz[:, None, None])


def test_roles_are_asked_for():
    model = make(Unnamed)
    call = {"foo": inputs()["x"], "bar": inputs()["t"], "baz": torch.full((2,), 0.3)}
    with pytest.raises(BadInput, match=re.escape("roles={'bar': 'timestep', 'baz': 'prompt'}")):
        take(model, **call)
    c = take(model, **call, roles={"bar": "timestep", "baz": "prompt"})
    assert [i.role for i in c.program.inputs] == ["latent", "timestep", "prompt", "latent", "timestep"]


class Timeless(Model):
    """What the blocks read depends on the latent."""

    def forward(self, x, t):
        c = self.time(t[:, None]) + x.mean((1, 2))[:, None]
        h = x * 2 if float(t[0]) > 0.5 else x
        return self.head(self.run(h, c, t))


@pytest.mark.filterwarnings("ignore:hoist_invariants:ditopt.errors.DitoptWarning")
def test_nothing_to_hoist_is_said():
    model = make(Timeless)
    text = ditopt.explain(model, example_inputs=inputs(), target="eager")
    assert "blocks.0.x on the latent; blocks.0.c on the latent and the timestep" in text
    assert "no matrix product is free of the latent" in text
