"""Systems that leave out a branch of guidance, against transcriptions, guided by two calls and by a doubled batch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ditopt
from ditopt.errors import DitoptWarning
from tests.recipes.oracle import DEPTH, LABELS, NEAR, PACE, STEPS, TIMES, Array, Parts, error, model, start

FREE = torch.tensor([9, 9])
SCALE = 3.0
FORMS = ("calls", "batch")

Step = Callable[[int, Array, float], tuple[bool, Array, Array]]
"""Step index, latent, time -> whether both branches ran; the unconditional and the conditional output."""


class Branch(Parts):
    """The denoiser's parts with one branch's prompt; ``whole`` is all of it, with the attention that is handed in."""

    def __init__(self, labels: torch.Tensor) -> None:
        super().__init__()
        self.labels = labels

    def begin(self, x: Array, t: float) -> Array:
        rates = torch.exp(-torch.arange(self.m.width // 2) * 0.5)
        angles = torch.full((2, 1), t) * rates
        self.c = self.m.time(torch.cat([angles.sin(), angles.cos()], -1)) + self.m.label(self.labels)
        return self.m.patch(torch.from_numpy(x)).flatten(2).transpose(1, 2).numpy()

    def whole(self, x: Array, t: float, attend: Callable[[int, Array], Array] | None = None) -> Array:
        h = self.begin(x, t)
        for i in range(DEPTH):
            gate, gate_mlp = self.gates(i)
            h = h + gate * (attend or self.attention)(i, h)
            h = h + gate_mlp * self.mlp(i, h)
        return self.end(h)


def cfg_cache(interval: int, first: int, order: int) -> Step:
    cond, free = Branch(LABELS), Branch(FREE)
    kept: list[tuple[int, Array]] = []

    def step(k: int, x: Array, t: float) -> tuple[bool, Array, Array]:
        c = cond.whole(x, t)
        if k < first or (k - first + 1) % interval == 0:
            u = free.whole(x, t)
            kept.append((k, u - c))
            return True, u, c
        (at, new), *before = kept[::-1]
        slope = (new - before[0][1]) / (at - before[0][0]) if order and before else 0.0
        return False, c + new + (k - at) * slope, c

    return step


def interval_guidance(begin: int, end: int) -> Step:
    cond, free = Branch(LABELS), Branch(FREE)

    def step(k: int, x: Array, t: float) -> tuple[bool, Array, Array]:
        c = cond.whole(x, t)
        return (True, free.whole(x, t), c) if begin <= k < end else (False, c, c)

    return step


def fastercache(
    form: str,
    attention_begin: int,
    guidance_begin: int,
    interval: int,
    attention_high: float = np.inf,
    high: float = np.inf,
) -> Step:
    """Windows in steps, or in time, below which something is left out: then steps count from the first one.

    With a doubled batch both halves compute attention anew where the unconditional one missed some, and what is
    extrapolated begins there; with two calls the conditional branch goes on."""
    cond, free = Branch(LABELS), Branch(FREE)
    seen: list[list[Array]] = [[] for _ in range(DEPTH)]
    missed = {"any": False}
    low: list[Array] = []

    def split(d: Array) -> tuple[Array, Array]:
        """By the transform and the mask of the official code."""
        rows, columns = d.shape[-2:]
        y, x = np.mgrid[:rows, :columns]
        near = (y - rows // 2) ** 2 + (x - columns // 2) ** 2 <= (min(rows, columns) // 5) ** 2
        shifted = np.fft.fftshift(np.fft.fft2(d), axes=(-2, -1))
        parts = [np.fft.ifft2(np.fft.ifftshift(shifted * m, axes=(-2, -1))).real for m in (near, ~near)]
        return parts[0].astype(np.float32), parts[1].astype(np.float32)

    def step(k: int, x: Array, t: float) -> tuple[bool, Array, Array]:
        both = k <= guidance_begin or (k - guidance_begin) % interval == 0 or t >= high
        keeps = k >= attention_begin
        catch_up = form == "batch" and both and missed["any"]
        reuse = k > attention_begin and (k - attention_begin) % 2 == 1 and t < attention_high and not catch_up

        def attend(i: int, h: Array) -> Array:
            if reuse:
                new, *before = seen[i][::-1]
                return new + k / (STEPS - 1) * (new - before[0]) if before else new
            value = cond.attention(i, h)
            if keeps:
                seen[i] = [*([] if catch_up else seen[i]), value][-2:]
            return value

        c = cond.whole(x, t, attend)
        missed["any"] = (missed["any"] or not reuse) if not both else False
        if both:
            u = free.whole(x, t)
            low[:] = split(u - c)
            return True, u, c
        done = k / (STEPS - 1)
        return False, c + (1.1 if 0.1 < done < 0.9 else 1) * low[0] + (1.1 if done > 0.7 else 1) * low[1], c

    return step


CASES: dict[str, Callable[[str], Step]] = {
    "cfg_cache": lambda form: cfg_cache(3, 2, 1),
    "cfg_cache{interval=3,first=1,order=0}": lambda form: cfg_cache(3, 1, 0),
    "interval_guidance": lambda form: interval_guidance(2, 13),
    "fastercache": lambda form: fastercache(form, 6, 6, 5),
    "fastercache{attention_since=0,attention_high=2,since=0,high=1.8}": lambda form: fastercache(form, 0, 0, 5, 2, 1.8),
}


@functools.cache
def wanted(recipe: str, form: str) -> tuple[list[bool], Array]:
    step, x, both, outputs = CASES[recipe](form), start(0).numpy(), [], []
    with torch.no_grad():
        for k, t in enumerate(TIMES):
            ran, u, c = step(k, x, t)
            both.append(ran)
            outputs.append(np.stack([u, c]))
            x = x - np.float32(PACE) * (u + np.float32(SCALE) * (c - u))
    return both, np.stack(outputs)


@functools.cache
def run(recipe: str, form: str, target: str = "eager") -> tuple[list[bool], Array, Any]:
    """Per step whether both branches ran, the outputs of both, and the optimized model, after two equal requests."""
    fast = ditopt.optimize(model(), recipe, steps=STEPS, target=target)

    def request() -> Array:
        x, outputs = start(0), []
        with fast.session(steps=STEPS):
            for t in TIMES:
                if form == "calls":
                    c, u = (fast(x, torch.full((2,), t), labels) for labels in (LABELS, FREE))
                else:
                    u, c = fast(torch.cat([x, x]), torch.full((4,), t), torch.cat([FREE, LABELS])).chunk(2)
                outputs.append(np.stack([u.numpy(), c.numpy()]))
                x = x - PACE * (u + SCALE * (c - u))
        return np.stack(outputs)

    with warnings.catch_warnings():
        warnings.simplefilter("error", DitoptWarning)
        first = request()
        assert np.array_equal(request(), first), "a request leaves nothing to the next one"
    rows = [r for r in fast.schedule_rows if form == "batch" or r.branch == 1]
    both = [v == "compute" for r in rows for n, v in r.choices.items() if n.startswith("guidance")]
    return both or [True] * STEPS, first, fast


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", CASES)
def test_the_session_does_what_the_transcription_says(recipe, form):
    both, outputs = wanted(recipe, form)
    found = run(recipe, form)
    assert found[0] == both
    assert 0 < both.count(False) < STEPS
    assert error(found[1], outputs) < NEAR
    assert error(found[1], run("lossless", form)[1]) > 10 * NEAR, "what changes nothing is no test"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", CASES)
def test_no_other_recipe_does_the_same(recipe, form):
    for other in CASES:
        both, outputs = run(other, form)[:2]
        same = both == wanted(recipe, form)[0] and error(outputs, wanted(recipe, form)[1]) < NEAR
        assert same == (other == recipe), other


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recipe", ["cfg_cache", "interval_guidance"])
def test_a_step_that_skips_runs_half_of_a_full_one(recipe, form):
    both, _, fast = run(recipe, form)
    stats, rows = fast.stats, 2 * STEPS * (2 if form == "calls" else 1)
    assert stats.calls == rows
    extra = stats.flops / stats.full_flops - (1 + both.count(True) / STEPS) / 2
    assert abs(extra) < 0.02, "hoisted values of the two requests are all that may differ"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "recipe",
    ["cfg_cache{interval=1}", "interval_guidance{since=0,until=1}", "fastercache{attention=1,interval=1}"],
)
def test_neutral_settings_are_the_plain_model_bit_for_bit(recipe, form):
    fast = ditopt.optimize(model(), recipe, steps=3, target="eager")
    x = start(3)

    @torch.no_grad()
    def request() -> None:
        with fast.session(steps=3):
            for t in TIMES[:3]:
                calls = [(x, torch.full((2,), t), labels) for labels in (LABELS, FREE)]
                if form == "batch":
                    calls = [(torch.cat([x, x]), torch.full((4,), t), torch.cat([FREE, LABELS]))]
                for call in calls:
                    assert torch.equal(fast(*call), model()(*call))

    with pytest.warns(DitoptWarning, match="never reused"):
        request()


def test_the_order_of_the_halves_is_read_off_the_prompts_or_said():
    one = torch.zeros(2, 4, 8, 8)
    for labels, recipe, last in (
        (torch.cat([LABELS, FREE]), "interval_guidance", False),
        (torch.cat([FREE, LABELS]), "interval_guidance", True),
        (torch.cat([FREE, LABELS]), "interval_guidance{unconditional=second}", False),
        (torch.cat([FREE, FREE]), "interval_guidance", True),
    ):
        fast = ditopt.optimize(model(), recipe, steps=STEPS, target="eager")
        with fast.session(steps=STEPS):
            out = fast(torch.cat([one, one]), torch.full((4,), 3.0), labels)
        kept = out.chunk(2)[1 if last else 0]
        assert torch.equal(*out.chunk(2))
        labels = labels.chunk(2)[1 if last else 0]
        assert F.mse_loss(kept, model()(one, torch.full((2,), 3.0), labels)) < 1e-10


def _warning(form: str, recipe: str, calls: Callable[[Any, torch.Tensor, float], None]) -> str:
    fast = ditopt.optimize(model(), recipe, steps=STEPS, target="eager")

    def request() -> None:
        with fast.session(steps=STEPS):
            for t in TIMES:
                calls(fast, start(0), t)

    with pytest.warns(DitoptWarning) as told:
        request()
    assert fast.stats.hits == {}
    assert fast.stats.share_flops > 0.99
    return " ".join(str(w.message) for w in told)


def test_without_guidance_nothing_is_skipped_and_a_sentence_says_so():
    def one(fast: Any, x: torch.Tensor, t: float) -> None:
        fast(x, torch.full((2,), t), LABELS)

    assert "called once a step" in _warning("calls", "cfg_cache", one)
    assert "not the same latent" in _warning("batch", "cfg_cache{form=batch}", one)


def test_calls_with_other_latents_are_no_guidance():
    def windows(fast: Any, x: torch.Tensor, t: float) -> None:
        for k, labels in enumerate((LABELS, FREE)):
            fast(x + k, torch.full((2,), t), labels)

    assert "different latents" in _warning("calls", "cfg_cache", windows)


def test_the_unconditional_branch_must_not_come_first():
    def swapped(fast: Any, x: torch.Tensor, t: float) -> None:
        for name, labels in (("uncond", FREE), ("cond", LABELS)):
            with fast.cache_context(name):
                fast(x, torch.full((2,), t), labels)

    assert "unconditional branch is called first" in _warning("calls", "interval_guidance", swapped)


@pytest.mark.parametrize("form", FORMS)
def test_tgate_against_hooks_on_the_model(form):
    """From the gate on each cross-attention gives what it gave at the step before: the mean of both halves of a batch,
    or of its own branch; and the unconditional output is the conditional one."""
    from tests.tiny_models import ZOO

    gate, steps, tiny = 3, 6, ZOO["pixart"]
    plain, fast = (tiny.model() for _ in range(2))
    fast = ditopt.optimize(fast, f"tgate{{gate={gate},form={form},unconditional=first}}", steps=steps, target="eager")
    inputs = tiny.inputs()
    x = inputs["hidden_states"][:1]
    text, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]
    kept: dict[Any, torch.Tensor] = {}
    now: dict[str, Any] = {"step": 0, "branch": ""}

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        key = (module, now["branch"])
        if now["step"] >= gate:
            held = kept[key]
            return held.mean(0, keepdim=True).expand_as(output) if form == "batch" else held
        kept[key] = output
        return output

    for block in plain.transformer_blocks:
        block.attn2.register_forward_hook(hook)

    def call(model: Any, rows: slice, t: int) -> torch.Tensor:
        now["branch"] = str(rows)
        n = len(text[rows])
        return model(
            hidden_states=x.expand(n, -1, -1, -1).contiguous(),
            timestep=torch.full((n,), t),
            encoder_hidden_states=text[rows],
            encoder_attention_mask=mask[rows],
            added_cond_kwargs=inputs["added_cond_kwargs"],
            return_dict=False,
        )[0]

    with torch.no_grad(), fast.session(steps=steps):
        for k in range(steps):
            now["step"], t = k, 900 - 100 * k
            if form == "batch":
                (u, c), (u2, c2) = call(plain, slice(0, 2), t).chunk(2), call(fast, slice(0, 2), t).chunk(2)
            else:
                c, u = call(plain, slice(1, 2), t), call(plain, slice(0, 1), t)
                c2, u2 = call(fast, slice(1, 2), t), call(fast, slice(0, 1), t)
            u = c if k >= gate else u
            torch.testing.assert_close(c2, c, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(u2, u, rtol=1e-3, atol=1e-4)
            x = x - 0.3 * (u + SCALE * (c - u))[:, :4]
    assert fast.stats.share_flops < 0.75
