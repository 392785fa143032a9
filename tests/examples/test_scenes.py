"""Drawing and captions of the scenes model, and what needs no trained weights of its pipeline."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ditopt.errors import BadInput
from ditopt.zoo.classifier import share
from ditopt.zoo.scenes import assemble, prompts
from ditopt.zoo.scenes.captions import (
    COLOURS,
    GROUNDS,
    HEADS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    SLOTS,
    TEXTURES,
    VOCABULARY,
    Item,
    Scene,
    attributes,
    labels,
    named,
    parse,
    tokens,
)
from ditopt.zoo.scenes.pipeline import images, patches
from examples import scenes, train_scenes
from examples.showing import sheet
from examples.training import TrainingAttention

CAPTION = "a large red circle left of a small blue square on green stripes"
SCENES = scenes.batch(7, 200)[1]


def lit(picture: np.ndarray, colour: str) -> np.ndarray:
    """Pixels (row, column) that have exactly the hue of ``colour``."""
    hue = np.array(scenes.RGB[colour], dtype=np.float32)
    scaled = picture / picture.max(0, keepdims=True)
    return np.argwhere((np.abs(scaled - (hue / hue.max())[:, None, None]) < 0.02).all(0) & (picture.max(0) > 0.8))


# -- captions ----------------------------------------------------------------------------------------------------------


def test_a_caption_is_read_and_said_again():
    scene = parse(CAPTION)
    assert scene == Scene(Item("large", "red", "circle"), "left", Item("small", "blue", "square"), "green", "stripes")
    assert scene.caption() == CAPTION
    assert parse("A small white ring at the top on grey dots").second is None
    for s in SCENES:
        assert parse(s.caption()) == s


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a large red hexagon at the top on grey dots", "'hexagon' in .* is no shape; there are: circle, square"),
        ("a huge red ring at the top on grey dots", "'huge' in .* is no size; there are: small, large"),
        ("a large pink ring at the top on grey dots", "'pink' in .* is no colour; there are: red, green"),
        ("a large red ring at the above on grey dots", "'above' in .* is no place; there are: left, right, top"),
        (CAPTION.replace("left of", "behind"), "'behind' in .* is no relation; there are: left, right, above, below"),
        (CAPTION.replace("green", "white"), "'white' in .* is no ground; there are: red, green, blue, grey"),
        (CAPTION.replace("stripes", "waves"), "'waves' in .* is no texture; there are: stripes, checks, dots"),
        ("a red ring", "is not a caption of the form 'a SIZE COLOUR SHAPE at the PLACE"),
        ("", "is not a caption"),
        ("a nothing red ring at the top on grey dots", "'nothing' in .* is no size"),
    ],
)
def test_an_unknown_word_is_one_error_that_lists_what_exists(caption, said):
    with pytest.raises(BadInput, match=said):
        parse(caption)


def test_a_scene_checks_its_words():
    with pytest.raises(BadInput, match=r"'top' in .* is no relation"):
        Scene(Item("large", "red", "ring"), "top", Item("small", "red", "ring"), "grey", "dots")


def test_a_picture_has_one_answer_whichever_shape_is_told_first():
    told = parse("a small blue square right of a large red circle on green stripes")
    assert told != parse(CAPTION)
    assert attributes(told) == attributes(parse(CAPTION))
    assert list(attributes(told).values()) == ["left", "large", "red", "circle", "small", "blue", "square"] + [
        "green",
        "stripes",
    ]
    for s in SCENES:
        assert s.canonical().canonical() == s.canonical()
        assert all(value in HEADS[head] for head, value in attributes(s).items())


def test_adherence_counts_the_attributes_that_the_caption_names():
    one, two = parse("a small white ring at the top on grey dots"), parse(CAPTION)
    truth, counted = labels([one, two]), named([one, two])
    assert counted.sum(1).tolist() == [6, 9]
    assert share(truth, truth, counted).tolist() == [1, 1]
    wrong = truth.clone()
    wrong[:, 2] += 1
    wrong[0, 5] += 1  # a second colour that the first caption does not name
    assert share(wrong, truth, counted).tolist() == pytest.approx([5 / 6, 8 / 9])


def test_default_prompts_have_both_forms_and_depend_on_the_seed():
    asked = prompts(8, 0)
    assert [parse(p).second is None for p in asked] == [False, True] * 4
    assert asked == prompts(8, 0)
    assert not set(asked) & set(prompts(8, 1))


def test_tokens_tell_captions_apart():
    ids = tokens([*SCENES, None])
    assert ids.shape == (201, SLOTS)
    assert ids[-1].eq(VOCABULARY.index("nothing")).all()
    assert len({tuple(row) for row in ids.tolist()}) == len(set(SCENES)) + 1
    words = {*SIZES, *COLOURS, *SHAPES, *PLACES, *RELATIONS, *GROUNDS, *TEXTURES, "nothing"}
    assert set(VOCABULARY) == words
    assert len(VOCABULARY) == len(words)


# -- drawing -----------------------------------------------------------------------------------------------------------

AREA = {
    "circle": lambda r: math.pi * r * r,
    "ring": lambda r: math.pi * r * r * (1 - 0.25),
    "square": lambda r: (2 * 0.88 * r) ** 2,
    "cross": lambda r: 2 * (2 * r) * (0.68 * r) - (0.68 * r) ** 2,
    "triangle": lambda r: 1.8 * r * r,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_the_area_of_the_shape(shape):
    exact = shape in ("square", "cross")  # the others take the distance of a pixel's centre for its coverage
    for r, (x, y) in itertools.product((3.8, 4.4, 6.9), ((16, 16), (15.3, 17.9))):
        mask = scenes.coverage(shape, x, y, r)
        assert mask.min() >= 0
        assert mask.max() <= 1
        assert mask.sum() == pytest.approx(AREA[shape](r), rel=1e-5 if exact else 0.03)
        rows, columns = np.nonzero(mask > 0)
        assert max(abs(rows + 0.5 - y).max(), abs(columns + 0.5 - x).max()) <= r + 1
        if shape != "triangle":
            assert np.average(columns + 0.5, weights=mask[rows, columns]) == pytest.approx(x, abs=0.02)
            assert np.average(rows + 0.5, weights=mask[rows, columns]) == pytest.approx(y, abs=0.02)


def test_shapes_and_textures_differ():
    masks = [scenes.coverage(s, 16, 16, 6.5) for s in SHAPES]
    assert min(np.abs(a - b).sum() for a, b in itertools.combinations(masks, 2)) > 20
    grounds = [scenes.texture(t, 1, 2) for t in TEXTURES]
    assert min(np.abs(a - b).mean() for a, b in itertools.combinations(grounds, 2)) > 0.2
    for g in grounds:
        np.testing.assert_allclose(g[:, :24], g[:, 8:], atol=1e-5)


def test_a_drawing_shows_what_its_caption_says():
    rng = np.random.default_rng(0)
    for scene in SCENES:
        if scene.second is None or scene.first.colour == scene.second.colour:
            continue
        picture = scenes.draw(scene, rng)
        assert picture.shape == (3, 32, 32)
        assert picture.min() >= 0
        assert picture.max() <= 1
        (y1, x1), (y2, x2) = (lit(picture, i.colour).mean(0) for i in (scene.first, scene.second))
        holds = {"left": x1 < x2 - 9, "right": x1 > x2 + 9, "above": y1 < y2 - 9, "below": y1 > y2 + 9}
        assert holds[scene.place], scene.caption()
        if scene.first.shape == scene.second.shape and scene.first.size != scene.second.size:
            area1, area2 = (len(lit(picture, i.colour)) for i in (scene.first, scene.second))
            assert (area1 > area2) == (scene.first.size == "large"), scene.caption()


@pytest.mark.parametrize("place", PLACES)
def test_the_place_of_a_single_shape(place):
    want = {"left": (16, 8.5), "right": (16, 23.5), "top": (8.5, 16), "bottom": (23.5, 16), "centre": (16, 16)}[place]
    scene = parse(f"a large yellow square at the {place} on blue dots")
    for seed in range(20):
        where = lit(scenes.draw(scene, np.random.default_rng(seed)), "yellow").mean(0) + 0.5
        assert abs(where - want).max() <= 3.5


def test_batches_repeat_by_seed():
    pictures, drawn = scenes.batch((3, 4), 12)
    again, same = scenes.batch((3, 4), 12)
    assert drawn == same
    assert torch.equal(pictures, again)
    other, _ = scenes.batch((3, 5), 12)
    assert not torch.equal(pictures, other)
    assert pictures.dtype == torch.float32


def test_a_sheet_holds_every_picture():
    pictures, drawn = scenes.batch(1, 5)
    made = np.asarray(sheet(list(pictures), [s.caption() for s in drawn], columns=3, scale=1))
    got = made[4 : 4 + 32, 4 : 4 + 32].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(got, pictures[0], atol=0.5 / 255 + 1e-6)


# -- the pipeline, untrained -------------------------------------------------------------------------------------------


def untrained():
    torch.manual_seed(0)
    model = train_scenes.Model()
    state = {"model": model.transformer.state_dict(), "text_encoder": model.text_encoder.state_dict()}
    return assemble(train_scenes.CONFIG, state)


def test_patches_are_undone():
    pictures, _ = scenes.batch(2, 3)
    latents = patches(pictures)
    assert latents.shape == (3, 256, 12)
    torch.testing.assert_close(images(latents), pictures)
    torch.testing.assert_close(latents[0, 17], (pictures[0, :, 2:4, 2:4].reshape(12) - 0.25) * 4)


def test_the_pipeline_refuses_what_it_was_not_trained_for():
    pipe = untrained()
    with pytest.raises(BadInput, match="trained on 32x32 pixels; got 64x32"):
        pipe(CAPTION, height=64)
    with pytest.raises(BadInput, match="no shape"):
        pipe(CAPTION.replace("circle", "hexagon"))


def test_the_pipeline_samples_and_guidance_takes_two_calls_a_step():
    pipe = untrained()
    assert sum(p.numel() for p in pipe.transformer.parameters()) * 2 < 10e6
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[0] if args else 0))
    out = pipe([CAPTION, CAPTION], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert out.shape == (2, 3, 32, 32)
    assert len(calls) == 4
    pipe(CAPTION, num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
    assert len(calls) == 6


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # diffusers' RMSNorm under autocast
def test_training_sees_the_timestep_unrounded():
    """The denoiser alone would round it to bfloat16 under autocast."""
    model = train_scenes.Model()
    seen = []
    model.transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sigma = torch.tensor([0.9873])
    with torch.autocast("cpu", dtype=torch.bfloat16), TrainingAttention():
        model(torch.randn(1, 256, 12), sigma, tokens([None]))
    assert seen[0].item() == pytest.approx(987.3, rel=1e-6)
