"""A call that fits the shapes of a captured signature and not its guard is captured again, with a notice."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.capture import Guard
from ditopt.errors import DitoptWarning
from ditopt.optimized import OptimizedModule
from tests.foreign.positions import JointDiT, joint_call
from tests.tiny_models import Plain, noise


class Padded(nn.Module):
    """Only as many text tokens as the longest prompt has take part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.text = Plain(depth=2), nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(1).max())
        out: Tensor = self.inner(x + self.text(text[:, :longest]).mean(), t, y)
        return out


def inputs(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(2, 4, 8, 8, generator=generator),
        "t": torch.rand(2, generator=generator) * 500,
        "y": torch.tensor([3, 7]),
        "text": torch.randn(2, 6, 8, generator=generator),
        "mask": torch.arange(6) < torch.tensor(lengths)[:, None],
    }


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noise(Padded())


@pytest.fixture
def guards(monkeypatch):
    """How often a guard ran."""
    runs, plain = [], Guard.broken

    def broken(self: Guard, args: Sequence[Tensor]) -> str:
        runs.append(1)
        return plain(self, args)

    monkeypatch.setattr(Guard, "broken", broken)
    return runs


def optimize(model: nn.Module) -> OptimizedModule:
    fast: OptimizedModule = ditopt.optimize(model, "lossless", target="eager")
    return fast


def agree(fast: OptimizedModule, given: dict[str, Tensor]) -> bool:
    with torch.no_grad():
        return torch.equal(fast(**given), fast.original(**given))


def test_another_value_is_another_signature(model, guards):
    fast = optimize(model)
    assert agree(fast, inputs(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # same longest prompt: same graph
        assert agree(fast, inputs(2, 4, seed=1))
    assert len(fast.engine.compiled) == 1
    with pytest.warns(DitoptWarning, match=r"captured again: its Python reads a value at .*test_valid.py:.*\.max\(\)"):
        assert agree(fast, inputs(5, 3))
    assert len(fast.engine.compiled) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # both are kept
        assert agree(fast, inputs(4, 3))
        assert agree(fast, inputs(5, 3))
    assert len(fast.engine.compiled) == 2


def test_the_guard_runs_once_a_prompt(model, guards):
    fast, given = optimize(model), inputs(4, 3)
    fast(**given)
    guards.clear()
    for seed in range(5):
        fast(**given | {"x": torch.randn(2, 4, 8, 8), "t": torch.rand(2), "text": inputs(1, 1, seed=seed)["text"]})
    assert len(guards) == 1
    fast(**inputs(4, 3))  # an equal mask in other memory
    assert len(guards) == 1
    fast(**inputs(3, 4))
    assert len(guards) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_changes_in_place_is_seen(model, mode):
    with mode():
        fast, given = optimize(model), inputs(4, 3)
        fast(**given)
        fast(**given)
        given["mask"].fill_(True)
        with pytest.warns(DitoptWarning, match="captured again"):
            got = fast(**given)
        assert torch.equal(got, model(**given))


def test_explain_says_how_the_model_was_captured(model):
    text = ditopt.explain(model, example_inputs=inputs(4, 3))
    assert text.startswith("Capture\n  torch.export alone: Padded cannot be traced at ")
    assert "guarded: 1 value, from mask, read at " in text


@pytest.mark.parametrize("road", ["save", "onnx"])
def test_what_leaves_the_process_gives_no_wrong_result(model, road, tmp_path):
    given = inputs(4, 3)
    fast = ditopt.optimize(model, "fora{interval=2}", target="eager", steps=2, example_inputs=given)
    path = tmp_path / ("model" if road == "save" else "model.onnx")
    write = ditopt.save if road == "save" else ditopt.export_onnx
    with pytest.warns(DitoptWarning, match=r"Python reads at .*its results are NaN for inputs \(mask\)"):
        write(fast, path)
    loaded = ditopt.load(path, target="eager")
    for lengths, valid in (((4, 3), True), ((3, 4), True), ((5, 3), False)):
        with loaded.session(steps=2):
            for t in (400.0, 300.0):
                got = loaded(**inputs(*lengths) | {"t": torch.full((2,), t)})
                assert got.isnan().all() == (not valid)
                if valid and t == 400.0:
                    with torch.no_grad():
                        want = model(**inputs(*lengths) | {"t": torch.full((2,), t)})
                    assert torch.allclose(got, want, atol=1e-5)


class Stack(nn.Module):
    """Takes a list of latents."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.time = nn.Linear(4, 4), nn.Linear(1, 4)

    def forward(self, xs: list[Tensor], t: Tensor, more: list[Tensor]) -> list[Tensor]:
        return [self.line(x) * self.time(t[None]) + sum(more) for x in xs]


def test_a_list_of_another_length_is_another_signature():
    fast = ditopt.optimize(Stack().eval(), "hoist_invariants", target="eager")
    xs, t = [torch.randn(3, 4) for _ in range(4)], torch.rand(())

    def check(n: int, more: int) -> None:
        with torch.no_grad():
            want = fast.original(xs[:n], t, xs[:more])
            assert all(torch.equal(a, b) for a, b in zip(fast(xs[:n], t, xs[:more]), want, strict=True))

    check(2, 1)
    with pytest.warns(DitoptWarning, match="captured again: the list xs has 3 entries and had 2; each length") as told:
        check(3, 1)
    assert len(told) == 1
    with pytest.warns(DitoptWarning, match="the list more has 2 entries and had 1"):
        check(3, 2)
    assert len(fast.engine.compiled) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(2, 1)
        check(3, 2)
    fast([x[:2] for x in xs[:3]], t, [x[:2] for x in xs[:2]])  # another shape alone needs no notice
    assert len(fast.engine.compiled) == 4


# -- positions that show a grid ----------------------------------------------------------------------------------------

TILES = "sparse_attention{pattern=tile,density=0.3,block=16,tile=4x4%s}"


def packed(rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """A call with 64 packed tokens on this grid."""
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
    noise_ = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(seed))
    call = joint_call(0, 0)
    assert isinstance(call, dict)
    return call | {"img": noise_, "img_ids": ids.expand(2, -1, -1).contiguous()}


@pytest.fixture(scope="module")
def joint():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noise(JointDiT())


def run(fast: OptimizedModule, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = fast(**call)
    return out


def test_lists_made_for_a_grid_hold_for_these_positions_alone(joint):
    fast = ditopt.optimize(joint, TILES % "", target="eager", example_inputs=packed(8, 8))
    assert fast.history[-1].applied == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = run(fast, packed(8, 8, seed=1))  # the same positions in other memory
    assert len(fast.engine.compiled) == 1
    with pytest.warns(DitoptWarning, match="captured again: img_ids holds other positions than those .* grid 8 x 8"):
        far = run(fast, packed(4, 16, seed=1))
    assert len(fast.engine.compiled) == 2
    wide = ditopt.optimize(joint, TILES % ",grid=4x16", target="eager", example_inputs=packed(8, 8))
    assert torch.equal(far, run(wide, packed(4, 16, seed=1)))
    assert not torch.equal(run(fast, packed(8, 8, seed=1)), run(wide, packed(8, 8, seed=1)))
    assert torch.equal(run(fast, packed(8, 8, seed=1)), near)
    mixed = packed(8, 8) | {"img_ids": packed(8, 8)["img_ids"][:, torch.randperm(64)]}
    with pytest.warns(DitoptWarning) as said:
        run(fast, mixed)
    words = " ".join(str(w.message) for w in said)
    assert "captured again: img_ids" in words
    assert "no grid was found for the 64 tokens" in words


def test_positions_do_not_matter_where_no_list_was_made_for_them(joint):
    for recipe in ("lossless", TILES % ",grid=8x8"):
        fast = ditopt.optimize(joint, recipe, target="eager", example_inputs=packed(8, 8))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(fast, packed(4, 16))
        assert len(fast.engine.compiled) == 1


def test_tokens_in_tiles_hold_for_these_positions_alone(joint):
    fast = ditopt.optimize(joint, "reorder_tokens{tile=4x4}", target="eager", example_inputs=packed(8, 8))
    torch.testing.assert_close(run(fast, packed(8, 8)), joint(**packed(8, 8)), atol=1e-5, rtol=1e-5)
    with pytest.warns(DitoptWarning, match="captured again: img_ids"):
        run(fast, packed(4, 16))


def test_explain_names_the_positions(joint):
    text = ditopt.explain(joint, TILES % "", example_inputs=packed(8, 8), target="eager")
    assert "guarded: the positions that show the grid 8 x 8 in img_ids; where others come" in text
    assert "latent: 64 tokens (8 x 8, by the positions in img_ids), axis 1" in text


def test_a_saved_model_made_for_a_grid_gives_no_wrong_result(joint, tmp_path):
    fast = ditopt.optimize(joint, TILES % "", target="eager", example_inputs=packed(8, 8))
    with pytest.warns(DitoptWarning, match=r"made for the grid 8 x 8 that the positions in img_ids show: its results"):
        ditopt.save(fast, tmp_path / "model")
    loaded = ditopt.load(tmp_path / "model", target="eager")
    assert torch.equal(loaded(**packed(8, 8)), run(fast, packed(8, 8)))
    assert loaded(**packed(4, 16)).isnan().all()


class Turned(nn.Module):
    """Packed tokens turned by complex numbers, a table of which comes with the call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.pack = Plain(depth=2), nn.Linear(16, 32)

    def forward(self, x: Tensor, t: Tensor, rotary: Tensor) -> Tensor:
        h: Tensor = self.pack(x)
        for block in self.inner.blocks:
            pairs = torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous())
            h = block(torch.view_as_real(pairs * rotary).flatten(-2), t[:, None].expand(-1, 32) * 1e-3)
        out: Tensor = self.inner.head(h)
        return out


def turned(rows: int, columns: int) -> dict[str, Tensor]:
    angles = (packed(rows, columns)["img_ids"][0, :, 1:, None] * 0.3 ** torch.arange(8)).flatten(1)
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    return {"x": x, "t": torch.tensor([400.0, 300.0]), "rotary": torch.polar(torch.ones_like(angles), angles)}


def test_a_file_made_for_a_grid_of_complex_rotations_gives_no_wrong_result(tmp_path):
    fast = ditopt.optimize(noise(Turned()), TILES % "", target="eager", example_inputs=turned(8, 8))
    assert fast.history[-1].applied == 2
    with pytest.warns(DitoptWarning, match="made for the grid 8 x 8 that the positions in rotary show"):
        ditopt.export_onnx(fast, tmp_path / "model.onnx")
    loaded = ditopt.load(tmp_path / "model.onnx")
    torch.testing.assert_close(loaded(**turned(8, 8)), run(fast, turned(8, 8)), atol=1e-4, rtol=1e-4)
    assert loaded(**turned(4, 16)).isnan().all()
