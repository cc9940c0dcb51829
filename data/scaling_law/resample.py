"""How far a fit can be trusted: refits to resampled runs, and errors on runs left out.

`refits` is a wild bootstrap by run: every run keeps its size, length and ratios, so that no
resample loses what determines the law, and its residuals, of all families together, are added to
the fitted losses with a random sign. Residuals are first divided by 1 - leverage, which makes up
for the part of the noise that the fit has followed (HC3 in the regression literature); runs at the
ends of a small grid have most of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data.scaling_law.huber_fit import Model, Rows, best_fit, minimise
from data.scaling_law.identify import lacking, model_of

MOST_LEVERAGE = 0.9  # a residual beyond has nothing left to be scaled up


@dataclass(frozen=True)
class HeldOut:
    """Errors in ln L of rows the law had not seen; nan where there are none."""

    rows: int  # how many the errors are over
    rms: float
    r2: float  # 1 - squared error / squared distance of ln L to its mean


def refits(
    model: Model, rows: Rows, theta: np.ndarray, delta: float, signs: np.ndarray
) -> np.ndarray:
    """theta [resamples, 6] for signs [resamples, runs of the table] of 1 and -1."""
    predicted, jacobian = model.jacobian(theta, rows)
    residual = (rows.log_loss - predicted) / (1 - leverage(jacobian[:, model.free]))
    targets = predicted + signs[:, rows.run] * residual
    start = np.tile(theta, (len(signs), 1))
    return minimise(model, rows, start, targets, np.ones_like(residual), delta)[0]


def held_out(
    rows: Rows,
    fixed: Mapping[str, float],
    delta: float,
    exponents: np.ndarray,
    left_out: np.ndarray,
) -> HeldOut:
    """Errors over rows that a fit without them predicts; left_out: bool [fits, rows].

    Each fit knows nothing of the rows left out: it starts as `best_fit` does, from a grid of
    `exponents`. Where the rows that remain do not determine the law (`lacking`), what they predict
    elsewhere is the starts' doing; those left out then do not count.
    """
    model = model_of(fixed)
    errors, spread = [np.empty(0)], [np.empty(0)]
    for gone in left_out:
        kept = rows.where(~gone)
        if lacking(kept, fixed):
            continue
        theta = best_fit(model, kept, delta, exponents)
        errors.append((rows.log_loss - model.predict(theta, rows))[gone])
        spread.append((rows.log_loss - rows.log_loss.mean())[gone])
    error, around = np.concatenate(errors), np.concatenate(spread)
    if not len(error):
        return HeldOut(rows=0, rms=float("nan"), r2=float("nan"))
    total = float(around @ around)
    return HeldOut(
        rows=len(error),
        rms=float(np.sqrt(np.mean(error**2))),
        r2=1 - float(error @ error) / total if total > 0 else float("nan"),
    )


def leverage(jacobian: np.ndarray) -> np.ndarray:
    """How much of its own noise each row's prediction follows, [rows] in [0, 0.9]."""
    left, values, _ = np.linalg.svd(jacobian, full_matrices=False)
    used = values > 1e-9 * values.max(initial=0.0)
    return np.minimum((left[:, used] ** 2).sum(axis=1), MOST_LEVERAGE)


def folds_by_run(rows: Rows, run_fold: np.ndarray) -> np.ndarray:
    """bool [folds with rows, rows] from the fold of each run of the table."""
    of_row = run_fold[rows.run]
    return np.array([of_row == fold for fold in np.unique(of_row)])
