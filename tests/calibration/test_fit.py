"""From a recording to a recipe: the schedules are the published ones, and systems find their sources by name."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ditopt
from ditopt.calibration import Profile, fit, sources
from ditopt.calibration.curves import FLUX_RATIOS, magcache
from ditopt.errors import BadInput, DitoptWarning, RecipeError
from ditopt.recipe import Recipe, available
from tests.calibration.use import Pipe, sampler


def profile(values: dict[str, np.ndarray], regions: dict[str, tuple[str, ...]]) -> Profile:
    count = next(iter(values.values())).shape[1]
    return Profile({"steps": str(count)}, np.arange(count, dtype=np.float64), values, regions)


# -- magcache ----------------------------------------------------------------------------------------------------------


def test_magcache_agrees_with_diffusers():
    """The hook of diffusers itself, asked step by step; it has no blocks to run here."""
    mag_cache = pytest.importorskip("diffusers.hooks.mag_cache")
    for threshold, most, share in ((0.24, 5, 0.1), (0.06, 3, 0.2), (0.5, 2, 0.0), (0.0, 3, 0.2), (1e9, 4, 0.5)):
        config = mag_cache.MagCacheConfig(threshold, most, share, len(FLUX_RATIOS), list(FLUX_RATIOS))
        state = mag_cache.MagCacheState()
        states = SimpleNamespace(_context="inference", get_state=lambda state=state: state)
        head = mag_cache.MagCacheHeadHook(states, config)
        head._metadata = SimpleNamespace(
            hidden_states_argument_name="x",
            return_encoder_hidden_states_index=None,
            _get_parameter_from_args_kwargs=lambda name, args, kwargs: args[0],
        )
        head.fn_ref = SimpleNamespace(original_forward=lambda x: x)
        computed = ""
        for k in range(len(FLUX_RATIOS)):
            state.step_index = k
            head.new_forward(None, torch.zeros(1))
            computed += "01"[state.should_compute]
            state.previous_residual = torch.zeros(1)
        assert magcache(FLUX_RATIOS, threshold, most, share) == computed


def test_magcache_as_a_recipe():
    value = np.ones((1, 8, 4, 2), np.float32)
    value[:, 5:] *= 2
    made = fit("magcache{threshold=0.5,retention_ratio=0}", profile({"blocks": value}, {"blocks": ("blocks",)}))
    assert str(made).endswith("cache{region=blocks,mask=10001100,residual=yes}")
    text = np.ones((1, 8, 4, 3), np.float32)  # a second stream, in which nothing changes
    both = profile({"blocks": value, "blocks/1": text}, {"blocks": ("blocks", "blocks/1")})
    assert str(fit("magcache{threshold=0.49,retention_ratio=0}", both)).endswith("mask=10001100,residual=yes}")
    assert str(fit("magcache{threshold=0.5,retention_ratio=0}", both)).endswith("mask=10001010,residual=yes}")
    with pytest.raises(BadInput, match="retention"):
        fit("magcache{retention_ratio=2}", both)
    assert made.name == "magcache"
    assert made.calibrated == {"steps": "8"}


# -- smoothcache -------------------------------------------------------------------------------------------------------


def test_types_of_layers_have_schedules_of_their_own():
    moving = np.cumsum(np.ones((1, 6, 3, 2), np.float32), 1) ** 3
    still = np.ones_like(moving)
    values = {"blocks.0.attn": still, "blocks.1.attn": still, "blocks.0.mlp": moving}
    regions = {"blocks.*.attn": ("blocks.0.attn", "blocks.1.attn"), "blocks.*.mlp": ("blocks.0.mlp",)}
    made = fit("smoothcache{alpha=0.1,lookahead=2}", profile(values, regions))
    assert [str(s) for s in made.steps if s.name == "cache"] == ["cache{region=blocks.*.attn,mask=100101}"]
    made = fit("smoothcache{alpha=1e9,lookahead=1}", profile(values, regions))
    assert [s.options["mask"] for s in made.steps if s.name == "cache"] == ["101011", "101011"]
    with pytest.warns(DitoptWarning, match="this recipe reuses nothing: the outputs of every layer type move by more"):
        made = fit("smoothcache{alpha=0}", profile(dict.fromkeys(values, moving), regions))
    assert "cache" not in str(made)


# -- systems and sources -----------------------------------------------------------------------------------------------


def test_every_fitted_system_has_its_source():
    asked = {system.calibration for system in available().values() if system.calibration}
    assert asked == set(sources.names())
    for name in asked:
        assert sources.searcher(name) is not None or sources.get(name).REGIONS
    with pytest.raises(RecipeError, match="no calibration is called 'magcach'; did you mean 'magcache'"):
        sources.get("magcach")


@pytest.fixture
def every_second(tmp_path, monkeypatch):
    """A system of somebody else: a TOML file, and a source found by its file name."""
    (tmp_path / "every_second.py").write_text(
        textwrap.dedent("""
        REGIONS = ["model"]
        given = {}

        def fit(profile, parameters):
            given.update(parameters)
            mask = "".join("10"[k % 2] for k in range(profile.steps))
            return f"cache{{region=model,mask={mask}}}"
        """)
    )
    (tmp_path / "nothing.py").write_text("REGIONS = 'model'\n")
    system = 'name = "mine"\ncalibration = "every_second"\n[parameters.share]\ndefault = 0.5\ndoc = "how much"\n'
    (tmp_path / "mine.toml").write_text(system)
    (tmp_path / "other.toml").write_text('name = "other"\ncalibration = "nothing"\n')
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    yield tmp_path
    for name in ("every_second", "nothing"):
        sys.modules.pop(f"ditopt.calibration.sources.{name}", None)
        vars(sources).pop(name, None)


def test_a_source_is_a_file(every_second):
    made = ditopt.calibrate(Pipe(), every_second / "mine.toml", sampler, steps=5, seeds=[0], progress=False)
    assert (str(made), made.name) == ("cache{region=model,mask=10101}", "mine")
    assert made.calibrated["steps"] == "5"
    assert sources.get("every_second").given == {"share": 0.5}  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="mine is fitted to a model"):
        Recipe.parse(every_second / "mine.toml")
    with pytest.raises(RecipeError, match=r"nothing\.py among the sources of calibration must offer REGIONS"):
        ditopt.calibrate(Pipe(), every_second / "other.toml", sampler, steps=5)


def test_what_cannot_be_fitted_is_said():
    with pytest.raises(RecipeError, match=r"fora is not fitted to a model: pass it to ditopt\.optimize as it is"):
        ditopt.calibrate(Pipe(), "fora", sampler, steps=5)
    with pytest.raises(RecipeError, match="did you mean 'alpha'"):
        ditopt.calibrate(Pipe(), "smoothcache{alpa=1}", sampler, steps=5)
    recording = profile({"model": np.ones((1, 3, 2, 1), np.float32)}, {"model": ("model",)})
    with pytest.raises(RecipeError, match=r"region 'blocks' was not recorded"):
        fit("magcache", recording)


def test_a_profile_cannot_be_changed():
    recording = profile({"model": np.ones((1, 3, 2, 1), np.float32)}, {"model": ("model",)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        recording.times = recording.times  # type: ignore[misc]
