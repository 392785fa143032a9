"""Nested arguments of a loaded model: tensors are found by name, everything else must be what the export saw."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from ditopt.artifact import Manifest, from_json, to_json
from ditopt.capture import bind
from ditopt.errors import BadInput, SessionError
from ditopt.ir.program import Input, TensorType
from ditopt.runtime.arguments import Arguments, leaves

Pair = namedtuple("Pair", "cos sin")

CONSTANTS = {"shapes.0.0": 8, "shapes.0.1": 10, "shapes.1": "all", "rope.1": None, "options.mode": "a", "kind": 1}


def arguments(**constants) -> Arguments:
    types = {"x": (2, 3), "rope.0.cos": (3,), "rope.0.sin": (3,), "options.scale": ()}
    inputs = tuple(Input(n, "latent", TensorType(torch.float32, s)) for n, s in types.items())
    extra = {"signature": ["x", "rope", "shapes", "options", "kind"], "constants": {**CONSTANTS, **constants}}
    manifest = Manifest(inputs, ("y",), (), (), (), (), extra=extra)
    return Arguments(from_json(to_json(manifest)), "dit.onnx")


def call(**changes):
    given = {
        "x": torch.zeros(2, 3),
        "rope": ({"cos": torch.ones(3), "sin": torch.zeros(3)}, None),
        "shapes": [(8, 10), "all"],
        "options": {"scale": 0.5, "mode": "a"},
        "kind": 1,
    }
    return {k: v for k, v in (given | changes).items() if v is not ...}


def test_nested_tensors_are_found_wherever_they_lie():
    x, cos, sin, scale = arguments().tensors(call())
    assert [*x.shape, cos.sum().item(), sin.sum().item(), scale.item()] == [2, 3, 3, 0, 0.5]


@pytest.mark.parametrize(
    "changes",
    [
        {"shapes": ((8, 10), "all")},
        {"shapes": [[np.int64(8), 10], "all"]},
        {"shapes": [torch.Size([8, 10]), "all"]},
        {"shapes": ..., "kind": ...},
        {"rope": [Pair(torch.ones(3), np.zeros(3, "f")), None]},
        {"options": OrderedDict(mode="a", scale=torch.tensor(0.5)), "unheard_of": None, "empty": {}},
    ],
    ids=["tuples", "lists", "size", "left out", "named tuple", "ordered dict"],
)
def test_what_the_export_saw_may_be_given_in_another_container_or_left_out(changes):
    assert len(arguments().tensors(call(**changes))) == 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"shapes": [(8, 12), "all"]},
            r"shapes\.0\.1=12 given, but dit\.onnx was exported with shapes=\[\[8, 10\], 'all'\]; export again",
        ),
        ({"shapes": [(8, 10)]}, r"shapes without shapes\.1 given, but dit\.onnx was exported with shapes=\[\[8"),
        ({"shapes": []}, r"shapes=\[\] given, but .* shapes=\[\[8"),
        ({"shapes": None}, r"shapes=None given, but .* shapes=\[\[8"),
        ({"shapes": [(8, 10, 1), "all"]}, r"shapes\.0\.2=1 given, but .* shapes=\[\[8"),
        ({"shapes": [torch.zeros(2), "all"]}, r"unknown input 'shapes\.0'; dit\.onnx takes x: float32\[2, 3\]"),
        ({"kind": torch.ones(1)}, r"kind is a tensor, but dit\.onnx was exported with kind=1"),
        ({"kind": object()}, r"kind=<object object at .*kind=1"),
        (
            {"options": {"scale": 1.0, "mode": "b"}},
            r"options\.mode='b' .* options=\{'scale': float32\[\], 'mode': 'a'\}",
        ),
        (
            {"rope": ({"cos": torch.ones(3), "sin": torch.zeros(3)}, 7)},
            r"rope\.1=7 given, but .* rope=\[\{'cos': float32\[3\], 'sin': float32\[3\]\}, None\]",
        ),
        ({"rope": ({"cos": torch.ones(3)}, None)}, r"rope\.0\.sin not given; dit\.onnx takes"),
        ({"more": 3}, r"more=3 given, but dit\.onnx was exported without it and takes x: float32"),
        ({"more": [1, 2]}, r"more\.0=1 given, but dit\.onnx was exported without it"),
        ({"x": ...}, "x not given"),
        ({"x": "a"}, "x is a str; dit.onnx expects a tensor there"),
    ],
)
def test_anything_else_is_one_clear_error(changes, told):
    with pytest.raises(BadInput, match=told):
        arguments().tensors(call(**changes))


def test_types_and_devices_are_compared_as_text():
    made = arguments(dtype=str(torch.float16), device="cpu")
    assert made.tensors(call(dtype=torch.float16, device=torch.device("cpu")))
    with pytest.raises(BadInput, match=r"dtype='torch\.float32' given, but .* dtype='torch\.float16'"):
        made.tensors(call(dtype=torch.float32))


def test_another_shape_inside_a_container():
    with pytest.raises(
        SessionError, match=r"rope\.0\.cos is float32\[4\], but dit\.onnx was exported for float32\[3\]"
    ):
        arguments().tensors(call(rope=({"cos": torch.ones(4), "sin": torch.ones(3)}, None)))


def test_long_values_are_shortened():
    made = arguments(table=None, **{f"many.{k}": k for k in range(500)})
    with pytest.raises(BadInput, match="exported with many") as caught:
        made.tensors(call(many=[7] * 500))
    assert "many.0=7 given" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_names_are_those_of_the_capture():
    given = {"a": [torch.ones(1), (3, None)], "b": {"c": Pair(torch.ones(2), 0.5), "d": []}, "e": OrderedDict(f=True)}

    class Takes(nn.Module):
        def forward(self, a, b, e):
            return a[0]

    spec, _ = bind(Takes(), (), given)
    assert [name for name, _ in leaves(given)] == list(spec.labels)
