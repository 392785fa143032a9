"""Arguments that are no tensors, and tensors inside containers, all the way into a file and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ditopt
from ditopt.errors import BadInput
from tests.roads.tiny import Small, example, noise


class Nested(Small):
    """Positions by sizes, a rotary table in nested tuples, an option by name, and defaults that nobody gives."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        sizes: list[tuple[int, int]],
        rotary: tuple[tuple[Tensor, Tensor], None],
        options: dict[str, Any],
        dtype: torch.dtype = torch.float32,
        strength: float = 1.0,
        return_dict: bool = True,
    ) -> Any:
        (rows, columns), ((cos, sin), _) = sizes[-1], rotary
        turned = hidden_states[..., :rows, :columns] * cos + hidden_states.flip(-1) * sin * options["weight"]
        moved = turned.to(dtype) * strength if options["mode"] == "turn" else hidden_states
        return super().forward(moved, timestep, encoder_hidden_states, pooled_projections, return_dict)


def call(seed: int, **changes: Any) -> dict[str, Any]:
    given = {
        **example(),
        "hidden_states": noise(seed),
        "sizes": [(1, 1), (8, 8)],
        "rotary": ((noise(7)[:1], noise(8)[:1]), None),
        "options": {"mode": "turn", "weight": 0.25},
    }
    return given | changes


@pytest.fixture(scope="module")
def model() -> Nested:
    torch.manual_seed(0)
    return Nested(depth=2).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["onnx", "folder"])
def loaded(request, model, tmp_path_factory) -> Any:
    path = tmp_path_factory.mktemp("nested") / "dit.onnx"
    if request.param == "onnx":
        ditopt.export_onnx(model, path, "lossless", example_inputs=call(0))
        return ditopt.load(path)
    fast = ditopt.optimize(model, "lossless", target="eager", example_inputs=call(0))
    return ditopt.load(ditopt.save(fast, path.with_suffix(".ditopt")), target="eager")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sizes": ((1, 1), [8, 8]), "dtype": torch.float32, "strength": 1.0},
        {"options": {"weight": 0.5, "mode": "turn"}, "rotary": [[noise(1)[:1], noise(2)[:1]], None]},
    ],
    ids=["as exported", "defaults said", "other tensors"],
)
def test_a_file_takes_what_the_model_takes(model, loaded, changes):
    got, want = loaded(**call(1, **changes))[0], model(**call(1, **changes))[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_values_that_the_file_holds_cannot_be_changed(loaded):
    with pytest.raises(BadInput, match=r"sizes\.1\.0=4 given, but .* was exported with sizes=\[\[1, 1\], \[8, 8\]\]"):
        loaded(**call(1, sizes=[(1, 1), (4, 8)]))
    with pytest.raises(BadInput, match=r"dtype='torch\.float16' given, but .* exported with dtype='torch\.float32'"):
        loaded(**call(1, dtype=torch.float16))
    with pytest.raises(BadInput, match=r"strength=2\.0 given, but .* exported with strength=1\.0"):
        loaded(**call(1, strength=2.0))
    with pytest.raises(BadInput, match=r"options without options\.mode given"):
        loaded(**call(1, options={"weight": 0.5}))
