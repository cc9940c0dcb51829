"""How far a fit can be trusted: refits to resampled runs, and errors on runs left out.

`refits` is a wild bootstrap by run: every run keeps its size, length and ratios, so that no
resample loses what determines the law, and its residuals, of all families together, are added to
the fitted losses with a random sign. Residuals are first divided by 1 - leverage, which makes up
for the part of the noise that the fit has followed (HC3 in the regression literature); runs at the
ends of a small grid have most of it.
"""

from dataclasses import dataclass

import numpy as np

from data.scaling_law.huber_fit import Model, Rows, minimise

MOST_LEVERAGE = 0.9  # a residual beyond has nothing left to be scaled up


@dataclass(frozen=True)
class HeldOut:
    """Errors in ln L of rows the law had not seen."""

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
    model: Model, rows: Rows, theta: np.ndarray, delta: float, left_out: np.ndarray
) -> HeldOut:
    """Errors over rows that a fit without them predicts; left_out: bool [fits, rows].

    Each fit starts from `theta`, the fit to all rows: what remains may determine the law only so
    far, and then stays near it.
    """
    start = np.tile(theta, (len(left_out), 1))
    found, _ = minimise(model, rows, start, rows.log_loss, 1.0 - left_out, delta)
    error = (rows.log_loss - model.predict(found, rows))[left_out]
    spread = np.broadcast_to(rows.log_loss - rows.log_loss.mean(), left_out.shape)[left_out]
    total = float(spread @ spread)
    return HeldOut(
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
