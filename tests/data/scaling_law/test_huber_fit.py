"""data.scaling_law.huber_fit: its derivatives, and its minima beside scipy's."""

import numpy as np
import pytest
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from data.scaling_law.fit import GRID
from data.scaling_law.fit_settings import rows_of_family
from data.scaling_law.huber_fit import HIGH, LOW, Rows, best_fit, centred, minimise, natural
from data.scaling_law.identify import model_of
from tests.data.scaling_law.synthetic import TRUE, sweep

FULL = model_of({})


def rows(noise: float = 0.01, seed: int = 0) -> Rows:
    return rows_of_family(sweep(noise=noise, seed=seed).usable()[0], "indic")


def test_predictions_are_the_law() -> None:
    one, law = rows(noise=0.0), TRUE["indic"]
    theta = centred(vars(law), one)
    assert FULL.predict(theta, one) == pytest.approx(one.log_loss, abs=1e-12)
    assert natural(theta, one) == pytest.approx(vars(law), rel=1e-12)


@pytest.mark.parametrize("fixed", [{}, {"A": 0.0}, {"E": 1.5, "beta": 0.3}, {"gamma": 0.0}])
def test_derivatives_are_those_of_differences(fixed: dict[str, float]) -> None:
    one, model = rows(), model_of(fixed)
    theta = np.where(model.free, [0.4, -0.2, 0.3, 0.1, 0.25, 0.1], model.values)
    predicted, jacobian = model.jacobian(theta, one)
    assert predicted == pytest.approx(model.predict(theta, one))
    for place in np.flatnonzero(model.free):
        step = np.zeros(6)
        step[place] = 1e-6
        slope = (model.predict(theta + step, one) - model.predict(theta - step, one)) / 2e-6
        assert jacobian[:, place] == pytest.approx(slope, abs=1e-8)
    assert not jacobian[:, ~model.free].any()


@pytest.mark.parametrize("delta", [1e-3, 1e-2, 1.0])
def test_minima_are_those_of_scipy(delta: float) -> None:
    """Three tables at once, with outliers, against scipy's own Huber least squares on each."""
    tables = [rows(seed=seed) for seed in range(3)]
    targets = np.array([one.log_loss for one in tables])
    targets[:, ::11] += 0.1
    start = centred(vars(TRUE["indic"]), tables[0])
    found, values = minimise(
        FULL, tables[0], np.tile(start, (3, 1)), targets, np.ones(targets.shape), delta, steps=2000
    )
    for theta, value, target in zip(found, values, targets, strict=True):
        theirs = least_squares(
            lambda x, target=target: target - FULL.predict(x, tables[0]),
            start,
            bounds=(LOW, HIGH),
            loss="huber",
            f_scale=delta,
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
        )
        assert value <= theirs.cost * (1 + 1e-6)
        if delta > 1e-3:  # where the minimum is not all but flat
            assert theta == pytest.approx(theirs.x, abs=2e-4)


def test_a_weight_of_0_is_a_row_left_out() -> None:
    one = rows()
    weights = np.ones(len(one.log_loss))
    weights[::3] = 0
    spoilt = np.where(weights > 0, one.log_loss, 5.0)
    start = centred(vars(TRUE["indic"]), one)[None]
    left = minimise(FULL, one, start, one.log_loss, weights, 0.01)[0]
    assert minimise(FULL, one, start, spoilt, weights, 0.01)[0] == pytest.approx(left, abs=1e-9)


def test_outliers_hardly_move_the_fit() -> None:
    one = rows(noise=0.002)
    one.log_loss[np.flatnonzero(one.log_p > -0.01)[::4]] += 0.3
    robust, squares = (natural(best_fit(FULL, one, delta, GRID), one) for delta in (0.01, 10.0))
    assert robust["gamma"] == pytest.approx(0.15, abs=0.005)
    assert abs(squares["gamma"] - 0.15) > 0.02
