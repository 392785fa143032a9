"""Coefficients of a forecast, fitted to a recording: one row for each step that a mask reuses.

The error at the end is one combination of recorded outputs, linear in all coefficients of all steps (``estimate``), so
that the coefficients of least error follow from one system of equations. The estimate's response decides how far errors
of different steps may be made to cancel; coefficients that change little from those of the polynomial are preferred.
The relatives in the literature fit the coefficients of a multistep solver instead (such as S4S, arXiv 2502.17423).
"""

from __future__ import annotations

import numpy as np

from ditopt.calibration.estimate import Estimate
from ditopt.ir.program import Rows

ROUNDS = 3
"""Each round weighs the recordings by their errors in the one before: the estimate is a mean of logarithms."""

RIDGE = 1e-4
"""Weight of a change of the coefficients themselves, in units of the value that they scale."""

_TINY = 1e-300

_LEAST = 1e-12
"""A step that goes nowhere keeps the polynomial's coefficients."""


def fitted(estimate: Estimate, mask: str, anchors: int | None = None) -> Rows:
    """For each step of ``mask`` the coefficients of the newest computed values, newest first; () where it computes.

    anchors: how many values a step reads at most (None: as many as the estimate's polynomial).
    """
    rows = estimate.rows(mask, anchors)
    if not rows:
        return tuple(() for _ in mask)
    at = np.array(list(rows))  # the reused steps
    step = np.repeat(at, [len(told) for _, told in rows.values()])  # of each coefficient: the step that it is for
    read = np.concatenate([np.asarray(a, dtype=int) for a, _ in rows.values()])  # and the one that it reads
    known = np.concatenate([told for _, told in rows.values()])
    worth, together = estimate.worth, estimate.response.together(estimate.steps)
    counts = np.outer(worth, worth) * together
    own = np.diag(counts)[step]
    least = _LEAST * float(np.max(worth**2))
    found = rows
    for _ in range(ROUNDS):
        weight = 1 / np.maximum(estimate.squares(found), _TINY)
        inner = np.einsum("n,nst->st", weight, estimate.products)
        inner /= np.trace(inner) / estimate.steps
        left = counts[np.ix_(step, step)] * inner[np.ix_(read, read)]
        right = (counts[np.ix_(step, at)] * inner[np.ix_(read, at)]).sum(1)
        ridge = RIDGE * np.maximum(own, least) * np.diag(inner)[read]
        flat = np.linalg.solve(left + np.diag(ridge), right + ridge * known)
        ends = np.cumsum([len(told) for _, told in rows.values()])[:-1]
        found = {s: (a, c) for (s, (a, _)), c in zip(rows.items(), np.split(flat, ends), strict=True)}
    return tuple(tuple(found[s][1].tolist()) if s in found else () for s in range(estimate.steps))


def text(mask: str, rows: Rows) -> str:
    """As the option ``fitted`` of the pass ``cache`` has them."""
    return "; ".join(" ".join(f"{c:.6g}" for c in row) for digit, row in zip(mask, rows, strict=True) if digit == "0")
