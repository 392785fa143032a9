"""Recipes whose steps a host decides, or whose numbers come from elsewhere, by every road: the same schedule, the same
outputs within rounding, and words that say what was decided and by what."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

import ditopt
from ditopt import dynamo
from ditopt.codegen.build import _Compiled
from ditopt.errors import DitoptWarning, SessionError
from examples import onnx_numpy
from tests.roads.tiny import error, example, noise, prompt, sample, small

STEPS = 8
RUN = "lossless, cache{region=blocks.1:,every=0,"
LEARNED = "mask=11001001,predictor=learned,table"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Corrections for runs of ``small``: another scale and shift at each step."""
    made = tmp_path_factory.mktemp("decided")
    generator = torch.Generator().manual_seed(0)
    tables = {k: torch.randn(STEPS, 32, generator=generator) * 0.02 for k in ("scale", "shift")}
    save_file({"scale": 1 + tables["scale"], "shift": tables["shift"]}, made / "tables.safetensors")
    save_file(predictor(generator), made / "predictor.safetensors")
    return made


def predictor(generator):
    """Two stages, windows of two and three values; steps 0, 1, 4 and 7 have to compute."""
    return {
        "reads": torch.tensor([0, 0, 2, 2, 0, 3, 3, 0]),
        "stage": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        "gate": 1 + 0.1 * torch.randn(STEPS, generator=generator),
        "mix": 0.05 * torch.randn(2, 3, generator=generator) * torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "down": 0.1 * torch.randn(2, 4, 96, generator=generator) * (torch.arange(96) < torch.tensor([[[64]], [[96]]])),
        "up": 0.1 * torch.randn(2, 32, 4, generator=generator),
        "bias": 0.02 * torch.randn(2, 32, generator=generator),
    }


def recipe(name, folder):
    return {
        "probe": f"{RUN}signal=residual,threshold=0.66,longest=2,predictor=newton,order=1,store=int8}}",
        "two": f"{RUN.replace('1:', '1:2')}signal=forecast,threshold=0.08}}, "
        "cache{region=blocks.2:,every=0,signal=modulated,threshold=0.16}",
        "lag": f"{RUN}signal=change,threshold=0.6,predictor=foca}}",
        "correction": f"{RUN.replace('every=0', 'every=3')}correction={folder / 'tables.safetensors'}}}",
        "learned": f"lossless, cache{{region=blocks,residual=no,{LEARNED}={folder / 'predictor.safetensors'}}}",
        "modules": f"lossless, cache{{region=blocks.*.mlp,store=int8,{LEARNED}={folder / 'predictor.safetensors'}}}",
        "dmd": "lossless, cache{region=model,every=2,predictor=dmd}",
        "fitted": "lossless, cache{region=model,mask=11010100,predictor=newton,order=1,"
        "fitted='1.5 -0.5; 0.7; 1.9 -0.8; 2.5 -1.4'}",
    }[name]


FITTED = [[0.0, 0.0], [0.0, 0.0], [1.5, -0.5], [0.0, 0.0], [0.7, 0.0], [0.0, 0.0], [1.9, -0.8], [2.5, -1.4]]
NAMES = ["probe", "two", "lag", "correction", "dmd", "learned", "modules", "fitted"]
STATIC = ("correction", "learned", "modules", "fitted")


class Ran:
    """Two requests of one optimized model."""

    def __init__(self, fast, session, stats):
        self.out, self.graphs = [], []
        for seed in (0, 1):
            with warnings.catch_warnings():
                warnings.simplefilter("error", DitoptWarning)
                self.out.append(sample(fast, seed, STEPS))
            self.graphs.append([r.graph for r in session.schedule_rows])
        self.stats, self.session = copy.deepcopy(stats), session  # other tests may run the same model on


@pytest.fixture(scope="module")
def eager(folder):
    @functools.cache
    def run(name):
        fast = ditopt.optimize(small(), recipe(name, folder), target="eager", steps=STEPS)
        return fast, Ran(fast, fast.engine.session, fast.stats)

    return run


def same(ran, want, bound=1e-5):
    assert ran.graphs == want.graphs
    assert all(error(a, b) < bound for a, b in zip(ran.out, want.out, strict=True))
    for field in ("hits", "measured", "block_flops", "calls", "requests"):
        assert getattr(ran.stats, field) == getattr(want.stats, field), field


@pytest.mark.parametrize("name", NAMES)
def test_eager_decides_and_the_request_is_as_in_a_fresh_model(name, eager, folder):
    _, ran = eager(name)
    assert all({"full"} < set(graphs) for graphs in ran.graphs)  # some computed, some did not
    again = ditopt.optimize(small(), recipe(name, folder), target="eager", steps=STEPS)
    assert torch.equal(sample(again, 1, STEPS), ran.out[1])
    assert 1e-4 < error(ran.out[0], sample(small(), 0, STEPS)) < 0.5


@pytest.mark.parametrize("name", ["probe", "correction", "learned"])
def test_inductor_compiles_each_graph_once(name, eager, folder):
    compiled = []
    _Compiled.on_compile = lambda graph: compiled.append(graph.name)
    try:
        fast = ditopt.optimize(small(), recipe(name, folder), target="inductor", steps=STEPS)
        same(Ran(fast, fast.engine.session, fast.stats), eager(name)[1])
    finally:
        _Compiled.on_compile = None
    assert sorted(compiled) == ["full", *(["probe"] if name == "probe" else []), "reuse"]


@pytest.mark.parametrize("name", NAMES)
def test_files_for_onnxruntime(name, eager, folder):
    path = folder / f"{name}.onnx"
    manifest = ditopt.export_onnx(small(), path, recipe(name, folder), example_inputs=example(), steps=STEPS)
    loaded = ditopt.load(path)
    # a value that is halfway between two integers may be stored as either
    bound = 1e-4 if "store=int8" in recipe(name, folder) else 1e-5
    same(Ran(loaded, loaded.requests, loaded.stats), eager(name)[1], bound)
    assert ("schedule" in manifest.extra) == (name in STATIC)
    # the driver without ditopt follows written schedules, and says so where there is none
    given = {k: v.numpy() for k, v in prompt(0).items()}
    sigmas = np.append(np.linspace(1, 1e-3, STEPS), 0)
    if name not in STATIC:
        with pytest.raises(ValueError, match=r"without a schedule: it decides .*; use ditopt\.load"):
            onnx_numpy.run(path.with_suffix(".json"), 0, sigmas, given)
        return
    by_step = {"fitted": [{"cache0.weights": row} for row in FITTED]}
    rows = by_step.get(name, [{"cache0.row": [k]} for k in range(STEPS)])
    assert [row["weights"] for row in manifest.extra["schedule"]] == rows
    got = onnx_numpy.run(path.with_suffix(".json"), 0, sigmas, given)
    fast, x = eager(name)[0], torch.from_numpy(np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32))
    with fast.session(steps=STEPS):
        for k, sigma in enumerate(sigmas[:-1]):
            v = fast(x, timestep=torch.full((2,), 1000 * float(sigma)), **prompt(0), return_dict=False)[0]
            x = x + np.float32(sigmas[k + 1] - sigma) * v
    assert error(torch.from_numpy(got), x) < 1e-5


def test_onnxruntime_as_a_target(eager, folder):
    fast = ditopt.optimize(small(), recipe("probe", folder), target="onnxruntime", steps=STEPS)
    same(Ran(fast, fast.engine.session, fast.stats), eager("probe")[1])


@pytest.mark.parametrize("name", NAMES)
def test_saved_folders(name, eager, folder):
    loaded = ditopt.load(ditopt.save(eager(name)[0], folder / f"{name}.ditopt"), target="eager")
    ran = Ran(loaded, loaded.requests, loaded.stats)
    assert all(torch.equal(a, b) for a, b in zip(ran.out, eager(name)[1].out, strict=True))
    assert ran.graphs == eager(name)[1].graphs
    assert loaded.plan.manifest.decisions == eager(name)[0].compiled.plan.manifest.decisions


def test_a_saved_folder_makes_graphs_on_demand(folder):
    """Five decisions by rules: eager makes what the requests ask for, also after loading."""
    one = "cache{{region=blocks.{},every=0,signal=change,threshold={},longest={}}}".format
    each = ", ".join(one(i, 0.5 + 0.1 * i, 1 + i % 3) for i in range(5))
    fast = ditopt.optimize(small(depth=5), each, target="eager", steps=STEPS)
    want = Ran(fast, fast.engine.session, fast.stats)
    loaded = ditopt.load(ditopt.save(fast, folder / "each.ditopt"), target="eager")
    got = Ran(loaded, loaded.requests, loaded.stats)
    assert got.graphs == want.graphs
    assert len({g for graphs in want.graphs for g in graphs}) > 3
    assert torch.equal(got.out[1], want.out[1])


def test_torch_compile_decides_by_a_rule(eager, folder):
    torch.compiler.reset()
    counters.clear()
    options = {"recipe": recipe("probe", folder), "target": "eager", "steps": STEPS}
    fast = torch.compile(small(), backend="ditopt", fullgraph=True, options=options)
    before = len(dynamo.engines)
    with dynamo_config.patch(error_on_recompile=True):
        out = [sample(fast, seed, STEPS) for seed in (0, 1)]
    (engine,) = dynamo.engines[before:]
    assert counters["stats"]["unique_graphs"] == 1
    assert [r.graph for r in engine.session.schedule_rows] == eager("probe")[1].graphs[1]
    assert all(error(a, b) < 1e-5 for a, b in zip(out, eager("probe")[1].out, strict=True))


def test_weights_that_left_the_loop_stay_away_beside_a_probe(eager, folder):
    fast = ditopt.optimize(small(), recipe("probe", folder), target="eager", steps=STEPS, release="offload")
    ran = Ran(fast, fast.engine.session, fast.stats)
    assert all(torch.equal(a, b) for a, b in zip(ran.out, eager("probe")[1].out, strict=True))
    probe = fast.compiled.plan.manifest.probe
    read = {f.ref for f in probe.inputs if f.kind == "param"}
    assert read
    assert not read & set(fast.release._away)
    assert fast.release.bytes > 0
    ditopt.restore(fast)


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_request_longer_than_its_correction(folder):
    """Beyond the table steps must compute, and those that would be corrected say what is missing."""
    fast = ditopt.optimize(small(), recipe("correction", folder), target="eager")
    with pytest.raises(SessionError, match="its correction is for 8 steps and this is step 8; calibrate for more"):
        sample(fast, 0, STEPS + 3)
    assert [r.step for r in fast.schedule_rows] == list(range(STEPS))
    masked = recipe("correction", folder).replace("every=3", f"mask={'10101010' + '111'}")
    fast = ditopt.optimize(small(), masked, target="eager")
    assert sample(fast, 0, STEPS + 3).isfinite().all()


def guided(model, seed=0, doubled=False, start=0):
    """Guidance by two calls, or by one with a doubled batch."""
    x, given, free = noise(seed), prompt(seed), prompt(77)
    both = {k: torch.cat([v, free[k]]) for k, v in given.items()}
    for k in range(start, STEPS):
        t = torch.full((2,), 1000 * (1 - k / STEPS))
        if doubled:
            v = model(hidden_states=torch.cat([x, x]), timestep=torch.cat([t, t]), **both, return_dict=False)[0]
            a, b = v.chunk(2)
        else:
            a, b = (model(hidden_states=x, timestep=t, **p, return_dict=False)[0] for p in (given, free))
        x = x - (b + 2 * (a - b)) / STEPS
    return x


ALONE = f"{RUN}signal=residual,threshold=0.66}}"


def test_each_guidance_branch_decides_by_its_own_state():
    fast = ditopt.optimize(small(), ALONE, target="eager")
    guided(fast)
    rows = {b: [r.graph for r in fast.schedule_rows if r.branch == b] for b in (0, 1)}
    assert fast.stats.measured == {"cache0": 2 * (STEPS - 1)}

    def alone(name):
        """The same latents, with only the calls of one branch."""
        seen, other = ditopt.optimize(small(), ALONE, target="eager"), small()

        def call(**kwargs):
            mine = torch.equal(kwargs["pooled_projections"], prompt(0 if name == 0 else 77)["pooled_projections"])
            return (seen if mine else follow)(**kwargs)

        follow = ditopt.optimize(other, ALONE, target="eager")
        guided(call)
        return [r.graph for r in seen.schedule_rows]

    assert {b: alone(b) for b in (0, 1)} == rows


def test_a_doubled_batch_is_one_decision():
    fast = ditopt.optimize(small(), ALONE, target="eager")
    x = guided(fast, doubled=True)
    assert {r.branch for r in fast.schedule_rows} == {0}
    assert len(fast.schedule_rows) == STEPS
    assert fast.stats.measured == {"cache0": STEPS - 1}
    assert x.isfinite().all()


def test_cancelled_requests_other_sizes_and_late_starts_leave_nothing():
    fast = ditopt.optimize(small(), ALONE, target="eager")

    def fresh(*args, **kwargs):
        return sample(ditopt.optimize(small(), ALONE, target="eager"), *args, **kwargs)

    want, large = fresh(1, STEPS), fresh(1, STEPS, size=12)
    for stop in (1, 4):
        sample(fast, 0, STEPS, stop=stop)
        assert torch.equal(sample(fast, 1, STEPS), want)
        assert torch.equal(sample(fast, 1, STEPS, size=12), large)
    late = guided(fast, start=3)  # an image to start from
    first = next(r for r in fast.schedule_rows if r.branch == 1)
    assert (first.step, first.graph) == (0, "full")
    assert torch.equal(late, guided(ditopt.optimize(small(), ALONE, target="eager"), start=3))


def test_heun_asks_at_every_evaluation():
    fast = ditopt.optimize(small(), ALONE, target="eager")
    x, p, grid = noise(0), prompt(0), [1000 * (1 - k / 4) for k in range(5)]

    def call(x, t):
        return fast(hidden_states=x, timestep=torch.full((2,), t), **p, return_dict=False)[0]

    for now, then in itertools.pairwise(grid):
        v = call(x, now)
        if then:
            v = (v + call(x - v / 4, then)) / 2
        x = x - v / 4
    assert [r.step for r in fast.schedule_rows] == list(range(7))
    assert fast.stats.measured == {"cache0": 6}
    assert x.isfinite().all()


# -- words -------------------------------------------------------------------------------------------------------------


def test_explain_says_what_the_signal_is_and_its_rule(folder):
    text = ditopt.explain(small(), recipe("probe", folder), example_inputs=example(), steps=STEPS, target="eager")
    for line in (
        r"cache0: 2 regions, blocks\.1 \.\. blocks\.2; predicted by newton of order 1",
        r"computes the first step\n",
        r"the host reads signal residual \(measured by the step itself, in the graph probe\)",
        r"signal residual: First-block caching: how far what the blocks in front",
        r"and reuses while it is below 0\.66, at most 2 in a row",
    ):
        assert re.search(line, text), line
    shares = {m[1]: float(m[2]) for m in re.finditer(r"(full|reuse|probe) +eager .* ([\d.]+)%", text)}
    assert shares["full"] + shares["probe"] == pytest.approx(100, abs=0.1)
    assert shares["reuse"] < 5
    more = ditopt.explain(small(), recipe("correction", folder), example_inputs=example(), steps=STEPS, target="eager")
    assert "reused as it was, corrected by a table of 8 steps" in more
    assert "computes the first step, then one step in 3" in more


def test_the_report_says_what_the_host_read(eager, tmp_path):
    fast, ran = eager("probe")
    page = fast.report(tmp_path / "r.html").read_text()
    times = ran.stats.measured["cache0"]
    last = fast.engine.session.measured["cache0"]
    assert f"the host read it {times} times; in the last request {len(last)} times, between {min(last):.3g}" in page
    assert "signal residual" in page
    assert re.search(rf"<td>probe</td><td>each step</td><td class=n>{ran.stats.calls}</td>", page)
    assert json.dumps(last)  # finite
