"""Coefficients of a forecast, fitted to a recording: one row for each step that a mask reuses.

The error at the end is one combination of recorded outputs, linear in all coefficients of all steps (``estimate``), so
that the coefficients of least error follow from one system of equations. What that leaves out is that the model answers
to an error before the end: so the errors of single steps count too, and coefficients that change little from those of
the polynomial are preferred. The relatives in the literature fit the coefficients of a multistep solver instead (such
as S4S, arXiv 2502.17423).
"""

from __future__ import annotations

import numpy as np

from ditopt.calibration.estimate import Estimate
from ditopt.calibration.mask import Floats
from ditopt.ir.program import Rows

ROUNDS = 3
"""Each round weighs the recordings by their errors in the one before: the estimate is a mean of logarithms."""

RIDGE = 1e-4
"""Weight of a change of the coefficients themselves, in units of the value that they scale."""

_TINY = 1e-300

_LEAST = 1e-12
"""A step that goes nowhere keeps the polynomial's coefficients."""


def fitted(estimate: Estimate, mask: str, local: float) -> Rows:
    """For each step of ``mask`` the coefficients of the newest computed values, newest first; () where it computes.

    local: weight of the errors of single steps against that of all of them together at the end.
    """
    rows = estimate.rows(mask)
    places = [(s, a) for s, (anchors, _) in rows.items() for a in anchors]
    if not places:
        return tuple(() for _ in mask)
    known = np.concatenate([told for _, told in rows.values()])
    worth, steps = estimate.worth, estimate.steps
    spread = np.zeros((steps, len(places)))  # coefficients -> the combination of outputs that is the error
    for k, (s, a) in enumerate(places):
        spread[a, k] = worth[s]
    missing = np.zeros(steps)
    missing[list(rows)] = -worth[list(rows)]
    weight = np.maximum(worth**2, _LEAST * np.max(worth**2))
    found = known
    for _ in range(ROUNDS):
        c = spread @ found + missing
        square = np.einsum("s,nst,t->n", c, estimate.products, c)
        inner = np.einsum("n,nst->st", 1 / np.maximum(square, _TINY), estimate.products)
        inner /= np.trace(inner) / steps
        left = spread.T @ inner @ spread
        right = -spread.T @ inner @ missing
        _add_single(left, right, rows, inner, worth, local)
        ridge = RIDGE * np.array([weight[s] * inner[a, a] for s, a in places])
        found = np.linalg.solve(left + np.diag(ridge), right + ridge * known)
    told = iter(found.tolist())
    return tuple(tuple(next(told) for _ in rows[s][0]) if s in rows else () for s in range(steps))


def _add_single(
    left: Floats, right: Floats, rows: dict[int, tuple[list[int], Floats]], inner: Floats, worth: Floats, local: float
) -> None:
    """The errors of single steps, added to the equations ``left @ found = right``."""
    at = 0
    for s, (anchors, told) in rows.items():
        own = slice(at, at := at + len(told))
        left[own, own] += local * worth[s] ** 2 * inner[np.ix_(anchors, anchors)]
        right[own] += local * worth[s] ** 2 * inner[anchors, s]


def text(mask: str, rows: Rows) -> str:
    """As the option ``fitted`` of the pass ``cache`` has them."""
    return "; ".join(" ".join(f"{c:.6g}" for c in row) for digit, row in zip(mask, rows, strict=True) if digit == "0")
