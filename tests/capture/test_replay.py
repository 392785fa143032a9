"""Values of the prompt that a model's Python looks at: constants in the graph, recomputed by a guard."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from ditopt.capture import capture, derive
from ditopt.capture.check import differing
from ditopt.capture.spec import bind
from ditopt.errors import CaptureError
from ditopt.ir.verify import verify
from tests.capture.use import run, same, take
from tests.tiny_models import equal, noise, snapshot


class Looks(nn.Module):
    """Two linears around ``look``, which subclasses write; text (2, 5, 4), mask (2, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return self.b(self.a(x) * t[:, None] + self.look(x, t, self.a(text), mask))

    def look(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


def inputs(seed: int = 0, lengths: tuple[int, int] = (3, 2)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    x, text = (torch.randn(*shape, generator=generator) for shape in ((2, 4), (2, 5, 4)))
    return {"x": x, "t": torch.rand(2, generator=generator), "text": text, "mask": mask}


class Item(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) / mask.sum().item()


class Int(Looks):
    def look(self, x, t, text, mask):
        return text[:, : int(mask.sum(1).max())].sum(1)


class Lengths(Looks):
    def look(self, x, t, text, mask):
        lengths = mask.sum(1).tolist()
        return torch.stack([row[:n].mean(0) for row, n in zip(text, lengths, strict=True)]) * len(set(lengths))


class Nested(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) * sum(sum(row) for row in mask.long().tolist())


class Numpy(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) * float(mask.sum(1).numpy().max())


class Bool(Looks):
    def look(self, x, t, text, mask):
        return text.cumsum(1).sum(1) if mask.all() else (text * mask[..., None]).sum(1)


class Equal(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) * (1 if torch.equal(mask[0], mask[1]) else 3)


class Contains(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) * (2 if 3 in mask.sum(1) else 5)


class Loop(Looks):
    def look(self, x, t, text, mask):
        for _ in range(mask[0].sum()):
            text = self.b(text)
        return text.sum(1)


class Slice(Looks):
    def look(self, x, t, text, mask):
        return text[:, : mask[0].sum()].sum(1)


class Arange(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) * torch.arange(mask.sum()).sum()


class Masked(Looks):
    def look(self, x, t, text, mask):
        return text[mask].cumsum(0).sum(0)


class MaskedRow(Looks):
    def look(self, x, t, text, mask):
        return text[:, mask[0]].cumsum(1)[:, -1]


class Nonzero(Looks):
    def look(self, x, t, text, mask):
        places = torch.nonzero(mask)
        return text[places[:, 0], places[:, 1]].cumsum(0).sum(0)


class Where(Looks):
    def look(self, x, t, text, mask):
        return text[torch.where(mask)].cumsum(0).sum(0)


class Select(Looks):
    def look(self, x, t, text, mask):
        return torch.masked_select(text, mask[..., None]).cumsum(0).mean()


class Repeat(Looks):
    def look(self, x, t, text, mask):
        return torch.repeat_interleave(text[0], mask[:, :5].sum(0), dim=0).cumsum(0).sum(0)


class RepeatAll(Looks):
    def look(self, x, t, text, mask):
        return torch.repeat_interleave(text, mask.sum(), dim=1).cumsum(1).mean(1)


class Bincount(Looks):
    def look(self, x, t, text, mask):
        counts = torch.bincount(mask.sum(1), minlength=2)
        return text.sum(1) * counts.cumsum(0).sum() + counts.bincount()[0] * mask.sum(1).bincount(counts[:2] / 3)[1]


class Stretched(Looks):
    """What is made of the first size fits no other."""

    def look(self, x, t, text, mask):
        more = torch.repeat_interleave(mask[0], mask[0].long() + 1)
        return torch.repeat_interleave(text, mask[0].long() + 1, dim=1).cumsum(1)[:, more].sum(1)


class Assigned(Looks):
    def look(self, x, t, text, mask):
        out = torch.zeros_like(text)
        out[mask] = text[mask].cumsum(0)
        out[:, : mask[0].sum()] += 1
        out[x.mean() > text] = 0.5  # a mask of the latent, and no size that depends on it
        return out.sum(1)


class Written(Looks):
    """The tensor that was read is written to afterwards."""

    def look(self, x, t, text, mask):
        count = mask.sum()
        n = int(count)
        return text.sum(1) * n + count.add_(1)


READERS = [
    Item, Int, Lengths, Nested, Numpy, Bool, Equal, Contains, Loop, Slice, Arange, Masked, MaskedRow, Nonzero, Where,
    Select, Repeat, RepeatAll, Bincount, Stretched, Assigned, Written,
]  # fmt: skip


def make(cls: type[Looks]) -> Looks:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noise(cls())  # type: ignore[return-value]


def line_of(cls: type, text: str) -> int:
    source, start = inspect.getsourcelines(cls)
    return start + next(i for i, line in enumerate(source) if text in line)


@pytest.mark.parametrize("cls", READERS)
def test_values_of_the_prompt_are_replayed_under_a_guard(cls):
    model = make(cls)
    before = snapshot(model)
    c = take(model, **inputs())
    assert equal(before, snapshot(model))
    verify(c.program)
    guard = c.guard
    assert guard is not None
    assert guard.inputs == ("mask",)
    for seed in (0, 1):  # x, t and text of the second are others
        assert not guard.broken(guard.arguments(inputs(seed)))
        with torch.no_grad():
            want = model(**inputs(seed))
        assert same(run(model, c, **inputs(seed)), want)
    other = inputs(lengths=(5, 5))
    said = guard.broken(guard.arguments(other))
    assert said.startswith(f"its Python reads a value at {__file__}:")
    with torch.no_grad():  # the guard is needed: the graph holds the value
        try:
            got = run(model, c, **other)
        except (RuntimeError, IndexError):
            return
        assert not torch.allclose(got, model(**other))


def test_a_guard_takes_any_layout():
    guard = take(make(Masked), **inputs()).guard
    assert guard is not None
    for lengths, holds in (((3, 2), True), ((2, 2), False)):
        mask = inputs(lengths=lengths)["mask"].t().contiguous().t()
        assert not mask.is_contiguous()
        assert (guard.broken([mask]) == "") == holds


def test_what_happened_is_noted():
    notes = take(make(Lengths), **inputs()).notes
    where = f"{__file__}:{line_of(Lengths, 'tolist')} (lengths = mask.sum(1).tolist())"
    assert notes[0].startswith(f"torch.export alone: Lengths cannot be traced at {__file__}")
    assert notes[1] == "captured by torch.export with 1 value that Python reads as constants"
    assert notes[2].startswith(f"guarded: 1 value, from mask, read at {where}")
    assert len(notes) == 3


class Fixed(Looks):
    def look(self, x, t, text, mask):
        sizes = torch.full((2,), 2).tolist()
        return sum(part.sum(1) for part in torch.split(text[:, :4], sizes, 1))


def test_values_that_no_input_changes_need_no_guard():
    model = make(Fixed)
    c = take(model, **inputs())
    assert c.guard is None
    assert "1 value " in c.notes[1]
    assert c.notes[2].startswith("the values are the same in every call")
    with torch.no_grad():
        assert same(run(model, c, **inputs(1)), model(**inputs(1)))


class Gain(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) * (2 if self.gain > 1 else 3)


def test_values_of_weights_are_guarded():
    model = make(Gain)
    guard = take(model, **inputs()).guard
    assert guard is not None
    assert (guard.inputs, list(guard.params)) == ((), ["gain"])
    assert guard.params["gain"] is model.gain
    assert not guard.broken(guard.arguments({}))
    with torch.no_grad():
        model.gain.fill_(-1)
    assert "(return text.sum(1) * (2 if self.gain > 1 else 3))" in guard.broken(guard.arguments({}))


class OfLatent(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) * (2 if x.mean() > 0 else 3)


class OfTime(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) * int(1000 * (t * mask.sum()).sum())


class Routed(Looks):
    """Token-choice routing."""

    def look(self, x, t, text, mask):
        chosen = x.argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate((self.a, self.b)):
            rows = chosen == i
            out[rows] = expert(x[rows])
        return out


@pytest.mark.parametrize(
    ("cls", "line", "role"),
    [(OfLatent, "x.mean", "latent"), (OfTime, "t * mask", "timestep"), (Routed, "out[rows]", "latent")],
)
def test_values_that_change_every_step_are_refused(cls, line, role):
    model = make(cls)
    before = snapshot(model)
    with pytest.raises(CaptureError) as error:
        take(model, **inputs())
    said = str(error.value)
    for words in (f"{cls.__name__} cannot be traced at {__file__}:{line_of(cls, line)} (", f"depends on the {role}"):
        assert words in said, said
    assert "torch.where" in said
    assert "roles={" in said
    assert equal(before, snapshot(model))


def test_a_role_that_is_given_decides_what_may_be_read():
    c = take(make(OfLatent), roles={"x": "prompt"}, **inputs())
    assert c.guard is not None
    assert c.guard.inputs == ("x",)


class LooksTwice(Looks):
    """Looks at more where it is not traced, as checks of arguments do."""

    def look(self, x, t, text, mask):
        if not torch.compiler.is_compiling() and mask.sum() == 0:
            raise ValueError("an empty prompt")
        return text.sum(1) * int(mask.sum())


def test_a_model_may_look_at_more_when_it_is_not_traced():
    model = make(LooksTwice)
    c = take(model, **inputs())
    with torch.no_grad():
        assert same(run(model, c, **inputs(1)), model(**inputs(1)))


class LooksWhenTraced(Looks):
    def look(self, x, t, text, mask):
        return text.sum(1) * (int(mask.sum()) if torch.compiler.is_compiling() else 5)


def test_what_is_read_only_in_a_trace_cannot_be_replayed():
    """A recorded run is none that a model could tell from others, so that it reads nothing there."""
    model = make(LooksWhenTraced)
    c = take(model, **inputs())
    assert c.notes[0].startswith(f"torch.export alone: LooksWhenTraced cannot be traced at {__file__}")
    assert c.notes[1] == (
        "torch.export with values as constants: no function of torch hands Python one outside of tracing"
    )
    assert c.notes[2] == "captured by recording a run at the dispatcher, with 0 values that Python reads as constants"
    assert c.guard is None
    with torch.no_grad():
        assert same(run(model, c, **inputs(1)), model(**inputs(1)))


class BakesMask(Looks):
    """Reads the mask behind the back of the tracer."""

    count = 5

    def look(self, x, t, text, mask):
        count = self.count if torch.compiler.is_compiling() else int(mask.sum())
        return text.sum(1) * count


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_a_constant_that_depends_on_the_mask_is_found_by_the_check(dtype):
    """The mask ends with zeros already: a derived one has to be shorter still."""
    given = inputs()
    given["mask"] = given["mask"].to(dtype)
    model = make(BakesMask)
    with torch.no_grad():
        unverified = capture(model, *bind(model, (), given), verify=False)
        assert same(run(model, unverified, **given), model(**given))
    with pytest.raises(CaptureError, match="differs from the model"):
        take(model, **given)


def test_the_second_input_respects_the_guard_and_is_another():
    model = make(Lengths)
    given = inputs()
    c = take(model, **given)
    assert c.guard is not None
    alone = dict(zip(given, derive(c.program.inputs, list(given.values())), strict=True))
    assert c.guard.broken(c.guard.arguments(alone))
    new = differing(c.program, c.guard, given)
    assert not c.guard.broken(c.guard.arguments(new))
    assert not torch.equal(new["mask"], given["mask"])
    assert not any(torch.equal(new[name], given[name]) for name in ("x", "t", "text"))
