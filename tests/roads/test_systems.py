"""Published systems that a host decides, on a model with double and single blocks, by every road: the schedule and the
outputs are those of the transcription of the paper, which the tests of recipes have for eager."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch._dynamo import config as dynamo_config

import ditopt
from ditopt import dynamo
from ditopt.errors import DitoptWarning
from tests.recipes.oracle import STEPS, captures_shared, drive, error, given, model, on, request, start, wanted
from tests.recipes.test_settings import TWO


@pytest.fixture(autouse=True)
def flux():
    with on("flux"), captures_shared(), warnings.catch_warnings():
        warnings.simplefilter("error", DitoptWarning)
        yield


def agrees(name, fast, session):
    """Two requests: what the transcription decides and gives, twice."""
    choices, outputs = wanted(TWO[name])
    for _ in range(2):
        with session.open(steps=STEPS):
            got = request(drive(fast))
        assert [tuple(row.choices.values()) for row in session.schedule_rows] == choices
        assert error(got, outputs) < 1e-4


def optimized(name, target="eager"):
    return ditopt.optimize(model(), TWO[name].recipe, steps=STEPS, target=target)


@pytest.mark.parametrize("name", ["firstblock", "dbcache", "cg_taylor", "teacache", "easycache"])
def test_files_for_onnxruntime(name, tmp_path):
    path = tmp_path / "flux.onnx"
    ditopt.export_onnx(model(), path, TWO[name].recipe, example_inputs=given(start(0), 3.0, 0), steps=STEPS)
    loaded = ditopt.load(path)
    agrees(name, loaded, loaded.requests)


@pytest.mark.parametrize("name", [n for n in TWO if n not in ("dbprune", "tdc")])
def test_saved_folders(name, tmp_path):
    fast = optimized(name)
    request(drive(fast), stop=1)
    loaded = ditopt.load(ditopt.save(fast, tmp_path / "flux.ditopt"), target="eager")
    agrees(name, loaded, loaded.requests)


@pytest.mark.parametrize("name", ["dbprune", "tdc"])
def test_saved_folders_of_blocks_that_decide_for_themselves(name, tmp_path):
    """Their graphs are made on demand, also after loading."""
    fast = optimized(name)
    request(drive(fast), stop=1)
    loaded = ditopt.load(ditopt.save(fast, tmp_path / "flux.ditopt"), target="eager")
    agrees(name, loaded, loaded.requests)
    assert len({row.graph for row in loaded.schedule_rows}) > 3


def test_inductor():
    fast = optimized("dbcache", "inductor")
    agrees("dbcache", fast, fast.engine.session)


@pytest.mark.parametrize("name", ["teacache", "dbcache_behind_the_join"])
def test_torch_compile(name):
    torch.compiler.reset()
    options: Any = {"recipe": TWO[name].recipe, "target": "eager", "steps": STEPS}
    fast = torch.compile(model(), backend="ditopt", fullgraph=True, options=options)
    before = len(dynamo.engines)
    request(drive(fast), stop=1)
    (engine,) = dynamo.engines[before:]
    with dynamo_config.patch(error_on_recompile=True):
        agrees(name, fast, engine.session)


def test_onnxruntime_with_guidance_by_two_calls(tmp_path):
    """Each branch has its own state and its own number."""
    with on("flux", sampler="calls"):
        path = tmp_path / "flux.onnx"
        recipe = TWO["firstblock"].recipe
        ditopt.export_onnx(model(), path, recipe, example_inputs=given(start(0), 3.0, 0), steps=STEPS)
        loaded = ditopt.load(path)
        agrees("firstblock", loaded, loaded.requests)
        rows = loaded.schedule_rows
        assert [r.graph for r in rows if r.branch == 0] != [r.graph for r in rows if r.branch == 1]
