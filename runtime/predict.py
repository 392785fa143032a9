"""Coefficients of predictions: every predictor is a linear combination of earlier values, and these are its weights.

Pure arithmetic on Python floats; the tensors are combined in the step graphs. A new basis is one function in ``_BASES``
and its number of values in ``Predictor.anchors``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ditopt.errors import SessionError
from ditopt.ir.program import Predictor

_FLOAT32_MAX = 3.4028234663852886e38

SIGMA = 0.5
"""HiCache's contraction of Hermite polynomials (arXiv 2508.16984)."""

BOOST = 1.1
"""FasterCache's factor on kept differences of guidance, and by how much which part of the request needs more of it."""

HORIZON = 3.0
"""FoCa trusts its slope for this many steps; beyond, what it adds shrinks as HORIZON / distance."""


@dataclass(frozen=True)
class At:
    """Where a prediction is asked for.

    ``positions``: of the computed values, newest first, distinct; ``at``: of the step; ``progress``: of the step within
    the request, 0 to 1, None where the number of steps is unknown; ``gram``: inner products of the computed values,
    row by row, newest first, where the predictor asked for them.
    """

    positions: Sequence[float]
    at: float
    progress: float | None = None
    gram: Sequence[Sequence[float]] = ()

    @property
    def distance(self) -> float:
        return self.at - self.positions[0]


def weights(
    predictor: Predictor,
    anchors: Sequence[float],
    at: float,
    name: str = "cache",
    progress: float | None = None,
    gram: Sequence[Sequence[float]] = (),
) -> list[float]:
    """Coefficients w, of length ``predictor.size``, of the prediction ``sum(w[i] * value[i])`` at position ``at``.

    ``anchors`` are the positions (step index or timestep, by ``predictor.time``) of the computed values, newest first,
    at least one. With fewer distinct positions than the basis reads the order falls and the rest is 0. ``name`` is the
    decision that an error names: SessionError where a position or a coefficient is not a finite float32.

    hold        the newest value.
    taylor      TaylorSeer as published (arXiv 2503.06923): G0 = value, G(i+1) = (Gi at this anchor - Gi at the one
                before) / d, all orders formed at an anchor dividing by the same newest d; prediction sum Gi k^i / i!, k
                the distance from the newest anchor. Exact for affine features only.
    newton, lagrange   the polynomial through the values.
    hermite     HiCache (arXiv 2508.16984): as taylor, with sigma^i H_i(sigma k) for k^i, H_i the physicists' Hermite
                polynomials.
    ab2         Adams-Bashforth: newest + k (3/2 f0 - 1/2 f1), f0 and f1 the last two slopes.
    ramp        FasterCache (arXiv 2410.19355): newest + w (newest - the one before), w = progress of the request.
    foca        FoCa (arXiv 2508.16211) as cache-dit runs it: newest + k/2 ((newest - the one before) + (F0 - F1)), F0
                and F1 the last two values, computed or predicted; beyond k = HORIZON what is added there is blended
                out, by HORIZON / k.
    bands       FasterCache's weights of low and high frequencies (arXiv 2410.19355): BOOST for the low ones between a
                tenth and nine tenths of the request, and for the high ones in its last three tenths, else 1.
    dmd         dynamic mode decomposition of the newest computed values that are equally far apart; with fewer than 4
                of these hermite of order 1.
    """
    if not anchors:
        raise SessionError(f"decision {name!r}: nothing was computed yet, so nothing can be predicted")
    given = [float(a) for a in anchors[: predictor.anchors]]
    if not all(math.isfinite(x) for x in [*given, at]):
        raise SessionError(f"decision {name!r}: positions {given} and {at} given; they must be finite")
    if predictor.basis not in _BASES:
        known = ", ".join(_BASES)
        raise SessionError(f"decision {name!r}: basis {predictor.basis!r} given; one of {known} expected")
    # A repeated position (Heun evaluates a time twice) carries no slope: its newest value stands for it.
    kept = [i for i, a in enumerate(given) if a not in given[:i]]
    inner = [[row[j] for j in kept] for row in (gram[i] for i in kept)] if gram else ()
    if predictor.basis in ("ramp", "bands") and progress is None:
        what = "the ramp needs" if predictor.basis == "ramp" else "weights of frequencies need"
        raise SessionError(
            f"decision {name!r}: {what} the number of steps of the request; pass steps= to optimize or open a "
            "session with steps="
        )
    found = _BASES[predictor.basis](At([given[i] for i in kept], at, progress, inner))
    result = [0.0] * predictor.size
    if predictor.bands > 1:
        kept = list(range(predictor.size))
    for i, c in zip(kept, found, strict=False):  # a basis may read fewer values than there are
        result[i] = c
    for i, c in enumerate(found[len(kept) :] if predictor.window else ()):
        result[predictor.anchors + i] = c
    if not all(abs(w) <= _FLOAT32_MAX for w in result):  # NaN compares false
        raise SessionError(
            f"decision {name!r}: predicting {at} from {given} gives the coefficients {result}; they must be finite"
        )
    return result


def _hold(where: At) -> list[float]:
    return [1.0]


def _differences(positions: Sequence[float]) -> list[list[float]]:
    """TaylorSeer's differences of each order at the newest value, as combinations of the values."""
    n = len(positions)
    # factor[j] = the current Gi at anchor j as a combination of the values
    factor = [[float(i == j) for i in range(n)] for j in range(n)]
    found = [factor[0]]
    for i in range(1, n):
        factor = [
            [(a - b) / (positions[j] - positions[j + 1]) for a, b in zip(factor[j], factor[j + 1], strict=True)]
            for j in range(n - i)
        ]
        found.append(factor[0])
    return found


def _series(where: At, term: Callable[[int, float], float]) -> list[float]:
    """The sum over orders i of ``term(i, k) / i!`` times the difference of order i."""
    total = [0.0] * len(where.positions)
    for i, factor in enumerate(_differences(where.positions)):
        scale = term(i, where.distance) / math.factorial(i)
        total = [t + scale * f for t, f in zip(total, factor, strict=True)]
    return total


def _taylor(where: At) -> list[float]:
    return _series(where, lambda i, k: k**i)


def _hermite(where: At) -> list[float]:
    return _series(where, lambda i, k: SIGMA**i * _physicists(i, SIGMA * k))


def _physicists(n: int, x: float) -> float:
    """The Hermite polynomial H_n(x)."""
    before, now = 0.0, 1.0
    for i in range(n):
        before, now = now, 2 * x * now - 2 * i * before
    return now


def _polynomial(where: At) -> list[float]:
    return [
        math.prod((where.at - other) / (own - other) for j, other in enumerate(where.positions) if j != i)
        for i, own in enumerate(where.positions)
    ]


def _ab2(where: At) -> list[float]:
    p, h = where.positions, where.distance
    if len(p) < 3:
        return _polynomial(where)
    new, old = h * 1.5 / (p[0] - p[1]), h * -0.5 / (p[1] - p[2])
    return [1 + new, old - new, -old]


def _ramp(where: At) -> list[float]:
    w = where.progress or 0.0
    return [1 + w, -w] if len(where.positions) > 1 else [1.0]


def _bands(where: At) -> list[float]:
    done = where.progress or 0.0
    return [BOOST if 0.1 < done < 0.9 else 1.0, BOOST if done > 0.7 else 1.0]


def _foca(where: At) -> list[float]:
    half = min(where.distance, HORIZON * HORIZON / where.distance) / 2
    if len(where.positions) < 2:
        return [1.0]
    return [1 + half, -half, half, -half]


def _dmd(where: At) -> list[float]:
    from ditopt.runtime.modes import modes

    gaps = [a - b for a, b in zip(where.positions, where.positions[1:], strict=False)]
    even = next((i for i, gap in enumerate(gaps) if gap != gaps[0]), len(gaps)) + 1
    if even < 4 or not where.gram:
        return _hermite(replace(where, positions=where.positions[:2]))
    return modes([row[:even] for row in where.gram[:even]], where.distance / gaps[0])


_BASES: Mapping[str, Callable[[At], list[float]]] = {
    "hold": _hold,
    "taylor": _taylor,
    "newton": _polynomial,
    "lagrange": _polynomial,
    "hermite": _hermite,
    "ab2": _ab2,
    "ramp": _ramp,
    "foca": _foca,
    "dmd": _dmd,
    "bands": _bands,
}
