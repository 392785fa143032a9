"""Every shipped model: it loads fast and offline, its samples are what was asked for, and bad input is one error."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest
import torch

from ditopt import zoo
from ditopt.errors import BadInput

pytest.importorskip("diffusers")

COLLAPSED = 0.75
"""Share right that a model which ignores its prompts stays well below; the shipped ones are above 0.9."""


@functools.cache
def pipe(name: str) -> Any:
    return zoo.load(name)


@functools.cache
def sampled(name: str, steps: int = 10) -> torch.Tensor:
    """One request of eight samples by the model's own guidance."""
    settings = {**zoo.config(name)["sampling"], "num_inference_steps": steps}
    return pipe(name)(zoo.package(name).prompts(8, 5), generator=torch.Generator().manual_seed(5), **settings)


def test_there_are_models():
    assert "digits" in zoo.names()
    with pytest.raises(BadInput, match=r"no shipped model is called 'cats'; there are: .*digits"):
        zoo.load("cats")


def test_loading_takes_under_two_seconds_and_no_network():
    """In a fresh process where nothing can connect; the import of diffusers is not part of it."""
    code = """
import socket, sys, time

def refused(*args, **kwargs):
    raise AssertionError("loading a shipped model went to the network")

socket.socket.connect = socket.getaddrinfo = refused
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models import modeling_utils
from ditopt import zoo
for name in sys.argv[1:]:
    begin = time.perf_counter()
    zoo.load(name)
    print(time.perf_counter() - begin)
"""
    done = subprocess.run([sys.executable, "-c", code, *zoo.names()], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    seconds = [float(line) for line in done.stdout.split()]
    assert len(seconds) == len(zoo.names())
    assert max(seconds) < 2


@pytest.mark.parametrize("name", zoo.names())
def test_a_model_is_small_and_says_how_it_was_trained(name):
    files = list((zoo.HERE / name).glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) < 10e6
    assert zoo.config(name)["training"] == f"python -m examples.train_{name}"


@pytest.mark.parametrize("name", zoo.names())
def test_samples_are_what_was_asked_for(name):
    package, samples = zoo.package(name), sampled(name)
    asked = package.prompts(8, 5)
    right = package.score(samples, asked)
    assert right.shape == (8,)
    assert float(right.mean()) > COLLAPSED
    others = [*asked[1:], asked[0]]
    assert float(package.score(samples, others).mean()) < COLLAPSED, "the prompts of others fit as well"


@pytest.mark.parametrize("name", zoo.names())
def test_samples_of_one_prompt_differ(name):
    (prompt,) = zoo.package(name).prompts(1, 2)
    samples = pipe(name)([prompt] * 2, num_inference_steps=10, generator=torch.Generator().manual_seed(0))
    assert float(torch.pdist(samples.flatten(1)).min()) / samples[0].numel() ** 0.5 > 0.02
    again = pipe(name)([prompt] * 2, num_inference_steps=10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(samples, again)


@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize(("steps", "guidance"), [(10, 1.0), (30, 3.0), (50, 2.0)])
def test_other_step_counts_and_guidance_scales(name, steps, guidance):
    package = zoo.package(name)
    asked = package.prompts(1, 9)
    generator = torch.Generator().manual_seed(9)
    samples = pipe(name)(asked, num_inference_steps=steps, guidance_scale=guidance, generator=generator)
    assert samples.isfinite().all()
    assert (samples.min() >= 0, samples.max() <= 1) == (True, True)
    assert float(package.score(samples, asked).mean()) >= 0.5


@pytest.mark.parametrize("name", zoo.names())
def test_prompts_and_score_are_of_one_sample_each(name):
    package = zoo.package(name)
    assert package.REQUEST >= 4
    for count in (1, 3, package.REQUEST):
        assert len(package.prompts(count, 0)) == count
    assert list(package.prompts(8, 0)) == list(package.prompts(8, 0)) != list(package.prompts(8, 1))
    assert set(package.score(torch.zeros_like(sampled(name)), package.prompts(8, 5)).tolist()) != {1.0}


def test_a_class_that_does_not_exist_is_one_error():
    with pytest.raises(BadInput, match=r"class labels \[10\] given; this model knows 0 to 9"):
        pipe("digits")([3, 10])
