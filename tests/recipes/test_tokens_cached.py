"""Chosen tokens under caches of blocks and of modules, against a transcription in PyTorch.

A step is full, partial or reused. What a cache keeps of a region holds a row for each token: a partial step writes the
rows of its tokens, the others stand still, and a step that reuses reads all of them. The transcription shares nothing
with the graph: it steps through the modules of the model with dictionaries.
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
from ditopt.pipeline import Context, PassManager
from ditopt.recipe import Recipe
from tests.roads.tiny import BATCH, TOKENS, error, example, sample, small
from tests.tiny_models import captured

STEPS, GRID, FIRST = 10, 4, 2
TOKENS_ALL, COUNT = GRID * GRID, GRID * GRID // 2
DENSE = {0, 1, 6}
SELECT = "select_tokens{ratio=0.5,first=2,resets=6}"


class Transcription:
    """``Small`` where ``steps`` compute what is cached and the others predict it: ``run`` of blocks (their residual),
    the modules ``roles`` of all of them (their value), or the prediction (``whole``). ``skip``: blocks that only
    ``steps`` run."""

    told: torch.Tensor
    patches: torch.Tensor

    def __init__(self, steps, run=(), roles=(), order=0, ratio=0.5, whole=False, skip=()):
        self.model, self.steps, self.run, self.roles, self.order = small(), steps, run, roles, order
        self.whole, self.skip = whole, skip
        self.count = int(TOKENS_ALL * ratio)
        self.kept, self.past, self.drops = {}, {}, np.zeros((BATCH, TOKENS_ALL))
        self.step, self.ids = -1, None

    def rows(self):
        """Which rows of text and image a step computes, for each sample."""
        image = torch.arange(TOKENS_ALL).expand(BATCH, -1) if self.ids is None else self.ids
        return torch.cat([torch.arange(TOKENS).expand(BATCH, -1), TOKENS + image], 1)

    def take(self, whole):
        return torch.stack([w[at] for w, at in zip(whole, self.rows(), strict=True)])

    def put(self, name, rows, kept):
        """All rows of a value, those that the step computed among those that were ``kept``."""
        whole = rows.clone() if kept is None else kept.clone()
        for row in range(BATCH):
            whole[row][self.rows()[row]] = rows[row]
        return whole

    def cached(self, name, compute):
        if self.step in self.steps:
            rows = compute()
            values = self.past.setdefault(name, [])
            values.insert(0, (self.step, self.put(name, rows, values[0][1] if values else None)))
            return rows
        (newest, value), *older = self.past[name]
        if self.order and older and older[0][0] >= FIRST - 2:
            value = value + (value - older[0][1]) / (newest - older[0][0]) * (self.step - newest)
        return self.take(value)

    def attention(self, i, b, x, s, shift):
        q, k, v = b.qkv(b.norm(x) * (1 + s) + shift).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        for name, own in ((f"{i}.k", k), (f"{i}.v", v)):
            self.kept[name] = self.put(name, own.transpose(1, 2), self.kept.get(name))
        k, v = (self.kept[f"{i}.{n}"].transpose(1, 2) for n in "kv")
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return b.out((weights @ v).transpose(1, 2).flatten(2))

    def block(self, i, x, c):
        b = self.model.blocks[i]
        s1, b1, g1, s2, b2, g2 = b.mod(F.silu(c)).unsqueeze(1).chunk(6, -1)
        attention = lambda: self.attention(i, b, x, s1, b1)  # noqa: E731
        x = x + g1 * (self.cached(f"{i}.attn", attention) if "attn" in self.roles else attention())
        mlp = lambda: b.down(F.gelu(b.up(b.norm(x) * (1 + s2) + b2)))  # noqa: E731
        return x + g2 * (self.cached(f"{i}.mlp", mlp) if "mlp" in self.roles else mlp())

    def blocks(self, which, x, c):
        for i in which:
            if i not in self.skip or self.step in self.steps:
                x = self.block(i, x, c)
        return x

    def choose(self):
        ids = []
        for row in range(BATCH):
            told = self.told[row].numpy()
            score = told.std(axis=0, ddof=1).reshape(GRID, 2, GRID, 2).mean(axis=(1, 3)).ravel()
            order = np.argsort(score * np.exp(-0.1 * self.drops[row]), kind="stable")
            ids.append(np.sort(order[: self.count]))
            self.drops[row, np.setdiff1d(np.arange(TOKENS_ALL), ids[-1])] += 1
        return torch.tensor(np.stack(ids))

    def __call__(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict=False):
        m, self.step = self.model, self.step + 1
        angles = timestep[:, None].float() * torch.exp(-torch.arange(16.0))
        c = m.time(torch.cat([angles.sin(), angles.cos()], -1)) + m.pooled(pooled_projections)
        if self.whole and self.step not in self.steps:
            return (self.told,)
        self.ids = None if self.step in DENSE else self.choose()
        x = torch.cat([m.context(encoder_hidden_states), m.patch(hidden_states).flatten(2).transpose(1, 2)], 1)
        x = self.take(x)
        first, last = (self.run[0], self.run[-1] + 1) if self.run else (3, 3)
        x = self.blocks(range(first), x, c)
        if self.run:
            x = x + self.cached("run", lambda: self.blocks(self.run, x, c) - x)
        x = self.blocks(range(last, 3), x, c)
        patches = m.head(x[:, TOKENS:])
        if self.ids is not None:
            whole = self.patches.clone()
            for row in range(BATCH):
                whole[row][self.ids[row]] = patches[row]
            patches = whole
        self.patches = patches
        self.told = patches.view(BATCH, GRID, GRID, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(BATCH, 4, 8, 8)
        return (self.told,)


def optimized(text, target="eager", steps=None):
    return ditopt.optimize(small(), text, target=target, example_inputs=example(), steps=steps)


def run(fast, seed=0):
    with fast.session(steps=STEPS):
        return sample(fast, seed, STEPS)


EVEN = {0, 2, 4, 6, 8}
CASES: dict[str, dict[str, Any]] = {
    "cache{region=blocks.1,every=2}": {"steps": EVEN, "run": (1,)},
    "cache{region=blocks,every=2}": {"steps": EVEN, "run": (0, 1, 2)},
    "cache{region=blocks.1:-0,every=2,first=2,predictor=taylor,order=1}": {
        "steps": {0, 1, 3, 5, 7, 9},
        "run": (1, 2),
        "order": 1,
    },
    "cache{region=blocks.*.attn,mask=1101001100}": {"steps": {0, 1, 3, 6, 7}, "roles": ("attn",)},
    "cache{region=blocks.*.attn|blocks.*.mlp,mask=1101101101,predictor=taylor,order=1}": {
        "steps": {0, 1, 3, 4, 6, 7, 9},
        "roles": ("attn", "mlp"),
        "order": 1,
    },
    "cache{region=model,every=2}": {"steps": EVEN, "whole": True},
    "skip_blocks{region=blocks.1,mask=1011001101}": {"steps": {0, 2, 3, 6, 7, 9}, "skip": (1,)},
}


@pytest.mark.parametrize("text", CASES)
def test_as_transcribed(text):
    fast = optimized(f"{text}, {SELECT}")
    assert all(h.applied for h in fast.history if h.asked)
    told = sample(Transcription(**CASES[text]), 0, STEPS)
    assert error(run(fast), told) < 1e-5
    assert {"full", "reuse_tokens1", "reuse"} <= set(fast.stats.graphs)
    assert torch.equal(run(fast), run(fast)), "a second request"
    other = next(o for t, o in CASES.items() if t != text)
    assert error(run(fast), sample(Transcription(**other), 0, STEPS)) > 1e-3, "the comparison tells them apart"


def test_in_onnx_and_from_a_file(tmp_path):
    text = "cache{region=blocks.*.attn,mask=1101001100}"
    fast = optimized(f"{text}, {SELECT}", "onnxruntime", STEPS)
    made = sample(fast, 0, STEPS)
    assert error(made, sample(Transcription(**CASES[text]), 0, STEPS)) < 1e-4
    ditopt.save(fast, tmp_path / "model.ditopt")
    loaded = ditopt.load(tmp_path / "model.ditopt")
    assert error(sample(loaded, 0, STEPS), made) < 1e-5
    assert loaded.stats.hits == fast.stats.hits


CACHES = [
    "cache{region=blocks.1,every=2}",
    "cache{region=blocks.1:-0,every=3,first=3,predictor=taylor,order=2,store=int8}",
    "cache{region=blocks,every=2,each=block,residual=no}",
    "cache{region=blocks.*.attn|blocks.*.mlp,every=3,predictor=foca,first=3}",
    "cache{region=blocks.1,every=2,since=0.4}",
    "cache{region=blocks.1,signal=modulated,test=sum,threshold=0.5}",
    "cache{region=blocks.0,signal=change,test=book,book='0.01:4 inf:2'}",
    "cache{region=model,every=2,first=2,predictor=taylor,order=1}",
]


@pytest.mark.parametrize("text", CACHES)
def test_all_tokens_leave_a_cache_as_it_is(text):
    alone, both = optimized(text), optimized(f"{text}, {SELECT.replace('0.5', '1')}")
    assert torch.equal(run(both), run(alone))
    tokens = both.stats.hits.pop(both.program.decisions[-1].name)
    assert tokens == (6 if "since" in text else 7)  # its first step needs all tokens
    assert both.stats.hits == alone.stats.hits


@pytest.mark.parametrize(
    "text", ["cache{region=blocks.1,every=1}", "cache{region=blocks.*.mlp,every=1,predictor=taylor,order=1}"]
)
@pytest.mark.filterwarnings("ignore:cache 'cache0' was never reused")
def test_a_cache_that_always_computes_leaves_tokens_as_they_are(text):
    assert torch.equal(run(optimized(f"{text}, {SELECT}")), run(optimized(SELECT)))


def passed(text):
    return PassManager(Recipe.parse(text), Context("eager", STEPS)).run(captured("plain")[1].program)


def test_a_window_begins_with_a_step_of_all_tokens():
    """A cache that holds nothing yet would otherwise keep zeros for the tokens that the step leaves out."""
    text = f"cache{{region=blocks.1,every=2,since=0.4}}, {SELECT}"
    fast = optimized(text)
    run(fast)
    rows = {r.step: r.choices for r in fast.engine.session.schedule_rows}
    assert [s for s in rows if rows[s]["tokens1"] == "compute"] == [0, 1, 4, 6]
    assert [s for s in rows if rows[s]["cache0"] == "reuse"] == [5, 7, 9]


def test_no_step_computes_what_its_cache_predicts():
    """Neither the rows of the chosen tokens nor the keys and values of the region."""
    program = passed("cache{region=blocks.1:-1,every=2}, select_tokens{first=2}")[-1].program
    cache, tokens = (d.name for d in program.decisions)
    for made in lower(program):
        if made.graph.choices[cache] == "compute":
            continue
        end = "" if made.graph.choices[tokens] == "compute" else f".{tokens}"
        assert {str(n.meta["region"]) for n in made.program.calls()} == {f"blocks.{k}{end}" for k in (0, 3)}
        written = {u.slot for u in made.graph.updates}
        assert not any(slot.startswith(cache) for slot in written)
        # keys and values of two blocks, the output, the score; a partial step counts whom it left out
        assert len([s for s in written if s.startswith(tokens)]) == 2 * 2 + 2 + bool(end)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cache{region=blocks.1,signal=residual,threshold=0.1}", "cache0 decides by signal=residual, measured where"),
        ("cache{region=blocks.2:,signal=forecast,threshold=0.1}", "cache0 decides by signal=forecast, measured where"),
    ],
)
def test_signals_that_need_all_tokens(text, said):
    last = passed(f"{text}, select_tokens{{first=2}}")[-1]
    assert (last.name, last.applied) == ("select_tokens", 0)
    assert len(last.refused) == 1
    assert last.refused[0].startswith(said)


def test_what_is_selected_already_is_a_sentence():
    program = passed("select_tokens{first=2}")[-1].program
    for text, said in (
        ("cache{region=blocks.1:-1}", "cache blocks and modules first, then select tokens"),
        ("select_tokens{first=3}", "one select_tokens a recipe"),
    ):
        last = PassManager(text).run(program)[-1]
        assert last.applied == 0
        assert said in last.refused[0]
