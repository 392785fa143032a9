"""Dynamic mode decomposition from inner products alone: the values themselves never leave the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CUT, RIDGE = 1e-4, 1e-8
"""Singular values below CUT times the largest are noise; RIDGE keeps the small inverse from exploding."""


def modes(gram: Sequence[Sequence[float]], ahead: float) -> list[float]:
    """Coefficients (newest first) of the value ``ahead`` spacings after the newest of n equally spaced values.

    ``gram[i][j]``: inner product of values i and j, newest first, n >= 4. With X all values but the newest and Y all
    but the oldest, in order of time, A = Y X+ is fitted to advance one spacing, in the subspace of X's singular vectors
    (exact DMD by the method of snapshots); its eigenvalues are raised to ``ahead``, and the newest value is propagated.
    """
    g = np.asarray(gram, dtype=np.float64)[::-1, ::-1]  # in order of time
    n = len(g)
    xx, xy = g[:-1, :-1], g[:-1, 1:]
    squares, v = np.linalg.eigh(xx)
    keep = squares > CUT**2 * squares[-1]
    v, s = v[:, keep], np.sqrt(squares[keep])
    # U = X V / s; U'Y V / s is the operator in that basis
    small = (v / s).T @ xy @ v / (s + RIDGE * s.max())
    values, vectors = np.linalg.eig(small)
    # the newest value in the basis: U' f = (V / s)' X' f
    start = (v / s).T @ g[:-1, -1]
    advanced = vectors @ (values.astype(complex) ** ahead * np.linalg.solve(vectors, start.astype(complex)))
    inside = (v / s) @ advanced.real  # on the snapshots of X
    # what of the newest value lies outside the subspace is held
    held = (v / s) @ start
    coefficients = np.zeros(n)
    coefficients[:-1] = inside - held
    coefficients[-1] = 1.0
    return [float(c) for c in coefficients[::-1]]
