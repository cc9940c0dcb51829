"""From a table of runs to the law: all six parameters of every family, with their uncertainty.

    fit_law         all six of a family at once, from all of its runs
    fit_chinchilla  E, A, alpha, B, beta from runs of one family alone (ratio 1)
    fit_gamma       gamma alone: the slope of ln L over ln p, at fixed sizes and lengths

How the paper (arXiv 2410.12883) fitted its law is not known to us. `fit_law` minimises a Huber
loss of ln L as Chinchilla did (`data.scaling_law.huber_fit`), refuses runs that cannot determine it
(`data.scaling_law.identify`), and refits resampled runs (`data.scaling_law.resample`).
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np

from data.scaling_law.fit_settings import FitSettings, rows_of_family, select_rows
from data.scaling_law.gamma_fit import fit_gamma, pooled_slope, ratio_groups
from data.scaling_law.huber_fit import (
    GAMMA,
    HIGH,
    LOW,
    PARAMETERS,
    Model,
    Rows,
    best_fit,
    natural,
)
from data.scaling_law.identify import (
    SAME_SIZE,
    UnderdeterminedError,
    missing_runs,
    model_of,
    reduction,
    trade_offs,
)
from data.scaling_law.law import TERMS, FamilyLaw, FittedRange, ScalingLaw
from data.scaling_law.resample import folds_by_run, held_out, refits
from data.scaling_law.runs_table import RunsTable

__all__ = ["FitSettings", "UnderdeterminedError", "fit_chinchilla", "fit_gamma", "fit_law"]

ALONE = 0.995  # a ratio from which on a run counts as of one family
GRID = np.array([0.1, 0.2, 0.35, 0.6, 1.0])  # of starting exponents, for alpha and for beta


def fit_law(
    table: RunsTable, settings: FitSettings | None = None, *, source: str = ""
) -> ScalingLaw:
    """Fit the law to a sweep's table.

    source: where the table comes from, for the law's provenance. What was left out and why, and
    what deserves doubt, stand in `provenance` ("left_out", "warnings"). Raises UnderdeterminedError
    where the runs do not determine the law, and ValueError for families that are not in the table.
    """
    settings = settings or FitSettings()
    usable, left_out = select_rows(table, settings)
    model, rows_of = _determined(usable, settings.fixed)
    random = np.random.default_rng(settings.seed)
    runs = usable.runs
    signs = random.choice([-1.0, 1.0], (settings.bootstrap, len(runs)))
    run_fold = random.permutation(np.arange(len(runs)) % max(settings.folds, 1))
    families, spread, bootstrap, quality, warnings = {}, {}, {}, {}, usable.remarks()
    for family, rows in rows_of.items():
        theta = best_fit(model, rows, settings.huber_delta, GRID)
        families[family] = FamilyLaw(**natural(theta, rows))
        again = refits(model, rows, theta, settings.huber_delta, signs)
        bootstrap[family] = [FamilyLaw(**natural(one, rows)) for one in again]
        spread[family] = _residual_std(model, rows, theta)
        quality[family] = _quality(model, rows, theta, settings, run_fold)
        groups = ratio_groups(usable, family)
        if groups:
            alone = pooled_slope(groups)
            quality[family] |= {"gamma_alone": alone.gamma, "gamma_alone_error": alone.std_error}
        elif model.free[GAMMA]:
            warnings.append(
                f"{family}: no two ratios at one size and length; gamma rests on the law's form in "
                "N and D"
            )
        warnings += [f"{family}: {line}" for line in _doubts(model, rows, theta)]
    return ScalingLaw(
        families=families,
        fitted_range=_fitted_range(usable),
        residual_std=spread,
        bootstrap=bootstrap if settings.bootstrap else {},
        terms=tuple(name for name in TERMS if settings.fixed.get(name) != 0),
        fixed=dict(settings.fixed),
        quality=quality,
        provenance={
            "source": source,
            "table_sha256": table.checksum(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": {name: version(name) for name in ("numpy", "scipy")}
            | {"python": platform.python_version()},
            "settings": asdict(settings),
            "runs": runs,
            "left_out": left_out,
            "warnings": warnings,
        },
    )


def fit_chinchilla(table: RunsTable, settings: FitSettings | None = None) -> dict[str, FamilyLaw]:
    """E, A, alpha, B, beta of every family from its runs alone (ratio 1), with gamma 0.

    Raises UnderdeterminedError as `fit_law` does.
    """
    settings = settings or FitSettings()
    usable, _ = select_rows(table, settings)
    alone = usable.column("ratio") >= ALONE
    without = [name for name in usable.families if name not in set(usable.column("family")[alone])]
    if without:
        raise UnderdeterminedError(
            [f"{name}: there is no run of it alone (ratio 1)" for name in without], None
        )
    model, rows_of = _determined(usable.where(alone), {**settings.fixed, "gamma": 0.0})
    return {
        family: FamilyLaw(**natural(best_fit(model, rows, settings.huber_delta, GRID), rows))
        for family, rows in rows_of.items()
    }


def _determined(table: RunsTable, fixed: Mapping[str, float]) -> tuple[Model, dict[str, Rows]]:
    """The regression, and its rows by family. Raises UnderdeterminedError."""
    rows_of = {family: rows_of_family(table, family) for family in table.families}
    missing = missing_runs(rows_of, fixed)
    if missing:
        raise UnderdeterminedError(missing, reduction(rows_of, fixed))
    return model_of(fixed), rows_of


def _residual_std(model: Model, rows: Rows, theta: np.ndarray) -> float:
    residual = rows.log_loss - model.predict(theta, rows)
    return float(np.sqrt(residual @ residual / (len(residual) - model.free.sum())))


def _quality(
    model: Model, rows: Rows, theta: np.ndarray, settings: FitSettings, run_fold: np.ndarray
) -> dict[str, float]:
    """Rows, and errors in ln L: of the fit, of runs left out, of the largest size left out.

    The last two are there as far as the other runs determine the law; `held_out_rows` says how many
    losses the errors of runs left out are over.
    """
    residual = rows.log_loss - model.predict(theta, rows)
    around = rows.log_loss - rows.log_loss.mean()
    found = {
        "rows": float(len(residual)),
        "rms": float(np.sqrt(np.mean(residual**2))),
        "r2": 1 - float(residual @ residual) / max(float(around @ around), 1e-300),
    }
    if settings.folds and len(np.unique(rows.run)) > 1:
        parts = folds_by_run(rows, run_fold)
        tested = held_out(rows, settings.fixed, settings.huber_delta, GRID, parts)
        found["held_out_rows"] = float(tested.rows)
        if tested.rows:
            found |= {"held_out_rms": tested.rms, "held_out_r2": tested.r2}
    largest = np.exp(rows.log_n - rows.log_n.max()) > 1 / (1 + SAME_SIZE)
    if settings.folds:
        tested = held_out(rows, settings.fixed, settings.huber_delta, GRID, largest[None])
        if tested.rows:
            found["largest_size_rms"] = tested.rms
    return found


def _doubts(model: Model, rows: Rows, theta: np.ndarray) -> list[str]:
    """What the optimum says about itself."""
    lines = []
    for name, low, high, value, free in zip(PARAMETERS, LOW, HIGH, theta, model.free, strict=True):
        if not free:
            continue
        if name in TERMS and value <= low + 1:
            lines.append(f"the term of {name} has vanished: the losses show nothing of it")
        elif not low * 1.001 < value < high * 0.999 and name not in TERMS and name != "gamma":
            lines.append(f"{name}={value:.3g} stopped at the end of its range, {low:g} to {high:g}")
    if model.free[GAMMA] and theta[GAMMA] <= 0:
        lines.append(
            f"gamma={theta[GAMMA]:.3g}: losses do not fall with the family's ratio, so the law has "
            "no optimum; more ratios or more seeds would tell whether that is noise"
        )
    lines += [
        f"{', '.join(names)} are not told apart by these runs; trust only what they predict inside "
        "of the fitted range"
        for names in trade_offs(model, rows, theta)
    ]
    return lines


def _fitted_range(table: RunsTable) -> FittedRange:
    def ends(part: RunsTable, column: str) -> tuple[float, float]:
        values = part.column(column)
        return float(values.min()), float(values.max())

    return FittedRange(
        num_parameters=ends(table, "num_parameters"),
        tokens=ends(table, "tokens"),
        ratios={name: ends(table.of_family(name), "ratio") for name in table.families},
    )
