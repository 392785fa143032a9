"""Settings of cache-dit: files as its documentation writes them, and keys that it would ignore."""

import warnings

import pytest
import torch

import ditopt
from ditopt.errors import DitoptWarning, RecipeError
from ditopt.recipe import Recipe
from ditopt.recipes.cache_dit import DBCacheSettings
from ditopt.recipes.scm import scm_policy
from tests import tiny_sampler

DOCUMENTED = """
cache_config:
  max_warmup_steps: 8
  warmup_interval: 2
  max_cached_steps: -1
  max_continuous_cached_steps: 2
  Fn_compute_blocks: 1
  Bn_compute_blocks: 0
  residual_diff_threshold: 0.12
  enable_taylorseer: true
  taylorseer_order: 1
  num_inference_steps: 28
  steps_computation_mask: fast
"""


def parsed(tmp_path, text: str) -> str:
    path = tmp_path / "cache.yaml"
    path.write_text(text)
    return str(Recipe.parse(str(path)))


def test_a_file_of_cache_dit_is_a_recipe(tmp_path):
    """Each of its names where its users know it; what is not said is cache-dit's default, not that of the recipe."""
    found = parsed(tmp_path, DOCUMENTED)
    same = Recipe.parse(
        "dbcache{Fn_compute_blocks=1,B=0,R=0.12,W=8,MC=2,predictor=taylorseer,taylorseer_order=1,"
        "SCM=1111110100010000100000100001}"
    )
    assert found == str(same)
    plain = parsed(tmp_path, "cache_config: {cache_type: DBCache}")
    assert plain == str(Recipe.parse("dbcache{F=8,B=0,threshold=0.08,warmup=8}"))
    assert parsed(tmp_path, "{max_cached_steps: 7, enable_foca: true, Bn_compute_blocks: 2}") == str(
        Recipe.parse("dbcache{F=8,B=2,M=7,calibrator=foca}")
    )
    static = "{steps_computation_mask: [1, 1, 0, 1], steps_computation_policy: static, enable_dmd: true}"
    assert parsed(tmp_path, static) == str(Recipe.parse("dbcache{F=8,policy=static,mask=1101,predictor=dmd}"))
    pruned = "{cache_type: DBPrune, residual_diff_threshold: 0.04, max_warmup_steps: 2}"
    assert parsed(tmp_path, pruned) == str(Recipe.parse("dbprune{F=8,R=0.04,W=2}"))
    some = "{max_warmup_steps: 4, warmup_interval: 2, num_inference_steps: 7}"
    assert "mask=1010000" in parsed(tmp_path, some)
    budget = parsed(tmp_path, "{max_accumulated_residual_diff_threshold: 0.5}")
    assert "budget=0.5" in budget


def test_a_file_of_cache_dit_runs(tmp_path):
    path = tmp_path / "cache.yml"
    path.write_text("{Fn_compute_blocks: 1, max_warmup_steps: 2, residual_diff_threshold: 0.9}")
    outputs = []
    for recipe in (path, "dbcache{F=1,B=0,W=2,R=0.9}"):
        fast = ditopt.optimize(tiny_sampler.model(), recipe, target="eager", steps=8)
        outputs.append(tiny_sampler.sample(fast, 3, 8))
        assert fast.stats.hits.total() > 0
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{max_cached_steps: 0}", "max_cached_steps=0 caches nothing; give -1"),
        ("{force_refresh_step_hint: 3}", "force_refresh_step_hint=3 cannot be followed: open a session"),
        ("{enable_taylorseer: true, taylorseer_cache_type: hidden_states}", "taylorseer_cache_type='hidden_states'"),
        ("{non_prune_block_ids: [8], cache_type: DBPrune}", "cannot be followed: give Fn_compute_blocks"),
        ("{steps_computation_policy: static}", "static needs a steps_computation_mask"),
        ("{warmup_interval: 2}", "warmup_interval=2 needs num_inference_steps"),
        ("{cache_type: DBPrune, enable_foca: true}", "foca goes with cache_type DBCache"),
        ("{residual_diff_treshold: 0.1}", "no setting is called residual_diff_treshold"),
        ("{residual_diff_threshold: 2}", "expected at most 1"),
    ],
)
def test_what_a_file_cannot_ask_for_is_one_sentence(tmp_path, text, says):
    with pytest.raises(RecipeError, match=says) as caught:
        parsed(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_what_needs_no_setting_here_is_said(tmp_path):
    with pytest.warns(DitoptWarning, match="enable_separate_cfg has no effect here"):
        parsed(tmp_path, "{enable_separate_cfg: true}")


def test_defaults_are_those_of_cache_dit():
    settings = DBCacheSettings()
    assert (settings.Fn_compute_blocks, settings.Bn_compute_blocks, settings.residual_diff_threshold) == (8, 0, 0.08)
    assert (settings.max_warmup_steps, settings.warmup_interval, settings.max_cached_steps) == (8, 1, -1)
    assert (settings.max_continuous_cached_steps, settings.calibrator) == (-1, "hold")
    assert settings.warmup_steps == tuple(range(8))


def test_a_documented_file(tmp_path):
    path = tmp_path / "cache.yaml"
    path.write_text(DOCUMENTED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = DBCacheSettings.read(path)
    assert settings == DBCacheSettings(
        max_warmup_steps=8,
        warmup_interval=2,
        max_continuous_cached_steps=2,
        Fn_compute_blocks=1,
        residual_diff_threshold=0.12,
        enable_taylorseer=True,
        num_inference_steps=28,
        steps_computation_mask="1111110100010000100000100001",
    )
    assert settings.calibrator == "taylorseer"
    assert settings.warmup_steps == (0, 2, 4)  # the mask reuses from step 6 on
    assert DBCacheSettings(warmup_interval=3).warmup_steps == (0, 3, 6)


def test_flat_keys_and_null_and_lists():
    given = {"cache_type": "DBPrune", "max_warmup_steps": None, "non_prune_block_ids": [8, 9], "enable_foca": True}
    settings = DBCacheSettings.parse({**given, "residual_diff_threshold": 1})
    assert settings.non_prune_block_ids == (8, 9)
    assert settings.max_warmup_steps == 8
    assert settings.residual_diff_threshold == 1.0
    assert settings.calibrator == "foca"
    listed = DBCacheSettings.parse({"steps_computation_mask": [1, 0, 1], "steps_computation_policy": "static"})
    assert (
        listed.steps_computation_mask == DBCacheSettings.parse({"steps_computation_mask": "101"}).steps_computation_mask
    )
    assert listed.steps_computation_mask == "101"
    named = DBCacheSettings.parse({"steps_computation_mask": "slow", "num_inference_steps": 50})
    assert named.steps_computation_mask == scm_policy("slow", 50)


def test_other_sections_are_said_to_have_no_effect():
    given = {
        "cache_config": {"Fn_compute_blocks": 2},
        "parallelism_config": {"tp_size": 2},
        "attention_backend": "flash",
    }
    with pytest.warns(DitoptWarning, match="parallelism_config, attention_backend has no effect"):
        assert DBCacheSettings.parse(given).Fn_compute_blocks == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"enable_sperate_cfg": True},
            "no setting is called enable_sperate_cfg; known are cache_type, .*enable_separate_cfg",
        ),
        ({"cache_config": {"Fn": 1}}, "no setting is called Fn; known are"),
        ({"cache_config": {"Fn_compute_blocks": 1}, "extra": 1}, "extra stands beside cache_config"),
        ({}, "no cache settings found"),
        ({"cache_config": None}, "no cache settings found"),
        ({"quantize_config": {}}, "no cache settings found"),
        ([1], "a list given"),
        (None, "a NoneType given"),
        ({"Fn_compute_blocks": 1.5}, "Fn_compute_blocks=1.5 given; expected a whole number"),
        ({"Fn_compute_blocks": True}, "Fn_compute_blocks=True given"),
        ({"enable_taylorseer": 1}, "expected true or false"),
        ({"residual_diff_threshold": "0.1"}, "expected a number"),
        ({"residual_diff_threshold": float("nan")}, "residual_diff_threshold=nan"),
        ({"residual_diff_threshold": -0.1}, "residual_diff_threshold=-0.1 given; expected a number from 0"),
        ({"warmup_interval": 0}, "warmup_interval=0"),
        ({"max_cached_steps": -2}, "from -1 on"),
        ({"cache_type": "FBCache"}, "DBCache or DBPrune"),
        ({"steps_computation_policy": "x"}, "dynamic or static"),
        ({"enable_taylorseer": True, "enable_dmd": True}, "exclude each other"),
        ({"steps_computation_mask": "fast"}, "needs num_inference_steps"),
        ({"steps_computation_mask": "quick", "num_inference_steps": 28}, "one of slow, medium, fast, ultra"),
        ({"steps_computation_mask": [1, 2]}, "list of 0 and 1"),
        ({"steps_computation_mask": [0, 1]}, "first digit must be 1"),
        ({"steps_computation_mask": [1, 0], "num_inference_steps": 3}, "2 digits for a run of 3 steps"),
        ({"non_prune_block_ids": "8"}, "a list of whole numbers"),
    ],
)
def test_wrong_settings_are_one_sentence(given, says):
    with pytest.raises(RecipeError, match=says) as caught:
        DBCacheSettings.parse(given)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.yaml"
    for content in (b"a: [1", b"\xff\xfe\x00\x01", b"!!python/object/apply:os.getcwd []"):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match="cannot be read") as caught:
            DBCacheSettings.read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="cannot be read"):
        DBCacheSettings.read(tmp_path / "none.yaml")
    path.write_text("")
    with pytest.raises(RecipeError, match=r"a\.yaml: a NoneType given"):
        DBCacheSettings.read(path)
