"""Arguments that are objects of a class of their own, and what a model writes into its arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.capture import bind
from ditopt.errors import BadInput, CaptureError
from tests.capture.use import run, same, take


class Layer:
    """Keys of one layer, and how often they were written."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.writes = 0


class Cache:
    """Layers in a list, and more in a dict."""

    def __init__(self) -> None:
        self.layers = [Layer(), Layer()]
        self.more: dict[str, Any] = {}


@dataclass
class Scales:
    """Two numbers, one of them a tensor."""

    gain: Tensor
    name: str = "plain"
    others: list[Tensor] = field(default_factory=list)


class Model(nn.Module):
    """Two linears after a product with the time; each keeps what it makes in ``cache``, or adds what is kept there."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, cache: Cache, mode: str, log: list[Tensor] | None = None) -> Tensor:
        x = x * self.time(t)
        for i, (block, layer) in enumerate(zip(self.blocks, cache.layers, strict=True)):
            x = block(x)
            if mode == "write":
                layer.key, layer.writes = x * 2, layer.writes + 1
                cache.more[f"{i}"] = (x + 1, {"deep": x - 1})
                if log is not None:
                    log.append(x)
            else:
                x = x + layer.key  # type: ignore[operator]
        return x


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def given(seed: int = 0) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, 4, generator=noise), "t": torch.rand(1, generator=noise) + 0.1}


def filled(seed: int = 0) -> Cache:
    cache = Cache()
    for i, layer in enumerate(cache.layers):
        layer.key = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed + i))
    return cache


# -- read --------------------------------------------------------------------------------------------------------------


def test_tensors_of_an_object_are_inputs_by_their_place():
    m = model()
    c = take(m, **given(), cache=filled(), mode="read")
    assert c.spec.names == ("x", "t", "cache.layers.0.key", "cache.layers.1.key")
    assert c.put is None
    assert c.written == ()
    other = {**given(1), "cache": filled(7), "mode": "read"}
    assert torch.equal(run(m, c, **other), m(**other))


def test_numbers_of_an_object_are_part_of_the_signature():
    m, cache = model(), filled()
    before, _ = bind(m, (), {**given(), "cache": cache, "mode": "read"})
    cache.layers[1].writes = 3
    after, _ = bind(m, (), {**given(), "cache": cache, "mode": "read"})
    assert before.key != after.key


def test_a_dataclass_is_an_object_too():
    class Scaled(nn.Module):
        def forward(self, x: Tensor, t: Tensor, scales: Scales) -> Tensor:
            assert type(scales) is Scales
            return x * t * scales.gain + sum(scales.others) * len(scales.name)

    call = {**given(), "scales": Scales(torch.ones(()), "plain", [torch.ones(4)])}
    m = Scaled()
    c = take(m, **call)
    assert c.spec.names == ("x", "t", "scales.gain", "scales.others.0")
    call["scales"] = Scales(torch.full((), 3.0), "plain", [torch.full((4,), 2.0)])
    assert torch.equal(run(m, c, **call), m(**call))


def itself() -> Layer:
    layer = Layer()
    layer.key = layer  # type: ignore[assignment]
    return layer


def holding(value: Any) -> Layer:
    layer = Layer()
    layer.key = value
    return layer


class Slotted:
    __slots__ = ("key",)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (itself(), "cache.key is a Layer"),
        (holding(torch.Generator()), "cache.key is a Generator"),
        (holding(len), "cache.key is a builtin_function_or_method"),
        (Slotted(), "cache is a Slotted"),
        (nn.Linear(1, 1), "cache is a Linear"),
    ],
)
def test_an_object_that_cannot_be_taken_apart(value, told):
    with pytest.raises(BadInput, match=f"argument {told}; ditopt takes tensors, numbers"):
        bind(model(), (), {**given(), "cache": value, "mode": "read"})


# -- written -----------------------------------------------------------------------------------------------------------


def request(step: Any) -> tuple[list[Tensor], Cache, list[Tensor]]:
    """Three calls: the first writes the cache that the others read."""
    cache, log = Cache(), [torch.zeros(1)]
    outputs = [step(**given(), cache=cache, mode="write", log=log)]
    outputs += [step(**given(seed), cache=cache, mode="read") for seed in (0, 1)]
    return outputs, cache, log


def test_what_the_model_writes_is_written():
    m = model()
    fast = ditopt.optimize(m, "lossless", target="eager")
    (outputs, cache, log), (got, made, logged) = request(m), request(fast)
    assert same(got, outputs)
    assert same(logged, log)
    assert len(log) == 3
    assert same([vars(layer) for layer in made.layers], [vars(layer) for layer in cache.layers])
    assert same(made.more, cache.more)
    assert made.layers[0].writes == 1
    assert set(made.more) == {"0", "1"}


def test_the_caller_s_own_containers_are_written_into():
    fast = ditopt.optimize(model(), "lossless", target="eager")
    cache, log = Cache(), []  # type: ignore[var-annotated]
    layers, first, more, kept = cache.layers, cache.layers[0], cache.more, log
    fast(**given(), cache=cache, mode="write", log=log)
    assert cache.layers is layers
    assert cache.layers[0] is first
    assert log is kept
    assert len(log) == 2
    assert cache.more is more
    assert set(more) == {"0", "1"}


def test_capture_notes_what_is_written_and_files_refuse_it(tmp_path):
    m = model()
    call = {**given(), "cache": Cache(), "mode": "write"}
    c = take(m, **call)
    assert c.written[0] == "cache.layers.0.key"
    assert any("writes 6 tensors into its arguments, cache.layers.0.key" in note for note in c.notes)
    assert call["cache"].layers[0].key is None  # type: ignore[attr-defined]
    fast = ditopt.optimize(m, "lossless", example_inputs=call, target="eager")
    for attempt in (
        lambda: ditopt.export_onnx(m, tmp_path / "a.onnx", example_inputs=call),
        lambda: ditopt.save(fast, tmp_path / "saved"),
    ):
        with pytest.raises(BadInput, match=r"it writes cache\.layers\.0\.key into its arguments"):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_takes_something_away():
    class Pops(nn.Module):
        def forward(self, x: Tensor, t: Tensor, kept: dict[str, Tensor]) -> Tensor:
            return x * t + kept.pop("key")

    with pytest.raises(CaptureError, match=r"Pops takes kept\.key out of its arguments during forward"):
        take(Pops(), **given(), kept={"key": torch.ones(4)})


# -- loaded ------------------------------------------------------------------------------------------------------------


class Parted(Model):
    """Adds what is kept, times the number of its parts."""

    def forward(self, x: Tensor, t: Tensor, cache: Cache, parts: list[int]) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, cache, "read") * len(parts) + parts[-1]


def test_a_loaded_model_takes_objects_and_lists_of_numbers(tmp_path):
    torch.manual_seed(0)
    m = Parted().eval().requires_grad_(False)
    ditopt.export_onnx(m, tmp_path / "a.onnx", example_inputs={**given(), "cache": filled(), "parts": [1, 2]})
    loaded = ditopt.load(tmp_path / "a.onnx")
    call = {**given(1), "cache": filled(5), "parts": [1, 2]}
    torch.testing.assert_close(loaded(**call), m(**call))
    for parts, told in (([1, 3], r"parts\.1"), ([1], r"parts\.1"), ([1, 2, 2], r"parts\.2")):
        with pytest.raises(BadInput, match=told):
            loaded(**{**call, "parts": parts})
    call["cache"].layers[0].writes = 2  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match=r"cache\.layers\.0\.writes=2 given"):
        loaded(**call)
