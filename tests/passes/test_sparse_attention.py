"""sparse_attention and reorder_tokens on real classes: self, joint and cross attention; what no program may hold."""

from __future__ import annotations

import pytest
import torch

from ditopt.capture import bind, capture
from ditopt.ir.cost import step_flops
from ditopt.ir.edit import inline
from ditopt.ir.interpret import run_program
from ditopt.ir.opening import opened, spelled
from ditopt.ops import block_sparse_attention
from ditopt.pipeline import Context, PassManager

diffusers = pytest.importorskip("diffusers")


def noisy(model):
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model.eval()


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=16,
        patch_size=1, num_embeds_ada_norm=10,
    )  # fmt: skip
    given = {"timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}
    return noisy(model), {"hidden_states": torch.randn(1, 4, 16, 16), **given}


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    given = {"encoder_hidden_states": torch.randn(1, 7, 32), "pooled_projections": torch.randn(1, 16)}
    return noisy(model), {"hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([3.0]), **given}


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(16.0), torch.arange(16.0), indexing="ij"), -1)
    given = {"encoder_hidden_states": torch.randn(1, 7, 32), "pooled_projections": torch.randn(1, 32)}
    given |= {"timestep": torch.tensor([0.5]), "img_ids": ids.view(-1, 3), "txt_ids": torch.zeros(7, 3)}
    return noisy(model), {"hidden_states": torch.randn(1, 256, 4), **given}


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        patch_size=1, cross_attention_dim=32, caption_channels=32,
    )  # fmt: skip
    size = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    given = {"encoder_hidden_states": torch.randn(1, 40, 32), "timestep": torch.tensor([3]), **size}
    return noisy(model), {"hidden_states": torch.randn(1, 4, 16, 16), **given}


MODELS = {"self": dit, "joint": sd3, "joint and rotated": flux, "self and cross": pixart}


def captured(kind):
    torch.manual_seed(0)
    model, given = MODELS[kind]()
    spec, tensors = bind(model, (), given)
    return capture(model, spec, tensors).program, dict(zip(spec.names, tensors, strict=True))


def far(program, other, inputs):
    (a, *_), (b, *_) = run_program(program, inputs)[0], run_program(other, inputs)[0]
    assert a.isfinite().all()
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pattern", ["window", "tile", "draft"])
def test_replaces_attention_and_holds_no_square(kind, pattern):
    program, inputs = captured(kind)
    recipe = f"sparse_attention{{pattern={pattern},block=16,density=0.25}}"
    result = PassManager(recipe, Context(given=inputs)).run(program)[-1]
    assert result.applied >= 2, result
    flat = inline(result.program)
    assert any(n.target is block_sparse_attention for n in flat.graph.nodes)
    assert 1e-6 < far(program, result.program, inputs) < 0.7
    assert step_flops(result.program)[0] < step_flops(result.before)[0]
    written = inline(spelled(opened(result.program)))
    tokens = 256
    for node in (*flat.graph.nodes, *written.graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert sum(int(n) >= tokens for n in value.shape) < 2, f"{node} is {list(value.shape)}"
    if kind == "self and cross":
        assert any("text is never left out" in r for r in result.refused)


@pytest.mark.parametrize("kind", MODELS)
def test_all_blocks_are_dense_attention(kind):
    program, inputs = captured(kind)
    result = PassManager("sparse_attention{block=16,density=1}", Context(given=inputs)).run(program)[-1]
    assert result.applied == 0
    assert any("nothing would be left out" in r for r in result.refused)


@pytest.mark.parametrize("kind", MODELS)
def test_order_of_tokens_changes_rounding_only(kind):
    program, inputs = captured(kind)
    result = PassManager("reorder_tokens{block=16}", Context(given=inputs)).run(program)[-1]
    assert result.applied >= 2, result
    assert far(program, result.program, inputs) < 1e-5
    sparse = "sparse_attention{pattern=tile,block=16,density=0.25}"
    once = PassManager(f"reorder_tokens{{block=16}}, {sparse}", Context(given=inputs)).run(program)[-1].program
    each = PassManager(sparse, Context(given=inputs)).run(program)[-1].program
    assert far(once, each, inputs) < 1e-5
    assert not any(".order." in n for n in once.params), "the tokens lie in tiles already"


def test_a_grid_has_to_be_found_or_given():
    program, _ = captured("joint and rotated")
    result = PassManager("sparse_attention{block=16}").run(program)[-1]
    assert result.applied == 0
    assert all("no grid was found" in r and "give grid=" in r for r in result.refused)
    assert PassManager("sparse_attention{block=16,pattern=draft}").run(program)[-1].applied
    assert "no grid was found" in PassManager("reorder_tokens{block=16}").run(program)[-1].refused[0]


@pytest.mark.parametrize(
    "text", ["sparse_attention{block=16,pattern=tile,grid=10x10}", "reorder_tokens{block=16,grid=10x10}"]
)
@pytest.mark.parametrize(
    ("kind", "there"), [("joint and rotated", "there are 256 tokens;"), ("self and cross", "256 tokens, 16x16;")]
)
def test_a_grid_that_is_not_that_of_the_tokens_is_a_sentence(text, kind, there):
    """Also where the graph shows another one: what a user says is never left out in silence."""
    program, _ = captured(kind)
    result = PassManager(text).run(program)[-1]
    assert result.applied == 0
    assert "grid=10x10 is of 100 tokens" in result.refused[0]
    assert there in result.refused[0]


def test_text_keys_of_cross_attention_may_be_drafted():
    program, inputs = captured("self and cross")
    result = PassManager("sparse_attention{block=16,pattern=draft,density=0.4,cross=sparse}").run(program)[-1]
    assert result.applied == 4 or any("mask" in r for r in result.refused), result
    assert far(program, result.program, inputs) < 0.7


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("sparse_attention{tile=5x5,block=25}", "does not consist of tiles of 5x5"),
        ("sparse_attention{tile=2x2x4,block=16}", "does not consist of tiles"),
        ("sparse_attention{window=4x4x4,block=16}", "another number of axes"),
        ("sparse_attention{tile=auto,block=48}", "has no tiles of 48 tokens"),
        ("sparse_attention{block=256}", "nothing would be left out"),
        ("reorder_tokens{tile=5x5}", "does not consist of tiles of 5x5"),
        ("reorder_tokens{tile=4x16}", "leave the grid 16x16 in its order"),
        ("reorder_tokens{block=48}", "has no tiles of 48 tokens"),
    ],
)
def test_refusals(recipe, said):
    program, _ = captured("self")
    result = PassManager(recipe).run(program)[-1]
    assert result.applied == 0
    assert said in " ".join(result.refused)
    assert result.program is program or str(result.program) == str(result.before)
