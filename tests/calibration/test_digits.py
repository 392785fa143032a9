"""The shipped digits model: calibrated on the command line, and run by the recipe that was written."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import ditopt
from ditopt import cli, demo, measure
from ditopt.errors import DitoptWarning

pytest.importorskip("diffusers")

STEPS = 8


def test_from_the_command_line_to_samples(tmp_path, capsys):
    out = tmp_path / "r.json"
    options = ("--steps", str(STEPS), "--seeds", "1", "--samples", "2", "--tokens", "64")
    system = "smoothcache{alpha=0.35}"
    assert cli.main(["calibrate", "digits", "--recipe", system, *options, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "cache{region=blocks.*.mlp,mask=1" in said.err
    assert f"steps: {STEPS}" in said.err
    recipe = ditopt.Recipe.parse(out)
    assert json.loads(out.read_text())["calibrated"] == recipe.calibrated
    assert recipe.name == "smoothcache"
    assert recipe.calibrated["latent"] == "1x16x16"
    assert recipe.calibrated["scheduler"].startswith("FlowMatchEulerDiscreteScheduler ")
    assert recipe.calibrated["guidance"] == "1 call a step, 2 copies of the latent"

    model = demo.shipped("digits", 2)
    plain = model.sample(model.pipe, 7, STEPS)
    fast = ditopt.optimize(model.pipeline(), recipe, target="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DitoptWarning)
        images = model.sample(fast, 7, STEPS)
    masks = {s.options["region"]: str(s.options["mask"]) for s in recipe.steps if s.name == "cache"}
    reused = sum(mask.count("0") for mask in masks.values())
    assert fast.transformer.stats.hits.total() == reused > 0
    db = measure.psnr(images, plain)
    assert 20 < float(db.min()) < 90
    assert torch.equal(model.sample(ditopt.restore(fast), 7, STEPS), plain)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "--recipe", "smoothcache"], "no shipped model is called 'nothing'"),
        (["digits", "--recipe", "smothcache"], "did you mean 'smoothcache'"),
        (["digits", "--recipe", "fora"], "fora is not fitted to a model"),
        (["digits"], "the following arguments are required: --recipe"),
        (["digits", "--recipe", "magcache", "--out", "r.txt"], "must end in .json"),
        (["digits", "--recipe", "magcache", "--steps", "1"], "at least 2"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, said):
    assert cli.main(["calibrate", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_fitted_system_is_described(capsys):
    assert cli.main(["recipes", "magcache"]) == 0
    said = capsys.readouterr().out
    assert "fitted by" in said
    assert "ditopt.calibrate(model, 'magcache'" in said
    assert "passes" not in said
