"""Recording: the values are those of the model's own modules, and the model is as before, whatever happens."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import ditopt
from ditopt.calibration import Profile, record
from ditopt.errors import ArtifactError, BadInput, DitoptWarning, RecipeError
from tests import tiny_sampler
from tests.calibration.use import ALL, Pipe, hooked, same, sampler, seen
from tests.tiny_sampler import TOKENS, WIDTH

STEPS = 4
MODULES = ("blocks.*.attn", "blocks.*.mlp")
EVERYTHING = (*MODULES, "blocks", "blocks.1:", "model", "latent")
"""Three runs over the seeds: modules, all blocks, some blocks."""


@functools.cache
def recorded() -> tuple[Profile, list[dict[str, torch.Tensor]], torch.Tensor]:
    """A profile of everything for two seeds, what hooks took in the same requests, and the last result."""
    plain = tiny_sampler.model()
    with hooked(plain) as taken:
        for seed in (3, 5):
            last = tiny_sampler.sample(plain, seed, STEPS)
    before = seen(plain)
    results = []

    def run(model, seed, steps):
        results.append(tiny_sampler.sample(model, seed, steps))

    profile = record(plain, run, regions=EVERYTHING, steps=STEPS, seeds=[3, 5], tokens=ALL, progress=False)
    assert same(before, seen(plain))
    assert len(results) == 3 * 2
    return profile, taken, results[-1] if torch.equal(results[-1], last) else torch.zeros(())


def test_the_sampler_gets_what_the_plain_model_gives():
    assert recorded()[2].ndim, "another image than the plain model's"


@pytest.mark.parametrize("name", ["blocks.0.attn", "blocks.2.attn", "blocks.1.mlp", "model", "latent"])
def test_a_value_is_what_the_module_computes(name):
    profile, taken, _ = recorded()
    assert profile.values[name].shape == (2, STEPS, ALL, WIDTH)
    order = torch.randperm(ALL, generator=torch.Generator().manual_seed(0))
    for n in range(2):
        for t in range(STEPS):
            expected = taken[n * STEPS + t][name].reshape(-1, WIDTH)[order]
            assert torch.equal(torch.from_numpy(profile.values[name][n, t]), expected)


@pytest.mark.parametrize(("name", "start"), [("blocks", 0), ("blocks.1:", 1)])
def test_a_run_is_what_its_blocks_add(name, start):
    profile, taken, _ = recorded()
    order = torch.randperm(ALL, generator=torch.Generator().manual_seed(0))
    for t in range(STEPS):
        call = taken[t]
        entry = call["latent"] if start == 0 else call[f"block {start - 1}"]
        expected = (call["block 2"] - entry).reshape(-1, WIDTH)[order]
        assert torch.equal(torch.from_numpy(profile.values[name][0, t]), expected)


def test_what_the_last_layers_read_is_what_the_last_block_gives():
    _, taken, _ = recorded()
    profile = record(
        tiny_sampler.model(), tiny_sampler.sample, regions=["head"], steps=STEPS, seeds=[3], tokens=ALL, progress=False
    )
    order = torch.randperm(ALL, generator=torch.Generator().manual_seed(0))
    assert list(profile.of("head")) == ["head"]
    for t in range(STEPS):
        expected = taken[t]["block 2"].reshape(-1, WIDTH)[order]
        assert torch.equal(torch.from_numpy(profile.values["head"][0, t]), expected)


def test_what_a_profile_says():
    profile, _, _ = recorded()
    assert profile.regions["blocks.*.attn"] == ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
    assert profile.regions["blocks"] == ("blocks",)
    assert list(profile.regions) == list(EVERYTHING)
    assert list(profile.of("blocks.*.mlp")) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    assert profile.recordings == ("seed 3, branch 0", "seed 5, branch 0")
    assert profile.times == pytest.approx([1000, 750, 500, 250])
    assert profile.sigmas is None
    assert profile.steps == STEPS
    assert profile.flops["blocks.0.mlp"] == 2 * ALL * WIDTH * 2 * WIDTH * 2  # up and down
    assert profile.flops["blocks"] >= sum(profile.flops[f"blocks.{i}.{m}"] for i in range(3) for m in ("attn", "mlp"))
    assert profile.flops["model"] > profile.flops["blocks"] > profile.flops["blocks.1:"] > profile.flops["latent"] == 0
    assert profile.key["steps"] == str(STEPS)
    assert profile.key["latent"] == f"{TOKENS}x{WIDTH}"
    assert profile.key["scheduler"] == "unknown"
    assert profile.key["guidance"] == "1 call a step, 1 copy of the latent"
    assert profile.nbytes == 10 * 2 * STEPS * ALL * WIDTH * 4
    with pytest.raises(RecipeError, match=r"'blocks\.\*\.mpl' was not recorded; did you mean 'blocks\.\*\.mlp'"):
        profile.of("blocks.*.mpl")


def test_a_profile_is_one_file(tmp_path):
    profile, _, _ = recorded()
    loaded = Profile.load(profile.save(tmp_path / "p.safetensors"))
    assert loaded.key == profile.key
    assert loaded.regions == profile.regions
    assert loaded.flops == profile.flops
    assert loaded.recordings == profile.recordings
    assert loaded.sigmas is None
    assert list(loaded.values) == list(profile.values)
    assert all(np.array_equal(loaded.values[n], profile.values[n]) for n in profile.values)
    assert np.array_equal(loaded.times, profile.times)
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "p.safetensors").read_bytes()[:999])
    for name in ("bad.safetensors", "nowhere.safetensors"):
        with pytest.raises(ArtifactError, match=rf"{name} is no profile.*record it again"):
            Profile.load(tmp_path / name)


# -- pipelines and guidance --------------------------------------------------------------------------------------------


def test_a_pipeline_is_recorded_and_left_as_it_was():
    pipe = Pipe("batch")
    own, before = pipe.transformer, seen(pipe.transformer, pipe)
    expected = pipe(1, STEPS)
    profile = record(pipe, sampler, regions=["model"], steps=STEPS, seeds=[1], progress=False)
    assert same(before, seen(own, pipe))
    assert pipe.transformer is own
    assert torch.equal(pipe(1, STEPS), expected)
    assert profile.key["guidance"] == "1 call a step, 2 copies of the latent"
    assert profile.key["scheduler"].startswith("Scheduler ")
    assert profile.sigmas == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert profile.values["model"].shape == (1, STEPS, 2 * ALL, WIDTH)


def test_guidance_by_two_calls_gives_two_recordings():
    pipe = Pipe("calls")
    with hooked(pipe.transformer) as taken:
        pipe(1, STEPS)
    profile = record(pipe, sampler, regions=["blocks.*.mlp"], steps=STEPS, seeds=[1], tokens=ALL, progress=False)
    assert profile.recordings == ("seed 1, branch 0", "seed 1, branch 1")
    assert profile.key["guidance"] == "2 calls a step, 1 copy of the latent"
    order = torch.randperm(ALL, generator=torch.Generator().manual_seed(0))
    for branch in range(2):
        expected = taken[2 * 3 + branch]["blocks.1.mlp"].reshape(-1, WIDTH)[order]
        assert torch.equal(torch.from_numpy(profile.values["blocks.1.mlp"][branch, 3]), expected)


def test_a_branch_that_misses_steps_is_left_out():
    with pytest.warns(DitoptWarning, match="1 guidance branches were not called at every step and are left out"):
        profile = record(Pipe("calls", late=2), sampler, regions=["model"], steps=STEPS, seeds=[1], progress=False)
    assert profile.recordings == ("seed 1, branch 0",)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [Stop, KeyboardInterrupt])
def test_an_interrupted_recording_leaves_no_trace(stop):
    pipe = Pipe()
    own, before = pipe.transformer, seen(pipe.transformer, pipe)
    with pytest.raises(stop):
        record(pipe, lambda p, seed: p(seed, STEPS, stop=stop), regions=["model"], steps=STEPS, progress=False)
    assert pipe.transformer is own
    assert same(before, seen(own, pipe))
    plain = tiny_sampler.model()
    before = seen(plain)
    with pytest.raises(stop):
        record(plain, interrupted(stop), regions=["model"], steps=STEPS, progress=False)
    assert same(before, seen(plain))


def interrupted(stop):
    def run(model, seed):
        model(**tiny_sampler.example())
        raise stop

    return run


def test_memory_bounds_the_positions():
    kept = 10
    memory = kept * WIDTH * 4 * STEPS * 1 * 2  # one seed, two branches
    with pytest.warns(DitoptWarning, match=f"{kept} token positions of each value are recorded instead of {ALL}"):
        small = record(Pipe("calls"), sampler, regions=["model"], steps=STEPS, seeds=[1], memory=memory, progress=False)
    assert small.values["model"].shape == (2, STEPS, kept, WIDTH)
    assert small.nbytes == memory
    whole = record(Pipe("calls"), sampler, regions=["model"], steps=STEPS, seeds=[1], progress=False)
    assert np.array_equal(small.values["model"], whole.values["model"][:, :, :kept])


def test_a_sampler_that_knows_its_steps():
    profile = record(Pipe(), lambda p, seed: p(seed, 3), regions=["model"], steps=3, seeds=range(2), progress=False)
    assert profile.values["model"].shape == (2, 3, ALL, WIDTH)
    with pytest.raises(BadInput, match=r"ran 3 model evaluations a request and steps=5 was given; pass steps=3"):
        record(Pipe(), lambda p, seed: p(seed, 3), regions=["model"], steps=5, seeds=[0], progress=False)


def test_an_optional_third_argument_is_not_taken_for_the_steps():
    def run(pipe, seed, rows=2):
        return pipe(seed, 3, rows)

    profile = record(Pipe(), run, regions=["latent"], steps=3, seeds=[0], progress=False)
    assert profile.values["latent"].shape == (1, 3, 2 * TOKENS, WIDTH)

    def named(pipe, seed, num_inference_steps=99):
        return pipe(seed, num_inference_steps)

    assert record(Pipe(), named, regions=["latent"], steps=3, seeds=[0], progress=False).steps == 3


def test_progress_is_shown(capfd):
    record(Pipe(), sampler, regions=["latent"], steps=3, seeds=[0, 1])
    assert "calibrating" in capfd.readouterr().err


# -- what cannot be used -----------------------------------------------------------------------------------------------

BAD = [
    ({"sampler": None}, r"needs a sampler, a function that runs one request: sampler\(pipe, seed\)"),
    ({"sampler": 3}, "a int was given"),
    ({"sampler": lambda pipe: None}, r"takes \(pipe\); expected sampler\(model, seed\)"),
    ({"sampler": lambda pipe, seed: None}, "never called the model that it was given"),
    ({"steps": 1}, "steps=1 given; expected the number of denoising steps of a request, at least 2"),
    ({"steps": "many"}, "steps='many' given"),
    ({"tokens": 0}, "tokens=0 given"),
    ({"seeds": []}, r"seeds=\[\] given; expected at least one"),
    ({"seeds": [1, 1]}, "each once"),
    ({"regions": "model"}, r"expected a list of selectors such as \['blocks.\*.attn'\]"),
    ({"regions": ["nothing"]}, "region 'nothing' is not a selector; the model has 3 blocks"),
    ({"regions": ["blocks.7"]}, "region 'blocks.7' matches nothing; the model has 3 blocks"),
    ({"regions": ["blocks.*.attn|blocks.*.mlp"]}, "record alternatives as regions of their own"),
    ({"sampler": lambda pipe, seed: pipe(seed, 3 + seed)}, r"different numbers of steps.*: 3 \(seed 0\), 4 \(seed 1\)"),
    (
        {"sampler": lambda pipe, seed: pipe(seed, 3, 3 + seed)},
        r"the latent is \(4, 8, 16\) in one call and \(3, 8, 16\)",
    ),
]


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_bad_input_is_said(changes, said):
    pipe = Pipe()
    before = seen(pipe.transformer, pipe)
    given: dict[str, Any] = {"regions": ["model"], "steps": 3, "seeds": range(2), "progress": False, **changes}
    with pytest.raises(BadInput, match=said):
        record(pipe, given.pop("sampler", lambda p, seed: p(seed, 3)), **given)
    assert same(before, seen(pipe.transformer, pipe))


def test_what_is_no_plain_model_is_said():
    model = tiny_sampler.model()
    given: dict[str, Any] = {"regions": ["model"], "steps": 3, "progress": False}
    with pytest.raises(BadInput, match=r"a str was given; calibration takes an nn\.Module"):
        record("digits", sampler, **given)
    with pytest.raises(BadInput, match=r"optimized already; ditopt\.restore"):
        record(ditopt.optimize(model, target="eager"), sampler, **given)
    pipe = ditopt.optimize(Pipe(), target="eager")
    with pytest.raises(BadInput, match=r"optimized already; call ditopt\.restore\(pipe\) first"):
        record(pipe, sampler, **given)


def test_two_denoisers_are_refused():
    class Two(Pipe):
        @property
        def components(self):
            return {**super().components, "transformer_2": tiny_sampler.model()}

    with pytest.raises(BadInput, match=r"has 2 denoisers \(transformer, transformer_2\)"):
        record(Two(), sampler, regions=["model"], steps=3, progress=False)


def test_a_model_without_time_is_refused():
    class Timeless(torch.nn.Module):
        def forward(self, hidden_states, encoder_hidden_states):
            return hidden_states + encoder_hidden_states

    def run(model, seed):
        model(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))

    with pytest.raises(BadInput, match="no timestep input"):
        record(Timeless(), run, regions=["model"], steps=2, progress=False)
