"""From a recording to a recipe: the schedules are the published ones, and systems find their sources by name."""

from __future__ import annotations

import dataclasses
import sys
import textwrap

import numpy as np
import pytest

import ditopt
from ditopt.calibration import Profile, fit, sources
from ditopt.calibration.sources import magcache, smoothcache
from ditopt.errors import DitoptWarning, RecipeError
from ditopt.recipe import Recipe, available
from tests.calibration.use import Pipe, sampler

FLUX = [
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359),
    0.89062,
]
"""The magnitude ratios that MagCache publishes for FLUX.1-dev, 28 steps."""


def steps(mask) -> list[int]:
    return [k for k, computed in enumerate(mask) if computed]


def profile(values: dict[str, np.ndarray], regions: dict[str, tuple[str, ...]]) -> Profile:
    count = next(iter(values.values())).shape[1]
    return Profile({"steps": str(count)}, np.arange(count, dtype=np.float64), values, regions)


# -- magcache ----------------------------------------------------------------------------------------------------------


def test_magcache_gives_the_published_schedule():
    assert steps(magcache.mask(FLUX, 0.24, 5, 0.1)) == [0, 1, 2, 5, 9, 15, 21, 26]
    expected = [0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 21, 24, 26, 27]
    assert steps(magcache.mask(FLUX, 0.06, 3, 0.2)) == expected, "the defaults of diffusers"


def test_magcache_agrees_with_diffusers():
    """The hook of diffusers itself, asked step by step; it has no blocks to run here."""
    from types import SimpleNamespace

    import torch
    from diffusers.hooks import mag_cache

    for threshold, most, share in ((0.24, 5, 0.1), (0.06, 3, 0.2), (0.5, 2, 0.0), (0.0, 3, 0.2), (1e9, 4, 0.5)):
        config = mag_cache.MagCacheConfig(threshold, most, share, len(FLUX), FLUX)
        state = mag_cache.MagCacheState()
        states = SimpleNamespace(_context="inference", get_state=lambda state=state: state)
        head = mag_cache.MagCacheHeadHook(states, config)
        head._metadata = SimpleNamespace(
            hidden_states_argument_name="x",
            return_encoder_hidden_states_index=None,
            _get_parameter_from_args_kwargs=lambda name, args, kwargs: args[0],
        )
        head.fn_ref = SimpleNamespace(original_forward=lambda x: x)
        computed = []
        for k in range(len(FLUX)):
            state.step_index = k
            head.new_forward(None, torch.zeros(1))
            computed.append(state.should_compute)
            state.previous_residual = torch.zeros(1)
        assert magcache.mask(FLUX, threshold, most, share) == computed


def test_magnitude_ratios_are_of_tokens():
    residual = np.ones((2, 3, 5, 4), np.float32)
    residual[:, 1] *= 3
    residual[:, 2, 0] = 0  # of ten tokens two vanish
    other = np.ones((2, 3, 5, 7), np.float32)  # a second stream
    assert magcache.ratios([residual]) == pytest.approx([1, 3, 8 / 3 / 10])
    assert magcache.ratios([residual, other]) == pytest.approx([1, 2, (8 / 3 + 10) / 20])


def test_magcache_as_a_recipe():
    value = np.ones((1, 8, 4, 2), np.float32)
    value[:, 5:] *= 2
    made = fit("magcache{threshold=0.5,retention_ratio=0}", profile({"blocks": value}, {"blocks": ("blocks",)}))
    assert str(made).endswith("cache{region=blocks,mask=10001100,residual=yes}")
    assert made.name == "magcache"
    assert made.calibrated == {"steps": "8"}


# -- smoothcache -------------------------------------------------------------------------------------------------------


def test_the_distance_is_relative_to_the_earlier_step():
    value = np.zeros((2, 4, 3, 2), np.float32)
    value[:, :] = np.array([1, 2, 4, 4], np.float32)[:, None, None]
    curves = smoothcache.errors([value, value * -5], 2)
    assert curves[:, 0] == pytest.approx([1, 1, 0, np.inf])
    assert curves[:, 1] == pytest.approx([3, 1, np.inf, np.inf])
    still = np.ones_like(value)
    assert smoothcache.errors([value, still], 2)[:, 0] == pytest.approx([0.5, 0.5, 0, np.inf]), "the mean over layers"


def test_the_greedy_schedule():
    curves = np.full((8, 3), 0.1)
    curves[0, 2] = 0.3
    curves[3, 0] = 0.3  # and further away it is near again: that counts for nothing
    assert steps(smoothcache.mask(curves, 0.2)) == [0, 3, 4, 7]
    assert steps(smoothcache.mask(curves, 0.05)) == list(range(8))
    assert steps(smoothcache.mask(curves, 1)) == [0, 4, 7], "the last step computes"


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
        made = fit("smoothcache{alpha=0}", profile({k: moving for k in values}, regions))
    assert "cache" not in str(made)


# -- systems and sources -----------------------------------------------------------------------------------------------


def test_every_fitted_system_has_its_source():
    asked = {system.calibration for system in available().values() if system.calibration}
    assert asked == set(sources.names())
    for name in asked:
        assert sources.get(name).REGIONS
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
