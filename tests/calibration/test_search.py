"""The searches against every schedule there is, on problems small enough to try them all."""

import itertools
import math

import numpy as np
import pytest

from ditopt.calibration.mask import anchors, computed
from ditopt.calibration.partition import l1_distance, partition, segments
from ditopt.calibration.search import Progress, best_mask, crowding, non_dominated, nsga2, repaired, spread
from ditopt.errors import BadInput


def walk(seed, steps):
    rng = np.random.default_rng(seed)
    speed = rng.uniform(0.05, 1.5, size=(1, steps, 1, 1))
    return np.cumsum(rng.normal(size=(2, steps, 3, 4)) * speed, axis=1)


def reuse_loss(distance):
    return lambda mask: float(sum(distance[a, s] for s, a in enumerate(anchors(mask))))


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def test_fronts_against_the_definition():
    rng = np.random.default_rng(0)
    for columns in (1, 2, 3):
        rows = rng.integers(0, 5, size=(40, columns)).astype(float)  # with ties and equal rows
        left, fronts = set(range(40)), []
        while left:
            front = {i for i in left if not any(dominates(rows[j], rows[i]) for j in left)}
            fronts.append(sorted(front))
            left -= front
        assert non_dominated(rows) == fronts
        assert len(fronts) > 1


def test_crowding_against_the_definition():
    rows = np.array([[0.0, 10.0], [1.0, 6.0], [4.0, 5.0], [10.0, 0.0]])
    np.testing.assert_allclose(crowding(rows), [math.inf, 4 / 10 + 5 / 10, 9 / 10 + 6 / 10, math.inf])
    np.testing.assert_allclose(crowding(np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])), [math.inf, 0, math.inf])


def test_a_genome_computes_at_its_first_step():
    given = np.zeros((3, 2), dtype=int)
    np.testing.assert_array_equal(repaired(given), [[True, True], [False, False], [False, False]])
    assert not given.any()


def problem(steps=6, components=2):
    """Computed bits, and the loss of reuse of each component."""
    distances = [l1_distance(walk(c, steps)) for c in range(components)]

    def evaluate(genome):
        masks = ["".join("1" if bit else "0" for bit in genome[:, c]) for c in range(components)]
        return genome.sum(), sum(reuse_loss(d)(m) for d, m in zip(distances, masks, strict=True))

    return evaluate, (steps, components)


def true_front(evaluate, shape):
    free = (shape[0] - 1) * shape[1]
    genomes = [repaired(np.reshape((*[1] * shape[1], *bits), shape)) for bits in itertools.product((0, 1), repeat=free)]
    rows = [tuple(map(float, evaluate(g))) for g in genomes]
    return sorted(r for r in rows if not any(dominates(other, r) for other in rows))


@pytest.mark.parametrize("seed", range(3))
def test_nsga2_finds_the_front(seed):
    evaluate, shape = problem()
    asked = []

    def counted(genome):
        assert genome[0].all()
        asked.append(genome.tobytes())
        return evaluate(genome)

    front = nsga2(counted, shape, population=24, generations=25, seed=seed, mutation=0.5)
    want = true_front(evaluate, shape)
    assert len(asked) == len(set(asked)) < 2**10 * 0.75
    assert [c.objectives for c in front] == want
    assert all(tuple(map(float, evaluate(c.genome))) == c.objectives for c in front)


def test_nsga2_is_better_than_as_many_random_genomes():
    evaluate, shape = problem(16, 3)
    count = 0

    def counted(genome):
        nonlocal count
        count += 1
        return evaluate(genome)

    front = nsga2(counted, shape, population=30, generations=30, seed=1)
    rng = np.random.default_rng(1)
    random = [evaluate(repaired(rng.random(shape) < rng.random())) for _ in range(count)]
    found = [c.objectives for c in front]
    assert np.mean([any(dominates(f, r) for f in found) for r in random]) > 0.9
    assert np.mean([any(dominates(r, f) for r in random) for f in found]) < 0.1


def test_nsga2_is_deterministic_and_keeps_what_it_was_given():
    evaluate, shape = problem(12, 2)

    def key(found):
        return [(c.objectives, c.genome.tobytes()) for c in found]

    runs = [key(nsga2(evaluate, shape, population=12, generations=6, seed=s)) for s in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    known = np.ones(shape, dtype=bool)
    known[1:, 0] = False
    start = nsga2(evaluate, shape, population=2, generations=0, initial=[known, np.ones(shape)])
    assert {c.genome.tobytes() for c in start} == {known.tobytes(), np.ones(shape, dtype=bool).tobytes()}


def test_nsga2_says_how_far_it_is_and_stops_in_time():
    evaluate, shape = problem(12, 2)
    seen: list[Progress] = []
    nsga2(evaluate, shape, population=8, generations=5, progress=seen.append)
    assert [p.generation for p in seen] == [1, 2, 3, 4, 5]
    assert [p.evaluated for p in seen] == [16, 24, 32, 40, 48]
    assert all(p.front for p in seen)
    seen.clear()
    front = nsga2(evaluate, shape, generations=10**6, time_limit=0.0, progress=seen.append)
    assert len(front) == 1
    assert not seen


@pytest.mark.parametrize(("steps", "count"), [(9, 3), (12, 4), (12, 9)])
def test_best_mask_reaches_the_optimum(steps, count):
    for seed in range(3):
        distance = l1_distance(walk(seed, steps))
        loss = reuse_loss(distance)
        every = ["1" + "".join("1" if s in on else "0" for s in range(1, steps))
                 for on in itertools.combinations(range(1, steps), count - 1)]  # fmt: skip
        mask, value = best_mask(loss, steps, count, seed=seed)
        assert mask == min(every, key=loss)
        assert value == loss(mask)
        assert computed(mask) == partition(segments(distance), count)


def test_best_mask_takes_a_start_and_leaves_it_for_better():
    distance = l1_distance(walk(5, 30))
    loss = reuse_loss(distance)
    dp = "".join("1" if s in partition(segments(distance), 8) else "0" for s in range(30))
    assert best_mask(loss, 30, 8, starts=[dp], evaluations=1) == (dp, loss(dp))
    poor = "1" * 8 + "0" * 22
    mask, value = best_mask(loss, 30, 8, starts=[poor], phases=1)
    assert value < min(loss(poor), loss(spread(30, 8, 0.0)))
    assert value <= loss(dp) * 1.1
    assert mask.count("1") == 8


def test_best_mask_asks_once_and_within_its_budget():
    asked: list[str] = []
    seen: list[Progress] = []
    value = reuse_loss(l1_distance(walk(6, 24)))

    def loss(mask):
        asked.append(mask)
        return value(mask)

    best_mask(loss, 24, 6, evaluations=40, progress=seen.append)
    assert len(asked) == len(set(asked)) == 40
    assert all(m.count("1") == 6 and m[0] == "1" and len(m) == 24 for m in asked)
    assert [p.generation for p in seen] == list(range(1, len(seen) + 1))
    assert seen
    asked.clear()
    best_mask(loss, 24, 6, time_limit=0.0)
    assert len(asked) == 1
    assert best_mask(lambda m: 1.0, 5, 5) == ("11111", 1.0)
    assert best_mask(lambda m: 1.0, 5, 1) == ("10000", 1.0)


def test_spread():
    assert spread(12, 3, 0.0) == "100010001000"
    assert spread(12, 3, 0.5) == "100000100010"
    assert spread(7, 3, 0.0) == "1010100"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nsga2(lambda g: (1.0, math.nan), (4, 2)), "finite numbers"),
        (lambda: nsga2(lambda g: range(g.sum()), (4, 2)), "as many for every genome"),
        (lambda: nsga2(lambda g: (1.0,), (4, 2), initial=[np.ones((2, 4))]), r"shape \(2, 4\); expected \(4, 2\)"),
        (lambda: nsga2(lambda g: (1.0,), (4, 2), crossover=1.5), "crossover=1.5"),
        (lambda: nsga2(lambda g: (1.0,), ()), "shape of a genome is empty"),
        (lambda: nsga2(lambda g: (1.0,), (4,), population=1), "population=1"),
        (lambda: best_mask(lambda m: math.nan, 4, 2), "is NaN"),
        (lambda: best_mask(len, 4, 5), "count=5 given; expected a whole number from 1 to 4"),
        (lambda: best_mask(len, 4, 2, starts=["1110"]), "computes 3 steps; expected 2"),
        (lambda: best_mask(len, 4, 2, starts=["110"]), "3 digits for a run of 4"),
    ],
)
def test_wrong_input_is_one_sentence(call, says):
    with pytest.raises(BadInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
