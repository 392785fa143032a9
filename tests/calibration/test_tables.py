"""Schedule tables from files: what they mean, and that damaged ones are refused in one sentence."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ditopt.calibration.search import nsga2
from ditopt.calibration.tables import ecad, genome_masks, harmonica, learning_to_cache, read_scores, region_masks
from ditopt.errors import RecipeError

LOGITS = np.array([[-9.0, -9, -9, -9], [2, -3, -2.1, -2.3], [-3, 0, 5, -9], [-2, -3, -3, 1]])
"""The logarithm of 1/9 is -2.197: above it the sigmoid is above 0.1."""


def test_harmonica_rows_are_steps():
    assert harmonica(LOGITS) == {
        "blocks.0.attn": "1101",
        "blocks.0.mlp": "1010",
        "blocks.1.attn": "1110",
        "blocks.1.mlp": "1001",
    }
    assert harmonica(LOGITS, threshold=0.9)["blocks.1.attn"] == "1010"
    assert set(harmonica(LOGITS, threshold=1.0).values()) == {"1000"}
    probabilities = 1 / (1 + np.exp(-LOGITS))
    assert harmonica(probabilities, logits=False) == harmonica(LOGITS)


def test_learning_to_cache_rows_run_backwards_and_every_second_step_is_full():
    """As its sampler: step s looks row T - 1 - s up, and forgets what it kept before steps 0, 2, 4, ..."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(8, 6)) * 3
    masks = learning_to_cache(scores, 0.5)
    for s in range(8):
        for c in range(6):
            runs = s % 2 == 0 or 1 / (1 + np.exp(-scores[7 - s, c])) > 0.5
            assert masks[f"blocks.{c // 2}.{'attn' if c % 2 == 0 else 'mlp'}"][s] == str(int(runs))
    assert masks != harmonica(scores, 0.5)


def test_scores_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(LOGITS.tolist()))
    np.save(tmp_path / "a.npy", LOGITS.astype(np.float32))
    save_file({"router": LOGITS}, tmp_path / "a.safetensors")
    save_file({f"{i}.prob": row for i, row in enumerate(LOGITS)}, tmp_path / "b.safetensors")
    many = np.arange(24.0).reshape(12, 2)  # so that step 10 is not taken for one before step 2
    save_file({f"{i}.prob": row for i, row in enumerate(many)}, tmp_path / "c.safetensors")
    for name in ("a.json", "a.npy", "a.safetensors", "b.safetensors"):
        np.testing.assert_allclose(read_scores(tmp_path / name), LOGITS, rtol=1e-6)
    np.testing.assert_array_equal(read_scores(tmp_path / "c.safetensors"), many)


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_scores(tmp_path / "a.npy")
    with open(tmp_path / "b.npy", "wb") as file:
        np.savez(file, LOGITS)
    with pytest.raises(RecipeError, match="archive of arrays"):
        read_scores(tmp_path / "b.npy")
    torch.save({"routers": torch.zeros(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(RecipeError, match=r"ends in \.pt; expected \.json, \.npy or \.safetensors"):
        read_scores(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"[[1, 2], [3]]", "not an array of numbers"),
        ("a.json", b'[["x", 2]]', "not an array of numbers"),
        ("a.json", b"[[NaN, 2]]", "holds NaN"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"\xff\xfe\x00", "cannot be read"),
        ("a.npy", b"", "cannot be read"),
        ("a.safetensors", b"12345678", "cannot be read"),
    ],
)
def test_damaged_tables(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=says) as caught:
        read_scores(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_tables_with_unclear_steps(tmp_path):
    row = np.zeros(2)
    for names, says in (
        (["a", "b"], "cannot tell the step"),
        (["0.x", "2.x"], r"steps \[0, 2\]"),
        (["1", "01"], "tell"),
    ):
        save_file(dict.fromkeys(names, row), tmp_path / "a.safetensors")
        with pytest.raises(RecipeError, match=says):
            read_scores(tmp_path / "a.safetensors")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_scores(tmp_path / "none.npy")


@pytest.mark.parametrize("read", [harmonica, learning_to_cache])
@pytest.mark.parametrize(
    ("table", "more", "says"),
    [
        (np.zeros((4, 3)), {}, r"expected \(steps, 2 \* blocks\)"),
        (np.zeros(4), {}, r"shape \(4,\)"),
        (np.full((4, 2), np.nan), {}, "NaN"),
        (np.full((4, 2), 2.0), {"logits": False}, "from 2 to 2 given; expected 0 to 1"),
        (np.zeros((4, 2)), {"steps": 5}, "is for 4 steps and this run has 5"),
        (np.zeros((4, 2)), {"threshold": 1.5}, "threshold=1.5"),
    ],
)
def test_wrong_routers(read, table, more, says):
    with pytest.raises(ValueError, match=says) as caught:
        read(table, **more)
    assert "\n" not in str(caught.value)


def test_genomes():
    genome = np.zeros((4, 2, 3), dtype=int)
    genome[:, 0, 0] = [0, 1, 0, 1]
    genome[:, 1, 2] = [1, 0, 1, 0]
    assert genome_masks(genome, ("attn", "cross", "mlp")) == {
        "blocks.0.attn": "1101",
        "blocks.0.cross": "1000",
        "blocks.0.mlp": "1000",
        "blocks.1.attn": "1000",
        "blocks.1.cross": "1000",
        "blocks.1.mlp": "1010",
    }
    both = genome_masks(genome | np.roll(genome, 1, axis=1), ("attn", "attn", "mlp"))
    assert both["blocks.0.attn"] == "1101"
    genome[:, 0, 1] = [0, 0, 1, 0]
    assert genome_masks(genome, ("attn", "attn", "mlp"))["blocks.0.attn"] == "1111"
    found = nsga2(lambda g: (g.sum(), -g[2].sum()), (4, 2, 3), population=8, generations=2)
    for candidate in found:
        masks = genome_masks(candidate.genome, ("attn", "cross", "mlp"), steps=4)
        assert sum(m.count("1") for m in masks.values()) == candidate.objectives[0]
    for given, says in (
        (genome[0], r"expected \(steps, blocks, 3\)"),
        (genome * 2, "other values than 0"),
        (np.full((4, 2, 3), np.nan), "other values"),
    ):
        with pytest.raises(RecipeError, match=says):
            genome_masks(given, ("attn", "cross", "mlp"))
    with pytest.raises(RecipeError, match="is for 4 steps and this run has 3"):
        genome_masks(genome, ("attn", "cross", "mlp"), steps=3)


def schedule(bits):
    """A file of ECAD of two blocks and one single block: bits[step] -> attn1, ff of both, then the single attention."""
    steps = {
        f"{s:03}": {
            "0": {"attn1": b[0], "attn2": True, "ff": b[1]},
            "1": {"attn1": b[2], "attn2": True, "ff": b[3]},
            "single_0": {"single_attn": b[4]},
        }
        for s, b in enumerate(bits)
    }
    return {"cache_schedule": {"num_blocks": 2, "num_inference_steps": len(bits), "name": "x", "schedule": steps}}


BITS = [[True] * 5, [False, True, False, False, True], [True, False, False, True, False]]
NAMES = {"attn1": "attn", "attn2": "", "ff": "mlp", "single_attn": "attn"}


def test_ecad_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(schedule(BITS)))
    assert ecad(path, NAMES, steps=3) == {
        "blocks.0.attn": "101",
        "blocks.0.mlp": "110",
        "blocks.1.attn": "100",
        "blocks.1.mlp": "101",
        "blocks.2.attn": "110",
    }
    joined = ecad(path, {**NAMES, "attn1": "all", "ff": "all"})
    assert joined["blocks.0.all"] == "111"
    assert joined["blocks.1.all"] == "101"
    with pytest.raises(RecipeError, match=r"component 'single_attn'; say in names= what it is here .*attn1, attn2, ff"):
        ecad(path, {"attn1": "attn", "attn2": "", "ff": "mlp"})
    with pytest.raises(RecipeError, match="is for 3 steps and this run has 20"):
        ecad(path, NAMES, steps=20)


def test_damaged_ecad_files(tmp_path):
    path = tmp_path / "a.json"
    missing_step = schedule(BITS)
    del missing_step["cache_schedule"]["schedule"]["001"]
    missing_bit = schedule(BITS)
    del missing_bit["cache_schedule"]["schedule"]["001"]["1"]
    number = schedule(BITS)
    number["cache_schedule"]["schedule"]["001"]["1"]["ff"] = 0.5
    for data, says in (
        ({}, "not a schedule of ECAD"),
        ([1], "not a schedule of ECAD"),
        (missing_step, "not a schedule of ECAD"),
        (missing_bit, r"blocks\.1\.attn has no bit at some step"),
        (number, "step 1, block '1'"),
    ):
        path.write_text(json.dumps(data))
        with pytest.raises(RecipeError, match=says):
            ecad(path, NAMES)


def test_masks_of_regions(tmp_path):
    want = {"blocks.*.attn": "1101", "blocks.0.mlp": "1001"}
    (tmp_path / "a.toml").write_text('"blocks.*.attn" = "1101"\n[blocks.0]\nmlp = [1, 0, 0, 1]\n')
    (tmp_path / "a.json").write_text(json.dumps({"blocks.*.attn": [1, 1, 0, 1], "blocks": {"0": {"mlp": "1001"}}}))
    assert region_masks(tmp_path / "a.toml") == want
    assert region_masks(tmp_path / "a.json", steps=4) == want
    (tmp_path / "smoothcache.json").write_text('{"attn1": [1,0,0,1], "mlp": [1,1,0,1]}')
    assert region_masks(tmp_path / "smoothcache.json") == {"attn1": "1001", "mlp": "1101"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.toml", 'a = "1101"\nb = "110"', "a has 4 digits and b has 3"),
        ("a.toml", 'a = "0101"', "its first digit must be 1"),
        ("a.toml", 'a = "1x01"', "a text of 1"),
        ("a.toml", "a = [1, 2]", "'12' given"),
        ("a.toml", "a = [1, 0.0]", "text of 1"),
        ("a.toml", "a = 1101", "1101 given"),
        ("a.toml", "a = ", "is not TOML"),
        ("a.toml", "", "holds no masks"),
        ("a.json", "[1]", "holds no masks"),
        ("a.yaml", "", r"end in \.yaml"),
    ],
)
def test_wrong_masks(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=says) as caught:
        region_masks(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_masks_of_another_run(tmp_path):
    (tmp_path / "a.toml").write_text('a = "1101"')
    with pytest.raises(RecipeError, match=r"a is for 4 steps and this run has 5"):
        region_masks(tmp_path / "a.toml", steps=5)
