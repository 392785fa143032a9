"""Step graphs of cached programs: what each variant reads, runs and keeps, and that reuse gives the numbers it should.

Expected values are made without ditopt: the model itself runs with some of its modules replaced by what a cache would
have kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditopt.artifact import Plan, StepGraph
from ditopt.codegen.build import build
from ditopt.codegen.lower import Lowered, lower, lower_memos, variant_name
from ditopt.codegen.variants import combinations
from ditopt.ir.cost import step_flops
from ditopt.ir.interpret import run_program
from ditopt.ir.program import Program, formal
from ditopt.ops import select
from ditopt.pipeline import PassManager
from ditopt.runtime.predict import weights
from ditopt.runtime.session import Session
from tests.tiny_models import ZOO, captured, flat, leaves, optimized

RUN = "cache{region=blocks.1:-1}"
ATTN = "cache{region=blocks.*.attn}"
TWO = "cache{region=blocks.*.attn,every=2}, cache{region=blocks.*.mlp,every=3}"


def step(
    lowered: Lowered,
    inputs: Mapping[str, Tensor],
    state: dict[str, Tensor],
    control: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """Run a step graph as a driver would: its results; ``state`` takes the new values."""
    outputs, _ = run_program(lowered.program, inputs, state, control=control)
    old = dict(state)
    for u in lowered.graph.updates:
        state[u.slot] = outputs[u.output] if u.output >= 0 else old.get(u.source, torch.zeros_like(outputs[-1]))
    return list(outputs[: lowered.graph.results])


def params(graph: StepGraph) -> set[str]:
    return {f.ref for f in graph.inputs if f.kind == "param"}


def kinds(graph: StepGraph) -> set[str]:
    return {f.kind for f in graph.inputs}


# -- the model with modules replaced -----------------------------------------------------------------------------------


@contextlib.contextmanager
def patched(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def streams(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The residual streams that enter a block, in the order in which it returns them."""
    if name in ("sd3", "flux"):
        return kwargs["encoder_hidden_states"], kwargs["hidden_states"]
    return args[:2] if name == "joint" else (kwargs.get("hidden_states", args[0] if args else None),)


def run_of_blocks(
    name: str, model: nn.Module, inputs: dict[str, Any], kept: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The model with blocks 1 to -1 computed (``kept`` None: returns what they add up to), or replaced by a sum."""
    blocks = ZOO[name].blocks(model)[1:-1]
    assert blocks
    entered: list[tuple[Tensor, ...]] = []
    left: list[Tensor] = []
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for i, block in enumerate(blocks):

            def forward(*args: Any, _i: int = i, _true: Any = block.forward, **kwargs: Any) -> Any:
                given = streams(name, args, kwargs)
                if _i == 0:
                    entered.append(given)
                if kept is None:
                    out = _true(*args, **kwargs)
                elif _i == 0:
                    out = [a + r for a, r in zip(given, kept, strict=True)]
                else:
                    out = list(given)
                if isinstance(out, (tuple, list)):
                    left[:] = out
                    return tuple(out) if len(out) > 1 else out[0]
                left[:] = [out]
                return out

            stack.enter_context(patched(block, forward))
        outputs = leaves(model(**inputs))
    return outputs, [b - a for a, b in zip(entered[0], left, strict=True)]


def with_held(
    model: nn.Module, modules: list[nn.Module], inputs: dict[str, Any], held: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The model with ``modules`` computed (``held`` None), or replaced by values; and the modules' values."""
    seen: list[Tensor] = []
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for i, module in enumerate(modules):

            def forward(*args: Any, _i: int = i, _true: Any = module.forward) -> Tensor:
                seen.append(_true(*args) if held is None else held[_i])
                return seen[-1]

            stack.enter_context(patched(module, forward))
        outputs = leaves(model(**inputs))
    return outputs, seen


# -- variants ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [RUN, ATTN, "cache{region=blocks.*.mlp,predictor=taylor,order=2}", "cache{region=model}"]
)
def test_one_region_makes_two_graphs(recipe):
    program = optimized("dit", recipe)
    variants = lower(program)
    assert [v.graph.name for v in variants] == ["full", "reuse"]
    assert [dict(v.graph.choices) for v in variants] == [{"cache0": "compute"}, {"cache0": "reuse"}]
    assert len(variants) + len(lower_memos(program)) <= 3


def test_a_program_without_caches_is_one_graph():
    (only,) = lower(optimized("dit", "outline_blocks"))
    assert (only.graph.name, dict(only.graph.choices), only.graph.updates) == ("full", {}, ())
    assert not kinds(only.graph) - {"input", "param"}


def test_two_regions_make_four_graphs():
    variants = lower(optimized("plain", TWO))
    assert [v.graph.name for v in variants] == ["full", "reuse", "reuse_cache1", "reuse_cache0"]
    assert {variant_name(v.graph.choices) for v in variants} == {v.graph.name for v in variants}
    assert all(sum(v.program.params[n].numel() for n in params(v.graph)) for v in variants)


def test_many_decisions_make_a_bounded_number_of_graphs():
    recipe = ", ".join(f"cache{{region=blocks.{i}.{m}}}" for i in (0, 1) for m in ("attn", "mlp"))
    program = optimized("plain", recipe)
    rows = combinations(program)
    names = [d.name for d in program.decisions]
    assert len(names) == 4
    assert len(rows) <= 8
    assert set(rows[0].values()) == {"compute"}
    assert set(rows[1].values()) == {"reuse"}
    assert len({tuple(r.items()) for r in rows}) == len(rows)
    assert len(combinations(program, 16)) == 16


@pytest.mark.parametrize(
    "recipe", [RUN, ATTN, TWO, f"hoist_invariants, {RUN}", "cache{region=blocks,predictor=newton,order=1}"]
)
@pytest.mark.parametrize("name", ["plain", "sd3", "joint"])
def test_variants_are_decided_trimmed_and_well_formed(name, recipe):
    for lowered in lower(optimized(name, recipe)):
        p = lowered.program
        p.step.graph.lint()
        assert not p.decisions
        assert tuple(formal(x) for x in p.step.placeholders) == lowered.graph.inputs
        assert len(p.step.results) == lowered.graph.results + sum(u.output >= 0 for u in lowered.graph.updates)
        for function in p.functions.values():
            for node in function.graph.nodes:
                assert node.target is not select
                if node.op in ("placeholder", "call_function"):
                    assert node.users, f"{lowered.graph.name}: {node} in {function.name} is read by nobody"
        for call in p.calls():
            body = p.functions[str(call.args[1])]
            assert {u.args[1] for u in call.users} <= set(range(len(body.results)))
        for body in (f for n, f in p.functions.items() if n != p.entry):
            sites = [c for c in p.calls() if c.args[1] == body.name]
            read = set().union(*({u.args[1] for u in c.users} for c in sites))
            assert read == set(range(len(body.results))), f"{body.name} returns what no call reads"


@pytest.mark.parametrize("name", list(ZOO))
def test_the_reuse_graph_does_not_read_the_weights_it_skips(name):
    model, _ = captured(name)
    paths = [f"{p}.{i}" for p in ZOO[name].lists for i in range(len(model.get_submodule(p)))]
    full, reuse = lower(optimized(name, RUN))
    weights_of = lambda path: {n for n in params(full.graph) if n.startswith(f"{path}.")}  # noqa: E731
    for path in paths[1:-1]:
        assert len(weights_of(path)) > 8
        assert not weights_of(path) & params(reuse.graph)
    for path in (paths[0], paths[-1]):
        assert weights_of(path) <= params(reuse.graph)
    assert params(full.graph) - params(reuse.graph) == set().union(*map(weights_of, paths[1:-1]))
    assert set(reuse.program.params) == params(reuse.graph)


def test_a_module_that_is_skipped_takes_only_its_own_weights_with_it():
    full, reuse = lower(optimized("plain", ATTN))
    gone = params(full.graph) - params(reuse.graph)
    assert gone == {f"blocks.{i}.{m}.{k}" for i in range(4) for m in ("qkv", "out") for k in ("weight", "bias")}


def test_state_that_no_step_reads_is_not_kept():
    # where every attention is skipped, the text stream of joint attention matters to nothing: only image slots remain
    program = optimized("sd3", "cache{region=blocks.*.attn|blocks.*.mlp}")
    full, reuse = lower(program)
    read = {f.ref for f in reuse.graph.inputs if f.kind == "state"}
    assert {u.slot for u in full.graph.updates} == read
    assert 0 < len(read) < len(program.state)
    manifest = build(program, "eager").manifest
    assert {s.name for s in manifest.state} == read
    assert "encoder_hidden_states" not in {f.ref for f in reuse.graph.inputs}


def test_a_skipped_model_reads_nothing_but_its_slots():
    _, reuse = lower(optimized("plain", "cache{region=model}"))
    assert kinds(reuse.graph) == {"state"}
    assert (reuse.graph.flops, reuse.graph.block_flops) == (0, 0)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_slots_move_by_renaming(order):
    options = f",predictor=taylor,order={order}" if order else ""
    full, reuse = lower(optimized("plain", f"cache{{region=blocks.1:-1{options}}}"))
    assert reuse.graph.updates == (), "a step that predicts changes nothing"
    fresh = [u for u in full.graph.updates if u.output >= 0]
    moved = [(u.slot, u.source) for u in full.graph.updates if u.output < 0]
    assert [(u.slot, u.output) for u in fresh] == [("cache0.0.0", 1)]
    assert moved == [(f"cache0.0.{i + 1}", f"cache0.0.{i}") for i in range(order)]
    assert kinds(full.graph) == {"input", "param"}, "nothing is read to be copied"
    assert kinds(reuse.graph) == {"input", "param", "state"} | ({"control"} if order else set())
    assert sum(f.kind == "state" for f in reuse.graph.inputs) == order + 1


@pytest.mark.parametrize("recipe", [RUN, ATTN])
@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "wan", "joint"])
def test_the_full_variant_is_the_model(name, recipe):
    model, c = captured(name)
    inputs = ZOO[name].inputs(5)
    full, _ = lower(optimized(name, recipe))
    with torch.no_grad():
        want = leaves(model(**inputs))
    for a, b in zip(step(full, flat(c, inputs, model), {}), want, strict=True):
        assert torch.equal(a, b)


# -- FLOPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ZOO))
def test_flops_of_the_variants(name):
    plain = optimized(name, "outline_blocks")
    full, reuse = lower(optimized(name, RUN))
    assert (full.graph.flops, full.graph.block_flops) == step_flops(plain)
    skipped = sum(b.flops for b in plain.blocks()[1:-1])
    assert full.graph.flops - reuse.graph.flops == full.graph.block_flops - reuse.graph.block_flops == skipped > 0


def test_flops_of_a_skipped_attention_by_hand():
    full, reuse = lower(optimized("plain", ATTN))
    rows, tokens, width = 2, 16, 32
    attention = 2 * rows * tokens * width * 3 * width + 2 * 2 * rows * tokens * tokens * width
    projection = 2 * rows * tokens * width * width
    assert full.graph.flops - reuse.graph.flops == 4 * (attention + projection)


def test_hoisted_work_is_counted_in_the_memos():
    program = optimized("plain", f"outline_blocks, hoist_invariants, {RUN}")
    full, _ = lower(program)
    memos = lower_memos(program)
    assert [m.graph.name for m in memos] == [m.function for m in program.memos]
    plain = step_flops(optimized("plain", "outline_blocks"))[0]
    assert full.graph.flops + sum(m.graph.flops for m in memos) == plain
    assert sum(m.graph.flops for m in memos) >= 4 * 2 * 2 * 32 * 6 * 32


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ZOO))  # in flux from two streams to the joined one
def test_a_held_run_of_blocks_adds_its_old_residual(name):
    model, c = captured(name)
    full, reuse = lower(optimized(name, RUN))
    first, second = ZOO[name].inputs(1), ZOO[name].inputs(2)
    state: dict[str, Tensor] = {}
    step(full, flat(c, first, model), state)
    _, residuals = run_of_blocks(name, model, first, None)
    want, _ = run_of_blocks(name, model, second, residuals)
    exact, _ = run_of_blocks(name, model, second, None)
    before = dict(state)
    got = step(reuse, flat(c, second, model), state)
    for a, b, e in zip(got, want, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert (a - e).norm() > 1e-3 * e.norm(), "the cache makes a difference here"
    assert all(state[k] is before[k] for k in before)


@pytest.mark.parametrize(("basis", "order"), [("taylor", 1), ("taylor", 2), ("newton", 2)])
def test_a_forecast_run_of_blocks(basis, order):
    model, c = captured("plain")
    full, reuse = lower(optimized("plain", f"cache{{region=blocks.1:-1,predictor={basis},order={order}}}"))
    state: dict[str, Tensor] = {}
    residuals: list[Tensor] = []
    for seed in range(order + 1):
        inputs = ZOO["plain"].inputs(seed)
        step(full, flat(c, inputs, model), state)
        residuals = [*run_of_blocks("plain", model, inputs, None)[1], *residuals]
    coefficients = [0.5, -1.25, 2.0][: order + 1]
    inputs = ZOO["plain"].inputs(9)
    predicted = sum(w * r for w, r in zip(coefficients, residuals, strict=True))
    want, _ = run_of_blocks("plain", model, inputs, [torch.as_tensor(predicted)])
    got = step(reuse, flat(c, inputs, model), state, {"cache0.weights": torch.tensor(coefficients)})
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("role", "part"), [("attn", "out"), ("mlp", "down")])
def test_a_held_module_keeps_its_value_before_the_gate(role, part):
    model, c = captured("plain")
    modules = [b.get_submodule(part) for b in ZOO["plain"].blocks(model)]
    full, reuse = lower(optimized("plain", f"cache{{region=blocks.*.{role}}}"))
    first, second = ZOO["plain"].inputs(1), ZOO["plain"].inputs(2)
    state: dict[str, Tensor] = {}
    step(full, flat(c, first, model), state)
    _, held = with_held(model, modules, first, None)
    assert [state[f"cache0.{i}.0"].equal(h) for i, h in enumerate(held)] == [True] * 4
    want, _ = with_held(model, modules, second, held)
    (got,) = step(reuse, flat(c, second, model), state)
    assert torch.equal(got, want[0])
    with torch.no_grad():
        assert (got - model(**second)).norm() > 1e-3 * got.norm()


def test_the_held_output_of_the_model_is_the_old_output():
    model, c = captured("joint")
    full, reuse = lower(optimized("joint", "cache{region=model}"))
    state: dict[str, Tensor] = {}
    old = step(full, flat(c, ZOO["joint"].inputs(1), model), state)
    new = step(reuse, flat(c, ZOO["joint"].inputs(2), model), state)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    _, residual = lower(optimized("joint", "cache{region=model,residual=yes}"))
    assert "input" in kinds(residual.graph)


# -- through a Session -------------------------------------------------------------------------------------------------


def sampled(program: Program, name: str, steps: int) -> tuple[list[Tensor], list[str], Session]:
    """The first output of each step, and the graphs that ran."""
    model, c = captured(name)
    made = build(program, "eager")
    manifest, executables = made.manifest, made.run
    plan = Plan(manifest, executables, lambda: program.params)
    session, outputs = Session(), []
    with session.open(steps=steps):
        for k in range(steps):
            inputs = flat(c, at(name, k), model)
            outputs.append(session.call(plan, [inputs[i.name] for i in manifest.inputs])[0])
    return outputs, [row.graph for row in session.schedule_rows], session


def at(name: str, k: int) -> dict[str, Any]:
    """Inputs of step ``k`` of a request: one prompt, falling times."""
    inputs = ZOO[name].inputs(k)
    for key, value in ZOO[name].inputs(0).items():
        if key in ("y", "prompt_embeds"):
            inputs[key] = value
    time = "t" if name == "plain" else "sigma"
    inputs[time] = torch.full((2,), 900.0 - 100 * k)
    return inputs


def once(true: Callable[..., Tensor], seen: list[Tensor], held: list[Tensor], i: int, reuse: bool) -> Any:
    """A forward that computes or takes the held value, and notes what it gave."""

    def forward(x: Tensor) -> Tensor:
        seen.append(held[i] if reuse else true(x))
        return seen[-1]

    return forward


@pytest.mark.parametrize("hoist", ["", "outline_blocks, hoist_invariants, "])
def test_two_caches_each_keep_their_own_time(hoist):
    model, _ = captured("plain")
    attn = [b.get_submodule("out") for b in ZOO["plain"].blocks(model)]
    mlp = [b.get_submodule("down") for b in ZOO["plain"].blocks(model)]
    outputs, graphs, session = sampled(optimized("plain", hoist + TWO), "plain", 7)
    assert graphs == ["full", "reuse", "reuse_cache1", "reuse_cache0", "reuse_cache1", "reuse", "full"]
    held: dict[str, list[Tensor]] = {"attn": [], "mlp": []}
    for k, got in enumerate(outputs):
        reuse = {"attn": k % 2 > 0, "mlp": k % 3 > 0}
        seen: dict[str, list[Tensor]] = {"attn": [], "mlp": []}
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for role, modules in (("attn", attn), ("mlp", mlp)):
                for i, module in enumerate(modules):
                    stack.enter_context(patched(module, once(module.forward, seen[role], held[role], i, reuse[role])))
            want = model(**at("plain", k))
        held = seen
        assert torch.equal(got, want), f"step {k}"
    assert session.stats.requests == 1


def test_a_forecast_uses_the_published_coefficients():
    """TaylorSeer of order 1 over a request: the difference of the last two computed values, spread over the gap."""
    model, _ = captured("plain")
    recipe = "cache{region=blocks.1:-1,every=3,first=2,predictor=taylor,order=1}"
    outputs, graphs, _ = sampled(optimized("plain", recipe), "plain", 8)
    assert graphs == ["full", "full", "reuse", "reuse", "full", "reuse", "reuse", "full"]
    kept: list[tuple[int, Tensor]] = []
    for k, got in enumerate(outputs):
        if graphs[k] == "full":
            want, (residual,) = run_of_blocks("plain", model, at("plain", k), None)
            kept = [(k, residual), *kept][:2]
        else:
            (now, newest), (then, older) = kept
            predicted = newest + (newest - older) / (now - then) * (k - now)
            want, _ = run_of_blocks("plain", model, at("plain", k), [predicted])
        torch.testing.assert_close(got, want[0], rtol=1e-4, atol=1e-5)


def test_a_run_of_blocks_excludes_modules_inside_it():
    program = optimized("plain", "outline_blocks")
    (*_, last) = PassManager(f"{RUN}, cache{{region=blocks.*.attn,every=3}}").run(program)
    assert last.applied == 0
    assert last.refused == ("blocks.1.attn is cached already by an earlier cache",)
    assert len(lower(last.program)) == 2
    assert weights(last.program.decisions[0].predictor, [0.0], 1.0) == [1.0]
