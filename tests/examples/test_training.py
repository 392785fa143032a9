"""The training loop of the shipped models, on a toy, and how a trained model is judged."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from ditopt import zoo
from ditopt.zoo.classifier import AttributeClassifier
from examples import judging, train_digits, train_scenes, train_sprites
from examples.training import fit, sigmas, spread, trained

SUBJECTS = {m.SUBJECT.name: m.SUBJECT for m in (train_scenes, train_sprites)}
MODELS = {"scenes": train_scenes.Model, "sprites": train_sprites.Model}


def randomized(name: str):
    """The pipeline of a model whose weights are all drawn anew, so that no block is closed, and its subject."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    parts = {part: getattr(model, prefix[:-1]).state_dict() for part, prefix in judging.PARTS.items()}
    return SUBJECTS[name].assemble(SUBJECTS[name].config, parts), SUBJECTS[name]


# -- the loop ----------------------------------------------------------------------------------------------------------


def train(checkpoint, minutes=1.0):
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    matrices = [p for p in model.parameters() if p.ndim == 2]

    def loss(step, generator):
        x = torch.randn(8, 3, generator=generator)
        return (model(x) - x.flip(1)).square().mean()

    fit(model, loss, steps=7, minutes=minutes, checkpoint=checkpoint, matrices=matrices)
    return model.state_dict()


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, capsys):
    whole = train(tmp_path / "whole.ckpt")
    for _ in range(3):
        train(tmp_path / "parts.ckpt", minutes=0.0)  # time is up after one step
    parts = train(tmp_path / "parts.ckpt")
    said = capsys.readouterr().out
    assert [f"resumed at step {n}" in said for n in (1, 2, 3)] == [True] * 3
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    averages = [trained(tmp_path / f"{name}.ckpt", {"model": ""}) for name in ("whole", "parts")]
    assert [step for _, step in averages] == [7, 7]
    assert all(torch.equal(averages[0][0]["model"][k], averages[1][0]["model"][k]) for k in whole)
    assert averages[0][0]["model"]["weight"].dtype == torch.float16


def test_noise_levels_reach_the_ends_and_shift_towards_noise():
    plain, shifted = (sigmas(4000, torch.Generator().manual_seed(0), shift) for shift in (1.0, 3.0))
    assert 0 < plain.min() < 0.01
    assert 0.99 < plain.max() < 1
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def test_spread_is_the_distance_between_samples():
    assert spread(torch.zeros(3, 2, 4)) == 0
    assert spread(torch.stack([torch.zeros(2, 4), torch.full((2, 4), 0.5)])) == pytest.approx(0.5)


# -- judging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_influence_names_every_block_and_finds_the_idle_one(name, monkeypatch):
    monkeypatch.setattr(judging, "STEPS", 1)
    pipe, subject = randomized(name)
    captions = [t.caption() for t in subject.batch(0, 1)[1]]
    blocks = dict(pipe.transformer.named_modules())
    idle = "single_transformer_blocks.2" if name == "scenes" else "blocks.2"
    for p in blocks[idle].parameters():  # without weights, all that it adds to the stream is 0
        nn.init.zeros_(p)
    moved = judging.influence(pipe, captions)
    config = subject.config["denoiser"]
    assert len(moved) == config["num_layers"] + config.get("num_single_layers", 0) >= 6
    assert moved.pop(idle) == 0
    assert min(moved.values()) > 1e-5
    assert not any(block._forward_hooks for block in blocks.values())


@pytest.mark.parametrize("name", SUBJECTS)
def test_adherence_counts_all_and_head_by_head(name):
    subject = SUBJECTS[name]
    samples, told = subject.batch(3, 40)
    truth = subject.labels(told)

    class Reads(AttributeClassifier):
        def predict(self, samples):
            seen = truth.clone()
            seen[:10, list(subject.heads).index("colour")] += 1
            return seen

    found = judging.adherence(subject, Reads(3, subject.heads), samples, told)
    assert found.pop("colour") == 0.75
    assert 0.93 < found.pop(judging.ATTRIBUTES) < 1
    assert set(found) == set(subject.heads) - {"colour"}
    assert set(found.values()) == {1.0}
    assert set(subject.floors) <= {judging.ATTRIBUTES, *subject.heads}


def test_an_untrained_model_misses_the_floors(tmp_path, monkeypatch, capsys):
    pipe, subject = randomized("scenes")
    network = subject.classifier().eval()
    monkeypatch.setattr(judging, "STEPS", 1)
    monkeypatch.setattr(judging, "DRAWINGS", 20)
    monkeypatch.setitem(subject.config["sampling"], "num_inference_steps", 1)
    missed = judging.judge(subject, pipe, network, 2, tmp_path / "sheet.png")
    assert all(any(m.startswith(floor) for m in missed) for floor in subject.floors)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert all(head in said for head in subject.heads)
    assert said.count("blocks.") == 8


def test_shipping_writes_what_loading_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "HERE", tmp_path)
    (tmp_path / "digits").mkdir()
    model = DiTTransformer2DModel.from_config(train_digits.CONFIG["denoiser"])
    classifier = {"weight": torch.randn(10, 64), "bias": torch.randn(10)}
    judging.ship("digits", train_digits.CONFIG, {"model": model.state_dict(), "classifier": classifier})
    assert zoo.names() == ["digits"]
    assert json.loads((tmp_path / "digits/config.json").read_text()) == zoo.config("digits") == train_digits.CONFIG
    assert {v.dtype for v in load_file(tmp_path / "digits/model.safetensors").values()} == {torch.float16}
    loaded = zoo.load("digits").transformer.state_dict()
    assert all(torch.equal(v, model.state_dict()[k].half().float()) for k, v in loaded.items())


def test_the_command_that_trained_digits_has_its_configuration():
    assert zoo.config("digits") == train_digits.CONFIG
