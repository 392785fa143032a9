"""ERTACache (arXiv 2508.21091) against its formulas in NumPy: fit, loop and scheduler, with guidance and on all roads.

The transcription shares no code with ditopt: it calls the model where the paper does, and is left to its own loop.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import ditopt
from ditopt import recipe as recipes
from ditopt.errors import DitoptWarning, RecipeError
from ditopt.ir.pacing import paced
from ditopt.recipe import Recipe, available
from tests import tiny_sampler
from tests.calibration.use import Pipe, Scheduler, sampler
from tests.tiny_sampler import ROWS, TOKENS, WIDTH

STEPS, SEEDS, JUDGED = 12, (3, 5), 11
BRANCHES = {"none": ("both",), "batch": ("both",), "calls": ("prompt", "empty")}
"""The calls of a step, which have recordings and a residual of their own."""


class Drifting(tiny_sampler.TinyDiT):
    """Its output moves with its input, as the paper has it: else the published factors are all 0."""

    def forward(self, hidden_states, timestep, class_labels):
        return hidden_states + super().forward(hidden_states, timestep, class_labels)


@functools.cache
def denoiser() -> Any:
    model: Any = Drifting().eval().requires_grad_(False)
    with torch.no_grad():
        for block in model.blocks:
            block.mod.bias[WIDTH:] += 0.7  # gates that let attention through
        model.time.weight *= 8
    return model


# -- the transcription -------------------------------------------------------------------------------------------------


@dataclass
class Tables:
    mask: list[bool]
    phi: np.ndarray
    scale: np.ndarray
    shift: np.ndarray


class Loop:
    """A request as the paper has it. ``tables`` None computes every step; ``trace``: (input, output) by branch."""

    def __init__(self, guidance, seed, tables=None, adjust=True):
        self.guidance, self.tables = guidance, tables
        self.trace: dict[str, list[Any]] = {b: [] for b in BRANCHES[guidance]}
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(ROWS, TOKENS, WIDTH, generator=generator).numpy().astype(np.float64)
        self.labels = torch.randint(3, (ROWS,), generator=generator)
        self.kept, sigma, self.sigmas = {}, 1.0, [1.0]
        for self.step in range(STEPS):
            v = self.velocity(x, sigma)
            full = sigma / (STEPS - self.step)  # what is left, over the steps that are left
            dt = full if tables is None or not adjust or self.step == STEPS - 1 else full * tables.phi[self.step]
            x, sigma = x - dt * v, sigma - dt
            self.sigmas.append(sigma)
        self.sample = 1 / (1 + np.exp(-x))[:, None]

    def velocity(self, x, sigma):
        empty = torch.full_like(self.labels, 3)
        if self.guidance == "none":
            return self.output("both", x, sigma, self.labels)
        if self.guidance == "batch":
            pair = self.output("both", np.concatenate([x, x]), sigma, torch.cat([self.labels, empty]))
            cond, free = pair[:ROWS], pair[ROWS:]
        else:
            cond, free = (self.output(b, x, sigma, y) for b, y in (("prompt", self.labels), ("empty", empty)))
        return free + 2 * (cond - free)

    def output(self, branch, x, sigma, labels):
        t = self.tables
        if t is not None and not t.mask[self.step]:
            return t.scale[self.step] * (x + self.kept[branch]) + t.shift[self.step]
        time = torch.full((len(x),), 1000 * sigma)
        v = denoiser()(torch.from_numpy(x).float(), time, labels).numpy().astype(np.float64)
        self.kept[branch] = v - x
        self.trace[branch].append((x.reshape(-1, WIDTH), v.reshape(-1, WIDTH)))
        return v


def l1(a):
    return np.abs(a).sum()


def fitted(guidance, threshold, table=True):
    runs = [trace for seed in SEEDS for trace in Loop(guidance, seed).trace.values()]
    anchors, mask = [0], [True]
    for s in range(1, STEPS):

        def residual(run, step):
            return run[step][1] - run[step][0]

        near = [l1(residual(r, anchors[-1]) - residual(r, s)) / l1(residual(r, s)) for r in runs]
        mask.append(not np.mean(near) < threshold)
        anchors.append(s if mask[s] else anchors[-1])
    phi, scale, shift = np.ones(STEPS), np.ones((STEPS, WIDTH)), np.zeros((STEPS, WIDTH))
    for s in (s for s in range(STEPS) if not mask[s]):
        told = [r[s][0] + r[anchors[s]][1] - r[anchors[s]][0] for r in runs]
        if s < STEPS - 1:
            ratio = [l1(g - r[s][1]) / l1(r[s][1] - r[s + 1][1]) for g, r in zip(told, runs, strict=True)]
            phi[s] = np.mean(np.clip(1 - np.array(ratio), 0, 1))
        guess, true = np.concatenate(told), np.concatenate([r[s][1] for r in runs])
        for c in range(WIDTH if table else 0):
            k, b = np.polyfit(guess[:, c], (guess - true)[:, c], 1)  # the error is k * guess + b
            scale[s, c], shift[s, c] = 1 - k, -b
    return Tables(mask, np.array([float(f"{p:.4g}") for p in phi]), scale, shift)


def differs(guidance, recipe, table=True, adjust=True, threshold=0.3, target="eager"):
    """How far a request through ditopt is from the transcription, largest difference of samples in [0, 1]."""
    want = Loop(guidance, JUDGED, fitted(guidance, threshold, table), adjust)
    pipe = ditopt.optimize(Pipe(guidance, denoiser=denoiser()), recipe, steps=STEPS, target=target)
    got = pipe(JUDGED, STEPS).double().numpy()
    ditopt.restore(pipe)
    return float(np.abs(got - want.sample).max())


def calibrated(guidance, text):
    pipe = Pipe(guidance, denoiser=denoiser())
    return ditopt.calibrate(pipe, text, sampler, steps=STEPS, seeds=SEEDS, progress=False)


@functools.cache
def made(guidance, folder, extra=""):
    return calibrated(guidance, f"ertacache{{threshold=0.3,table={folder}/{guidance}.safetensors{extra}}}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


def test_the_subject_can_tell():
    """Steps that reuse and steps that compute, factors inside (0, 1), a correction: else a test could pass for free."""
    tables, uncorrected = fitted("none", 0.3), fitted("none", 0.3, table=False)
    assert 3 <= sum(tables.mask) <= STEPS - 3
    assert ((tables.phi > 0) & (tables.phi < 1)).sum() >= 1
    assert np.abs(tables.scale - 1).max() > 0.05
    made = Loop("none", JUDGED, tables).sample
    others = [Loop("none", JUDGED), Loop("none", JUDGED, tables, adjust=False), Loop("none", JUDGED, uncorrected)]
    assert min(np.abs(made - other.sample).max() for other in others) > 5e-3


@pytest.mark.parametrize("guidance", BRANCHES)
def test_ertacache(guidance, folder):
    recipe = made(guidance, folder)
    assert differs(guidance, recipe) < 1e-4


@pytest.mark.parametrize("target", ["inductor", "onnxruntime"])
def test_the_other_roads(target, folder):
    assert differs("calls", made("calls", folder), target=target) < 1e-4


def test_its_parts_can_be_left_out(folder):
    held = made("none", folder, ",adjust=false")
    assert "rescale_steps" not in str(held)
    assert differs("none", held, adjust=False) < 1e-4
    assert differs("none", held) > 5e-3
    bare = calibrated("none", "ertacache{threshold=0.3}")
    assert "correction" not in str(bare)
    assert differs("none", bare, table=False) < 1e-4
    assert differs("none", bare) > 5e-3


def test_a_bare_model_runs_what_needs_no_scheduler(folder):
    """The user's own loop, over the plain times."""
    fast = ditopt.optimize(denoiser(), made("none", folder, ",adjust=false"), steps=STEPS, target="eager")
    want = Loop("none", JUDGED, fitted("none", 0.3), adjust=False)
    pipe = Pipe(denoiser=denoiser())
    pipe.transformer = fast
    with fast.session(steps=STEPS):
        assert np.abs(pipe(JUDGED, STEPS).numpy() - want.sample).max() < 1e-4
    assert sum(fast.stats.hits.values()) == fitted("none", 0.3).mask.count(False)


@pytest.mark.parametrize("other", ["magcache", "cachequant", "ddt_sharing", "bac"])
def test_another_file_under_its_name_fails(other, folder, monkeypatch):
    """What another system fits, with its own parameters, is not what this transcription does."""
    systems = {**available(), "ertacache": available()[other]}
    monkeypatch.setattr(recipes, "available", lambda: systems)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DitoptWarning)
        swapped = calibrated("none", "ertacache")
    assert differs("none", swapped) > 1e-3


def test_a_share_is_reached_by_the_smallest_threshold():
    for share in (0.25, 0.5, 0.75):
        recipe = str(calibrated("none", f"ertacache{{share={share}}}"))
        mask = recipe.partition("mask=")[2].partition(",")[0]
        assert mask.count("1") <= share * STEPS
        tried = [fitted("none", t, table=False).mask for t in np.linspace(0.01, 2, 400)]
        first = next(m for m in tried if sum(m) <= share * STEPS)
        assert sum(first) == mask.count("1")


def test_neutral_settings_are_exact():
    pipe = Pipe("batch", denoiser=denoiser())
    plain = pipe(JUDGED, STEPS)
    with pytest.warns(DitoptWarning, match="reuses nothing"):
        recipe = calibrated("batch", "ertacache{threshold=0}")
    assert "rescale_steps" not in str(recipe)
    assert torch.equal(ditopt.optimize(pipe, recipe, target="eager")(JUDGED, STEPS), plain)
    ditopt.restore(pipe)
    for text in ("rescale_steps{factors=1}", f'rescale_steps{{factors="{"1 " * STEPS}"}}'):
        with pytest.warns(DitoptWarning, match="every factor is 1"):
            assert torch.equal(ditopt.optimize(pipe, text, target="eager")(JUDGED, STEPS), plain)
        ditopt.restore(pipe)
    times = np.sort(np.random.default_rng(0).random(9))[::-1].tolist()
    assert paced(times, [1.0] * 8) == times
    assert paced(times, [1.0, 1.0, 0.5, *[1.0] * 5])[:3] == times[:3]


def test_the_recipe_is_data(folder, tmp_path):
    recipe = made("none", folder)
    assert Recipe.parse(str(recipe)) == recipe
    path = tmp_path / "recipe.json"
    path.write_text(recipe.to_json())
    again = Recipe.parse(path)
    assert again == recipe
    assert again.calibrated["scheduler"].startswith("Scheduler ")
    (step,) = [s for s in recipe.steps if s.name == "rescale_steps"]
    assert [float(w) for w in str(step.options["factors"]).split()] == pytest.approx(fitted("none", 0.3).phi.tolist())


def test_an_input_that_holds_more_than_the_latent(tmp_path):
    """The output itself is held then, and the recipe says so."""

    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = denoiser()

        def forward(self, hidden_states, timestep, class_labels):
            return self.inner(hidden_states, timestep, class_labels)[..., :5]

    model = Wide()

    def loop(running, seed, steps):
        x = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
        for k in range(steps):
            v = running(x, torch.full((ROWS,), 1000 * (1 - k / steps)), torch.arange(ROWS))
            x = torch.cat([x[..., :5] - v / steps, x[..., 5:]], -1)
        return x

    table = tmp_path / "t.safetensors"
    text = f"ertacache{{share=0.5,adjust=false,table={table}}}"
    recipe = ditopt.calibrate(model, text, loop, steps=STEPS, seeds=SEEDS, progress=False)
    assert "residual=no" in str(recipe)
    assert "corrected=whole" in str(recipe)
    plain = loop(model, JUDGED, STEPS)
    fast = ditopt.optimize(model, recipe, steps=STEPS, target="eager")
    with fast.session(steps=STEPS):
        near = (loop(fast, JUDGED, STEPS) - plain).abs().max()
    assert 0 < near < 0.2 * (plain - loop(model, JUDGED, 2)).abs().max()


def test_what_cannot_be_paced_is_refused_when_it_is_fitted():
    pipe = Pipe(denoiser=denoiser())
    with pytest.raises(RecipeError, match=r"this recording saw none; calibrate a pipeline.*adjust=false"):
        ditopt.calibrate(
            denoiser(), "ertacache", lambda model, seed, steps: loop_of(model, seed, steps), steps=4, progress=False
        )

    class Curved(Scheduler):
        def set_timesteps(self, count):
            super().set_timesteps(count)
            self.timesteps = self.timesteps**0.5

    pipe.scheduler = Curved()
    with pytest.raises(RecipeError, match="timesteps are proportional to its sigmas"):
        ditopt.calibrate(pipe, "ertacache", sampler, steps=6, seeds=[0], progress=False)


def loop_of(model, seed, steps):
    x = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    for k in range(steps):
        x = x - model(x, torch.full((ROWS,), 1000 * (1 - k / steps)), torch.arange(ROWS)) / steps
    return x
