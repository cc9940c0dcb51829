"""data.scaling_law.resample on the one law whose fit is a mean: a level and nothing else."""

import numpy as np
import pytest

from data.scaling_law.huber_fit import E, Rows
from data.scaling_law.identify import model_of
from data.scaling_law.resample import folds_by_run, held_out, leverage, refits

LEVEL = model_of({"A": 0.0, "B": 0.0, "gamma": 0.0})
LOG_LOSS = np.array([1.0, 1.3, 0.7, 1.4])
FLAT = np.zeros(4)
ROWS = Rows(FLAT, FLAT, FLAT, LOG_LOSS, run=np.array([0, 2, 3, 5]), log_n0=10.0, log_d0=12.0)
THETA = np.where(LEVEL.free, LOG_LOSS.mean(), LEVEL.values)
LEAST_SQUARES = 1e3  # as delta: no residual is beyond it


def test_refits_follow_the_signs_of_their_runs() -> None:
    """The residual of each row, divided by 1 - leverage (1/4 here), with the sign of its run."""
    signs = np.ones((3, 6))
    signs[1, 2] = -1  # the run of the second row
    signs[2, 1] = -1  # a run of other families
    found = refits(LEVEL, ROWS, THETA, LEAST_SQUARES, signs)[:, E]
    residual = (LOG_LOSS - LOG_LOSS.mean()) / (1 - 1 / 4)
    assert found[0] == pytest.approx(LOG_LOSS.mean(), abs=1e-7)
    assert found[1] == pytest.approx(LOG_LOSS.mean() - 2 * residual[1] / 4, abs=1e-7)
    assert found[2] == pytest.approx(found[0], abs=1e-7)


def test_held_out_errors_are_of_fits_without_the_row() -> None:
    folds = folds_by_run(ROWS, np.array([0, 9, 1, 2, 9, 3]))
    assert folds.tolist() == np.eye(4, dtype=bool).tolist()
    tested = held_out(LEVEL, ROWS, THETA, LEAST_SQUARES, folds)
    # the mean of the other three is off by 4/3 of the residual
    error = 4 / 3 * (LOG_LOSS - LOG_LOSS.mean())
    assert tested.rms == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6)
    assert tested.r2 == pytest.approx(1 - 16 / 9, rel=1e-6)


def test_leverage_is_the_diagonal_of_the_hat_matrix() -> None:
    columns = np.random.default_rng(0).normal(size=(12, 4))
    columns[:, 3] = columns[:, 2]  # one too many
    independent = columns[:, :3]
    hat = independent @ np.linalg.inv(independent.T @ independent) @ independent.T
    assert leverage(columns) == pytest.approx(np.diag(hat))
    assert leverage(np.eye(3)) == pytest.approx([0.9] * 3)  # never all of it
