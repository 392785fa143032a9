"""Sparse attention systems, against transcriptions of their papers on a model small enough to write out.

The model is one block of attention on a grid of tokens; each transcription says which tokens a token sees, token by
token, and the rest is dense softmax with a mask.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ditopt.ir import example
from ditopt.ir.interpret import random_inputs, run_program
from ditopt.ops import attention, block_sparse_attention
from ditopt.pipeline import PassManager
from ditopt.recipe import Recipe

GRID, TILE = (16, 16), (4, 4)


def sites(recipe):
    """The operands and the result of the sparse attention of each block, as the program computes them."""
    program = PassManager(Recipe.parse(recipe)).run(example.grid_dit(*GRID))[-1].program
    dense = PassManager("recognize_attention, outline_blocks").run(example.grid_dit(*GRID))[-1].program
    inputs = random_inputs(dense)
    inputs = {k: v * 3 if v.is_floating_point() else v for k, v in inputs.items()}
    out, plain = run_program(program, inputs)[0][0], run_program(dense, inputs)[0][0]
    return program, dense, inputs, out, plain


def masked(recipe, sees):
    """The model with what ``sees(query, key)`` (operands of one attention -> (batch, heads, N, N) truth) allows."""
    from torch import fx

    from ditopt.ir.edit import inline

    program, dense, inputs, out, plain = sites(recipe)
    sparse = [n for f in program.functions.values() for n in f.graph.nodes if n.target is block_sparse_attention]
    assert sparse, "nothing became sparse"
    flat = inline(dense)

    class Masked(fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is attention:
                scores = args[0].double() @ args[1].double().transpose(-1, -2) / math.sqrt(args[0].shape[-1])
                allowed = sees(args[0], args[1])
                weights = torch.softmax(scores.masked_fill(~allowed, -math.inf), -1)
                return (weights @ args[2].double()).float()
            return super().call_function(target, args, kwargs)

    from ditopt.ir.program import formal

    given = {("input", k): v for k, v in inputs.items()} | {("param", k): v for k, v in dense.params.items()}
    values = [given[(formal(p).kind, formal(p).ref)] for p in flat.placeholders]
    with torch.no_grad():
        (expected,) = Masked(fx.GraphModule({}, flat.graph)).run(*values)
    assert (plain - expected).norm() / plain.norm() > 1e-3, "the pattern leaves nothing out"
    return float((out - expected).norm() / expected.norm())


def places():
    return list(itertools.product(*map(range, GRID)))


def sliding_tile(window):
    """STA: the window of tiles is centred on the query's tile and clamped to the grid."""
    tiles = tuple(n // t for n, t in zip(GRID, TILE, strict=True))

    def start(tile, axis):
        return min(max(tile - window[axis] // 2, 0), tiles[axis] - window[axis])

    def near(q, k):
        return all(
            start(q[a] // TILE[a], a) <= k[a] // TILE[a] < start(q[a] // TILE[a], a) + window[a] for a in range(2)
        )

    table = torch.tensor([[near(q, k) for k in places()] for q in places()])
    return lambda query, key: table


def draft(share, scope):
    """DraftAttention: patches are averaged; the best entries of a head's map (or of each row) are computed."""
    patch = torch.tensor([(y // TILE[0]) * (GRID[1] // TILE[1]) + x // TILE[1] for y, x in places()])
    count = int(patch.max()) + 1

    def sees(query, key):
        pooled = [torch.stack([x[..., patch == p, :].mean(-2) for p in range(count)], -2) for x in (query, key)]
        map_ = torch.softmax(pooled[0] @ pooled[1].transpose(-1, -2) / math.sqrt(query.shape[-1]), -1)
        if scope == "head":
            flat = map_.flatten(-2)
            least = flat.sort(-1, descending=True).values[..., round(share * count * count) - 1]
            kept = map_ >= least[..., None, None]
            kept |= map_ == map_.amax(-1, keepdim=True)  # no row is empty
        else:
            kept = map_ >= map_.sort(-1, descending=True).values[..., math.ceil(share * count) - 1, None]
        return kept[..., patch, :][..., patch]

    return sees


def window(size):
    """Blocks of which a token lies in the window of a token of the query's block, moved inside the grid."""
    tiles = [[(y // TILE[0], x // TILE[1]) for y, x in places()]][0]

    def start(at, axis):
        return min(max(at - size[axis] // 2, 0), GRID[axis] - size[axis])

    near = {
        (tiles[i], tiles[j])
        for i, q in enumerate(places())
        for j, k in enumerate(places())
        if all(start(q[a], a) <= k[a] < start(q[a], a) + size[a] for a in range(2))
    }
    return near, tiles


CASES = {
    "sliding_tile{block=16,tile=4x4,window=3x3}": lambda: sliding_tile((3, 3)),
    "sliding_tile{block=16,tile=4x4,window=2x4}": lambda: sliding_tile((2, 4)),
    "draft_attention{block=16,tile=4x4,density=0.2,selector=topk,region=blocks}": lambda: draft(0.2, "row"),
}


@pytest.mark.parametrize("recipe", CASES)
def test_agrees_with_the_paper(recipe):
    assert masked(recipe, CASES[recipe]()) < 1e-5


def test_longest_bounds_the_lists_of_a_head():
    """With lists long enough for all that a head's map keeps, what is computed is the paper's."""
    recipe = "draft_attention{block=16,tile=4x4,density=0.25,longest=0.9,region=blocks}"
    assert masked(recipe, draft(0.25, "head")) < 1e-5


def test_another_recipe_fails():
    swapped = "sliding_tile{block=16,tile=4x4,window=3x3}"
    assert masked(swapped, draft(0.2, "row")) > 1e-3
    assert (
        masked("draft_attention{block=16,tile=4x4,density=0.2,selector=topk,region=blocks}", sliding_tile((3, 3)))
        > 1e-3
    )


def test_window_attention_sees_every_block_that_the_window_touches():
    near, tiles = window((6, 6))
    order = list(dict.fromkeys(tiles))

    recipe = "window_attention{block=16,tile=4x4,window=6x6}"
    program = sites(recipe)[0]
    lists = next(t for n, t in program.params.items() if ".index." in n)
    for i, row in enumerate(lists.tolist()):
        wanted = {order.index(k) for q, k in near if q == order[i]}
        assert wanted <= set(row)
        assert len(set(row)) == len(row)
    longest = max(sum(q == t for q, _ in near) for t in order)
    assert lists.shape == (16, longest)


@pytest.mark.parametrize("recipe", ["sliding_tile", "window_attention", "draft_attention{longest=1}"])
def test_neutral_is_exact(recipe):
    neutral = recipe.rstrip("}") + (",density=1}" if "{" in recipe else "{density=1}")
    *_, out, plain = sites(neutral)
    assert torch.equal(out, plain)
