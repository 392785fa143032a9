"""What the recipes of caching systems refuse, in sentences; and the names that their users know parameters by."""

import pytest

import ditopt
from ditopt.errors import DitoptWarning, RecipeError, SessionError
from ditopt.pipeline import Context, PassManager
from ditopt.recipe import Recipe, available
from tests.denoisers import REGISTRY
from tests.tiny_models import ZOO, captured


def run(text, steps=16, model="plain"):
    """The program of a tiny model (``plain`` has 4 blocks) after the recipe."""
    return PassManager(Recipe.parse(text), Context("eager", steps)).run(captured(model)[1].program)[-1].program


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dbcache{F=3,B=1}", r"'blocks\.3:-1' matches nothing; the model has 4 blocks"),
        ("dbcache{F=4}", r"'blocks\.4:-0' matches nothing; the model has 4 blocks"),
        ("dbcache{F=0}", r"in front of the region: start it at blocks\.1 .* first of 4"),
        ("dbcache{F=most}", r"'blocks\.most:-0' is not a selector"),
        ("dbprune{F=2,B=2}", r"'blocks\.2:-2' matches nothing; the model has 4 blocks"),
        ("dbcache{mask=1101}", "mask has 4 steps, the request has 16"),
        (f"dbcache{{mask=1{'0' * 16}}}", "mask has 17 steps, the request has 16"),
        ("dbcache{policy=static,mask=110}", "mask has 3 steps, the request has 16"),
    ],
)
def test_what_does_not_fit_the_model_or_the_request(text, said):
    with pytest.raises(RecipeError, match=said):
        run(text)


def test_a_mask_of_another_length_than_the_request():
    """Where the number of steps is first known when the request opens."""
    tiny = ZOO["plain"]
    fast = ditopt.optimize(tiny.model(), "dbcache{F=1,mask=1101}", target="eager", example_inputs=tiny.inputs())
    with pytest.raises(SessionError, match="mask has 4 entries and this request runs 6 steps"), fast.session(steps=6):
        fast(**tiny.inputs())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("firstblock{threshold=-0.1}", "expected at least 0, got -0.1"),
        ("firstblock{R=1.5}", r"firstblock\{R=\.\.\.\}: expected at most 1, got 1.5"),
        ("firstblock{threshold=nan}", "expected at least 0, got nan"),
        ("dbcache{residual_diff_threshold=2}", "expected at most 1, got 2"),
        ("dbcache{W=0}", "expected at least 1, got 0"),
        ("dbcache{MC=-1}", "expected at least 0, got -1"),
        ("dbcache{mask=0111}", "the first step has nothing to reuse"),
        ("dbcache{mask=12}", "a text of 1 .compute. and 0 .reuse."),
        ("dbcache{policy=static,mask=10,R=0.1}", "R has no effect with policy=static and predictor=hold"),
        ("dbcache{order=2}", "order has no effect with policy=dynamic and predictor=hold"),
        ("dbcache{predictor=taylor}", "did you mean 'taylorseer'"),
        ("hicache{on=blocks}", "there are: modules, run"),
        ("easycache{ret_steps=1}", "expected at least 2, got 1"),
        ("tdc{threshold=1.01}", "expected at most 1"),
        ("teacache{coefficients=a b}", "expected numbers with spaces between"),
        ("teacache{domain=0.1}", "expected two numbers, the lowest and the highest"),
        ('adacache{codebook="0.1:0 inf:1"}', "'0.1:0' is no bound:steps, 1 step or more"),
        ('adacache{codebook="0.1:3"}', "the last one be inf"),
    ],
)
def test_what_is_out_of_range(text, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.parse(text)


def test_easycache_needs_an_output_like_its_latent():
    with pytest.raises(RecipeError, match="needs a latent input of the shape of the model's output"):
        run("easycache", model="dit")  # it predicts a variance besides


def test_a_static_policy_without_a_mask_computes_everything_and_says_so():
    tiny = ZOO["plain"]
    inputs = tiny.inputs()
    fast = ditopt.optimize(tiny.model(), "dbcache{F=1,policy=static}", target="eager")

    def request():
        with fast.session(steps=2):
            for t in (500.0, 400.0):
                fast(**{**inputs, "t": inputs["t"] * 0 + t})

    with pytest.warns(DitoptWarning, match="its schedule computes every step"):
        request()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("dbcache{Fn=8,Bn=2,R=0.12,W=4,M=9,MC=3}", "dbcache{F=8,B=2,threshold=0.12,warmup=4,max_cached_steps=9,MC=3}"),
        (
            "dbcache{Fn_compute_blocks=8,Bn_compute_blocks=2,residual_diff_threshold=0.12,max_warmup_steps=4}",
            "dbcache{F=8,B=2,R=0.12,W=4}",
        ),
        ("dbcache{steps_computation_mask=110,SCM=110}", ""),
        ("teacache{rel_l1_thresh=0.4}", "teacache{threshold=0.4}"),
        ("hicache{N=5,O=2,F=3}", "hicache{cache_interval=5,max_order=2,first_enhance=3}"),
    ],
)
def test_the_names_that_users_know(one, other):
    if not other:
        with pytest.raises(RecipeError, match="one parameter; give it once"):
            Recipe.parse(one)
    else:
        assert Recipe.parse(one) == Recipe.parse(other)


def test_blocks_are_counted_or_shared_out():
    assert run("dbcache{F=1,B=0}").decisions[0].regions == ("blocks.1", "blocks.2", "blocks.3")
    assert run("dbcache{F=1,B=1}").decisions[0].regions == ("blocks.1", "blocks.2")
    assert run("dbcache{F=25%,B=25%}").decisions[0].regions == ("blocks.1", "blocks.2")
    assert run("dbcache").decisions[0].regions == ("blocks.1", "blocks.2", "blocks.3"), "14 % of 4 is a block"
    assert [d.regions for d in run("dbprune{F=1,B=1}").decisions] == [("blocks.1",), ("blocks.2",)]


@pytest.mark.parametrize("name", sorted(available()))
def test_what_ships_says_what_it_is(name):
    system = available()[name]
    assert system.source
    assert system.notes
    assert all(p.min is not None for p in system.parameters if not isinstance(p.default, (str, bool)))
    assert all(set(p.choices) >= {p.default} for p in system.parameters if p.choices)


TEXTS = [
    "firstblock", "dbcache{F=1,B=1}", "dbcache{F=1,predictor=dmd}", "dbprune{F=1}", "teacache", "easycache",
    "cg_taylor", "adacache", "tdc", "hicache", "foca{on=run}", "ab2", "dmd",
]  # fmt: skip


@pytest.mark.parametrize(("text", "model"), [(t, m) for m in ("flux", "joint") for t in TEXTS])
def test_two_streams_are_cached(text, model):
    history = PassManager(Recipe.parse(text), Context("eager", 16)).run(captured(model)[1].program)
    cache = history[-1]
    assert cache.applied > 0
    # The joint model has another output, of another shape than the latent: EasyCache keeps that itself.
    said = ["no latent input has the shape of the output: its value is kept instead of the difference"]
    assert list(cache.refused) == (said if (text, model) == ("easycache", "joint") else [])
    decisions = cache.program.decisions
    assert len(decisions) == (len({r for d in decisions for r in d.regions}) if "each=block" in cache.text else 1)
    assert all(d.slots for d in decisions)


@pytest.mark.parametrize(
    ("text", "model", "tokens"),
    [
        ("firstblock", "flux", {16}),
        ("cg_taylor", "flux", {16}),
        ("dbcache{F=2}", "flux", {16}),  # the two streams are joined behind the second block
        ("dbcache{F=3}", "flux", {22}),  # they are one
        ("teacache", "flux", {16}),
        ("dbprune{F=1}", "flux", {16, 22}),
        ("firstblock", "joint", {9}),
        ("dbprune{F=1}", "joint", {9}),
    ],
)
def test_the_signal_is_measured_on_the_stream_of_the_latent(text, model, tokens):
    """Of 6 text tokens and 16 or 9 of the latent, although behind joint attention both depend on the latent."""
    slots = {s.name: s.type.shape for s in run(text, model=model).state}
    assert {shape[1] for name, shape in slots.items() if ".seen" in name or ".watch" in name} == tokens


def test_the_first_block_is_that_of_the_main_chain():
    """Refiners of the text are called before it."""
    built, call = REGISTRY["hunyuan_video"].build()
    recipe = "outline_blocks, cache{region=model,signal=modulated}"
    fast = ditopt.optimize(built, recipe, target="eager", example_inputs=call)
    assert next(s.type.shape[1] for s in fast.program.state if s.name == "cache0.seen") == 160


FITTED = "cache{region=model,mask=1101,predictor=newton,order=1,fitted='1.5 -0.5'}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("mask=1101,", ""), "has 1 rows, .* expected a mask=, one row for each 0 of it"),
        (("mask=1101", "mask=1100"), "has 1 rows, .* expected a mask=, one row for each 0 of it"),
        (("order=1", "order=1,signal=change,threshold=0.1"), "and no signal="),
        (("predictor=newton,order=1", "predictor=foca"), "expected a predictor that combines as many values"),
        (("1.5 -0.5", "1.5 -0.5 0.1"), "the row of step 2 has 3 numbers; expected 1 to 2"),
        (("mask=1101", "mask=1011"), "the row of step 1 has 2 numbers; expected 1 to 1"),
        (("1.5 -0.5", "1.5 x"), "expected numbers with spaces between"),
    ],
)
def test_fitted_coefficients_that_do_not_fit_the_mask(change, said):
    Recipe.parse(FITTED)
    with pytest.raises(RecipeError, match=said):
        run(FITTED.replace(*change))
