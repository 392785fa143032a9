"""Settings of cache-dit: files as its documentation writes them, and keys that it would ignore."""

import warnings

import pytest

from ditopt.calibration.dbcache import DBCacheSettings
from ditopt.calibration.scm import scm_policy
from ditopt.errors import DitoptWarning, RecipeError

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
