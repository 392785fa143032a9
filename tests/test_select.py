"""Region selectors, on a model of ten blocks in two stages, the second without attention of its own."""

from __future__ import annotations

import pytest

from ditopt.errors import RecipeError
from ditopt.ir.program import Program, Region
from ditopt.ir.select import select_regions
from ditopt.passes.cache import Cache
from ditopt.pipeline import Context


def program(n: int = 10, first_stage: int = 6) -> Program:
    regions = [Region("model", "model", "")]
    for i in range(n):
        regions.append(Region(f"blocks.{i}", "block", "model", stage=int(i >= first_stage)))
        if i < first_stage:
            regions.append(Region(f"blocks.{i}.attn", "attn", f"blocks.{i}"))
        regions.append(Region(f"blocks.{i}.mlp", "mlp", f"blocks.{i}"))
    return Program({}, "step", {}, (), (), regions=tuple(regions))


def numbers(text: str) -> list[int]:
    (selection,) = select_regions(program(), text)
    return [int(b.id.split(".")[1]) for b in selection.blocks]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blocks", range(10)),
        ("blocks.3", [3]),
        ("blocks.-1", [9]),
        ("blocks.1:-1", range(1, 9)),
        ("blocks.:2", [0, 1]),
        ("blocks.8:", [8, 9]),
        ("blocks.8:99", [8, 9]),
        ("blocks.10%:90%", range(1, 9)),
        ("blocks.0%:100%", range(10)),
        ("blocks.15%:50%", range(2, 5)),  # 1.5 rounds up; Python's round() would agree here, and not at 2.5
        ("blocks.25%:50%", range(3, 5)),
        ("blocks.8:-0", [8, 9]),
        ("blocks.8:-10%", [8]),
        ("blocks.-20%:", [8, 9]),
        ("stage.0", range(6)),
        ("stage.1", range(6, 10)),
    ],
)
def test_runs(text, expected):
    assert numbers(text) == list(expected)
    (selection,) = select_regions(program(), text)
    assert selection.kind == "run"
    assert selection.ids == tuple(f"blocks.{i}" for i in expected)


def test_modules_and_alternatives():
    attn, mlp = select_regions(program(), "blocks.*.attn | blocks.1:-1.mlp")
    assert attn.kind == mlp.kind == "modules"
    assert attn.ids == tuple(f"blocks.{i}.attn" for i in range(6)), "blocks without the role are left out"
    assert mlp.ids == tuple(f"blocks.{i}.mlp" for i in range(1, 9))
    assert numbers("stage.1.mlp") == [6, 7, 8, 9]
    assert numbers("blocks.attn") == list(range(6))
    (model,) = select_regions(program(), "model")
    assert (model.kind, model.ids) == ("model", ("model",))


@pytest.mark.parametrize(
    "text", ["blocks.10", "blocks.-12", "blocks.5:5", "stage.2", "stage.1.attn", "blocks.*.ffn", "blocks.6:.attn"]
)
def test_matching_nothing_says_what_there_is(text):
    with pytest.raises(
        RecipeError, match=r"matches nothing; the model has 10 blocks .* 2 stages, roles attn, mlp.*try"
    ):
        select_regions(program(), text)


def test_an_alternative_may_match_nothing_where_another_does_not():
    """A recipe for attention and MLP fits a model whose blocks are attention only."""
    attn, other = select_regions(program(), "blocks.*.attn|blocks.6:.attn")
    assert len(attn.ids) == 6
    assert other.ids == ()
    with pytest.raises(RecipeError, match=r"'blocks.6:.attn\|stage.2' matches nothing"):
        select_regions(program(), "blocks.6:.attn|stage.2")


def test_a_cache_says_which_alternative_matches_nothing():
    out = Cache(region="blocks.*.attn|stage.7.mlp").run(Cache.example_applies(), Context())
    assert out.applied > 0
    assert out.refused == ("stage.7.mlp matches nothing",)


@pytest.mark.parametrize(
    "text",
    ["", "block", "blocks.x:y", "blocks.1:2:3", "blocks.50%", "blocks.*", "stage", "stage.*", "model|", "blocks..attn"],
)
def test_malformed(text):
    with pytest.raises(RecipeError, match=r"region '"):
        select_regions(program(), text)


def test_a_model_without_blocks():
    with pytest.raises(RecipeError, match="no repeated blocks were found"):
        select_regions(program(0), "blocks")
