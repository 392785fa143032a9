"""The mask of an edit on the grid of tokens: where it lies, and what it makes of each token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ditopt.errors import RecipeError
from ditopt.ir.edit import Editor, replace_functions
from ditopt.ir.edit_mask import classes, find_mask
from ditopt.ir.example import Builder
from ditopt.ir.interpret import run_program
from ditopt.ir.program import Stream
from ditopt.ir.short import Mixes

ROWS, GRID = 2, (3, 4, 6)


def program(shape, name="mask", dtype=torch.float32):
    b = Builder()
    latent = b.input("x", "latent", ROWS, 8)
    b.input(name, "prompt", *shape, dtype=dtype)
    return b.program(latent)


def stream(grid=GRID, tokens=None):
    return Stream("x", 0, (1,), tokens or math.prod(grid), grid=grid)


def found(mask, text="mask", grid=GRID, margin=1, tokens=None):
    """The classes of each token that ditopt computes."""
    p = program(mask.shape, dtype=mask.dtype)
    of = stream(grid, tokens)
    with Editor(p.step, "test") as e:
        e.set_results([classes(e, find_mask(p, text, of), of, ROWS, margin, e.graph.output_node())])
    made = replace_functions(p, {p.entry: e.function()})
    (out,), _ = run_program(made, {"x": torch.zeros(ROWS, 8), "mask": mask})
    return out


def wanted(tokens, margin=1):
    """``tokens``: (rows, frames, height, width), True where something is masked."""
    out = np.full(tokens.shape, 2.0)
    for row, frame, i, j in np.ndindex(tokens.shape):
        far = min((math.hypot(i - a, j - b) for a, b in np.argwhere(tokens[row, frame])), default=math.inf)
        out[row, frame, i, j] = 0 if far == 0 else 1 if far <= margin else 2
    return torch.tensor(out, dtype=torch.float32).reshape(ROWS, -1)


def masked(share=0.1, factors=(1, 1, 1)):
    """A mask on pixels, and which tokens it touches."""
    sizes = [n * k for n, k in zip(GRID, factors, strict=True)]
    pixels = torch.rand(ROWS, *sizes, generator=torch.Generator().manual_seed(3)) < share
    parts = [n for pair in zip(GRID, factors, strict=True) for n in pair]
    return pixels, pixels.reshape(ROWS, *parts).amax((2, 4, 6)).numpy()


@pytest.mark.parametrize("margin", [0, 1, 2, 3])
def test_pixels_of_video(margin):
    """The margin is round and stays within its frame."""
    pixels, tokens = masked(0.02, (1, 2, 2))
    assert torch.equal(found(pixels, margin=margin), wanted(tokens, margin))


def test_channels_count_by_their_mean():
    pixels, tokens = masked()
    spread = pixels[:, None].float() * torch.tensor([0.2, 0.9, 0.9, 0.0]).reshape(4, 1, 1, 1)
    assert torch.equal(found(spread, "mask:1:3"), wanted(tokens))
    assert torch.equal(found(spread, "mask:2"), wanted(tokens))
    assert (found(spread) == 2).all(), "the mean of all four is below 0.5"


def test_one_frame_is_for_all_and_one_sample_too():
    pixels, _ = masked()
    one = pixels[:1, :1]
    tokens = one.expand(ROWS, GRID[0], -1, -1).numpy()
    assert torch.equal(found(one[:, None]), wanted(tokens))


def test_a_mask_on_tokens():
    pixels, tokens = masked()
    assert torch.equal(found(pixels.reshape(ROWS, -1)), wanted(tokens))
    packed = torch.stack([torch.zeros(ROWS, 72), pixels.reshape(ROWS, -1)], -1)
    assert torch.equal(found(packed, "mask:1:2"), wanted(tokens))
    plain = found(pixels.reshape(ROWS, -1), grid=(), tokens=72, margin=0)
    assert torch.equal(plain, wanted(tokens, 0)), "without a margin no grid is needed"


@pytest.mark.parametrize(
    ("shape", "text", "said", "kind"),
    [
        ((ROWS, 4, 6), "", r"no input of this model is called the mask .*mask=NAME for an input of its own", Mixes),
        ((ROWS, 3, 5, 6), "mask", r"\[2, 3, 5, 6\] does not lie on the grid of tokens, which is 3 x 4 x 6", Mixes),
        ((3, 3, 4, 6), "mask", "the mask is for 3 samples, and tokens are chosen for 2", Mixes),
        ((ROWS, 2, 3, 4, 6), "mask:1:4", "has 2 channels; expected 0 <= FIRST < STOP <= 2", RecipeError),
        ((ROWS, 3, 4, 6), "mask:0", "has 0 channels", RecipeError),
        ((ROWS, 3, 4, 6), "mask:0:1:2", "expected NAME, NAME:CHANNEL or NAME:FIRST:STOP", RecipeError),
        (
            (ROWS, 3, 4, 6),
            "masks",
            r"'masks' is no tensor input of this model; there are x \[2, 8\], mask",
            RecipeError,
        ),
    ],
)
def test_what_does_not_fit_is_said(shape, text, said, kind: Any):
    with pytest.raises(kind, match=said):
        found(torch.zeros(shape), text)


def test_a_margin_without_a_grid():
    with pytest.raises(Mixes, match=r"the grid of the tokens is not known, .*; give margin=0"):
        found(torch.zeros(ROWS, 72), grid=(), tokens=72)


@pytest.mark.parametrize("order", [(0, 2, 1, 3, 4), (0, 1, 2, 3, 4), (0, 2, 3, 4, 1)])
def test_the_graph_shows_where_channels_are(order):
    """As in models of (rows, frames, channels, height, width), whose shape alone does not tell."""
    shape = (ROWS, 4, *GRID)
    b = Builder()
    given = b.input("latents", "latent", *(shape[i] for i in order))
    x = b(torch.ops.aten.permute.default, given, [order.index(i) for i in range(5)])
    tokens = b(torch.ops.aten.transpose.int, b(torch.ops.aten.reshape.default, x, [ROWS, 4, 72]), 1, 2)
    p = b.program(tokens)
    mask = find_mask(p, "latents:1:2", stream(), p.step.results[0])
    assert mask.channels == order.index(1)
    assert mask.spatial == tuple(order.index(i) for i in (2, 3, 4))


def test_masks_of_attention_are_no_edits():
    with pytest.raises(Mixes, match="no input of this model is called the mask"):
        find_mask(program((ROWS, 72), "encoder_attention_mask"), "", stream())


def test_two_masks_are_a_question():
    b = Builder()
    x = b.input("x", "latent", ROWS, 8)
    for name in ("mask", "edit_mask"):
        b.input(name, "prompt", ROWS, *GRID)
    with pytest.raises(Mixes, match="mask and edit_mask could each be the mask of the edit"):
        find_mask(b.program(x), "", stream())
