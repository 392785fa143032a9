"""Searching schedules by what they do: a front of genomes (NSGA-II, as ECAD uses it), or the best mask of a given size.

The caller says what a schedule is worth; nothing here runs a model. Searches are deterministic by their seed, except
where a time limit ends them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditopt.calibration.mask import Floats, check, computed, real, text, whole
from ditopt.errors import BadInput

Genome = NDArray[np.bool_]
"""(T, ...): True where a component computes at a step; components are whatever the other axes say."""


@dataclass(frozen=True)
class Candidate:
    """A genome and its objectives, all of which are to be small."""

    genome: Genome
    objectives: tuple[float, ...]


@dataclass(frozen=True)
class Progress:
    """How far a search is: generations (or improvements) done, schedules evaluated, the best ones so far."""

    generation: int
    evaluated: int
    seconds: float
    front: Sequence[Candidate] = field(repr=False, default=())


def repaired(genome: ArrayLike) -> Genome:
    """A genome that can run: where nothing is kept yet a component computes whatever its bit says, so that the first
    step is all True."""
    out = np.array(genome, dtype=bool)
    out[0] = True
    return out


def non_dominated(objectives: Floats) -> list[list[int]]:
    """Fronts of the rows of (n, m), all columns to be small: those that no row dominates, then those that only rows of
    the first front dominate, and so on."""
    no_worse: NDArray[np.bool_] = np.all(objectives[:, None] <= objectives[None], axis=2)
    better: NDArray[np.bool_] = no_worse & ~no_worse.T
    left, fronts = np.arange(len(objectives)), []
    while len(left):
        free = ~better[np.ix_(left, left)].any(axis=0)
        fronts.append([int(i) for i in left[free]])
        left = left[~free]
    return fronts


def crowding(objectives: Floats) -> Floats:
    """Crowding distances of the rows of one front (n, m): the sum over columns of the gap between a row's neighbours
    over the column's range; inf at both ends."""
    n = len(objectives)
    out = np.zeros(n)
    for column in objectives.T:
        order = np.argsort(column, kind="stable")
        ordered, span = column[order], float(column.max() - column.min())
        out[order[[0, -1]]] = math.inf
        if span > 0 and n > 2:
            out[order[1:-1]] += (ordered[2:] - ordered[:-2]) / span
    return out


def nsga2(
    evaluate: Callable[[Genome], Sequence[float]],
    shape: Sequence[int],
    *,
    population: int = 72,
    generations: int = 100,
    initial: Iterable[ArrayLike] = (),
    seed: int = 0,
    crossover: float = 0.9,
    points: int = 4,
    mutation: float = 0.05,
    flip: float | None = None,
    progress: Callable[[Progress], None] | None = None,
    evaluations: int | None = None,
    time_limit: float | None = None,
) -> list[Candidate]:
    """The Pareto front of schedules by NSGA-II with the settings of ECAD (arXiv 2506.15682), smallest first objective
    first.

    evaluate: a genome, bool of ``shape`` = (T, ...) -> objectives, all to be small, as many every time. It is asked
        once for each genome.
    initial: genomes to start from, such as known schedules; random ones of different density fill the population.
    crossover: chance that two parents exchange what lies between ``points`` random cuts of their bits.
    mutation: chance that a child is mutated; then each bit flips with chance ``flip`` (None: 1 / bits). The authors'
        ``BitflipMutation(prob=0.05)`` means this in their version of pymoo.
    progress: called after each generation. evaluations, time_limit: genomes, and seconds, after which the search
        returns what it has.

    Every genome is ``repaired`` first. The front is that of all genomes ever evaluated.
    """
    steps = [whole("shape", n, 1) for n in shape]
    whole("population", population, 2)
    whole("generations", generations, 0)
    whole("points", points, 1)
    for name, chance in (("crossover", crossover), ("mutation", mutation), ("flip", flip)):
        if chance is not None:
            real(name, chance, 0.0, 1.0)
    if not steps:
        raise BadInput("nsga2: the shape of a genome is empty; expected (steps, ...)")
    run = _Evolution(evaluate, tuple(steps), np.random.default_rng(seed), evaluations, time_limit)
    chance = 1 / math.prod(steps) if flip is None else flip
    members = run.begin(population, initial)
    for generation in range(1, generations + 1):
        if run.over():
            break
        children = run.children(members, population, crossover, points, mutation, chance)
        if not children:
            break  # every genome that can be reached is known
        members = run.survivors([*members, *children], population)
        if progress:
            progress(Progress(generation, len(run.known), run.seconds(), run.front()))
    return run.front()


class _Evolution:
    """A run of NSGA-II: what was evaluated, and the operators."""

    def __init__(
        self,
        evaluate: Callable[[Genome], Sequence[float]],
        shape: tuple[int, ...],
        rng: np.random.Generator,
        evaluations: int | None,
        time_limit: float | None,
    ) -> None:
        self.evaluate, self.shape, self.rng = evaluate, shape, rng
        self.most = math.inf if evaluations is None else whole("evaluations", evaluations, 1)
        self.limit = math.inf if time_limit is None else real("time_limit", time_limit, 0.0)
        self.started = time.monotonic()
        self.known: dict[bytes, Candidate] = {}
        self.best: list[Candidate] = []  # the front of all known ones, kept up to date: they may be many

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def over(self) -> bool:
        return self.seconds() >= self.limit or len(self.known) >= self.most

    def add(self, genome: ArrayLike) -> Candidate | None:
        """The genome as a candidate; None where it is known already."""
        made = repaired(genome)
        key = made.tobytes()
        if key in self.known:
            return None
        values = tuple(float(v) for v in self.evaluate(made.copy()))
        one = next(iter(self.known.values()), None)
        if not values or not all(map(math.isfinite, values)) or (one and len(one.objectives) != len(values)):
            raise BadInput(f"nsga2: evaluate returned {values}; expected finite numbers, as many for every genome")
        new = self.known[key] = Candidate(made, values)
        if not any(_dominates(c, new) for c in self.best):
            self.best = [*(c for c in self.best if not _dominates(new, c)), new]
        return new

    def begin(self, population: int, initial: Iterable[ArrayLike]) -> list[Candidate]:
        members: list[Candidate | None] = []
        for genome in initial:
            array = np.asarray(genome)
            if array.shape != self.shape:
                raise BadInput(f"nsga2: an initial genome has shape {array.shape}; expected {self.shape}")
            if not (members and self.over()):
                members.append(self.add(array))
        tries = 0
        while len(members) < population and tries < 10 * population and not (members and self.over()):
            tries += 1
            members.append(self.add(self.rng.random(self.shape) < self.rng.random()))
            members = [m for m in members if m is not None]
        return self.survivors([m for m in members if m is not None], population)

    def survivors(self, members: list[Candidate], population: int) -> list[Candidate]:
        """The best ``population`` members: by front, then by crowding, best first."""
        values = np.array([m.objectives for m in members])
        kept: list[int] = []
        for front in non_dominated(values):
            crowd = crowding(values[front])
            kept += [front[i] for i in np.argsort(-crowd, kind="stable")]
            if len(kept) >= population:
                break
        return [members[i] for i in kept[:population]]

    def children(
        self, members: list[Candidate], count: int, crossover: float, points: int, mutation: float, flip: float
    ) -> list[Candidate]:
        """Up to ``count`` new candidates. ``members`` come best first: the lower index wins a tournament."""
        made: list[Candidate] = []
        for _ in range(10 * count):
            if len(made) >= count or (made and self.over()):
                break
            pair = [members[int(self.rng.integers(len(members), size=2).min())].genome.ravel() for _ in range(2)]
            if self.rng.random() < crossover:
                pair = self.crossed(pair[0], pair[1], points)
            for child in pair:
                if self.rng.random() < mutation:
                    child = child ^ (self.rng.random(child.size) < flip)
                new = self.add(child.reshape(self.shape)) if len(made) < count else None
                made += [] if new is None else [new]
        return made

    def crossed(self, one: Genome, other: Genome, points: int) -> list[Genome]:
        cuts = 1 + np.sort(self.rng.permutation(one.size - 1)[:points])
        swap = np.searchsorted(cuts, np.arange(one.size), side="right") % 2 == 1
        return [np.where(swap, other, one), np.where(swap, one, other)]

    def front(self) -> list[Candidate]:
        return sorted(self.best, key=lambda c: (c.objectives, c.genome.tobytes()))


def _dominates(one: Candidate, other: Candidate) -> bool:
    pairs = zip(one.objectives, other.objectives, strict=True)
    return one.objectives != other.objectives and all(a <= b for a, b in pairs)


# -- one mask ----------------------------------------------------------------------------------------------------------


def spread(steps: int, count: int, phase: float) -> str:
    """A mask of ``count`` evenly spaced computed steps: step 0, and the others shifted by ``phase`` in [0, 1) of their
    distance."""
    gap = steps / count
    return text(steps, [0, *(min(math.floor((i + phase) * gap), steps - 1) for i in range(1, count))])


def best_mask(
    loss: Callable[[str], float],
    steps: int,
    count: int,
    *,
    seed: int = 0,
    starts: Iterable[str] = (),
    phases: int = 4,
    evaluations: int | None = None,
    time_limit: float | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[str, float]:
    """The mask of ``steps`` digits, ``count`` of them 1, of least ``loss`` that hill climbing finds, and its loss.

    loss: a mask -> number to be small; asked once for each mask. starts: masks to begin with besides ``phases`` evenly
    spaced ones, such as those of ``partition``; each has ``count`` computed steps. A move takes one computed step,
    never the first, to a step that is reused, near ones first. Each start is climbed from, the best one first, until
    ``evaluations`` masks were asked for or ``time_limit`` seconds are over.
    """
    whole("steps", steps, 1)
    whole("count", count, 1, steps)
    whole("phases", phases, 1)
    most = math.inf if evaluations is None else whole("evaluations", evaluations, 1)
    limit = math.inf if time_limit is None else real("time_limit", time_limit, 0.0)
    rng, started, moves = np.random.default_rng(seed), time.monotonic(), 0
    known: dict[str, float] = {}

    def over() -> bool:
        return bool(known) and (len(known) >= most or time.monotonic() - started >= limit)

    def ask(mask: str) -> float:
        if mask not in known:
            value = float(loss(mask))
            if math.isnan(value):
                raise BadInput(f"best_mask: the loss of {mask} is NaN; return inf for a mask that cannot be used")
            known[mask] = value
        return known[mask]

    first = [check(m, steps, "a start") for m in starts]
    wrong = next((m for m in first if m.count("1") != count), None)
    if wrong is not None:
        raise BadInput(f"best_mask: the start {wrong} computes {wrong.count('1')} steps; expected {count}")
    for mask in [*first, *(spread(steps, count, i / phases) for i in range(phases))]:
        if mask.count("1") == count and not over():
            ask(mask)
    for mask in sorted(known, key=lambda m: known[m]):
        improved: str | None = mask
        while improved is not None:
            mask, improved = improved, None
            for neighbour in _neighbours(mask, rng):
                if over():
                    break
                if ask(neighbour) < known[mask]:
                    improved, moves = neighbour, moves + 1
                    if progress:
                        progress(Progress(moves, len(known), time.monotonic() - started))
                    break
    best = min(known, key=lambda m: known[m])
    return best, known[best]


def _neighbours(mask: str, rng: np.random.Generator) -> list[str]:
    """The masks one move away: shuffled, then by the length of the move."""
    on, off = computed(mask)[1:], [s for s, digit in enumerate(mask) if digit == "0"]
    moves = [(abs(a - b), a, b) for a in on for b in off]
    moves = [moves[i] for i in rng.permutation(len(moves))]
    steps = set(computed(mask))
    return [text(len(mask), steps - {a} | {b}) for _, a, b in sorted(moves, key=lambda m: m[0])]
