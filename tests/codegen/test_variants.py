"""Which combinations of choices get graphs: those that let steps skip the most, and what the others run."""

from __future__ import annotations

import functools
import itertools
import random
import warnings

import pytest
import torch

from ditopt.artifact import Plan
from ditopt.codegen.build import build
from ditopt.codegen.variants import combinations, pick, worth
from ditopt.errors import DitoptWarning, SessionError
from ditopt.rewriting import variants
from ditopt.runtime.session import Session
from tests.runtime.loops import plan, program, request

EACH = "cache{region=blocks,each=block,residual=no,every=2}"


def reused(rows):
    return [{n for n, c in row.items() if c == "reuse"} for row in rows]


def saved(chosen, asked):
    """The share of the wanted reuse that these sets give."""
    return sum(max(len(c) for c in chosen if set(c) <= w) for w in asked) / sum(map(len, asked))


@pytest.mark.parametrize("decisions", [4, 10])
def test_eight_graphs_let_neighbours_reuse_together(decisions):
    made = program(EACH, decisions)
    rows = combinations(made)
    names = [d.name for d in made.decisions]
    assert (len(names), len(rows)) == (decisions, 8)
    assert set(rows[0].values()) == {"compute"}
    assert set(rows[1].values()) == {"reuse"}
    runs = [set(names[i:j]) for i, j in itertools.combinations(range(decisions + 1), 2)]
    rng = random.Random(0)
    alone = [{n for n in names if rng.random() < 0.7} for _ in range(500)]
    few = [set(), set(names), *({n} for n in names[:6])]  # what would be there without choosing
    for asked, gain in ((runs, 1.1), (alone, 1.1)):
        assert saved(reused(rows), asked) > gain * saved(few, asked)


def test_pick_weighs_by_how_often_and_how_much():
    a, b, c = frozenset("a"), frozenset("ab"), frozenset("c")
    cost = {"a": 1, "b": 1, "c": 10}
    assert pick({a: 1, b: 1, c: 1}, cost, 2) == [frozenset(), c]
    assert pick({a: 9, b: 1, c: 0}, cost, 2) == [frozenset(), a]
    assert pick({b: 1, frozenset("ac"): 1}, {"a": 5, "b": 1, "c": 1}, 2) == [frozenset(), a]  # what both share
    assert pick({b: 1}, cost, 8) == [frozenset(), b]


def test_the_worth_of_a_decision_is_what_it_skips():
    made = program("cache{region=blocks.0.attn}, cache{region=blocks.1:3}")
    flops = {r.id: r.flops for r in made.regions}
    assert worth(made) == {"cache0": flops["blocks.0.attn"], "cache1": flops["blocks.1"] + flops["blocks.2"]}
    assert worth(program("cache{region=model}"))["cache0"] > 4 * flops["blocks.1"]


# -- graphs of a schedule ----------------------------------------------------------------------------------------------


def rows_of(made, target, steps):
    rows = variants(made, target, steps)
    assert rows is not None
    return rows


def masked(masks):
    return ", ".join(f"cache{{region=blocks.{i},mask={m}}}" for i, m in enumerate(masks))


def test_a_schedule_with_too_many_kinds_of_steps_keeps_the_best_eight_and_says_so_once():
    masks = ["1" + "".join(str(k >> i & 1) for k in range(15)) for i in range(4)]
    made = program(masked(masks))
    with pytest.warns(DitoptWarning, match=r"16 combinations .* 'inductor' gets 8 compiled ones") as said:
        rows = rows_of(made, "inductor", None)
    assert len(said) == 1
    assert len(rows) == 8
    asked = [{f"cache{i}" for i, m in enumerate(masks) if m[k] == "0"} for k in range(1, 16)]
    assert saved(reused(rows), asked) >= 0.75
    first = [set(), *asked[:7]]
    assert saved(reused(rows), asked) > saved(first, asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(rows_of(made, "eager", None)) == 16


def test_an_unknown_number_of_steps_needs_no_more_graphs_than_the_schedule_has():
    made = program(EACH, 6)
    assert reused(variants(made, "inductor", None)) == [set(), {d.name for d in made.decisions}]
    assert variants(made, "eager", None) is None


def test_a_rule_beside_a_schedule():
    made = program("cache{region=blocks.0,mask=1010}, cache{region=blocks.1,signal=change,threshold=1}")
    assert variants(made, "inductor", 4) is None  # all four
    assert variants(made, "eager", 4) is None
    ruled = "cache{region=blocks.1:,each=block,every=0,signal=change,threshold=1}"
    made = program(f"cache{{region=blocks.0,mask=1010}}, {ruled}", 5)
    with pytest.warns(DitoptWarning, match="12 combinations"):
        rows = reused(variants(made, "inductor", 4))
    names = {d.name for d in made.decisions}
    assert len(names) == 5
    assert all(r in rows for r in (set(), {"cache0"}, names - {"cache0"}, names))


# -- graphs on demand --------------------------------------------------------------------------------------------------


def choices(session):
    return [{n for n, c in r.choices.items() if c == "reuse"} for r in session.schedule_rows]


def masks_of(count, steps=8, seed=0):
    rng = random.Random(seed)
    return {f"cache{i}": "1" + "".join(rng.choice("01") for _ in range(steps - 1)) for i in range(count)}


@pytest.mark.filterwarnings("ignore:cache .* was never reused")
def test_eager_follows_any_masks_and_gives_what_a_model_made_for_them_gives():
    """A graph on demand must find what it reads: nothing of it may have been left out because others do not read it."""
    session, free = Session(), plan(EACH, blocks=5)
    for seed in range(3):
        masks = masks_of(5, seed=seed)
        session.reschedule(masks)
        got = request(session, free, seed)
        wanted = [{n for n, m in masks.items() if m[k] == "0"} for k in range(8)]
        assert choices(session) == wanted
        text = ", ".join(f"cache{{region=blocks.{i},residual=no,mask={m}}}" for i, m in enumerate(masks.values()))
        made = program(text, 5)
        own = build(made, "eager", variants(made, "eager", 8))
        want = request(Session(), Plan(own.manifest, own.run, functools.partial(getattr, made, "params")), seed)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore:cache .* was never reused")
def test_a_plan_for_one_schedule_computes_where_another_would_read_what_it_does_not_keep():
    made = program(EACH, 5)
    rows = rows_of(made, "eager", 8)
    assert len(rows) == 2
    fixed = plan(EACH, rows, 5)
    assert len(fixed.manifest.state) < len(plan(EACH, blocks=5).manifest.state)
    session = Session()
    session.reschedule({f"cache{i}": "10101010" if i == 2 else "11111111" for i in range(5)})
    out = request(session, fixed)
    assert choices(session) == [set()] * 8
    plain = plan("cache{every=1}", blocks=5)
    assert all(torch.equal(a, b) for a, b in zip(out, request(Session(), plain), strict=True))


@pytest.mark.parametrize(
    ("masks", "said"), [({"cache9": "10"}, "no decision cache9"), ({"cache0": "1x"}, "text of 1 .* and 0")]
)
def test_masks_that_cannot_be_followed_change_nothing(masks, said):
    session, made = Session(), plan("cache{region=blocks.1:-1,every=2}")
    before = request(session, made)
    with pytest.raises(SessionError, match=said):
        session.reschedule(masks)
    assert torch.equal(request(session, made)[-1], before[-1])
    session.reschedule({"cache0": "11000000"})
    request(session, made)
    assert [len(c) for c in choices(session)] == [0, 0, *[1] * 6]
    session.reschedule({})
    assert torch.equal(request(session, made)[-1], before[-1])
