"""Rotary positions as complex numbers: eager keeps them, compiled targets and files get pairs of real numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ditopt
from tests.roads.tiny import Small, SmallBlock, example, noise


class Rotary(SmallBlock):
    """The small block with queries and keys turned by complex numbers, as published rotary embeddings do."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        angles = torch.outer(torch.arange(64.0), 0.1 ** torch.arange(width // 2))
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        turn: Any = self.turn
        turned = torch.view_as_real(pairs * turn[: x.shape[1]].unsqueeze(0)).flatten(2)
        return super().forward(x + 0.3 * turned, c)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = Small(depth=2)
    made.blocks = torch.nn.ModuleList(Rotary(32) for _ in range(2))
    return made.eval().requires_grad_(False)


def call(seed: int) -> dict[str, Any]:
    return {**example(), "hidden_states": noise(seed)}


def test_eager_computes_with_complex_numbers_bit_for_bit(model):
    fast = ditopt.optimize(model, "lossless", target="eager", example_inputs=call(0))
    assert all(r.name != "lower_complex" for r in fast.history)
    assert torch.equal(fast(**call(1))[0], model(**call(1))[0])


def test_a_file_of_an_eager_model_holds_real_numbers_alone(model, tmp_path):
    fast = ditopt.optimize(model, "lossless", target="eager", example_inputs=call(0))
    for source in (fast, model):
        manifest = ditopt.export_onnx(source, tmp_path / "m.onnx", "lossless", example_inputs=call(0))
        assert manifest.target == "onnxruntime"
        given, plain = ditopt.load(tmp_path / "m.onnx")(**call(1)), model(**call(1))[0]
        torch.testing.assert_close(given[0] if isinstance(given, tuple) else given, plain, atol=1e-5, rtol=1e-5)


def test_inductor_gets_real_numbers(model):
    fast = ditopt.optimize(model, "lossless", target="inductor", example_inputs=call(0))
    lowered = next(r for r in fast.history if r.name == "lower_complex")
    assert lowered.applied > 4
    assert not lowered.asked
    torch.testing.assert_close(fast(**call(1))[0], model(**call(1))[0], atol=1e-5, rtol=1e-5)


def test_a_saved_eager_model_is_made_real_where_it_is_loaded_for_inductor(model, tmp_path):
    fast = ditopt.optimize(model, "lossless", target="eager", example_inputs=call(0))
    ditopt.save(fast, tmp_path / "m")
    plain = model(**call(1))[0]
    for target in ("eager", "inductor"):
        given = ditopt.load(tmp_path / "m", target=target)(**call(1))
        torch.testing.assert_close(given[0] if isinstance(given, tuple) else given, plain, atol=1e-5, rtol=1e-5)
