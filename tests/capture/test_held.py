"""Models that keep something in plain attributes: what an earlier call made, locks, tables."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditopt
from ditopt.errors import CaptureError, SessionError
from tests.foreign.base import BATCH, randn, sinusoid, times
from tests.foreign.looking import WIDTH, Block


class Keeping(nn.Module):
    """Blocks under the embedding of a text and rotary tables; subclasses say what they keep of these."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.time = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, WIDTH)
        self.words = nn.Linear(12, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def text(self, text: Tensor) -> Tensor:
        return self.words(text).mean(1)

    def table(self, length: int) -> Tensor:
        return (torch.arange(length)[:, None] / torch.arange(1, WIDTH + 1)).cos()

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.time(sinusoid(t * 1000, WIDTH)) + self.text(text)
        h = self.embed(x) + self.table(x.shape[1])
        for block in self.blocks:
            h = block(h, c)
        return self.head(h)


class Table(Keeping):
    """The table of the last length, and that length."""

    length: int | None = None
    kept: Tensor

    def table(self, length: int) -> Tensor:
        if self.length != length:
            self.length, self.kept = length, super().table(length)
        return self.kept


class Told(Table):
    """The same; says at first that there is no length."""

    def __init__(self) -> None:
        super().__init__()
        self.length = None


class Prompt(Keeping):
    """The text of the request, until it is emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def text(self, text: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = super().text(text)
        return self.kept

    def empty(self) -> None:
        self.kept = None


class PromptOfThread(Keeping):
    """The same, where each thread has its own; a lock, which cannot be copied, is among what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {"lock": threading.Lock(), "local": threading.local()}

    def text(self, text: Tensor) -> Tensor:
        with self.store["lock"]:
            if getattr(self.store["local"], "kept", None) is None:
                self.store["local"].kept = super().text(text)
            return self.store["local"].kept

    def empty(self) -> None:
        self.store["local"].kept = None


class PromptAroundBlocks(Prompt):
    """The same; looks at the time around its blocks."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(x * 2 if float(t[0]) > 0.5 else x, t, text)


class Momentum(Keeping):
    """Adds its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        out = super().forward(x, t, text)
        self.last = out if self.last is None else out + 0.5 * self.last
        return self.last


class Served(Keeping):
    """Uses a table that somebody else puts in place."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = super().table(16)

    def table(self, length: int) -> Tensor:
        return self.kept[:length]


def call(step: int, prompt: int, length: int = 16) -> dict[str, Tensor]:
    return {
        "x": randn(BATCH, length, 8, seed=step),
        "t": times(step),
        "text": randn(BATCH, 5, 12, seed=prompt),
    }


def made(cls: type[Keeping]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls().eval()


@pytest.mark.parametrize("cls", [Table, Told, Prompt, PromptOfThread, PromptAroundBlocks])
def test_what_a_first_call_keeps_is_made_anew_for_each_request(cls):
    model = made(cls)
    fast = ditopt.optimize(model, "lossless", example_inputs=call(0, 99), target="eager")
    assert any("from call to call" in n for n in fast.compiled.captured.notes) == (cls is not PromptAroundBlocks)
    other = Keeping().eval()  # the same without a memory
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for prompt in (99, 98):
            with fast.session(steps=3):
                for step in range(3):
                    given = call(step, prompt)
                    got = fast(**given)
                    given["x"] = given["x"] * 2 if cls is PromptAroundBlocks and given["t"][0] > 0.5 else given["x"]
                    assert torch.equal(got, other(**given)), f"prompt {prompt}, step {step}"
            model(**call(0, 97, 12))  # the plain model fills its own, and is free to


@pytest.mark.parametrize("cls", [Told, Prompt, PromptOfThread])
def test_the_model_itself_keeps_nothing_of_a_trace(cls):
    model = made(cls)
    ditopt.optimize(model, "lossless", example_inputs=call(0, 99), target="eager")
    with torch.no_grad():
        assert torch.equal(model(**call(0, 98)), made(cls)(**call(0, 98)))


def test_what_is_added_up_over_calls_is_refused():
    """A graph would start anew in each call."""
    with pytest.raises(CaptureError, match=r"Momentum changes its attribute last during forward, and another call"):
        ditopt.optimize(made(Momentum), example_inputs=call(0, 99), target="eager")


@pytest.mark.parametrize("change", [lambda m: setattr(m, "kept", m.kept * 2), lambda m: m.kept.mul_(2)])
def test_a_table_that_a_graph_holds_is_watched(change):
    model = made(Served)
    fast = ditopt.optimize(model, "lossless", example_inputs=call(0, 99), target="eager")
    with torch.no_grad():
        assert torch.equal(fast(**call(0, 99)), model(**call(0, 99)))
        change(model)
        with pytest.raises(SessionError, match=r"kept of the model changed after optimize"):
            fast(**call(0, 98))
        fast.refresh()
        assert torch.equal(fast(**call(0, 98)), model(**call(0, 98)))


def test_a_prompt_that_was_kept_before_capture_is_noticed_when_it_is_emptied():
    """Until then the plain model holds on to it as well."""
    model = made(Prompt)
    with torch.no_grad():
        model(**call(0, 99))
        fast = ditopt.optimize(model, "lossless", example_inputs=call(0, 98), target="eager")
        assert torch.equal(fast(**call(0, 98)), model(**call(0, 98)))
        model.empty()
        with pytest.raises(SessionError, match=r"kept of the model changed"):
            fast(**call(0, 98))
