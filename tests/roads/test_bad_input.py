"""Bad input: one clear error or warning that says what to do, and the model still gives what it gave."""

import contextlib
import inspect
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import ditopt
from ditopt.errors import BadInput, CaptureError, DitoptWarning, RecipeError, SessionError
from tests.roads.tiny import Small, example, small
from tests.tiny_models import noise


@pytest.fixture(scope="module")
def model():
    """Shared by all tests: each must leave it usable and unchanged."""
    return small()


@pytest.fixture(scope="module")
def want(model):
    return model(**example())[0].clone()


@pytest.fixture(autouse=True)
def still_usable(model, want):
    before = {k: (id(v), v._version) for k, v in model.state_dict(keep_vars=True).items()}
    yield
    assert torch.equal(model(**example())[0], want)
    assert {k: (id(v), v._version) for k, v in model.state_dict(keep_vars=True).items()} == before
    assert not model.training
    assert "forward" not in vars(model)


# -- what optimize refuses ---------------------------------------------------------------------------------------------

optimize: Any = ditopt.optimize  # called against its types
explain: Any = ditopt.explain
GIVEN: dict[str, tuple[Any, Any, str]] = {
    "no module": (lambda m: optimize(lambda x: x), BadInput, "a function was given; ditopt optimizes an nn.Mod"),
    "a class": (lambda m: optimize(Small), BadInput, "a type was given"),
    "nothing": (lambda m: optimize(None), BadInput, "a NoneType was given"),
    "twice": (
        lambda m: optimize(optimize(m, target="eager")),
        BadInput,
        r"optimized already; ditopt\.restore\(model\) gives the original",
    ),
    "restore a model": (lambda m: ditopt.restore(m), BadInput, "a Small was given; expected what ditopt.optimize ret"),
    "restore a number": (lambda m: ditopt.restore(3), BadInput, "a int was given; expected what"),
    "steps zero": (lambda m: optimize(m, steps=0), BadInput, "steps=0 given; expected the number of denoising"),
    "steps text": (lambda m: optimize(m, steps="6"), BadInput, "steps='6' given; expected the number"),
    "steps half": (lambda m: optimize(m, steps=6.5), BadInput, r"steps=6\.5 given; expected the number"),
    "target": (lambda m: optimize(m, target="indctor"), BadInput, "called 'indctor'; did you mean 'inductor'?"),
    "target None": (
        lambda m: optimize(m, target=None),
        BadInput,
        "no target is called None; there are: auto, e",
    ),
    "target later": (lambda m: optimize(m, target="triton"), BadInput, "'triton' is not built yet; use one of"),
    "roles list": (lambda m: optimize(m, roles=["x"]), BadInput, "roles is a list; expected a dict"),
    "explain": (lambda m: explain(3, example_inputs=example()), BadInput, "a int was given; explain takes"),
    "export": (lambda m: ditopt.export_onnx(3, "x.onnx"), BadInput, "a int was given; export takes an nn.Module"),
}


@pytest.mark.parametrize("what", GIVEN)
def test_what_is_given(model, what):
    call, kind, says = GIVEN[what]
    with pytest.raises(kind, match=says):
        call(model)


RECIPES = {
    "losless": "no recipe and no pass is called 'losless'; did you mean 'lossless'?",
    "cach{every=2}": "no recipe and no pass is called 'cach'; did you mean 'cache'?",
    "taylorseer{intervall=3}": "has no parameter 'intervall'; did you mean 'interval'?",
    "cache{evry=2}": "cache has no option 'evry'; did you mean 'every'?",
    "cache{every=-2}": "expected 0 or more",
    "cache{every=two}": "expected a whole number, got 'two'",
    "cache{predictor=tailor}": "'tailor'",
    "cache{": "position 6: expected the name of an option of cache, found the end",
    "": "expected the name of a pass or recipe, found the end",
    "nowhere.toml": "the recipe file nowhere.toml cannot be read",
}


@pytest.mark.parametrize("text", RECIPES)
def test_recipes_that_cannot_be_read(model, text):
    with pytest.raises(RecipeError) as error:
        ditopt.optimize(model, text, target="eager")
    assert RECIPES[text] in str(error.value)


def test_a_recipe_of_another_type(model):
    with pytest.raises(RecipeError, match="a recipe is a name, a line of text, a path or a Recipe, not int"):
        ditopt.optimize(model, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("region", ["blocks.7:9", "blocks.*.foo", "bloks.*", "aux0.*"])
def test_a_recipe_that_matches_nothing_says_what_there_is(model, region):
    with pytest.raises(
        RecipeError,
        match=rf"region '{region.replace('*', '.')}' .*; the model has 3 blocks \(blocks\.0 to blocks\.2\), .* try 'b",
    ):
        ditopt.optimize(model, f"cache{{region={region},every=2}}", target="eager", example_inputs=example())


def test_a_cache_on_a_cached_region_says_so(model):
    recipe = "cache{region=blocks.1:2,every=2}, cache{region=blocks.1:2,every=3}"
    with pytest.warns(DitoptWarning, match=r"changed nothing: blocks\.1 is cached already by an earlier cache"):
        ditopt.optimize(model, recipe, target="eager", example_inputs=example())


def test_a_mask_of_another_length(model):
    with pytest.raises(RecipeError, match="mask has 2 steps, the request has 4: give one digit a step"):
        ditopt.optimize(model, "cache{mask=10}", target="eager", example_inputs=example(), steps=4)


# -- example inputs ----------------------------------------------------------------------------------------------------

EXAMPLES: dict[str, tuple[Any, Any, str]] = {
    "tensor": (lambda e: torch.zeros(2), BadInput, "example_inputs is a Tensor; expected a dict of keyword arg"),
    "text": (lambda e: "abc", BadInput, "example_inputs is a str; expected"),
    "set": (lambda e: {1, 2}, BadInput, "example_inputs is a set; expected"),
    "empty": (lambda e: {}, BadInput, "does not fit Small.forward.* missing a required argument: 'hidden_states'"),
    "missing": (
        lambda e: {k: v for k, v in e.items() if k != "timestep"},
        BadInput,
        "missing a required argument: 'timestep'",
    ),
    "unknown": (lambda e: {**e, "cfg": 1}, BadInput, "got an unexpected keyword argument 'cfg'"),
    "too many": (lambda e: (*e.values(), 1), BadInput, "too many positional arguments"),
    "array": (
        lambda e: {**e, "timestep": e["timestep"].numpy()},
        BadInput,
        "argument timestep is a ndarray; ditopt takes tensors",
    ),
    "channels": (
        lambda e: {**e, "hidden_states": torch.zeros(2, 3, 8, 8)},
        CaptureError,
        r"Small itself fails for these inputs at .*tiny\.py:\d+ .* expected input\[2, 3, 8, 8\] to have 4 channels",
    ),
    "dtype": (
        lambda e: {**e, "hidden_states": e["hidden_states"].double()},
        CaptureError,
        r"Small itself fails for these inputs at .*tiny\.py:\d+",
    ),
}


@pytest.mark.parametrize("what", EXAMPLES)
def test_example_inputs(model, what):
    change, kind, says = EXAMPLES[what]
    with pytest.raises(kind, match=says):
        ditopt.optimize(model, target="eager", example_inputs=change(example()))


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ({"hidden_state": "latent"}, "did you mean 'hidden_states'?"),
        (
            {"hidden_states": "latnt"},
            "roles gives 'hidden_states' the role 'latnt'; roles are latent, timestep, prompt",
        ),
    ],
)
def test_roles(model, roles, says):
    with pytest.raises(BadInput) as error:
        ditopt.optimize(model, target="eager", example_inputs=example(), roles=roles)
    assert says in str(error.value)


def test_nothing_captured_yet(model, tmp_path):
    fast = ditopt.optimize(model, target="eager")
    for ask in (
        lambda: fast.history,
        lambda: fast.program,
        lambda: fast.compiled,
        lambda: fast.report(tmp_path / "x.html"),
        lambda: ditopt.save(fast, tmp_path / "x"),
        lambda: ditopt.export_onnx(fast, tmp_path / "x.onnx"),
    ):
        with pytest.raises(BadInput, match=r"nothing is captured yet: pass example_inputs .* or call the model once"):
            ask()
    assert (fast.stats.calls, fast.schedule_rows) == (0, [])
    assert not hasattr(fast, "no_such_thing")
    fast(**example())
    assert len(fast.history) == 3


# -- models that cannot be captured ------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A small model with a line in front of it; subclasses have another one."""

    seen: torch.Tensor

    def __init__(self, blocks: int | None = None) -> None:
        super().__init__()
        self.inner = small()
        self.inner.blocks = self.inner.blocks[:blocks]
        self.calls = 0
        self.register_buffer("seen", torch.zeros(1))

    def odd(self, x, t):
        return x

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict=True):
        x = self.odd(hidden_states, timestep)
        return self.inner(x, timestep, encoder_hidden_states, pooled_projections, return_dict)


class Asks(Odd):
    def odd(self, x, t):
        if t.max().item() > 500:
            return x * 2
        return x


class Branches(Odd):
    def odd(self, x, t):
        return x * 2 if x.sum() > 0 else x


class Leaves(Odd):
    def odd(self, x, t):
        return x * float(t.numpy().max())


class Raises(Odd):
    def odd(self, x, t):
        raise RuntimeError("as its author wanted")


class Counts(Odd):
    def odd(self, x, t):
        self.calls += 1
        return x * self.calls


class Writes(Odd):
    def odd(self, x, t):
        self.seen.add_(1)
        return x


class Random(Odd):
    def odd(self, x, t):
        return x + torch.randn_like(x)


ODD = {
    Asks: (
        r"Asks cannot be traced at {file}:{line} \(.*\): .* on the timestep.* Compute it outside forward and pass",
        1,
    ),
    Branches: (r"Branches cannot be traced at {file}:{line} \(.*\): .* use torch\.where", 1),
    Leaves: (
        r"Leaves cannot be traced at {file}:{line} \(.*\): .* depends on the timestep.* Compute it outside forward",
        1,
    ),
    Raises: (r"Raises itself fails for these inputs at {file}:{line} .* RuntimeError: as its author wanted\. Call", 1),
    Counts: (r"Counts changes its attribute calls during forward, .* Make it an input of forward", 0),
    Writes: (r"Writes changes seen during forward .* Pass it in and return it", 0),
    Random: (r"the graph of Random differs from the model by .* on a second input; .* or it is not deterministic", 0),
}


@pytest.mark.parametrize("kind", ODD, ids=lambda k: k.__name__)
def test_an_untraceable_model_is_named_with_its_line(kind, capfd):
    """Of one block: more of them would be captured without the rest of forward."""
    says, offset = ODD[kind]
    odd = kind(1).eval()
    line = inspect.getsourcelines(kind.odd)[1] + offset
    capfd.readouterr()
    with pytest.raises(CaptureError, match=says.format(file=r"\S*test_bad_input\.py", line=line)) as error:
        ditopt.optimize(odd, target="eager", example_inputs=example())
    assert len(str(error.value)) < 900
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # one error, and nothing else
    assert (odd.calls, float(odd.seen)) == (0, 0.0)
    if kind is not Raises:
        assert odd(**example())[0].shape == (2, 4, 8, 8)


def test_an_untraceable_model_fails_at_the_first_call_where_no_example_was_given():
    fast = ditopt.optimize(Branches(1).eval(), target="eager")
    for _ in range(2):
        with pytest.raises(CaptureError, match="Branches cannot be traced"):
            fast(**example())


# -- models with nothing to find ---------------------------------------------------------------------------------------


class Flat(nn.Module):
    """No blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, t):
        return self.a(x) * t[:, None]


class NoTime(Flat):
    def forward(self, x, other):
        return self.a(x) + other


FLAT = {"x": torch.ones(2, 8), "t": torch.ones(2)}


def test_a_model_without_blocks():
    flat = Flat().eval()
    with pytest.raises(RecipeError, match=r"matches nothing; no repeated blocks were found .* only 'model' can be sel"):
        ditopt.optimize(flat, "fora", target="eager", example_inputs=FLAT)
    with pytest.warns(DitoptWarning) as told:
        ditopt.optimize(flat, "lossless", target="eager", example_inputs=FLAT)
    assert [str(w.message).partition(" changed nothing: ")[0] for w in told] == [
        "canonicalize",
        "outline_blocks",
        "hoist_invariants",
    ]


def test_the_output_of_a_model_without_blocks_can_be_forecast():
    flat = Flat().eval()
    fast = ditopt.optimize(flat, "forecast", target="eager")
    for t in (9.0, 8.0, 7.0, 6.0):  # linear in t: the forecast is exact
        given = {"x": FLAT["x"], "t": torch.full((2,), t)}
        torch.testing.assert_close(fast(**given), flat(**given))
    assert fast.stats.hits.total() == 1


def test_a_model_without_a_timestep(tmp_path):
    """On each road it is told that only the latent tells steps apart, and only inside a session."""
    none, given = NoTime().eval(), {"x": torch.ones(2, 8), "other": torch.ones(2, 8)}
    says = r"no timestep input, so steps are told apart by the latent, .* pass roles=\{'<name>': 'timestep'\}"
    with pytest.warns(DitoptWarning, match=says):
        fast = ditopt.optimize(none, "cache{region=model,every=2}", target="eager", example_inputs=given)
    later = [{**given, "x": given["x"] * k} for k in (1, 2, 3)]
    for call in later:  # each call a request of its own
        assert torch.equal(fast(**call), none(**call))
    with fast.session(steps=3):
        assert [torch.equal(fast(**call), none(**later[0])) for call in later] == [True, True, False]
    with pytest.warns(DitoptWarning, match=says):
        ditopt.export_onnx(none, tmp_path / "x.onnx", "cache{region=model,every=2}", steps=3, example_inputs=given)
    recipe = "cache{region=model,every=2,predictor=newton,order=1,time=timestep}"
    with pytest.warns(DitoptWarning) as said:
        ditopt.optimize(none, recipe, target="eager", example_inputs=given)
    assert "there is no timestep to measure distance in; cache{time=step} counts steps" in str(said[1].message)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recpe": "fora"}, "torch.compile option 'recpe' is unknown to ditopt; did you mean 'recipe'?"),
        ({"recipe": "forra"}, "no recipe and no pass is called 'forra'; did you mean 'fora'?"),
        ({"target": "egaer"}, "no target is called 'egaer'; did you mean 'eager'?"),
        ({"recipe": "cache{region=blocks.9}", "target": "eager"}, "region 'blocks.9' matches nothing; the model has 3"),
    ],
)
def test_options_of_torch_compile(model, options, says):
    torch.compiler.reset()
    with pytest.raises((BackendCompilerFailed, RecipeError)) as error:  # Dynamo wraps what a backend raises
        torch.compile(model, backend="ditopt", options=options)(**example())
    assert says in str(error.value)


def test_a_model_that_breaks_dynamos_graph_is_right_all_the_same():
    """Each part is a graph of its own; one without a timestep gets local passes, and says so."""
    torch.compiler.reset()
    odd = Branches().eval()
    fast = torch.compile(odd, backend="ditopt", options={"recipe": "lossless", "target": "eager"})
    x = example()["hidden_states"]
    calls = [{**example(), "hidden_states": latent} for latent in (x.abs(), -x.abs(), x.abs())]
    with pytest.warns(DitoptWarning, match=r"only local passes run\. Where the graph is a part of a model that Dynamo"):
        out = [fast(**given)[0] for given in calls]
    assert all(torch.equal(a, odd(**given)[0]) for a, given in zip(out, calls, strict=True))


class Broken(nn.Module):
    """The embedding and the blocks are graphs of their own to Dynamo."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.blocks = nn.Linear(1, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        gate = self.time(t[:, None])[:, None]
        torch._dynamo.graph_break()
        for block in self.blocks:
            x = x + gate * block(torch.tanh(x))
        return x


def test_a_part_without_blocks_runs_as_it_is():
    torch.compiler.reset()
    model = noise(Broken())
    fast = torch.compile(model, backend="ditopt", options={"recipe": "deepcache", "target": "eager"})
    x, t = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 0.25])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", DitoptWarning)
        assert torch.equal(fast(x, t), model(x, t))
    assert any(re.search("has no blocks, so only local passes run .*matches nothing", str(s.message)) for s in said)


# -- in use ------------------------------------------------------------------------------------------------------------


def test_sessions_that_cannot_be(model):
    fast = ditopt.optimize(model, "cache{region=model,every=2}", target="eager", example_inputs=example())
    with pytest.raises(SessionError, match="a request of 0 steps given; at least 1 expected"), fast.session(steps=0):
        pass
    with contextlib.suppress(SessionError), fast.session(timesteps=[]):
        pytest.fail("a request without timesteps")
    assert fast(**example())[0].shape == (2, 4, 8, 8)
