"""A bare optimized module over requests: whatever happened before, a request gives what a fresh optimize gives."""

import contextlib
import subprocess
import sys

import pytest
import torch
from torch import nn

import ditopt
from ditopt.engine import SIGNATURES
from ditopt.errors import CaptureError, DitoptWarning, SessionError
from tests.roads.tiny import error, example, noise, prompt, sample, sd3, small, times

CACHED = "lossless, cache{region=blocks.*.attn|blocks.*.mlp,every=3,first=2,predictor=taylor,order=2}"


def fast(model=None, recipe=CACHED, **more):
    return ditopt.optimize(small() if model is None else model, recipe, target="eager", **more)


@pytest.fixture(scope="module")
def used():
    """One optimized model that many tests use one after the other: each must find it as good as new."""
    return fast()


@pytest.fixture(scope="module")
def want():
    """seed -> what a model that was never used before gives."""
    return {seed: sample(fast(), seed) for seed in (0, 1)}


def test_the_cached_recipe_differs_from_plain(used, want):
    """Else every test below would pass with a cache that does nothing."""
    before = used.stats.hits.total()
    out = sample(used, 0)
    assert used.stats.hits.total() - before == 3  # of six steps 0, 1 and 4 compute
    assert 1e-3 < error(out, sample(small(), 0)) < 1


_FRESH = """
import sys, torch
from tests.roads.test_sessions import fast, sample, sd3
torch.save(sample(fast(sd3()), 1), sys.argv[1])
"""


def test_a_second_request_equals_a_fresh_process(tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", "-c", _FRESH, str(tmp_path / "x.pt")], check=True, timeout=120)
    model = fast(sd3())
    sample(model, 0)
    assert torch.equal(sample(model, 1), torch.load(tmp_path / "x.pt"))
    assert model.stats.requests == 2


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_cancelled_request_leaves_nothing(used, want, stop):
    sample(used, 0, stop=stop)
    assert torch.equal(sample(used, 1), want[1])


def test_a_request_cancelled_by_an_exception_inside_a_session(used, want):
    def cancelled():
        with used.session(steps=6):
            sample(used, 0, stop=3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cancelled()
    assert torch.equal(sample(used, 1), want[1])


def test_a_reset_begins_a_request(used):
    x, p = noise(5), prompt(5)

    def call(t):
        return used(hidden_states=x, timestep=torch.full((2,), t), **p, return_dict=False)[0]

    used.reset()
    first = [call(t) for t in (900.0, 800.0, 700.0)]
    used.reset()  # the times go on falling and nothing else changed: nobody could guess this
    second = [call(t) for t in (600.0, 500.0, 400.0)]
    alone = fast()
    assert [r.choices["cache0"] for r in used.schedule_rows] == ["compute", "compute", "reuse"]
    assert torch.equal(
        second[2],
        [
            alone(hidden_states=x, timestep=torch.full((2,), t), **p, return_dict=False)[0]
            for t in (600.0, 500.0, 400.0)
        ][2],
    )
    assert not torch.equal(first[2], second[2])
    used.reset()


def test_resolutions_between_and_inside_requests(want):
    model = fast()
    large = sample(fast(), 0, size=12)
    assert torch.equal(sample(model, 0), want[0])
    assert torch.equal(sample(model, 0, size=12), large)
    assert torch.equal(sample(model, 1), want[1])  # back to a signature that was used before
    # inside: a sampler that enlarges its latent midway; what follows is a request of its own
    p = prompt(3)

    def rest(m):
        x, out = noise(3, size=12), []
        for t in times(6)[3:]:
            out.append(m(hidden_states=x, timestep=torch.full((2,), t), **p, return_dict=False)[0])
            x = x - out[-1] / 6
        return out

    sample(model, 3, stop=3)
    got, expected = rest(model), rest(fast())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(model.engine.compiled) == 2


def test_signatures_are_kept_in_the_order_of_use():
    model = fast(recipe="cache{region=model,every=2}")
    for batch in range(1, SIGNATURES + 1):
        model(**example(batch))
    first = {id(c) for c in model.engine.compiled.values()}
    model(**example(1))  # used again: now the second is the oldest
    model(**example(SIGNATURES + 1))
    left = [c.program.inputs[0].type.shape[0] for c in model.engine.compiled.values()]
    assert left == [*range(3, SIGNATURES + 1), 1, SIGNATURES + 1]
    assert len(first & {id(c) for c in model.engine.compiled.values()}) == SIGNATURES - 1
    model(**example(2))  # comes back by a new capture
    assert len(model.engine.compiled) == SIGNATURES


# -- weights ----------------------------------------------------------------------------------------------------


def add_to_data(model):
    for p in model.parameters():
        p.data.add_(0.05)


def add_to_hoisted_data(model):
    model.time.weight.data.mul_(1.5)


def load_state(model):
    model.load_state_dict(small(7).state_dict())


def exchange_parameters(model):
    for module in (model.head, model.blocks[1].mod, model.context):
        module.weight = nn.Parameter(module.weight * 1.5, requires_grad=False)


def write_under_inference_mode(model):
    with torch.inference_mode():
        model.context.weight.mul_(1.5)


@pytest.mark.parametrize(
    "change", [add_to_data, add_to_hoisted_data, load_state, exchange_parameters, write_under_inference_mode]
)
def test_changed_weights_are_seen(change):
    changed = small()
    change(changed)
    expected = sample(fast(changed), 1)
    model = small()
    optimized = fast(model)
    old = sample(optimized, 1)
    change(model)
    assert torch.equal(sample(optimized, 1), expected)
    assert not torch.equal(old, expected)
    assert optimized.stats.memo_drops > 0  # and this is why


def test_state_is_loaded_through_the_optimized_module_too():
    model = small()
    optimized = fast(model)
    sample(optimized, 1)
    optimized.load_state_dict(small(7).state_dict())
    assert torch.equal(sample(optimized, 1), sample(fast(small(7)), 1))
    assert optimized.state_dict().keys() == model.state_dict().keys()


def test_a_weight_that_is_not_hoisted_counts_from_the_next_step():
    model = small()
    optimized = fast(model, recipe="lossless")
    out = optimized(**example())[0]
    model.head.bias.data.add_(1.0)
    torch.testing.assert_close(optimized(**example())[0], out + 1.0)


def test_a_dtype_that_changed_is_an_error_and_moving_back_helps(want):
    model = small()
    optimized = fast(model)
    assert torch.equal(sample(optimized, 0), want[0])
    model.double()
    with pytest.raises(
        SessionError,
        match=r"optimized as torch\.float32 on cpu and is now torch\.float64 on cpu; call ditopt\.optimize again",
    ):
        optimized(**example())
    with pytest.raises(SessionError, match=r"call ditopt\.optimize again"):
        optimized(**example(dtype=torch.float64))
    assert model(**example(dtype=torch.float64))[0].dtype is torch.float64  # the original is usable
    assert fast(model)(**example(dtype=torch.float64))[0].dtype is torch.float64  # and doing what it says helps
    model.float()
    assert torch.equal(sample(optimized, 1), want[1])


def test_a_device_that_changed_is_an_error():
    model = small()
    optimized = fast(model, example_inputs=example())
    model.to("meta")
    with pytest.raises(
        SessionError, match=r"is now torch\.float32 on meta; call ditopt\.optimize again, or move it back"
    ):
        optimized(**example())


def test_exchanged_modules_are_an_error_until_refresh():
    model = small()
    optimized = fast(model)
    sample(optimized, 1)
    model.blocks[1].up = nn.Linear(32, 128)
    with pytest.raises(SessionError, match=r"modules were exchanged after optimize .* call\s+ditopt\.optimize again"):
        optimized(**example())
    assert model(**example())[0].shape == (2, 4, 8, 8)
    optimized.refresh()
    assert torch.equal(sample(optimized, 1), sample(fast(model), 1))


# -- guidance ----------------------------------------------------------------------------------------------------


def guided(model, order, context=False, steps=6, seed=4, shuffle=False):
    """Guidance by two calls; every step's two outputs. ``shuffle``: the order of the calls alternates."""
    x, out = noise(seed), []
    prompts = {"cond": prompt(seed), "uncond": prompt(77)}
    for k, t in enumerate(times(steps)):
        v = {}
        for name in order if not (shuffle and k % 2) else tuple(reversed(order)):
            with model.cache_context(name) if context else contextlib.nullcontext():
                v[name] = model(hidden_states=x, timestep=torch.full((2,), t), **prompts[name], return_dict=False)[0]
        out.append((v["cond"], v["uncond"]))
        x = x - (v["uncond"] + 2 * (v["cond"] - v["uncond"])) / steps
    return out


def doubled(model, steps=6, seed=4):
    x, out = noise(seed), []
    both = {k: torch.cat([v, prompt(77)[k]]) for k, v in prompt(seed).items()}
    for t in times(steps):
        v = model(hidden_states=torch.cat([x, x]), timestep=torch.full((4,), t), **both, return_dict=False)[0]
        cond, uncond = v.chunk(2)
        out.append((cond, uncond))
        x = x - (uncond + 2 * (cond - uncond)) / steps
    return out


def test_guidance_is_the_same_by_any_calls():
    model = fast(sd3())
    reference = doubled(model)
    assert model.stats.hits["cache0"] == 3
    for order in (("cond", "uncond"), ("uncond", "cond")):
        for context in (False, True):
            for shuffle in (False, True):
                before = model.stats.hits["cache0"], model.stats.requests
                out = guided(model, order, context, shuffle=shuffle)
                assert (model.stats.hits["cache0"], model.stats.requests) == (before[0] + 6, before[1] + 1)
                assert {r.branch for r in model.schedule_rows} == {0, 1}
                for a, b in zip(out, reference, strict=True):
                    assert error(a[0], b[0]) < 1e-5
                    assert error(a[1], b[1]) < 1e-5


def test_guidance_equals_plain_where_nothing_is_cached():
    model = sd3()
    optimized = fast(model, recipe="lossless")
    for context in (False, True):
        plain, out = guided(model, ("cond", "uncond")), guided(optimized, ("cond", "uncond"), context)
        assert all(torch.equal(a[i], b[i]) for a, b in zip(out, plain, strict=True) for i in (0, 1))


def test_guidance_that_begins_late_computes_first():
    model = fast(recipe="cache{region=model,every=2}")
    x, p, n = noise(1), prompt(1), prompt(2)
    for k, t in enumerate(times(6)):
        for given in (p, n) if k >= 3 else (p,):
            model(hidden_states=x, timestep=torch.full((2,), t), **given)
    rows = {b: [r.choices["cache0"] for r in model.schedule_rows if r.branch == b] for b in (0, 1)}
    assert rows[0] == ["compute", "reuse"] * 3
    assert rows[1] == ["compute", "compute", "reuse"]  # step 3 would have reused, and has nothing to
    assert model.stats.requests == 1


# -- the order of times ------------------------------------------------------------------------------------------------


def heun(model, seed=0, steps=4, p=None):
    """Heun's method: every time but the first is evaluated twice, with two latents."""
    x, p = noise(seed), p or prompt(seed)

    def call(x, t):
        return model(hidden_states=x, timestep=torch.full((2,), t), **p, return_dict=False)[0]

    grid = [*times(steps), 0.0]
    for k in range(steps):
        first = call(x, grid[k])
        if k == steps - 1:
            return x - first / steps
        second = call(x - first / steps, grid[k + 1])
        x = x - (first + second) / 2 / steps


def test_heun_repeats_times():
    model = fast(recipe="forecast{interval=3,first=2}")
    first, second = heun(model), heun(model, 1)
    assert model.stats.requests == 2
    assert [r.step for r in model.schedule_rows] == list(range(7))
    assert [r.choices["cache0"] for r in model.schedule_rows] == ["compute"] * 2 + ["reuse", "reuse", "compute"] + [
        "reuse"
    ] * 2
    assert torch.equal(second, heun(fast(recipe="forecast{interval=3,first=2}"), 1))
    assert torch.isfinite(first).all()
    plain = small()
    assert torch.equal(heun(fast(plain, recipe="lossless")), heun(plain))


def test_times_that_rise():
    model = fast(recipe="cache{region=model,every=2}")
    for seed in (0, 1):
        x, p = noise(seed), prompt(0)  # the same prompt: only the direction tells the requests apart
        for t in reversed(times(6)):
            x = x - model(hidden_states=x, timestep=torch.full((2,), t), **p, return_dict=False)[0] / 6
    assert model.stats.requests == 2
    assert [r.choices["cache0"] for r in model.schedule_rows] == ["compute", "reuse"] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_timestep_that_is_no_number_is_an_error(used, want, bad):
    used.reset()
    with pytest.raises(SessionError, match=rf"the timestep is {bad}; a finite number expected"):
        used(**{**example(), "timestep": torch.full((2,), bad)})
    assert torch.equal(sample(used, 0), want[0])


# -- failures ----------------------------------------------------------------------------------------------------


def sample_disturbed(model, seed, at, disturb, steps=6):
    x, p = noise(seed), prompt(seed)
    for k, t in enumerate(times(steps)):
        if k == at:
            disturb(model, x, t, p)
        x = x - model(hidden_states=x, timestep=torch.full((2,), t), **p, return_dict=False)[0] / steps
    return x


def out_of_memory(model, x, t, p):
    """The step's graph fails once."""
    run = model.compiled.plan.run
    kept = dict(run)

    def fail(inputs):
        raise MemoryError("as if")

    run.update(dict.fromkeys(run, fail))
    try:
        with pytest.raises(MemoryError):
            model(hidden_states=x, timestep=torch.full((2,), t), **p, return_dict=False)
    finally:
        run.update(kept)


def wrong_width(model, x, t, p):
    with pytest.raises(CaptureError, match=r"Small itself fails for these inputs at .*\.py:\d+"):
        model(hidden_states=x, timestep=torch.full((2,), t), **{**p, "pooled_projections": torch.zeros(2, 21)})


def no_such_argument(model, x, t, p):
    with pytest.raises(ditopt.BadInput, match=r"the call does not fit Small\.forward"):
        model(hidden_states=x, timestep=torch.full((2,), t), **p, guidance_scale=3.0)


def not_a_number(model, x, t, p):
    with pytest.raises(SessionError, match="finite"):
        model(hidden_states=x, timestep=torch.full((2,), float("nan")), **p)


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("disturb", [out_of_memory, wrong_width, no_such_argument, not_a_number])
def test_a_call_that_fails_changes_nothing(used, want, at, disturb):
    sample(used, 0)
    assert torch.equal(sample_disturbed(used, 1, at, disturb), want[1])
    assert torch.equal(sample(used, 0), want[0])


# -- words ----------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_hit_warns_with_the_reason(used):
    with (
        pytest.warns(DitoptWarning, match=r"'cache0' was never reused .*: its warm-up .* none of the 2 steps"),
        used.session(steps=2),
    ):
        sample(used, 0, steps=2)
    always = fast(recipe="cache{region=model,every=1}")
    with (
        pytest.warns(DitoptWarning, match=r"never reused in this request: its schedule computes every step"),
        always.session(steps=4),
    ):
        sample(always, 0, steps=4)


def test_a_bare_module_that_never_reuses_is_told():
    model = fast(recipe="cache{region=model,every=4,first=4}")
    sample(model, 0, steps=3)
    sample(model, 1, steps=3)
    with pytest.warns(
        DitoptWarning, match=r"reused in \d+ calls, because 3 requests were opened .* `with model\.session"
    ):
        sample(model, 2, steps=3)


def test_another_number_of_steps_warns_where_a_formula_can_follow():
    model = fast(recipe="cache{region=model,every=2,last=1}", steps=6)
    with (
        pytest.warns(DitoptWarning, match=r"this request runs 8 steps and the model was optimized for 6"),
        model.session(steps=8),
    ):
        sample(model, 0, steps=8)
    assert [r.choices["cache0"] for r in model.schedule_rows] == ["compute", "reuse"] * 3 + ["compute"] * 2
    with pytest.warns(DitoptWarning, match=r"step 6 of a request that was declared to have 6 steps"):
        sample(model, 0, steps=8)


def test_another_number_of_steps_is_an_error_for_a_mask():
    model = fast(recipe="cache{region=model,mask=110101}", steps=6)
    with (
        pytest.raises(SessionError, match=r"its mask has 6 entries and this request runs 8 steps; run 6 steps, or"),
        model.session(steps=8),
    ):
        sample(model, 0, steps=8)
    with model.session(steps=6):
        sample(model, 0)
    assert "".join("1" if r.choices["cache0"] == "compute" else "0" for r in model.schedule_rows) == "110101"


def test_last_without_a_number_of_steps_warns():
    model = fast(recipe="cache{region=model,every=2,last=1}")
    with pytest.warns(DitoptWarning, match=r"asks that the last 1 steps compute, but the number of steps is unknown"):
        sample(model, 0)


# -- drop-in ----------------------------------------------------------------------------------------------------


def test_a_drop_in_answers_like_the_model():
    model = sd3()
    used = fast(model)
    assert used.config is model.config
    assert (used.dtype, used.device) == (model.dtype, model.device)
    assert list(dict(used.named_parameters())) == list(dict(model.named_parameters()))
    assert ditopt.restore(used) is model
    out = used(**{**example(), "return_dict": True})
    assert type(out).__name__ == "Transformer2DModelOutput"
    assert torch.equal(out.sample, used(**example())[0])
    assert not out.sample.requires_grad


def test_results_belong_to_the_caller(want):
    """A sampler may write into what it was given."""
    model = fast()
    x, p = noise(1), prompt(1)
    for t in times(6):
        v = model(hidden_states=x, timestep=torch.full((2,), t), **p, return_dict=False)[0]
        x.sub_(v / 6)  # in place, as Euler does
        v.fill_(float("nan"))
    assert torch.equal(x, want[1])


def test_compile_says_that_it_has_no_effect(used):
    with pytest.warns(DitoptWarning, match="compile\\(\\) has no effect here"):
        used.compile()
    with pytest.raises(ditopt.BadInput, match="cannot be trained; train the original"):
        used.train()
    assert used.eval() is used
