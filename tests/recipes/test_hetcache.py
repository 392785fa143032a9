"""HetCache against a transcription of its own: three ways to run a step by one sum, and the tokens that an edit needs.

The transcription shares nothing with the graph: it steps through the modules of the model, with keys and values in a
dictionary, and chooses tokens with NumPy, one sample and one cluster at a time.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ditopt
from ditopt.errors import DitoptWarning, RecipeError
from ditopt.pipeline import Context, PassManager
from ditopt.recipe import Recipe
from tests.recipes.oracle import captures_shared
from tests.roads.tiny import BATCH, TOKENS, Small, error, noise, prompt, times
from tests.tiny_models import captured

STEPS, SIDE = 14, 8
COUNT = SIDE * SIDE
THRESHOLD = 0.2


class Inpaint(Small):
    """``Small`` on a latent of four channels and the mask of an edit, side by side."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth=depth)
        self.patch = nn.Conv2d(5, 32, 2, 2)


class Apart(nn.Module):
    """The same with the mask as an argument of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inpaint()

    def forward(self, hidden_states, timestep, mask, encoder_hidden_states, pooled_projections, return_dict=True):
        joined = torch.cat([hidden_states, mask], 1)
        return self.inner(joined, timestep, encoder_hidden_states, pooled_projections, return_dict)


@functools.cache
def model(kind: type[nn.Module] = Inpaint) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval().requires_grad_(False)


def masks(side: int = 3) -> torch.Tensor:
    """An edit of ``side`` by three tokens in the first sample, elsewhere in the second."""
    found = torch.zeros(BATCH, 1, 2 * SIDE, 2 * SIDE)
    found[0, :, 4 : 4 + 2 * side, 5:10] = 1  # covers half of the pixels of a column of tokens
    found[1, :, 2:6, 8 : 8 + 2 * side] = 1
    return found


class Transcription:
    """The denoiser, held, on part of the tokens, or whole. ``decided``: which, step by step."""

    told: torch.Tensor
    patches: torch.Tensor
    before: Any = None

    def __init__(
        self,
        threshold: float = THRESHOLD,
        partial: float = 1.5,
        restart: str = "full",
        margin: int = 1,
        context: float = 0.5,
        clusters: int = 4,
        iterations: int = 3,
        ratio: float = 0.75,
        alpha: float = 0.0,
    ) -> None:
        self.model, self.limit, self.partial, self.restart = model(), threshold, partial, restart
        self.margin, self.context, self.k, self.iterations = margin, context, clusters, iterations
        self.count, self.alpha = int(COUNT * ratio), alpha
        self.kept: dict[int, Any] = {}
        self.decided: list[str] = []
        self.sum, self.need = 0.0, 0
        self.attended = np.zeros((BATCH, COUNT))

    def blocks(self, x, c, ids):
        for i, b in enumerate(self.model.blocks):
            s1, b1, g1, s2, b2, g2 = b.mod(F.silu(c)).unsqueeze(1).chunk(6, -1)
            q, k, v = b.qkv(b.norm(x) * (1 + s1) + b1).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            if ids is not None:
                whole = [t.clone() for t in self.kept[i]]
                for row in range(BATCH):
                    at = torch.cat([torch.arange(TOKENS), TOKENS + ids[row]])
                    whole[0][row][:, at], whole[1][row][:, at] = k[row], v[row]
                k, v = whole
            self.kept[i] = k, v
            self.weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + g1 * b.out((self.weights @ v).transpose(1, 2).flatten(2))
            x = x + g2 * b.down(F.gelu(b.up(b.norm(x) * (1 + s2) + b2)))
        return x

    def clustered(self, x: np.ndarray, who: list[int]) -> np.ndarray:
        """K-means on the tokens ``who``, from tokens at a fixed stride."""
        centers = x[:: COUNT // self.k][: self.k].copy()
        for _ in range(self.iterations):
            label = ((x[who, None] - centers[None]) ** 2).sum(-1).argmin(-1)
            for j in range(self.k):
                if (label == j).any():
                    centers[j] = x[who][label == j].mean(0)
        return ((x[who, None] - centers[None]) ** 2).sum(-1).argmin(-1)

    def order(self, mask: torch.Tensor, x: torch.Tensor) -> None:
        """What partial steps compute, from a full step whose last block gave ``x``."""
        self.chosen, self.need = [], 0
        for row in range(BATCH):
            edit = mask[row, 0].numpy().reshape(SIDE, 2, SIDE, 2).max((1, 3)) > 0.5
            far = np.array(
                [
                    min((math.hypot(i - a, j - b) for a, b in np.argwhere(edit)), default=math.inf)
                    for i in range(SIDE)
                    for j in range(SIDE)
                ]
            )
            new, band = np.flatnonzero(far == 0), np.flatnonzero((far > 0) & (far <= self.margin))
            rest = [i for i in range(COUNT) if far[i] > self.margin]
            share = self.weights[row, :, TOKENS:, TOKENS + torch.tensor(new)].sum(-1).mean(0).double().numpy()
            self.attended[row] = self.alpha * self.attended[row] + (1 - self.alpha) * share
            label = self.clustered(x[row, TOKENS:].double().numpy(), rest)
            ranks = []
            for j in range(self.k):
                own = sorted((rest[i] for i in np.flatnonzero(label == j)), key=lambda i: -self.attended[row][i])
                ranks += [(place / len(own), -self.attended[row][i], i) for place, i in enumerate(own)]
            ranks.sort()
            self.need = max(self.need, len(new) + len(band) + sum(r < self.context for r, _, _ in ranks))
            self.chosen.append([*new, *band, *(i for _, _, i in ranks)])

    def way(self, modulated: torch.Tensor) -> str:
        """hold, partial or full."""
        step = len(self.decided)
        before, self.before = self.before, modulated
        if step in (0, STEPS - 1):
            self.sum = 0.0
            return "full"
        self.sum += float((modulated - before).abs().mean() / before.abs().mean())
        if self.sum < self.limit:
            return "hold"
        found = "partial" if self.sum < self.partial * self.limit and self.need <= self.count else "full"
        if found == "full" or self.restart == "any":
            self.sum = 0.0
        return found

    def __call__(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict=False):
        m = self.model
        angles = timestep[:, None].float() * torch.exp(-torch.arange(16.0))
        c = m.time(torch.cat([angles.sin(), angles.cos()], -1)) + m.pooled(pooled_projections)
        x, text = m.patch(hidden_states).flatten(2).transpose(1, 2), m.context(encoder_hidden_states)
        first = m.blocks[0]
        scale, shift, *_ = first.mod(F.silu(c)).unsqueeze(1).chunk(6, -1)
        how = self.way(first.norm(torch.cat([text, x], 1)) * (1 + scale) + shift)
        self.decided.append(how)
        if how == "hold":
            return (self.told,)
        ids = None
        if how == "partial":
            ids = torch.tensor(np.sort([row[: self.count] for row in self.chosen]))
            x = torch.stack([x[row][ids[row]] for row in range(BATCH)])
        x = self.blocks(torch.cat([text, x], 1), c, ids)
        if ids is None:
            self.order(hidden_states[:, 4:], x)
        patches = m.head(x[:, TOKENS:])
        if ids is not None:
            whole = self.patches.clone()
            for row in range(BATCH):
                whole[row][ids[row]] = patches[row]
            patches = whole
        self.patches = patches
        self.told = patches.view(BATCH, SIDE, SIDE, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(BATCH, 4, 16, 16)
        return (self.told,)


@torch.no_grad()
def sample(fast, seed=0, mask=None, apart=False):
    x, mask, outputs = noise(seed, size=2 * SIDE), masks() if mask is None else mask, []
    for t in times(STEPS):
        call = {"hidden_states": x, "mask": mask} if apart else {"hidden_states": torch.cat([x, mask], 1)}
        v = fast(**call, timestep=torch.full((BATCH,), t), **prompt(seed), return_dict=False)[0]
        outputs.append(v.clone())
        x = x - v / STEPS
    return torch.stack(outputs)


def example():
    given = torch.cat([noise(99, size=2 * SIDE), masks()], 1)
    return {"hidden_states": given, "timestep": torch.full((BATCH,), 700.0), **prompt(99), "return_dict": False}


SETTINGS = {
    "threshold": THRESHOLD, "mask": "hidden_states:4", "margin": 1, "context_ratio": 0.5, "clusters": 4,
    "iterations": 3, "ratio": 0.75,
}  # fmt: skip


def text(**more):
    return f"hetcache{{{','.join(f'{k}={v}' for k, v in {**SETTINGS, **more}.items())}}}"


@functools.cache
def optimized(recipe, target="eager"):
    with captures_shared():
        return ditopt.optimize(model(), recipe, target=target, example_inputs=example())


@functools.cache
def plain():
    return sample(model())


@functools.cache
def transcribed(options=()):
    made = Transcription(**dict(options))
    return sample(made), made.decided


def run(fast, **more):
    with fast.session(steps=STEPS):
        return sample(fast, **more)


def ways(fast):
    """What the session did, in the words of the transcription."""
    found = []
    for row in fast.engine.session.schedule_rows:
        tokens, hold = row.choices.values()
        found.append("hold" if hold == "reuse" else "partial" if tokens == "reuse" else "full")
    return found


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"restart": "any"}, {"restart": "any"}),
    ({"partial": 2.5}, {"partial": 2.5}),
    ({"alpha": 0.95, "margin": 2, "ratio": 0.9}, {"alpha": 0.95, "margin": 2, "ratio": 0.9}),
    ({"context_ratio": 0.1, "ratio": 0.5}, {"context": 0.1, "ratio": 0.5}),
    ({"clusters": 1, "iterations": 0, "margin": 0}, {"clusters": 1, "iterations": 0, "margin": 0}),
]


@pytest.mark.parametrize("k", range(len(CASES)))
def test_as_transcribed(k):
    given, options = CASES[k]
    outputs, decided = transcribed(tuple(options.items()))
    assert set(decided) == {"hold", "partial", "full"}, "a request that never does one of them is no test of it"
    fast = optimized(text(**given))
    found = run(fast)
    assert ways(fast) == decided
    assert error(found, outputs) < 1e-5
    other, _ = transcribed(tuple(CASES[k - 1][1].items()))
    assert error(found, other) > 1e-3, "the comparison tells the settings apart"


@pytest.mark.parametrize("recipe", [f"teacache{{threshold={THRESHOLD}}}", "ras{ratio=0.75,start=1}"])
def test_another_recipe_is_told_apart(recipe):
    assert error(run(optimized(recipe)), transcribed()[0]) > 1e-3


def test_a_second_request_is_like_the_first():
    fast = optimized(text())
    first = run(fast)
    run(fast, seed=4, mask=masks(2))
    assert torch.equal(run(fast), first)


def test_one_read_a_step_decides_all_three_ways():
    """Beside the reads that every recipe has."""
    fast, plain_ = optimized(text()), optimized("lossless")
    for each in (fast, plain_):
        run(each)
    before = fast.stats.reads, plain_.stats.reads
    for each in (fast, plain_):
        run(each)
    assert fast.stats.reads - before[0] - (plain_.stats.reads - before[1]) == STEPS - 2
    measured = fast.engine.session.measured
    assert measured["tokens0"] == measured["cache1"], "both decisions go by one number"
    assert len(measured["cache1"]) == STEPS - 2


def test_a_mask_of_its_own_is_found_by_its_name():
    given = example()
    given["hidden_states"] = given["hidden_states"][:, :4]
    with captures_shared():
        fast = ditopt.optimize(model(Apart), text(mask='""'), target="eager", example_inputs={**given, "mask": masks()})
    assert error(run(fast, apart=True), transcribed()[0]) < 1e-5


def test_a_mask_that_needs_more_than_there_is_room_for():
    """What would be partial is full, and one sentence says so."""
    options = {"context": 0.9}
    outputs, decided = transcribed(tuple(options.items()))
    assert "partial" not in decided
    assert "hold" in decided
    fast = optimized(text(context_ratio=0.9))
    with pytest.warns(DitoptWarning) as told:
        found = run(fast)
    assert ways(fast) == decided
    assert error(found, outputs) < 1e-5
    said = [str(w.message) for w in told]
    assert len(said) == 1
    assert "this request needs 95% of them, and a partial step computes 75%; optimize with a larger ratio" in said[0]


def test_guidance_by_two_calls_keeps_two_states():
    fast = optimized(text())

    @torch.no_grad()
    def both(one, other):
        x = noise(0, size=2 * SIDE)
        for t in times(STEPS):
            call = {"hidden_states": torch.cat([x, masks()], 1), "timestep": torch.full((BATCH,), t)}
            free = one(**call, **prompt(0), return_dict=False)[0].clone()
            bound = other(**call, **prompt(7), return_dict=False)[0].clone()
            x = x - (free + 2 * (bound - free)) / STEPS
        return x

    with fast.session(steps=STEPS):
        got = both(fast, fast)
    one, other = Transcription(), Transcription()
    assert error(got, both(one, other)) < 1e-5
    rows = fast.engine.session.schedule_rows
    found = {branch: sum(r.graph == "full" for r in rows if r.branch == branch) for branch in (0, 1)}
    assert found == {0: one.decided.count("full"), 1: other.decided.count("full")}


@pytest.mark.filterwarnings("ignore:.*was never reused")
def test_a_threshold_of_0_is_exact():
    assert torch.equal(run(optimized(text(threshold=0))), plain())


PASSES = "canonicalize, outline_blocks, edit_tokens{{mask=hidden_states:4,margin=1,iterations=1,first=1,{}}}"


def test_all_tokens_are_exact_on_the_partial_path():
    fast = optimized(PASSES.format("ratio=1"))
    assert torch.equal(run(fast), plain())
    assert fast.stats.graphs["reuse"] == STEPS - 1


def test_export():
    """What the host decides by goes with the manifest; what orders the tokens is in the file of the full step."""
    made = Inpaint(depth=2).eval().requires_grad_(False)
    recipe = PASSES.format("every=3,last=1,clusters=2,ratio=0.9")
    exported, eager = (
        ditopt.optimize(made, recipe, target=target, example_inputs=example()) for target in ("onnxruntime", "eager")
    )
    found = run(exported)
    assert error(found, run(eager)) < 1e-5
    assert error(found, sample(made)) > 1e-3
    assert 0 < exported.stats.graphs["reuse"] < STEPS


# -- refusals ----------------------------------------------------------------------------------------------------------


def passed(recipe, steps=None):
    return PassManager(Recipe.parse(recipe), Context("eager", steps)).run(captured("plain")[1].program)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("hetcache{threshold=-0.1}", "expected at least 0"),
        ("hetcache{partial=1}", "expected at least 1.001"),
        ("hetcache{margin=-1}", "expected at least 0"),
        ("hetcache{context_ratio=1.2}", "expected at most 1"),
        ("hetcache{ratio=0}", r"expected at least 0\.01"),
        ("hetcache{clusters=0}", "expected at least 1"),
        ("hetcache{restart=never}", "got 'never'; there are: full, any"),
        ("edit_tokens{margin=-1}", r"margin=-1.: expected 0 or more"),
        ("edit_tokens{context=-0.1}", "expected a share of the context from 0 to 1"),
        ("edit_tokens{ema=1}", "expected a weight from 0 .none. to below 1"),
        ("edit_tokens{ratio=1.5}", "expected a share above 0 and at most 1"),
        ("edit_tokens{region=model,mask=x:3}", "name a run of blocks"),
        ("edit_tokens{mask=z}", r"'z' is no tensor input of this model; there are x \[2, 4, 8, 8\]"),
        ("edit_tokens{mask=x:4}", "x .2, 4, 8, 8. has 4 channels; expected 0 <= FIRST < STOP <= 4"),
        ("edit_tokens{mask=x:a}", "expected NAME, NAME:CHANNEL or NAME:FIRST:STOP"),
    ],
)
def test_settings_that_make_no_sense(recipe, said):
    with pytest.raises(RecipeError, match=said):
        passed(recipe)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            "edit_tokens",
            "no input of this model is called the mask of the edit; say where it is: mask=NAME for an input",
        ),
        ("edit_tokens{mask=t}", r"mask=t: \[2\] does not lie on the grid of tokens, which is 4 x 4; expected"),
    ],
)
def test_models_without_what_it_takes(recipe, said):
    last = passed(recipe)[-1]
    assert last.applied == 0
    assert len(last.refused) == 1
    assert re.match(said, last.refused[0])


def test_a_request_of_dense_steps_only():
    last = passed("edit_tokens{mask=x:3,first=2,last=2}", steps=4)[-1]
    assert last.refused == ("a request of 4 steps has no other than the first 2 and the last 2: give fewer",)


def test_without_a_mask_the_model_is_told_how_to_give_it():
    with pytest.warns(
        DitoptWarning, match="mask=NAME:FIRST:STOP for channels of an input, as in mask=hidden_states:4:5"
    ):
        optimized("edit_tokens")
