"""Ordered partition against brute force; BAC, CacheQuant and DDT against their definitions, written out as loops."""

import itertools
import math

import numpy as np
import pytest

from ditopt.calibration.mask import anchors, check, computed, text
from ditopt.calibration.partition import (
    bac,
    bubbling_union,
    cachequant,
    cosine_distance,
    ddt_sharing,
    l1_distance,
    partition,
    segments,
    token_cosine_distance,
    volatility,
)
from ditopt.errors import BadInput


def walk(seed, n=2, steps=10, tokens=3, channels=4):
    """A recording that drifts unevenly, so that no two partitions cost the same."""
    rng = np.random.default_rng(seed)
    speed = rng.uniform(0.05, 1.5, size=(1, steps, 1, 1))
    return np.cumsum(rng.normal(size=(n, steps, tokens, channels)) * speed, axis=1) + rng.normal(
        size=(n, 1, tokens, channels)
    )


def all_partitions(steps, groups, shortest, longest):
    for cuts in itertools.combinations(range(1, steps), groups - 1):
        edges = [0, *cuts, steps]
        if all(shortest <= b - a <= longest for a, b in itertools.pairwise(edges)):
            yield list(edges[:-1])


def total(cost, begins):
    return sum(cost[a][b - 1] for a, b in itertools.pairwise([*begins, len(cost)]))


@pytest.mark.parametrize("steps", range(1, 13))
def test_partition_is_the_best_of_all(steps):
    rng = np.random.default_rng(steps)
    cost = rng.uniform(size=(steps, steps))
    tried = 0
    for groups in range(1, steps + 1):
        for shortest, longest in ((1, None), (1, 3), (2, None), (2, 4)):
            every = list(all_partitions(steps, groups, shortest, longest or steps))
            if not every:
                with pytest.raises(BadInput, match=f"{steps} steps do not divide into {groups} groups"):
                    partition(cost, groups, shortest, longest)
                continue
            tried += 1
            assert partition(cost, groups, shortest, longest) == min(every, key=lambda b: total(cost, b))
    assert tried >= steps


def test_partition_reads_only_the_upper_triangle():
    cost = np.random.default_rng(0).uniform(size=(6, 6))
    below = np.where(np.tri(6, k=-1, dtype=bool), np.nan, cost)
    assert partition(below, 3) == partition(cost, 3)


def test_segments_sum_what_a_reuse_costs():
    distance = np.arange(16.0).reshape(4, 4)
    cost = segments(distance)
    for i in range(4):
        for j in range(4):
            assert cost[i, j] == sum(distance[i, k] for k in range(i, j + 1))  # an empty sum below the diagonal


def cosine(a, b):
    return float(np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)))


def test_distances_against_loops():
    v = walk(1)
    n, steps, tokens, _ = v.shape
    for i, k in itertools.product(range(steps), repeat=2):
        whole = [1 - cosine(v[r, i].ravel(), v[r, k].ravel()) for r in range(n)]
        token = [1 - cosine(v[r, i, p], v[r, k, p]) for r in range(n) for p in range(tokens)]
        l1 = [sum(abs(x - y) for x, y in zip(v[r, i].flat, v[r, k].flat, strict=True)) for r in range(n)]
        assert cosine_distance(v)[i, k] == pytest.approx(np.mean(whole), abs=1e-12)
        assert token_cosine_distance(v)[i, k] == pytest.approx(np.mean(token), abs=1e-12)
        assert l1_distance(v)[i, k] == pytest.approx(np.mean(l1))
    assert volatility(v) == pytest.approx(np.mean([abs(v[:, t + 1] - v[:, t]).mean() for t in range(steps - 1)]))


def test_values_of_zero_are_like_each_other_only():
    v = np.zeros((1, 3, 1, 2))
    v[0, 2] = 1.0
    for distance in (cosine_distance(v), token_cosine_distance(v)):
        np.testing.assert_allclose(distance, [[0, 0, 1], [0, 0, 1], [1, 1, 0]], atol=1e-15)


def best_by_brute_force(v, measure, groups, shortest, longest):
    """Serve each step from the newest computed one, in every way there is."""
    steps = v.shape[1]

    def loss(begins):
        anchor = [max(b for b in begins if b <= s) for s in range(steps)]
        return sum(measure(v[:, a], v[:, s]) for s, a in enumerate(anchor))

    return min(all_partitions(steps, groups, shortest, longest), key=loss)


def whole_cosine(a, b):
    return np.mean([1 - cosine(x.ravel(), y.ravel()) for x, y in zip(a, b, strict=True)])


def token_cosine(a, b):
    return np.mean(
        [1 - cosine(x, y) for x, y in zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)]
    )


def l1(a, b):
    return np.abs(a - b).sum()


@pytest.mark.parametrize("seed", range(4))
def test_cachequant_ddt_and_bac_against_brute_force(seed):
    v = walk(seed)
    assert computed(cachequant(v, 3)) == best_by_brute_force(v, l1, 4, 2, 6)
    assert computed(ddt_sharing(v, 3.0)) == best_by_brute_force(v, token_cosine, 3, 1, 10)
    assert computed(bac({"a": v}, 4)["a"]) == best_by_brute_force(v, whole_cosine, 4, 1, 10)


def test_the_three_systems_differ():
    """None of the three would pass for another in the test above."""
    for seed in range(20):
        v = walk(seed)
        if len({cachequant(v, 2), ddt_sharing(v, 2), bac({"a": v}, 5)["a"]}) == 3:
            return
    pytest.fail("the three systems chose the same steps on every recording")


def test_ddt_counts_down_and_computes_first():
    v = walk(3)
    for rate, count in ((1, 10), (1.5, 6), (4, 2), (10, 1)):
        mask = ddt_sharing(v, rate)
        assert mask[0] == "1"
        assert mask.count("1") == count


def test_bubbling_union_reaches_from_deep_to_shallow():
    sets = {"0.attn": [0], "0.mlp": [0, 1], "1.attn": [0, 9], "1.mlp": [0, 2], "2.mlp": [0, 3], "3.mlp": [0, 4]}
    mlps = ["0.mlp", "1.mlp", "2.mlp", "3.mlp"]
    volatile = {"0.mlp": 5.0, "1.mlp": 1.0, "2.mlp": 4.0, "3.mlp": 0.0}
    assert bubbling_union(sets, mlps, volatile, 0) == sets
    assert bubbling_union(sets, mlps, volatile, 1) == sets | {"0.mlp": [0, 1, 2, 3, 4]}
    assert bubbling_union(sets, mlps, volatile, 2) == sets | {"0.mlp": [0, 1, 2, 3, 4], "2.mlp": [0, 3, 4]}
    assert bubbling_union(sets, mlps, volatile, 3)["1.mlp"] == [0, 2, 3, 4]


def test_bac_masks_hold_those_behind_them():
    modules = {f"{b}.{m}": walk(10 * b + len(m)) * (4 - b) for b in range(4) for m in ("attn", "mlp")}
    mlps = [n for n in modules if n.endswith("mlp")]
    masks = bac(modules, 3, mlps, volatile=2)
    plain = bac(modules, 3)
    order = sorted(mlps, key=lambda n: -volatility(modules[n]))[:2]
    for n in order:
        behind = set().union(*[computed(masks[m]) for m in mlps if m >= n])
        assert set(computed(masks[n])) == behind
    assert all(masks[n] == plain[n] and plain[n].count("1") == 3 for n in modules if n not in order)
    assert any(masks[n] != plain[n] for n in order)


def test_masks():
    assert text(4, [0, 2]) == "1010"
    assert computed("1010") == [0, 2]
    assert list(anchors("10110")) == [0, 0, 2, 3, 3]
    with pytest.raises(BadInput, match="3 digits for a run of 4 steps"):
        check("101", 4)
    with pytest.raises(BadInput, match="first digit must be 1"):
        check("01")
    with pytest.raises(BadInput, match="text of 1"):
        check("1x")
    with pytest.raises(BadInput, match="from 0 to 3"):
        text(4, [4])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda v: partition(np.zeros((2, 3)), 1), r"shape \(2, 3\)"),
        (lambda v: partition(np.full((2, 2), np.nan), 1), "NaN"),
        (lambda v: partition(np.zeros((3, 3)), 0), "groups=0"),
        (lambda v: cachequant(v, 11), "interval=11 given; expected a whole number from 1 to 10"),
        (lambda v: cachequant(v[0], 3), r"expected \(recordings, steps, tokens, channels\)"),
        (lambda v: cachequant(v * np.nan, 3), "values hold NaN"),
        (lambda v: ddt_sharing(v, 0.5), "rate=0.5"),
        (lambda v: ddt_sharing(v, 11), "rate=11"),
        (lambda v: bac({"a": v}, 11), "refreshes=11 given for recordings of 10 steps"),
        (lambda v: bac({}, 2), "no recording"),
        (lambda v: bac({"a": v, "b": v[:, :5]}, 2), r"\[5, 10\] steps"),
        (lambda v: bac({"a": v}, 2, ["b"]), "'b' is named as an MLP"),
        (lambda v: cachequant([["x"]], 3), "not an array of numbers"),
    ],
)
def test_wrong_input_is_one_sentence(call, says):
    with pytest.raises(BadInput, match=says) as caught:
        call(walk(0))
    assert "\n" not in str(caught.value)
