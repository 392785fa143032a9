"""What depends on the weights alone is computed when they are written down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ditopt
from ditopt.ir.fold import weights_of_constants
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ir.verify import verify


class Orthogonal(nn.Module):
    """A layer whose weight is made orthogonal in each call, and one that is modulated by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.time, self.out = nn.Linear(1, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        turn = torch.linalg.qr(self.weight)[0] @ self.weight
        return self.out(x @ turn * self.time(t + turn[0, 0]))


def made() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Orthogonal().eval().requires_grad_(False)
    return model, {"x": torch.randn(2, 6), "t": torch.rand(1)}


def test_constant_memos_become_weights():
    model, call = made()
    program = ditopt.optimize(model, "lossless", example_inputs=call, target="eager").program
    assert [m.name for m in program.memos if not m.keys] == ["constant"]
    folded = weights_of_constants(program)
    verify(folded)
    assert folded.memos
    assert all(m.keys for m in folded.memos)
    assert "weight" not in folded.params
    assert any(name.startswith("memo.constant.") for name in folded.params)
    values = random_inputs(program)
    assert torch.equal(run_program(folded, values)[0][0], run_program(program, values)[0][0])
    assert weights_of_constants(folded) is folded


def test_a_file_needs_no_operator_for_them(tmp_path):
    """ONNX has no QR decomposition."""
    model, call = made()
    ditopt.export_onnx(model, tmp_path / "a.onnx", example_inputs=call)
    assert sorted(f.name for f in tmp_path.glob("*.onnx")) == ["a.memo.memo_timestep.onnx", "a.onnx"]
    torch.testing.assert_close(ditopt.load(tmp_path / "a.onnx")(**call), model(**call))


def test_a_changed_weight_is_seen_by_onnxruntime():
    model, call = made()
    fast = ditopt.optimize(model, "lossless", example_inputs=call, target="onnxruntime")
    torch.testing.assert_close(fast(**call), model(**call))
    model.weight.data.mul_(-2)  # type: ignore[operator]
    fast.reset()
    torch.testing.assert_close(fast(**call), model(**call))
