"""Drawing and captions of the sprites model, and what needs no trained weights of its pipeline."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ditopt.errors import BadInput
from ditopt.zoo.sprites import assemble, prompts
from ditopt.zoo.sprites.captions import DIRECTIONS, HEADS, LANES, SLOTS, VOCABULARY, Clip, labels, parse, tokens
from ditopt.zoo.sprites.pipeline import FRAMES
from examples import scenes, showing, sprites, train_sprites

CAPTION = "a large red circle moving right quickly at the top on green stripes"
CLIP = Clip("large", "red", "circle", "right", "quickly", "top", "green", "stripes")
CLIPS = sprites.batch(7, 100)[1]


# -- captions ----------------------------------------------------------------------------------------------------------


def test_a_caption_is_read_and_said_again():
    assert parse(CAPTION) == CLIP
    assert CLIP.caption() == CAPTION
    for c in CLIPS:
        assert parse(c.caption()) == c


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        (CAPTION.replace("circle", "hexagon"), "'hexagon' in .* is no shape; there are: circle, square"),
        (CAPTION.replace("red", "pink"), "'pink' in .* is no colour; there are: red, green"),
        (CAPTION.replace("right", "sideways"), "'sideways' in .* is no direction; there are: left, right, up, down"),
        (CAPTION.replace("quickly", "fast"), "'fast' in .* is no speed; there are: slowly, quickly"),
        (
            CAPTION.replace("top", "left"),
            "'left' in .* is no lane of a sprite that moves right; there are: top, centre",
        ),
        (CAPTION.replace("right", "up"), "'top' in .* is no lane of a sprite that moves up; there are: left, centre"),
        (CAPTION.replace("stripes", "waves"), "'waves' in .* is no texture; there are: stripes, checks, dots"),
        ("a red ring", "is not a caption of the form 'a SIZE COLOUR SHAPE moving DIRECTION"),
        ("", "is not a caption"),
    ],
)
def test_an_unknown_word_is_one_error_that_lists_what_exists(caption, said):
    with pytest.raises(BadInput, match=said):
        parse(caption)


def test_tokens_and_labels_tell_captions_apart():
    ids = tokens([*CLIPS, None])
    assert ids.shape == (101, SLOTS)
    assert ids[-1].eq(VOCABULARY.index("nothing")).all()
    assert len({tuple(row) for row in ids.tolist()}) == len(set(CLIPS)) + 1
    assert len({tuple(row) for row in labels(CLIPS).tolist()}) == len(set(CLIPS))
    assert set(VOCABULARY) == {"nothing", *itertools.chain(*HEADS.values())}


def test_default_prompts_have_every_direction_and_depend_on_the_seed():
    asked = prompts(4, 0)
    assert {parse(p).direction for p in asked} == set(DIRECTIONS)
    assert asked == prompts(4, 0)
    assert not set(asked) & set(prompts(4, 1))


# -- drawing -----------------------------------------------------------------------------------------------------------


def covers(clip: Clip, seed: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """How much of each pixel of each frame the sprite covers (frames, H, W): where the clip lies between one without a
    sprite and one that is all sprite."""
    clips = {}
    for name, cover in {"drawn": None, "ground": np.zeros, "sprite": np.ones}.items():
        with monkeypatch.context() as patch:
            if cover is not None:
                patch.setattr(sprites, "coverage", lambda *_, made=cover: made((32, 32)))
            clips[name] = sprites.draw(clip, np.random.default_rng(seed)).astype(np.float64)
    whole = clips["sprite"] - clips["ground"]
    return (clips["drawn"] - clips["ground"]).sum(0) / whole.sum(0)


def centres(cover: np.ndarray) -> np.ndarray:
    """The centre of mass (x, y) of each frame, in pixels."""
    y, x = np.mgrid[0:32, 0:32] + 0.5
    return np.stack([(cover * x).sum((1, 2)), (cover * y).sum((1, 2))], 1) / cover.sum((1, 2))[:, None]


def test_a_sprite_moves_as_told(monkeypatch):
    sign = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for seed, clip in enumerate(CLIPS):
        video = sprites.draw(clip, np.random.default_rng(seed))
        assert video.shape == (3, FRAMES, 32, 32)
        assert (video.min() >= 0, video.max() <= 1) == (True, True)
        where = centres(covers(clip, seed, monkeypatch))
        moved = where[-1] - where[0]
        axis = 0 if clip.direction in ("left", "right") else 1
        low, high = sprites.TRAVEL[clip.speed]
        assert low - 0.1 < moved[axis] * sign[clip.direction][axis] < high + 0.1, clip.caption()
        assert abs(moved[1 - axis]) < 0.1, clip.caption()
        assert np.abs(np.diff(where[:, axis]) - moved[axis] / (FRAMES - 1)).max() < 0.1, "one speed"
        lane = {"top": 8.5, "left": 8.5, "centre": 16, "bottom": 23.5, "right": 23.5}[clip.lane]
        drop = 0.3 * sprites.RADIUS["large"][1] if clip.shape == "triangle" else 0  # its mass lies below its middle
        assert abs(where[0, 1 - axis] - lane) < sprites.JITTER + 0.05 + drop, clip.caption()


def test_the_path_is_exact():
    """The centre of coverage, drawn by area, is the path to a hundredth of a pixel."""
    for clip in CLIPS[:20]:
        for x, y in sprites.path(clip, np.random.default_rng(1)):
            cover = scenes.coverage("square", float(x), float(y), 4.0)
            rows, columns = np.nonzero(cover)
            assert np.average(columns + 0.5, weights=cover[rows, columns]) == pytest.approx(x, abs=0.01)
            assert np.average(rows + 0.5, weights=cover[rows, columns]) == pytest.approx(y, abs=0.01)


@pytest.mark.parametrize("word", range(SLOTS))
def test_every_word_shows(word):
    """Captions that differ in one word give different clips from the same dice."""
    known = list(HEADS.values())[word]
    said = list(CLIP.words())
    drawn = []
    for value in known:
        words = [*said[:word], value, *said[word + 1 :]]
        if words[5] not in LANES[words[3]]:
            words[5] = "centre" if word == 3 else words[5]
        if words[5] in LANES[words[3]]:
            drawn.append(sprites.draw(Clip(*words), np.random.default_rng(0)))
    assert len(drawn) >= 2
    assert min(np.abs(a - b).mean() for a, b in itertools.combinations(drawn, 2)) > 0.005


def test_size_shows_as_area(monkeypatch):
    for size, (low, high) in sprites.RADIUS.items():
        areas = covers(Clip(size, *CLIP.words()[1:]), 2, monkeypatch).sum((1, 2))
        assert np.pi * (low - 0.05) ** 2 < areas.min() <= areas.max() < np.pi * (high + 0.05) ** 2


def test_batches_repeat_by_seed():
    videos, drawn = sprites.batch((3, 4), 6)
    again, same = sprites.batch((3, 4), 6)
    assert drawn == same
    assert torch.equal(videos, again)
    assert not torch.equal(videos, sprites.batch((3, 5), 6)[0])
    assert videos.dtype == torch.float32


# -- sheets ------------------------------------------------------------------------------------------------------------


def test_a_gif_shows_each_frame_and_a_png_all_of_them(tmp_path):
    from PIL import Image

    videos, drawn = sprites.batch(1, 3)
    titles = [c.caption() for c in drawn]
    showing.write(list(videos), titles, tmp_path / "s.gif")
    with Image.open(tmp_path / "s.gif") as made:
        assert made.n_frames == FRAMES  # type: ignore[attr-defined]
        for i in range(FRAMES):
            made.seek(i)
            got = np.asarray(made.convert("RGB"))[4 : 4 + 128 : 4, 4 : 4 + 128 : 4].transpose(2, 0, 1) / 255
            assert np.abs(got - videos[0, :, i].numpy()).mean() < 0.05, "256 colours"
    showing.write(list(videos), titles, tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as made:
        row = np.asarray(made)[4 : 4 + 96 : 3, 4::3].transpose(2, 0, 1) / 255
    for i in range(FRAMES):
        got = row[:, :, i * 34 : i * 34 + 32]
        np.testing.assert_allclose(got, videos[0, :, i], atol=0.5 / 255 + 1e-6)


# -- the pipeline, untrained -------------------------------------------------------------------------------------------


def untrained():
    torch.manual_seed(0)
    model = train_sprites.Model()
    state = {"model": model.transformer.state_dict(), "text_encoder": model.text_encoder.state_dict()}
    return assemble(train_sprites.CONFIG, state)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_frames": 16}, "trained on 8 frames of 32x32 pixels; got 16 frames of 32x32"),
        ({"height": 64}, "trained on 8 frames of 32x32 pixels; got 8 frames of 64x32"),
        ({"prompt": CAPTION.replace("circle", "hexagon")}, "'hexagon' .* is no shape"),
    ],
)
def test_the_pipeline_refuses_what_it_was_not_trained_for(given, said):
    with pytest.raises(BadInput, match=said):
        untrained()(**{"prompt": CAPTION, **given})


def test_the_pipeline_samples_and_guidance_doubles_the_batch():
    pipe = untrained()
    assert sum(p.numel() for p in pipe.transformer.parameters()) * 2 < 10e6
    rows = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    out = pipe([CAPTION, CAPTION], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert out.shape == (2, 3, FRAMES, 32, 32)
    assert rows == [4, 4]
    pipe(CAPTION, num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
    assert rows == [4, 4, 1, 1]
