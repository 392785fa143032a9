"""What each input is to the loop: by its name, by its shape, as told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ditopt import roles as role_rules
from ditopt.errors import BadInput
from tests.capture.use import take
from tests.tiny_models import ZOO, captured

NAMES = list(ZOO)


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            "latent",
            "hidden_states x img latents sample noisy_latents control controlnet_block_samples.0 L_kwargs_x_ x_t "
            "x_B_C_T_H_W latent_B_C_Tt_Hp_Wp L_kwargs_x_B_C_T_H_W_ batch.x.0",
        ),
        (
            "timestep",
            "timestep t timesteps sigma r_timestep noise_labels L_kwargs_timestep_ timesteps_B_T c_noise batch.t",
        ),
        (
            "prompt",
            "encoder_hidden_states encoder_hidden_states_image y c context txt prompt_embeds class_labels pooled "
            "pooled_projections guidance encoder_attention_mask cap_feats.1 added_cond_kwargs.text_embeds "
            "attention_mask L_kwargs_encoder_hidden_states_ id_cond id_vit_hidden.0 camera_conditions "
            "global_hidden_states image_cond_hidden_states micro_conds crossattn_emb cond.t batch.y prompts.0 texts.1 "
            "contexts",
        ),
        (
            "shape",
            "img_ids txt_ids position_ids image_rotary_emb.0 resolution fps freqs_cis img_hw rope_emb_L_1_1_D",
        ),
    ],
)
def test_roles_by_name(role, names):
    for name in names.split():
        assert role_rules._by_name(name) == role, name


def test_roles_by_shape():
    """Names that say nothing: the output's shape is the latent's, one number a row is the time, labels are prompts."""
    given = [("q", torch.zeros(2, 7)), ("u", torch.zeros(2, 4)), ("v", torch.zeros(2)), ("w", torch.zeros(2).long())]
    assert role_rules.infer(given, [torch.zeros(2, 4)]) == ["latent", "latent", "timestep", "prompt"]


def test_a_grid_of_the_outputs_shape_is_the_latent_whatever_its_name():
    """Where no other input could be it; a vector of a prompt may have the output's shape by chance."""
    given = [("c", torch.zeros(2, 4, 8, 8)), ("t", torch.zeros(2))]
    assert role_rules.infer(given, [torch.zeros(2, 4, 8, 8)]) == ["latent", "timestep"]
    assert role_rules.infer([("x", given[0][1]), *given], [given[0][1]]) == ["latent", "prompt", "timestep"]
    assert role_rules.infer([("c", torch.zeros(2, 4)), ("t", torch.zeros(2))], [torch.zeros(2, 4)])[0] == "prompt"


def test_ambiguous_times_are_asked_for():
    x, u, v = torch.zeros(2, 4), torch.zeros(2), torch.ones(2)
    given = [("x", x), ("u", u), ("n", torch.zeros(2).long()), ("v", v)]
    with pytest.raises(BadInput) as error:
        role_rules.infer(given, [x])
    assert str(error.value) == (
        "the inputs u, v (all float32[2]) could each be the time of the step, and no name tells; pass "
        "roles={'u': 'timestep', 'v': 'prompt'} or the other way round (roles are latent, timestep, prompt, shape)"
    )
    assert role_rules.infer(given, [x], guess=True) == ["latent", "timestep", "prompt", "latent"]
    assert role_rules.infer(given, [x], {"v": "timestep"}) == ["latent", "latent", "prompt", "timestep"]
    assert role_rules.infer(given, [x], {"v": "prompt"}) == ["latent", "timestep", "prompt", "prompt"]


def test_a_conditioning_of_one_number_a_row_is_the_time_where_nothing_else_is():
    """``forward(x, c)``: the name says prompt, but then there would be no time."""
    x, c = ("x", torch.zeros(2, 4)), ("c", torch.zeros(2))
    assert role_rules.infer([x, c], [x[1]]) == ["latent", "timestep"]
    assert role_rules.infer([x, c], [x[1]], {"c": "prompt"}) == ["latent", "prompt"]
    assert role_rules.infer([x, c, ("t", torch.zeros(2))], [x[1]]) == ["latent", "prompt", "timestep"]
    assert role_rules.infer([x, ("c", torch.zeros(2).long())], [x[1]]) == ["latent", "prompt"]
    with pytest.raises(BadInput, match=r"the inputs c, guidance .* could each be the time"):
        role_rules.infer([x, c, ("guidance", torch.zeros(2))], [x[1]])


def test_numbers_of_words_are_no_positions_and_may_be_the_latent():
    ids = ("input_ids", torch.zeros(2, 7).long())
    drop = ("drop", torch.zeros(2, 7, dtype=torch.bool))
    assert role_rules.infer([("x", torch.zeros(2, 4)), ids, drop], [torch.zeros(2, 4)]) == [
        "latent",
        "prompt",
        "prompt",
    ]
    assert role_rules.infer([ids, drop], [torch.zeros(2, 9, 7)]) == ["latent", "prompt"]


def test_a_single_number_is_no_latent():
    given = [("x", torch.zeros(2, 4)), ("t", torch.zeros(2)), ("scale", torch.tensor(0.5)), ("w", torch.zeros(2))]
    assert role_rules.infer(given, [torch.zeros(2, 4)]) == ["latent", "timestep", "prompt", "latent"]


@pytest.mark.parametrize(
    "inputs",
    [
        [("x", torch.zeros(2, 4)), ("t", torch.zeros(2)), ("u", torch.zeros(2))],  # a name tells
        [("x", torch.zeros(2, 4)), ("u", torch.zeros(2)), ("n", torch.zeros(2).long())],  # labels are no times
        [("x", torch.zeros(2, 4)), ("u", torch.zeros(2)), ("n", torch.zeros(()))],  # one number a row
        [("p", torch.zeros(2, 4)), ("q", torch.zeros(2, 4)), ("u", torch.zeros(2))],  # latents both
    ],
)
def test_what_is_not_ambiguous(inputs):
    assert "timestep" in role_rules.infer(inputs, [torch.zeros(2, 4)])


@pytest.mark.parametrize("name", NAMES)
def test_roles_of_the_tiny_models(name):
    roles = {i.name: i.role for i in captured(name)[1].program.inputs}
    assert list(roles.values()).count("latent") == 1
    assert list(roles.values()).count("timestep") == 1
    shape = {n for n, r in roles.items() if r == "shape"}
    assert shape == ({"img_ids", "txt_ids"} if name == "flux" else set())


class Anonymous(nn.Module):
    """``Plain`` behind names that say nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, a: Tensor, b: Tensor, foo: Tensor) -> Tensor:
        return self.inner(a, b, foo)


def test_roles_can_be_given():
    inputs = dict(zip("ab", list(ZOO["plain"].inputs().values())[:2], strict=True)) | {"foo": torch.tensor([3, 7])}
    model = Anonymous(captured("plain")[0])
    assert [i.role for i in take(model, **inputs).program.inputs] == ["latent", "timestep", "prompt"]
    given = {"b": "shape", "foo": "timestep"}
    assert [i.role for i in take(model, roles=given, **inputs).program.inputs] == ["latent", "shape", "timestep"]


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ({"tt": "timestep"}, ["names the input 'tt'", "x, t, y", "did you mean 't'"]),
        ({"t": "time"}, ["'time'", "latent, timestep, prompt, shape"]),
    ],
)
def test_unknown_roles_and_names(roles, words):
    with pytest.raises(BadInput) as error:
        take(captured("plain")[0], roles=roles, **ZOO["plain"].inputs())
    assert all(w in str(error.value) for w in words)
