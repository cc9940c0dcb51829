"""The law as a regression on ln(loss): many Huber fits at once, by damped Gauss-Newton steps.

    ln L = logsumexp(e, a - alpha ln(N / N0), b - beta ln(D / D0)) - gamma ln p

so e, a, b are the logarithms of the bracket's terms at the runs' geometric means N0, D0. That is
the log-sum-exp form of Chinchilla (arXiv 2203.15556, section 3.3), but for the centring, which
takes most of the correlation out of (a, alpha) and (b, beta). As there, the Huber loss of
residuals of ln L is minimised; there by L-BFGS from a grid of starts, here by Levenberg-Marquardt
steps on all starts or resamples at once (arrays [fits, rows, 6]), and then L-BFGS-B from the best.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize, nnls  # type: ignore[import-untyped]

PARAMETERS = ("E", "A", "alpha", "B", "beta", "gamma")  # of a vector theta: E, A, B as logarithms
E, A, ALPHA, B, BETA, GAMMA = range(6)
# a term below exp(-10) nats at the middle of the runs is none; no study reports exponents above 1
LOW = np.array([-10.0, -10.0, 0.01, -10.0, 0.01, -1.0])
HIGH = np.array([5.0, 5.0, 3.0, 5.0, 3.0, 3.0])


@dataclass(frozen=True)
class Rows:
    """One family's runs as arrays [rows]."""

    log_n: np.ndarray  # ln(N / N0)
    log_d: np.ndarray
    log_p: np.ndarray  # at most 0
    log_loss: np.ndarray
    run: np.ndarray  # int: which run of the whole table
    log_n0: float
    log_d0: float

    def where(self, keep: np.ndarray) -> "Rows":
        """The rows for which `keep` is true, still around N0 and D0 of all."""
        arrays = ("log_n", "log_d", "log_p", "log_loss", "run")
        return replace(self, **{name: getattr(self, name)[keep] for name in arrays})


@dataclass(frozen=True)
class Model:
    """Which of the six are free, and the values of the others (of E, A, B: -inf for no term)."""

    free: np.ndarray  # bool [6]
    values: np.ndarray  # [6]

    def predict(self, theta: np.ndarray, rows: Rows) -> np.ndarray:
        """ln L: theta [..., 6] -> [..., rows]."""
        return _terms(theta, rows)[1] - theta[..., GAMMA, None] * rows.log_p

    def jacobian(self, theta: np.ndarray, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """ln L, and its derivatives [..., rows, 6] (0 for what is not free)."""
        shares, total = _terms(theta, rows)
        e, a, b = shares
        columns = [e, a, -a * rows.log_n, b, -b * rows.log_d, np.broadcast_to(-rows.log_p, e.shape)]
        return (
            total - theta[..., GAMMA, None] * rows.log_p,
            np.stack(columns, axis=-1) * self.free,
        )


def minimise(
    model: Model,
    rows: Rows,
    start: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    delta: float,
    steps: int = 200,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest minimum of sum_i w_i huber(target_i - ln L_i) for each of many starts.

    start [fits, 6]; targets, weights [fits, rows] or [rows]. Returns theta [fits, 6] and the
    objective [fits]. Each fit keeps its own damping and only ever goes down.
    """
    theta = np.where(model.free, np.clip(start, LOW, HIGH), model.values)
    targets, weights = (np.broadcast_to(x, (len(theta), x.shape[-1])) for x in (targets, weights))
    best = _objective(targets - model.predict(theta, rows), weights, delta)
    damping = np.full(len(theta), 1e-2)
    going = np.arange(len(theta))  # the fits that have not settled
    for _ in range(steps):
        now, target, weight = theta[going], targets[going], weights[going]
        tried = _step(model, rows, now, target, weight, delta, damping[going])
        value = _objective(target - model.predict(tried, rows), weight, delta)
        gain = best[going] - value
        better = gain > 0
        theta[going] = np.where(better[:, None], tried, now)
        settled = np.where(
            better,
            (gain <= 1e-10 * best[going]) & (damping[going] < 1e-2),
            damping[going] > 1e6,
        )
        best[going] = np.where(better, value, best[going])
        damping[going] = np.maximum(damping[going] * np.where(better, 0.2, 6.0), 1e-12)
        going = going[~settled]
        if not len(going):
            break
    return theta, best


def _step(
    model: Model,
    rows: Rows,
    theta: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    delta: float,
    damping: np.ndarray,
) -> np.ndarray:
    """Where a damped Gauss-Newton step leads from theta [fits, 6], within the bounds."""
    predicted, jacobian = model.jacobian(theta, rows)
    residual = targets - predicted
    # the quadratic that touches the Huber loss from above at this residual
    weight = weights * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
    weighted = jacobian * weight[..., None]
    gradient = np.einsum("bni,bn->bi", weighted, residual)  # downhill
    hessian = np.swapaxes(weighted, 1, 2) @ jacobian
    held = ~model.free | ((theta <= LOW) & (gradient < 0)) | ((theta >= HIGH) & (gradient > 0))
    gradient[held] = 0.0
    hessian[held[:, :, None] | held[:, None, :]] = 0.0
    diagonal = np.arange(6)
    scale = hessian[:, diagonal, diagonal]
    hessian[:, diagonal, diagonal] += damping[:, None] * scale + np.where(held, 1.0, 1e-12)
    step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
    return np.where(model.free, np.clip(theta + step, LOW, HIGH), theta)


def best_fit(model: Model, rows: Rows, delta: float, exponents: np.ndarray) -> np.ndarray:
    """theta [6] of the lowest minimum found from a grid of exponents [k] for alpha and for beta.

    Given alpha, beta and gamma the law is linear in E, A and B: non-negative least squares of
    relative errors starts them (variable projection, as in arXiv 2603.22339).
    """
    starts = np.array([_start(model, rows, x, y) for x in exponents for y in exponents])
    ones = np.ones_like(rows.log_loss)
    found, values = minimise(model, rows, starts, rows.log_loss, ones, delta)
    return _polish(model, rows, found[np.argmin(values)], delta)


def natural(theta: np.ndarray, rows: Rows) -> dict[str, float]:
    """The six numbers of the law from the centred logarithms [6]."""
    return {
        "E": float(np.exp(theta[E])),
        "A": float(np.exp(theta[A] + theta[ALPHA] * rows.log_n0)),
        "alpha": float(theta[ALPHA]),
        "B": float(np.exp(theta[B] + theta[BETA] * rows.log_d0)),
        "beta": float(theta[BETA]),
        "gamma": float(theta[GAMMA]),
    }


def centred(law: Mapping[str, float], rows: Rows) -> np.ndarray:
    """theta [6] of the law's six numbers: the inverse of `natural`."""
    with np.errstate(divide="ignore"):  # the logarithm of a term that is 0
        e, a, b = np.log([law["E"], law["A"], law["B"]])
    a, b = a - law["alpha"] * rows.log_n0, b - law["beta"] * rows.log_d0
    return np.array([e, a, law["alpha"], b, law["beta"], law["gamma"]])


def _terms(
    theta: np.ndarray, rows: Rows
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Shares of the three terms in the bracket and its logarithm, each [..., rows]."""
    e = np.broadcast_to(theta[..., E, None], (*theta.shape[:-1], len(rows.log_n)))
    a = theta[..., A, None] - theta[..., ALPHA, None] * rows.log_n
    b = theta[..., B, None] - theta[..., BETA, None] * rows.log_d
    top = np.maximum(np.maximum(e, a), b)
    e, a, b = np.exp(e - top), np.exp(a - top), np.exp(b - top)
    total = e + a + b
    return (e / total, a / total, b / total), top + np.log(total)


def _objective(residual: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residual)
    loss = np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))
    return (weights * loss).sum(axis=-1)


def _start(model: Model, rows: Rows, alpha: float, beta: float) -> np.ndarray:
    theta = np.array([0.0, 0.0, alpha, 0.0, beta, _rough_gamma(rows)])
    theta = np.where(model.free, theta, model.values)
    relative = np.exp(-theta[GAMMA] * rows.log_p - rows.log_loss)  # p^-gamma / L
    columns = np.stack(
        [
            relative,
            relative * np.exp(-theta[ALPHA] * rows.log_n),
            relative * np.exp(-theta[BETA] * rows.log_d),
        ],
        axis=1,
    )
    terms = np.array([E, A, B])
    set_terms = np.exp(model.values[terms]) * ~model.free[terms]
    found, _ = nnls(
        columns * model.free[terms], np.maximum(1 - columns @ set_terms, 0.0), maxiter=100
    )
    level = np.exp(rows.log_loss).mean()
    theta[terms] = np.log(np.maximum(found, 1e-3 * level))  # a start at 0 would stay there
    return np.where(model.free, theta, model.values)


def _rough_gamma(rows: Rows) -> float:
    """- slope of ln L over ln p, with ln N and ln D beside it."""
    columns = np.stack([np.ones_like(rows.log_p), rows.log_n, rows.log_d, rows.log_p], axis=1)
    return float(-np.linalg.lstsq(columns, rows.log_loss, rcond=None)[0][3])


def _polish(model: Model, rows: Rows, theta: np.ndarray, delta: float) -> np.ndarray:
    """L-BFGS-B from `theta`; its result where it is lower."""
    free = model.free
    if not free.any():
        return theta

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        full = theta.copy()
        full[free] = x
        predicted, jacobian = model.jacobian(full, rows)
        residual = rows.log_loss - predicted
        slope = np.clip(residual, -delta, delta)
        # in units of delta^2, so that the optimiser's own tolerances mean something
        value = float(_objective(residual, np.ones_like(residual), delta)) / delta**2
        return value, -(slope @ jacobian)[free] / delta**2

    bounds = list(zip(LOW[free], HIGH[free], strict=True))
    before = objective(theta[free])[0]
    found = minimize(
        objective,
        theta[free],
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 500, "ftol": 1e-12, "gtol": 1e-9},
    )
    if found.fun < before:
        theta = theta.copy()
        theta[free] = found.x
    return theta
