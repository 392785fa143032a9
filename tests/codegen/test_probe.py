"""The probe, what a step measures before it decides: nothing is computed twice, no signal lies behind a decision."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ditopt.codegen.lower import lower
from ditopt.errors import RecipeError
from ditopt.ir.cost import step_flops
from ditopt.ir.program import is_call
from ditopt.runtime.session import Session
from tests.runtime.loops import LABELS, plan, program, request

RUN = "cache{region=blocks.1:-1,every=0,threshold=0.1,signal="
FRONT, BACK = "cache{region=blocks.0:2,every=2}", RUN.replace("1:-1", "2:")
SIGNALS = {
    "residual": f"{RUN}residual}}",
    "hidden": f"{RUN}hidden}}",
    "forecast": f"{RUN}forecast,watch=2}}",
    "boundary": f"{RUN}boundary,first=2}}",
    "modulated": f"hoist_invariants, {RUN}modulated}}",
    "two of them": f"{RUN}residual}}, cache{{region=model,every=0,threshold=0.2,signal=modulated}}",
}


def graphs(recipe):
    return {v.graph.name: v for v in lower(program(recipe))}


def calls(lowered):
    return [str(n.meta["region"]) for n in lowered.program.step.graph.nodes if is_call(n)]


@pytest.mark.parametrize("name", list(SIGNALS)[:-1])
def test_nothing_is_computed_twice(name):
    found = graphs(SIGNALS[name])
    hoisted = "hoist_invariants" if "hoist" in SIGNALS[name] else "cache{every=1}"
    plain = step_flops(program(hoisted))
    both = [found[g].graph for g in ("full", "probe")]
    assert (sum(g.flops for g in both), sum(g.block_flops for g in both)) == plain
    assert found["probe"].graph.flops + found["reuse"].graph.flops < plain[0]
    blocks = [f"blocks.{i}" for i in range(4)]
    in_front = 1 if name in ("residual", "hidden", "forecast") else 0
    assert calls(found["probe"]) == blocks[:in_front]
    assert calls(found["full"]) == blocks[in_front:]
    assert calls(found["reuse"]) == [b for b in blocks[in_front:] if b in ("blocks.0", "blocks.3")]


@pytest.mark.parametrize("name", list(SIGNALS))
def test_what_the_probe_gives_is_what_the_others_read(name):
    found = graphs(SIGNALS[name])
    given = [u.slot for u in found["probe"].graph.updates]
    read = {f.ref for n, v in found.items() if n != "probe" for f in v.graph.inputs if f.kind == "carry"}
    assert set(given) == read
    assert len(given) == len(set(given))
    signals = {d.rule.signal for d in program(SIGNALS[name]).decisions if d.rule is not None}
    assert found["probe"].graph.results == len(signals)
    assert not any(f.kind == "carry" for f in found["probe"].graph.inputs)
    assert not signals & {f.ref for v in found.values() for f in v.graph.inputs}  # the host reads them, no graph


@pytest.mark.filterwarnings("ignore:cache .* was never reused")
@pytest.mark.parametrize("name", list(SIGNALS))
def test_a_step_that_computes_gives_the_plain_output(name):
    session, made = Session(), plan(SIGNALS[name].replace("threshold=0.1", "threshold=0").replace("0.2", "0"))
    got = request(session, made, labels=LABELS)
    want = request(Session(), plan("cache{every=1}"), labels=LABELS)
    assert {r.graph for r in session.schedule_rows} == {"full"}
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    # the probe and the full graph ran at every step, and no other but memo functions
    every = {g.name: g.block_flops for g in made.manifest.every_graph}
    assert session.stats.block_flops == 16 * (every["full"] + every["probe"])


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (f"{FRONT}, {BACK}residual}}", r"behind cache0, another decision"),
        (f"cache{{region=blocks.0.attn,every=2}}, {RUN}residual}}", r"behind cache0, another decision"),  # in a body
        (f"{BACK}residual}}, {FRONT}", r"signal of cache0 .* behind cache1"),
        (f"{RUN}hidden}}, cache{{region=blocks.0.mlp,every=2}}", r"signal of cache0 .* behind cache1"),
        (f"{RUN.replace('blocks.1:-1', 'blocks.0.attn|blocks.1:')}hidden}}", "behind its own decision"),
        (f"{RUN.replace('1:-1', '0:')}residual}}", "needs a block in front of the region"),
        (f"{RUN.replace('blocks.1:-1', 'blocks.*.attn')}hidden}}", "needs a run of blocks"),
    ],
)
def test_a_signal_that_a_step_cannot_measure_first_is_refused(recipe, said):
    with pytest.raises(RecipeError, match=said):
        program(recipe)


@pytest.mark.parametrize("signal", ["modulated", "boundary"])
def test_signals_in_front_of_everything_go_with_any_other_cache(signal):
    recipe = f"{BACK}{signal}}}, cache{{region=blocks.0.attn,every=2}}"
    assert [d.rule is None for d in program(recipe).decisions] == [False, True]


# -- what a rule reads is never a slot that nothing was written to -----------------------------------------------------


@pytest.mark.parametrize("signal", ["residual", "hidden", "modulated", "forecast", "boundary", "change"])
@pytest.mark.parametrize("late", [0, 3])
def test_the_first_reuse_follows_enough_computed_steps(signal, late):
    """With a threshold that reuses whenever there is something to compare with."""
    session, made = Session(), plan(f"cache{{region=blocks.1:-1,every=0,signal={signal},threshold=1000}}")
    request(session, made, labels=LABELS, absent={(k, 1) for k in range(late)})
    needed = 2 if signal in ("boundary", "change") else 1
    for branch, start in ((0, 0), (1, late)):
        ran = [r.graph for r in session.schedule_rows if r.branch == branch]
        assert ran == ["full"] * needed + ["reuse"] * (8 - start - needed)


@pytest.mark.filterwarnings("ignore:cache .* was never reused")
@pytest.mark.parametrize("name", [n for n in SIGNALS if n not in ("modulated", "two of them")])
def test_the_flops_that_are_executed_are_those_of_a_step_without_a_probe(name):
    """Counted by torch while a request runs: the probe hands on what it computed."""

    def executed(recipe):
        made = plan(recipe)
        with FlopCounterMode(display=False) as counter:
            request(Session(), made, labels=LABELS)
        return counter.get_total_flops()

    assert executed(SIGNALS[name].replace("threshold=0.1", "threshold=0")) == executed("cache{every=1}") > 0


# -- 8-bit storage -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def kept_after_a_step(recipe):
    """The slots of a request's only branch after its first step."""
    session = Session()
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    with session.open(steps=None):
        session.call(plan(recipe), [x, torch.full((2,), 1000.0), torch.tensor([1, 2])])
        (branch,) = session._branches.values()
        return list(dict(branch.slots).values())


@pytest.mark.filterwarnings("ignore:cache .* was never reused")
def test_what_is_kept_in_8_bits_is_off_by_half_a_step_at_most():
    """A token has one scale, its largest value over 127."""
    coarse = {t.dtype: t for t in kept_after_a_step("cache{region=blocks.1:-1,every=9,store=int8}")}
    (exact,) = kept_after_a_step("cache{region=blocks.1:-1,every=9}")
    largest = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(coarse[torch.float32] * 127, largest)
    off = (coarse[torch.int8] * coarse[torch.float32] - exact).abs()
    assert (off <= largest / 254 * 1.001).all()
    assert off.max() > 0
