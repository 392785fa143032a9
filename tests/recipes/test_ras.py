"""RAS against a transcription of its own: a model that runs on chosen tokens, and who chooses them.

The transcription shares nothing with the graph: it steps through the modules of the model, with keys and values in a
dictionary, and chooses tokens with NumPy from the predictions that it recorded.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ditopt
from ditopt.codegen.lower import lower
from ditopt.errors import DitoptWarning, RecipeError, SessionError
from ditopt.ir.cost import is_matmul
from ditopt.ir.edit import inline
from ditopt.pipeline import Context, PassManager
from ditopt.recipe import Recipe
from tests.roads.tiny import BATCH, TOKENS, error, example, noise, prompt, sample, small, times

STEPS, GRID = 10, 4
COUNT = GRID * GRID // 2
FULL = {0, 1, 2, 3, round(0.4 * STEPS), round(0.73 * STEPS)}


class Transcription:
    """``Small`` on all tokens, or on those of each row in ``chosen``."""

    told: torch.Tensor
    patches: torch.Tensor

    def __init__(self, model, starvation=0.1, high=1.0, ratio=0.5, later=None):
        self.model, self.starvation, self.high, self.later = model, starvation, high, later or {}
        self.count = int(GRID * GRID * ratio)
        self.kept, self.drops, self.chosen = {}, np.zeros((BATCH, GRID * GRID)), []

    def blocks(self, x, c, ids):
        for i, b in enumerate(self.model.blocks):
            s1, b1, g1, s2, b2, g2 = b.mod(F.silu(c)).unsqueeze(1).chunk(6, -1)
            q, k, v = b.qkv(b.norm(x) * (1 + s1) + b1).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            if ids is not None:
                whole = [t.clone() for t in self.kept[i]]
                for row in range(BATCH):
                    at = TOKENS + ids[row]
                    whole[0][row][:, at], whole[1][row][:, at] = k[row][:, TOKENS:], v[row][:, TOKENS:]
                    whole[0][row][:, :TOKENS], whole[1][row][:, :TOKENS] = k[row][:, :TOKENS], v[row][:, :TOKENS]
                k, v = whole
            self.kept[i] = k, v
            weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + g1 * b.out((weights @ v).transpose(1, 2).flatten(2))
            x = x + g2 * b.down(F.gelu(b.up(b.norm(x) * (1 + s2) + b2)))
        return x

    def choose(self):
        """ras_manager.py, for each row: the standard deviation over channels of each pixel, its mean over a patch."""
        ids = []
        for row in range(BATCH):
            told = self.told[row].numpy()
            score = told.std(axis=0, ddof=1).reshape(GRID, 2, GRID, 2).mean(axis=(1, 3)).ravel()
            order = np.argsort(score * np.exp(-self.starvation * self.drops[row]), kind="stable")
            skipped = len(order) - self.count
            low = skipped - int(skipped * self.high)
            ids.append(np.sort(order[low : low + self.count]))
            left_out = np.setdiff1d(np.arange(len(order)), ids[-1])
            self.drops[row, left_out] += 1
        return torch.tensor(np.stack(ids))

    def __call__(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict=False):
        m, step = self.model, len(self.chosen)
        angles = timestep[:, None].float() * torch.exp(-torch.arange(16.0))
        c = m.time(torch.cat([angles.sin(), angles.cos()], -1)) + m.pooled(pooled_projections)
        x = m.patch(hidden_states).flatten(2).transpose(1, 2)
        self.count = int(GRID * GRID * self.later[step]) if step in self.later else self.count
        ids = None if step in FULL else self.choose()
        if ids is not None:
            x = torch.stack([x[row][ids[row]] for row in range(BATCH)])
        x = self.blocks(torch.cat([m.context(encoder_hidden_states), x], 1), c, ids)
        patches = m.head(x[:, TOKENS:])
        if ids is not None:
            whole = self.patches.clone()
            for row in range(BATCH):
                whole[row][ids[row]] = patches[row]
            patches = whole
        self.patches = patches
        self.told = patches.view(BATCH, GRID, GRID, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(BATCH, 4, 8, 8)
        self.chosen.append(ids)
        return (self.told,)


def transcribed(**options):
    return sample(Transcription(small(), **options), 0, STEPS)


def optimized(text, target="eager", model=None):
    return ditopt.optimize(model or small(), text, target=target, example_inputs=example())


def run(fast, seed=0, steps=STEPS):
    with fast.session(steps=steps):
        return sample(fast, seed, steps)


CASES: dict[str, dict[str, Any]] = {
    "ras": {},
    "ras{starvation=-0.3}": {"starvation": -0.3},
    "ras{high_ratio=0}": {"high": 0.0},
    "ras{high_ratio=0.5,starvation=0}": {"high": 0.5, "starvation": 0.0},
    "ras{ratio=0.25}": {"ratio": 0.25},
    "ras{later=0.25@60%}": {"later": {6: 0.25}},
    "ras{later='0.25@45% 0.75@80%'}": {"later": {5: 0.25, 8: 0.75}},
}


@pytest.mark.parametrize("text", CASES)
def test_as_transcribed(text):
    fast = optimized(text)
    assert error(run(fast), transcribed(**CASES[text])) < 1e-5
    assert {r.step for r in fast.engine.session.schedule_rows if r.graph == "full"} == FULL
    other = transcribed(**next(o for t, o in CASES.items() if t != text))
    assert error(run(fast), other) > 1e-3, "the comparison tells the settings apart"


def test_a_second_request_is_like_the_first():
    fast = optimized("ras")
    first = run(fast, 3)
    run(fast, 4)
    assert torch.equal(run(fast, 3), first)


@pytest.mark.parametrize(("target", "text"), [("inductor", "ras"), ("onnxruntime", "ras{later=0.25@60%}")])
def test_other_targets(target, text):
    assert error(run(optimized(text, target)), transcribed(**CASES[text])) < 1e-4


def test_all_tokens_are_exact_on_the_partial_path():
    fast = optimized("ras{ratio=1}")
    assert torch.equal(run(fast), sample(small(), 0, STEPS))
    assert fast.stats.graphs["reuse"] == STEPS - len(FULL)


def program(text="ras", steps=None):
    from tests.tiny_models import captured

    return PassManager(Recipe.parse(text), Context("eager", steps)).run(captured("plain")[1].program)[-1]


def partial(fast):
    """The partial step of an optimized model, flat, with the program before it was lowered."""
    last = fast.history[-1].program
    return inline(next(v.program for v in lower(last) if v.graph.name == "reuse"))


def test_every_product_of_a_partial_step_is_short():
    """Its rows are the chosen tokens and the text; what is not of tokens has one row a sample, keys and values all."""
    fast = optimized("canonicalize, outline_blocks, select_tokens{ratio=0.5}")
    rows = [n.meta["val"].shape[1] for n in partial(fast).graph.nodes if is_matmul(n) and n.meta["val"].ndim == 3]
    assert rows.count(TOKENS + COUNT) == 4 * 3  # qkv, out, up, down of three blocks
    assert set(rows) == {TOKENS, COUNT, TOKENS + COUNT}  # the text embedding; the head


def test_half_of_the_tokens_is_half_of_the_work():
    fast = optimized("select_tokens{first=1}")
    run(fast)
    text, image, width = TOKENS, GRID * GRID, 32

    def flops(queries):
        return 2 * BATCH * 3 * (queries * 12 * width * width + 2 * queries * (text + image) * width + 6 * width * width)

    expected = (flops(text + image) + (STEPS - 1) * flops(text + COUNT)) / (STEPS * flops(text + image))
    assert fast.stats.share_block_flops == pytest.approx(expected, rel=0.02)


def test_one_choice_for_both_halves_of_the_batch():
    """Which tokens moved is seen in the prediction: others keep the last one."""
    for share, same in (("sample", False), ("halves", True), ("batch", True)):
        fast = optimized(f"ras{{share={share}}}")
        given, x = prompt(0), noise(0)
        told = []
        with fast.session(steps=STEPS):
            for t in times(STEPS)[:6]:
                told.append(
                    fast(hidden_states=x, timestep=torch.full((BATCH,), t), **given, return_dict=False)[0].clone()
                )
                x = x - told[-1] / STEPS
        moved = (told[5] != told[4]).any(1).view(BATCH, GRID, 2, GRID, 2).any(4).any(2)
        assert moved.flatten(1).sum(1).tolist() == [COUNT, COUNT]
        assert torch.equal(moved[0], moved[1]) is same


def test_guidance_by_two_calls_keeps_two_states():
    fast = optimized("ras")

    def both(model, steps=STEPS):
        x, a, b = noise(0), prompt(0), prompt(7)
        for t in times(steps):
            call = {"hidden_states": x, "timestep": torch.full((BATCH,), t), "return_dict": False}
            free, bound = model(**call, **a)[0].clone(), model(**call, **b)[0].clone()
            x = x - (free + 2 * (bound - free)) / steps
        return x

    with fast.session(steps=STEPS):
        got = both(fast)
    one, other = Transcription(small()), Transcription(small())
    calls = iter([one, other] * STEPS)
    assert error(got, both(lambda **k: next(calls)(**k))) < 1e-5


def test_under_a_forecast():
    """The cache decides first: a step that it predicts leaves tokens as they are."""
    fast = optimized("ras{start=2,resets=''}, cache{region=model,every=2,first=3,predictor=taylor,order=1}")
    out = run(fast)
    assert torch.isfinite(out).all()
    graphs = fast.stats.graphs
    assert set(graphs) == {"full", "reuse_cache0", "reuse_tokens1", "reuse"} - ({"reuse_cache0"} - set(graphs))
    assert fast.stats.share_block_flops < 0.5


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ras{ratio=0}", r"expected at least 0\.01, got 0"),
        ("ras{ratio=1.5}", "expected at most 1, got 1.5"),
        ("ras{start=0}", "expected at least 1"),
        ("ras{later=0.25}", "such as '0.35@40% 0.25@70%'"),
        ("ras{later='0.25@70% 0.5@40%'}", "rising"),
        ("ras{later=0@50%}", "expected shares of the tokens"),
        ("ras{resets=a}", "expected steps such as '12 22', or shares of the request"),
        ("select_tokens{mask=01}", "the first step has nothing to keep"),
        ("select_tokens{region=model}", "name a run of blocks"),
        ("select_tokens{region=blocks.*.attn}", "name a run of blocks"),
    ],
)
def test_settings_that_make_no_sense(text, said):
    with pytest.raises(RecipeError, match=said):
        program(text)


def test_a_request_of_dense_steps_only():
    result = program("ras", steps=4)
    assert result.applied == 0
    assert result.refused == ("a request of 4 steps has no other than the first 4: give fewer",)
    fast = optimized("ras{resets=''}")
    with pytest.warns(DitoptWarning, match="'tokens0' was never reused in this request: its warm-up"):
        run(fast, steps=4)


def test_shares_of_a_request_of_unknown_length():
    with pytest.raises(SessionError, match=r"computes at shares of the request .40% 73%., and the number of steps is"):
        optimized("ras")(**example())
