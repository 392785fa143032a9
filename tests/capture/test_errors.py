"""What cannot be a graph is said with the model's own line, and the model is as it was."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from ditopt.capture import bind, capture
from ditopt.errors import CaptureError
from tests.capture.use import take
from tests.tiny_models import ZOO, Plain, equal, noise, snapshot


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
        (Breaks, [lambda: f"{__file__}:{line_of(Breaks, 'self.nothing')}", "AttributeError", "nothing"]),
        (Counts, ["changes its attribute step during forward", "Make it an input of forward"]),
        (CountsInside, ["changes its attribute seen.steps.0 during forward"]),
        (Buffers, ["changes seen during forward", "Pass it in and return it"]),
        (Overwrites, ["changes its input x in place during forward at ", __file__, "clone the input first"]),
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


def test_what_forward_looks_at_leaves_the_blocks_to_a_graph():
    model = noise(Branches())
    notes = take(model, **ZOO["plain"].inputs()).notes
    for note in notes[:2]:
        assert f"{__file__}:{line_of(Branches, 'if x.mean')} (if x.mean() > 0:)" in note
        assert "torch.where" in note
    assert notes[3].startswith("captured by blocks: blocks.0 .. ")


def test_the_checks_can_pass():
    """The same models without what is refused."""
    for cls in (Bakes, Random):
        model = noise(cls())
        with torch.random.fork_rng():
            inputs = ZOO["plain"].inputs()
            spec, tensors = bind(model, (), inputs)
            assert capture(model, spec, tensors, verify=False).program.params
