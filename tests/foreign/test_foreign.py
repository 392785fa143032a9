"""Denoisers in styles of other people: blocks found, exact, cached, exported, explained; and what is refused."""

from __future__ import annotations

import datetime
import functools
import re
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import ditopt
from ditopt._torch import pytree
from ditopt.capture import capture
from ditopt.errors import BadInput, DitoptError
from tests.foreign import ZOO
from tests.foreign.base import BATCH, STEPS, Call, randn, run, times
from tests.foreign.image import Functional
from tests.foreign.routed import ROUTED

NAMES = list(ZOO)
EXPORTED = ("functional", "causal", "keywords", "packed")
"""The cheapest; one has two outputs, one a dataclass, one values that Python reads. Beside them another each day."""


def exported() -> list[str]:
    others = [name for name in NAMES if name not in EXPORTED]
    return [*EXPORTED, others[datetime.date.today().toordinal() % len(others)]]


@functools.cache
def model(name: str) -> Any:
    """One model of each name for all tests: read-only."""
    return ZOO[name].model()


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, also of a dataclass and of what a loaded artifact gives in its place."""
    plain = dict(output) if isinstance(output, dict) else vars(output) if is_dataclass(output) else output
    return [v for v in pytree.tree_leaves(plain) if isinstance(v, Tensor)]


def plain(name: str, call: Call) -> list[Tensor]:
    """What the model gives."""
    return plain_of(model(name), call)


def plain_of(model: Any, call: Call) -> list[Tensor]:
    """The same, of a model that is given."""
    with torch.no_grad():
        return tensors(run(model, call))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


CAPTURED: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    """All tests of a model start from one capture."""

    def once(given, spec, *rest):
        key = (id(given), spec.key)
        if given not in map(model, NAMES):
            return capture(given, spec, *rest)
        if key not in CAPTURED:
            CAPTURED[key] = capture(given, spec, *rest)
        return CAPTURED[key]

    monkeypatch.setattr("ditopt.capture.captures.capture", once)
    monkeypatch.setattr("ditopt.api.capture", once)


def optimized(name: str, recipe: str) -> Any:
    example = ZOO[name].call(0, 0)
    return ditopt.optimize(model(name), recipe, example_inputs=example, target="eager", steps=STEPS)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_matters(name):
    """Else the tests below would pass for gates that are zero."""
    call = ZOO[name].call(0, 0)
    fresh, want = ZOO[name].model(), plain(name, call)
    for weight, p in fresh.named_parameters():
        with torch.no_grad():
            before = p.clone()
            p.mul_(1.5)
            assert any(
                (a - b).norm() > 1e-5 * b.norm() for a, b in zip(tensors(run(fresh, call)), want, strict=True)
            ), weight
            p.copy_(before)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_found_and_the_exact_tier_is_exact(name):
    fast = optimized(name, "lossless")
    outlined = next(r.program for r in fast.history if r.name == "outline_blocks")
    assert sum(r.id.startswith("blocks.") for r in outlined.blocks()) == ZOO[name].blocks
    hoisted = next(r for r in fast.history if r.name == "hoist_invariants")
    assert hoisted.applied > 5
    for seed in (0, 20):  # two requests
        with fast.session(steps=STEPS):
            for step in range(STEPS):
                call = ZOO[name].call(step, seed + step)
                assert same(tensors(run(fast, call)), plain(name, call)), f"step {step}"


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_reuses_every_second_step(name):
    fast = optimized(name, "fora{interval=2}")
    blocks = {region.rsplit(".", 1)[0] for region in fast.program.decisions[0].regions}
    assert len(blocks) == ZOO[name].blocks
    with fast.session(steps=STEPS) as session:
        for step in range(STEPS):
            call = ZOO[name].call(step, step)
            output = tensors(run(fast, call))
            assert all(v.isfinite().all() for v in output)
            assert same(output, plain(name, call)) is (step % 2 == 0), f"step {step}"
        reused = ["reuse" in row.choices.values() for row in session.schedule_rows]
    assert reused == [False, True] * 3
    assert fast.stats.share_block_flops < 0.8


@pytest.mark.parametrize("name", NAMES)
def test_it_is_explained(name):
    text = ditopt.explain(
        model(name), "fora{interval=2}", example_inputs=ZOO[name].call(0, 0), steps=STEPS, target="eager"
    )
    counts = [int(n) for n in re.findall(r"^  stage \d+ .*?(\d+) blocks?\b", text, re.MULTILINE)]
    assert sum(counts) == ZOO[name].blocks, text
    weights, _work = map(float, re.findall(r"([\d.]+)%", re.findall("never sees the latent.*", text)[0]))
    assert weights > 1, text


@pytest.mark.parametrize("name", exported())
@pytest.mark.filterwarnings("ignore:.*NaN:ditopt.errors.DitoptWarning")  # values that Python reads are constants there
def test_onnx_is_eager(name, tmp_path):
    fast = ditopt.optimize(
        model(name), "fora{interval=2}", example_inputs=ZOO[name].call(0, 0), target="eager", steps=4
    )
    manifest = ditopt.export_onnx(fast, tmp_path / "dit.onnx")
    loaded = ditopt.load(tmp_path / "dit.onnx")
    with fast.session(steps=4), loaded.session(steps=4):
        for step in range(4):
            call = ZOO[name].call(step, step)
            got, want = tensors(run(loaded, call)), tensors(run(fast, call))
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm(), f"step {step}"
    assert {g.name for g in manifest.graphs} == set(loaded.stats.graphs)


@pytest.mark.parametrize("region", ["blocks.1:", "blocks.1:-1", "blocks.2:"])
def test_a_stream_is_followed_through_other_layouts(region):
    """A run of blocks is entered in one layout and left in another: what it adds is kept, and what the blocks in front
    of it add can be measured."""
    fast = optimized("turns", f"outline_blocks, cache{{region={region},signal=residual,threshold=0,residual=yes}}")
    assert not fast.history[-1].refused
    for step in range(2):
        call = ZOO["turns"].call(step, step)
        assert same(tensors(run(fast, call)), plain("turns", call))


def test_a_skipped_block_passes_its_stream_on_in_its_layout():
    """The positions that are added behind it are added all the same."""
    fast, call = optimized("turns", "outline_blocks, skip_blocks{region=blocks.0:2}"), ZOO["turns"].call(0, 0)
    without = ZOO["turns"].model()
    with torch.no_grad():
        for block in without.blocks[:2]:
            block.out.weight.zero_(), block.out.bias.zero_(), block.down.weight.zero_(), block.down.bias.zero_()
    for got, want in zip(tensors(run(fast, call)), plain_of(without, call), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("foreign", [pytest.param(f, id=f.name) for f in ROUTED])
def test_experts_that_the_latent_routes_stay_python(foreign, tmp_path):
    model, call = foreign.model(), foreign.call(0, 0)
    fast = ditopt.optimize(model, "lossless", example_inputs=call, target="eager")
    said = next(n for n in fast.compiled.captured.notes if " stay Python, one operator each" in n)
    assert "routed.py:" in said
    assert "depends on the latent" in said
    for step in range(2):
        again = foreign.call(0, step)
        assert same(tensors(fast(**again)), plain_of(model, again))
    with pytest.raises(DitoptError, match="become ONNX"):
        ditopt.export_onnx(model, tmp_path / "a.onnx", "lossless", example_inputs=call)


class Unnamed(Functional):
    """Names that say nothing, and two inputs that could be the time."""

    def forward(self, foo: Tensor, bar: Tensor, baz: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(foo, bar) * (1 + baz[:, None, None])


def test_ambiguous_roles_are_asked_for_and_can_be_given():
    unnamed = Unnamed().eval()
    calls = [{"foo": randn(BATCH, 40, 6, seed=k), "bar": times(k), "baz": torch.full((BATCH,), 0.3)} for k in range(4)]
    with pytest.raises(BadInput, match=r"the inputs bar, baz .* pass roles=\{'bar': 'timestep', 'baz': 'prompt'\}"):
        ditopt.optimize(unnamed, example_inputs=calls[0], target="eager")
    roles: Any = {"bar": "timestep", "baz": "prompt"}
    fast = ditopt.optimize(unnamed, "fora{interval=2}", example_inputs=calls[0], target="eager", roles=roles, steps=4)
    assert [i.role for i in fast.program.inputs] == ["latent", "timestep", "prompt"]
    with fast.session(steps=4), torch.no_grad():
        equal = [torch.equal(fast(**c), unnamed(**c)) for c in calls]
    assert equal == [True, False, True, False]


def test_a_conditioning_of_one_number_a_row_is_the_time():
    """``forward(x, c)``: no name tells, and there is nothing else that could be it."""
    fast = optimized("functional", "lossless")
    assert [(i.name, i.role) for i in fast.program.inputs] == [("x", "latent"), ("c", "timestep")]


def test_a_dataclass_comes_back_as_it_was():
    fast = optimized("keywords", "lossless")
    call: Any = ZOO["keywords"].call(1, 1)
    out = fast(**call)
    assert type(out) is type(model("keywords")(**call))
    assert out.extra["tokens"] == 36
    assert same(tensors(out), plain("keywords", call))
