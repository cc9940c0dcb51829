"""data.scaling_law.resample on the one law whose fit is a mean: a level and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from data.scaling_law.fit import GRID
from data.scaling_law.fit_settings import rows_of_family
from data.scaling_law.huber_fit import E, Rows, best_fit
from data.scaling_law.identify import lacking, model_of
from data.scaling_law.resample import folds_by_run, held_out, leverage, refits
from tests.data.scaling_law.synthetic import MIXTURES, SIZES, sweep

ONLY_A_LEVEL = {"A": 0.0, "B": 0.0, "gamma": 0.0}
LEVEL = model_of(ONLY_A_LEVEL)
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
    tested = held_out(ROWS, ONLY_A_LEVEL, LEAST_SQUARES, GRID, folds)
    # the mean of the other three is off by 4/3 of the residual
    error = 4 / 3 * (LOG_LOSS - LOG_LOSS.mean())
    assert tested.rms == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6)
    assert tested.r2 == pytest.approx(1 - 16 / 9, rel=1e-6)
    assert tested.rows == 4


def test_left_out_rows_that_the_others_do_not_determine_do_not_count() -> None:
    """Without its third size, E, A and alpha could be anything: no fit to the rest predicts it."""
    rows = rows_of_family(sweep(SIZES[:3], mixtures=MIXTURES[3:], noise=0.003), "indic")
    of_size = [np.isclose(rows.log_n, value) for value in np.unique(rows.log_n)]
    tested = held_out(rows, {}, 0.01, GRID, np.array(of_size))
    assert tested.rows == 0
    assert np.isnan(tested.rms) and np.isnan(tested.r2)
    every_fifth = np.arange(len(rows.run)) % 5 == 0
    both = held_out(rows, {}, 0.01, GRID, np.array([of_size[2], every_fifth]))
    assert both.rows == every_fifth.sum()
    assert both == held_out(rows, {}, 0.01, GRID, every_fifth[None])


def test_too_few_rows_are_left() -> None:
    """7 rows for 6 parameters are enough, the 6 that one left out leaves are not."""
    rows = rows_of_family(sweep(SIZES[:3], mixtures=MIXTURES[3:]), "indic")
    some = np.arange(len(rows.run)) % 4 == 0
    seven = rows.where(some)
    assert len(seven.run) == 7 and not lacking(seven, {})
    assert held_out(seven, {}, 0.01, GRID, np.eye(7, dtype=bool)).rows == 0


def test_a_fold_knows_nothing_of_what_was_left_out() -> None:
    """The level of the runs left out may be any: the fit to the others is the same."""
    rows = rows_of_family(sweep(noise=0.003).usable()[0], "indic")
    gone = rows.log_n == rows.log_n.max()
    errors = []
    for shift in (0.0, 1.0):
        moved = replace(rows, log_loss=rows.log_loss + shift * gone)
        kept = best_fit(model_of({}), moved.where(~gone), 0.01, GRID)
        error = (moved.log_loss - model_of({}).predict(kept, moved))[gone]
        assert held_out(moved, {}, 0.01, GRID, gone[None]).rms == np.sqrt(np.mean(error**2))
        errors.append(error)
    assert errors[1] - errors[0] == pytest.approx(np.ones(gone.sum()))


def test_leverage_is_the_diagonal_of_the_hat_matrix() -> None:
    columns = np.random.default_rng(0).normal(size=(12, 4))
    columns[:, 3] = columns[:, 2]  # one too many
    independent = columns[:, :3]
    hat = independent @ np.linalg.inv(independent.T @ independent) @ independent.T
    assert leverage(columns) == pytest.approx(np.diag(hat))
    assert leverage(np.eye(3)) == pytest.approx([0.9] * 3)  # never all of it
