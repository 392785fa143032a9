"""Half a batch: what the step written for one half computes, for models of every kind, on every target."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import ditopt
from ditopt.errors import DitoptWarning, RecipeError
from ditopt.ir import example
from ditopt.passes.cache_guidance import CacheGuidance
from ditopt.pipeline import Context, PassManager
from ditopt.recipe import Recipe
from tests.tiny_models import ZOO, captured, leaves

aten = torch.ops.aten


def doubled(name):
    """Inputs of a call whose halves have one latent and different prompts."""
    roles = {i.name: i.role for i in captured(name)[1].program.inputs}
    inputs = ZOO[name].inputs()
    return {k: torch.cat([v[:1], v[:1]]) if roles.get(k) == "latent" else v for k, v in inputs.items()}


@pytest.mark.parametrize("unconditional", ["first", "second"])
@pytest.mark.parametrize("name", ZOO)
def test_a_step_without_the_unconditional_half_is_the_model_on_the_other_one(name, unconditional):
    model, _ = captured(name)
    recipe = f"lossless, cache_guidance{{mask=0,keep=nothing,form=batch,unconditional={unconditional}}}"
    fast = ditopt.optimize(model, recipe, steps=1, roles=dict(ZOO[name].roles), target="eager")
    inputs = doubled(name)
    with torch.no_grad(), fast.session(steps=1):
        plain, found = leaves(model(**inputs))[0], leaves(fast(**inputs))[0]
    own = 1 if unconditional == "first" else 0
    first, second = found.chunk(2)
    assert torch.equal(first, second)
    torch.testing.assert_close(found.chunk(2)[own], plain.chunk(2)[own], rtol=1e-4, atol=2e-5)
    assert (plain.chunk(2)[0] - plain.chunk(2)[1]).abs().max() > 1e-2, "halves that are equal prove nothing"
    assert fast.stats.share_flops < 0.65
    assert sum(fast.stats.graphs.values()) == 1


@pytest.mark.parametrize("form", ["calls", "batch"])
@pytest.mark.parametrize("target", ["inductor", "onnxruntime"])
def test_compiled_targets_do_what_eager_does(target, form):
    model, _ = captured("plain")
    recipe = (
        f"cache{{region=blocks.1:-1,every=3}}, cache_guidance{{every=2,form={form},keep=bands,unconditional=first}}"
    )
    outputs, kinds = [], []
    for used in ("eager", target):
        fast = ditopt.optimize(model, recipe, steps=6, target=used)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        made = []
        with torch.no_grad(), fast.session(steps=6):
            for t in torch.linspace(500, 100, 6):
                if form == "batch":
                    u, c = fast(torch.cat([x, x]), t.expand(2), torch.tensor([9, 3])).chunk(2)
                else:
                    c, u = (fast(x, t.expand(1), torch.tensor([y])) for y in (3, 9))
                made.append(torch.stack([u, c]))
                x = x - 0.1 * (u + 2 * (c - u))
        outputs.append(torch.stack(made))
        kinds.append([r.choices for r in fast.schedule_rows])
        assert fast.stats.hits["guidance1"] == 3
        assert fast.stats.hits["cache0"] > 0
    assert kinds[0] == kinds[1]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


def refused(program, recipe):
    last = PassManager(Recipe.parse(recipe), Context()).run(program)[-1]
    assert last.applied == 0
    return " ".join(last.refused)


def build(*ops):
    """A program with one latent (2, 6, 8), through ``ops``."""
    b = example.Builder()
    x = b.input("hidden_states", "latent", 2, 6, 8)
    for op in ops:
        x = op(b, x)
    return b.program(x)


def _packed(b, x):
    """Attention over the tokens of all samples at once."""
    packed = b(aten.view.default, x, [1, 12, 8])
    return b(aten.view.default, b(aten.scaled_dot_product_attention.default, packed, packed, packed), [2, 6, 8])


def _paired(b, x):
    """The batch split in two dimensions and back."""
    return b(aten.view.default, b(aten.gelu.default, b(aten.view.default, x, [2, 1, 3, 2, 8])), [2, 6, 8])


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (lambda b, x: b(aten.mul.Tensor, x, b(aten.mean.dim, x, [0], True)), "runs over the samples"),
        (lambda b, x: b(aten.softmax.int, x, 0), "runs over the samples"),
        (lambda b, x: b(aten.flip.default, x, [0]), "runs over the samples"),
        (lambda b, x: b(aten.roll.default, x, [1], [0]), "not known to treat each sample by itself"),
        (lambda b, x: b(aten.cat.default, [b(aten.slice.Tensor, x, 0, s, s + 1) for s in (1, 0)], 0), "apart"),
        (_packed, "attend to each other"),
    ],
)
def test_what_mixes_samples_is_refused(op, said):
    assert said in refused(build(op), "cache_guidance{form=batch}")


def test_what_treats_samples_alone_is_not_refused():
    assert CacheGuidance(form="batch").run(build(_paired), Context()).applied == 1


def test_a_constant_as_large_as_the_batch_is_cut():
    program = build(lambda b, x: b(aten.add.Tensor, x, b(aten.mul.Tensor, b.param("bias", 2, 6, 8), 2.0)))
    made = CacheGuidance(form="batch", keep="nothing").run(program, Context())
    assert made.applied == 1
    assert "aten.slice.Tensor" in str(made.program)


def test_numbers_measured_on_the_whole_batch_are_refused():
    program = captured("plain")[1].program
    text = "outline_blocks, cache{region=blocks.1:-1,signal=hidden,threshold=0.1}, cache_guidance{form=batch}"
    assert "measures numbers of the whole batch" in refused(program, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cache_guidance{since=0.5,until=0.5}", "since < until"),
        ("cache_guidance{mask=012}", "expected 1"),
        ("cache_guidance{mask=01}", "nothing to reuse"),
        ("cache_guidance{keep=nothing,predictor=taylor}", "no predictor"),
        ("cache_guidance{predictor=dmd}", "without a window"),
        ("cache_guidance{order=1}", "no order"),
        ("cache_guidance{every=-1}", "0 or more"),
        ("cache_guidance{low=0.8,high=0.1}", "expected low < high, or 0 for both"),
    ],
)
def test_bad_options_are_one_sentence(text, said):
    with pytest.raises(RecipeError, match=said):
        PassManager(text).run(example.tiny_dit(1))


def test_a_window_of_the_time_needs_a_timestep():
    program = example.tiny_dit(1)
    untimed = tuple(dataclasses.replace(i, role="prompt") for i in program.inputs)
    said = refused(program.replace(inputs=untimed), "cache_guidance{form=calls,high=0.5}")
    assert "there is no timestep to compare low and high with" in said


def test_bands_need_rows_and_columns():
    assert "rows and columns" in refused(example.tiny_dit(1), "cache_guidance{keep=bands}")


def test_a_second_pass_and_an_odd_batch_are_refused():
    once = PassManager("cache_guidance").run(example.tiny_dit(1))[-1].program
    assert "already" in refused(once, "cache_guidance{every=3}")
    assert "no two halves" in refused(build_odd(), "cache_guidance{form=batch}")


def build_odd():
    b = example.Builder()
    return b.program(b(aten.gelu.default, b.input("x", "latent", 3, 4)))


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(RecipeError, match="2 steps, the request has 3"):
        PassManager("cache_guidance{mask=10}", Context(steps=3)).run(example.tiny_dit(1))


def test_mean_of_the_halves_needs_plain_caches():
    text = "outline_blocks, cache{region=blocks.1:-1,store=int8}, cache_guidance{form=batch,held=mean}"
    assert "values as they are" in refused(example.tiny_dit(), text)


def test_what_other_caches_hold_is_read_as_the_mean_of_both_halves():
    """At the second step only the conditional half runs, with what the block kept of both."""
    model, _ = captured("plain")
    x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([300.0, 300.0]), torch.tensor([9, 3])
    got = {}
    for held in ("own", "mean"):
        recipe = (
            "cache{region=model,every=2,residual=no},"
            f"cache_guidance{{mask=10,keep=nothing,form=batch,unconditional=first,held={held}}}"
        )
        fast = ditopt.optimize(model, recipe, steps=2, target="eager")
        with torch.no_grad(), fast.session(steps=2), warnings.catch_warnings():
            warnings.simplefilter("error", DitoptWarning)
            first = fast(torch.cat([x, x]), t, y)
            got[held] = fast(torch.cat([x, x]), t - 20, y)
    assert torch.equal(got["own"][1], first[1])
    torch.testing.assert_close(got["mean"][1], first.mean(0))


@pytest.mark.parametrize("form", ["calls", "batch"])
def test_an_exported_file_skips_as_well(form, tmp_path):
    model, _ = captured("plain")
    rows = 2 if form == "batch" else 1
    x, y = torch.randn(1, 4, 8, 8).expand(rows, -1, -1, -1).contiguous(), torch.tensor([9, 3][:rows])
    example_inputs = {"x": x, "t": torch.full((rows,), 500.0), "y": y}
    made = ditopt.export_onnx(model, tmp_path / "m.onnx", "cfg_cache", steps=4, example_inputs=example_inputs)
    assert [d.guidance for d in made.decisions] == [form], "the doubled batch of the example is seen"
    assert min(g.flops for g in made.graphs) < 0.6 * made.full_flops
