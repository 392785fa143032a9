"""The same recipe by every road gives the same numbers, over two requests in a row; and what each road compiles.

Two models: a tiny random two-stream, text-conditioned one, and the trained one that ships.
"""

import functools

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

import ditopt
from ditopt import dynamo, recipe
from ditopt.codegen.build import _Compiled
from ditopt.errors import DitoptWarning
from ditopt.ir.program import callee
from tests.roads.tiny import digits_pipe, error, example, sample, sample_digits, sd3, small

PRIMITIVES = {
    "exact": "lossless",
    "residual hold of a run": "lossless, cache{region=blocks.0:2,every=2,predictor=hold,residual=yes}",
    "taylor of modules": "lossless, cache{region=blocks.*.attn|blocks.*.mlp,every=3,first=2,predictor=taylor,order=2}",
    "forecast of the model": "forecast",
}
STEPS = 8
COMPUTED = {  # of 8 steps, by hand
    "exact": range(8),
    "residual hold of a run": (0, 2, 4, 6),
    "taylor of modules": (0, 1, 4, 7),
    "forecast of the model": (0, 1, 3, 5, 7),
}


@functools.cache
def model_of(name):
    return {"sd3": sd3, "small": lambda: small(), "digits": lambda: digits_pipe().transformer}[name]()


def requests(name, model):
    """Two requests with different noise and prompts."""
    return [(sample_digits if name == "digits" else sample)(model, seed, STEPS) for seed in (0, 1)]


@functools.cache
def plain(name):
    return requests(name, model_of(name))


class Ran:
    """What one recipe did to one model by one road."""

    def __init__(self, name, primitive, road):
        compiled = []
        _Compiled.on_compile = lambda graph: compiled.append(graph.name)
        try:
            if road.startswith("torch.compile"):
                self.compile(name, PRIMITIVES[primitive], road.removeprefix("torch.compile "))
            else:
                fast = ditopt.optimize(model_of(name), PRIMITIVES[primitive], target=road)
                self.out = requests(name, fast)
                self.engine = fast.engine
        finally:
            _Compiled.on_compile = None
        self.compiled = compiled
        self.stats = self.engine.session.stats
        self.program = self.engine.last.program
        self.choices = [row.graph for row in self.engine.session.schedule_rows]

    def compile(self, name, text, target):
        torch.compiler.reset()
        counters.clear()
        before = len(dynamo.engines)
        options = {"recipe": text, "target": target}
        fast = torch.compile(model_of(name), backend="ditopt", fullgraph=True, options=options)
        with dynamo_config.patch(error_on_recompile=True):
            self.out = requests(name, fast)
        self.engines = dynamo.engines[before:]
        self.graphs, self.breaks = counters["stats"]["unique_graphs"], counters["graph_break"].total()
        self.engine = self.engines[-1]


ran = functools.cache(Ran)

ROADS = ["inductor", "onnxruntime", "torch.compile eager"]
CASES = [  # lossless is the full graph of forecast
    *[("sd3", "taylor of modules", road) for road in ROADS],
    *[("sd3", "forecast of the model", road) for road in ROADS],
    *[("small", "residual hold of a run", road) for road in [*ROADS, "torch.compile inductor"]],
    *[("digits", "taylor of modules", road) for road in ROADS],
    ("sd3", "exact", "torch.compile eager"),
]


@pytest.mark.parametrize(("name", "primitive", "road"), CASES)
def test_every_road_gives_the_numbers_of_eager(name, primitive, road):
    eager, other = ran(name, primitive, "eager"), ran(name, primitive, road)
    for a, b in zip(other.out, eager.out, strict=True):
        assert error(a, b) < 1e-5
    assert other.choices == eager.choices
    assert other.stats.hits == eager.stats.hits
    assert other.stats.block_flops == eager.stats.block_flops
    assert (other.stats.requests, other.stats.calls) == (2, 2 * STEPS)
    if road == "torch.compile eager":
        assert all(torch.equal(a, b) for a, b in zip(other.out, eager.out, strict=True))


@pytest.mark.parametrize(
    ("name", "primitive"),
    [*[("sd3", p) for p in PRIMITIVES], ("small", "residual hold of a run"), ("digits", "taylor of modules")],
)
def test_eager_does_what_the_schedule_says(name, primitive):
    it = ran(name, primitive, "eager")
    computed = [k for k, graph in enumerate(it.choices) if graph == "full"]
    assert computed == list(COMPUTED[primitive])
    assert it.stats.hits.total() == 2 * (STEPS - len(computed))
    for a, b in zip(it.out, plain(name), strict=True):
        if primitive == "exact":
            assert torch.equal(a, b)  # bit for bit
        else:
            assert 1e-4 < error(a, b) < 0.5
    assert it.stats.full_flops == 2 * STEPS * it.engine.last.plan.manifest.full_flops > 0


# -- what is compiled --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "primitive", "road"), [c for c in CASES if c[2].startswith("torch.compile")])
def test_torch_compile_makes_one_graph_and_never_again(name, primitive, road):
    it = ran(name, primitive, road)
    assert (it.graphs, it.breaks, len(it.engines)) == (1, 0, 1)
    assert len(it.engine.compiled) == 1


@pytest.mark.parametrize(("name", "primitive", "road"), [c for c in CASES if c[2].endswith("inductor")])
def test_a_recipe_with_one_region_compiles_two_step_graphs(name, primitive, road):
    assert sorted(ran(name, primitive, road).compiled) == ["full", "reuse"]


def test_blocks_share_one_body():
    """Blocks that are equal up to weights are one text and one compile: here all ten of the trained model."""
    for name, calls in (("digits", 10), ("sd3", 3)):
        program = ran(name, "taylor of modules", "eager").program
        assert len(list(program.calls())) == calls
        # SD3: the first block's text projections have left the loop, the last one drops the text stream
        assert len({callee(call) for call in program.calls()}) == (1 if name == "digits" else 3)


def test_torch_compile_takes_a_new_resolution_and_changed_weights():
    model = small(3)
    torch.compiler.reset()
    fast = torch.compile(
        model, backend="ditopt", fullgraph=True, dynamic=False, options={"recipe": "forecast", "target": "eager"}
    )
    before = len(dynamo.engines)
    for size in (8, 12, 8):
        want = sample(ditopt.optimize(model, "forecast", target="eager"), 1, STEPS, size=size)
        assert torch.equal(sample(fast, 1, STEPS, size=size), want)
    assert len(dynamo.engines) - before == 2
    for p in model.parameters():
        p.data.mul_(1.1)
    want = sample(ditopt.optimize(model, "forecast", target="eager"), 1, STEPS)
    assert torch.equal(sample(fast, 1, STEPS), want)
    model.load_state_dict(small(4).state_dict())
    assert torch.equal(sample(fast, 1, STEPS), sample(ditopt.optimize(small(4), "forecast", target="eager"), 1, STEPS))


def test_torch_compile_of_an_optimized_module_returns_it():
    fast = ditopt.optimize(small(), "lossless", target="eager", example_inputs=example())
    want = fast(**example())[0]
    with pytest.warns(DitoptWarning, match="no effect"):
        fast.compile()
    torch.compiler.reset()
    assert torch.equal(torch.compile(fast, backend="eager")(**example())[0], want)


# -- the shipped recipes on the trained model --------------------------------------------------------------------------

LONG, LABELS = 12, (0, 3, 5, 8)
FLOOR = {
    "fora": 25.0,
    "forecast": 39.0,
    "taylorseer": 31.0,
}  # dB, the worst of eight samples; measured 26.5, 40.6, 32.3
SHIPPED = {  # steps that compute, by the published schedules at their defaults
    "lossless": range(LONG),
    "fora": (0, 3, 6, 9),
    "taylorseer": (0, 1, 4, 7, 10),
    "forecast": (0, 1, 3, 5, 7, 9, 11),
}


@functools.cache
def long_plain():
    return [sample_digits(model_of("digits"), seed, LONG, LABELS) for seed in (0, 1)]


@pytest.mark.parametrize("name", SHIPPED)  # the other recipes: tests/recipes and tests/calibration
def test_shipped_recipes_on_the_trained_model(name):
    fast = ditopt.optimize(model_of("digits"), name, target="eager")
    out = [sample_digits(fast, seed, LONG, LABELS) for seed in (0, 1)]
    assert [k for k, row in enumerate(fast.schedule_rows) if row.graph == "full"] == list(SHIPPED[name])
    full = fast.compiled.plan.manifest.graphs[0]
    share = len(SHIPPED[name]) / LONG
    # a reused step runs nothing inside blocks: gates and modulation are hoisted
    assert fast.stats.block_flops == 2 * len(SHIPPED[name]) * full.block_flops
    assert share * 0.97 < fast.stats.share_block_flops <= share
    assert fast.stats.share_flops < share + 0.02
    if recipe.available()[name].contract == "exact":
        assert all(torch.equal(a, b) for a, b in zip(out, long_plain(), strict=True))
        return
    assert fast.stats.hits.total() == 2 * (LONG - len(SHIPPED[name])) > 0
    worst = torch.cat([ditopt.measure.psnr(a, b) for a, b in zip(out, long_plain(), strict=True)]).min()
    assert FLOOR[name] < float(worst) < 60
    assert ditopt.zoo.package("digits").score(torch.cat(out), LABELS * 2).all()
