"""Is the law the right one? Its two assumptions about ratios, put to the sweep's own runs.

    exponent_check   gamma does not depend on N and D: one slope against a slope for each (N, D)
    transfer_check   a family's loss depends on its own ratio only: does it matter which others
                     the rest is made of?

`data.scaling_law.split_effect` asks the second question of runs made for it, without any law, and
`data.scaling_law.mixing_law` fits another form altogether.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import f as f_distribution  # type: ignore[import-untyped]

from data.scaling_law.fit_settings import FitSettings, rows_of_family, select_rows
from data.scaling_law.gamma_fit import GammaFit, pooled_slope, ratio_groups
from data.scaling_law.huber_fit import centred
from data.scaling_law.identify import model_of
from data.scaling_law.law import FamilyLaw
from data.scaling_law.runs_table import RunsTable

RANK = 1e-10  # singular values below this part of the largest are 0
LEAST_ROWS = 3  # of a mean error over rows left out


@dataclass(frozen=True)
class ExponentCheck:
    """gamma of one family at each size and length, beside the shared one."""

    shared: GammaFit
    groups: dict[tuple[float, float], GammaFit]  # by num_parameters and tokens
    spread: float  # standard deviation of the groups' gamma; nan for a single group
    p_value: float  # of spread as large from noise alone (F-test); nan without rows to judge by


@dataclass(frozen=True)
class TransferCheck:
    """Whether the others' shares tell something about a family's loss that its own does not.

    effect: by other family, how much ln L changes a unit of ratio that goes to it instead of evenly
    to all others (negative: it helps more than they do on average). The effects sum to 0.
    """

    effect: dict[str, float]
    std_error: dict[str, float]
    p_value: float  # of effects as large from noise alone (F-test)
    # error in ln L of a run left out, by the plain law, over the runs that either form can predict
    # from the others; nan for fewer than 3 of them
    held_out_rms: float
    held_out_rms_with: float  # the same with the effects


def exponent_check(
    table: RunsTable, settings: FitSettings | None = None
) -> dict[str, ExponentCheck]:
    """`ExponentCheck` by family; families without two ratios at one (N, D) are not in it."""
    usable, _ = select_rows(table, settings or FitSettings())
    found = {}
    for family in usable.families:
        members = ratio_groups(usable, family)
        if not members:
            continue
        groups = {place: pooled_slope({place: one}) for place, one in members.items()}
        shared = pooled_slope(members)
        slopes = [one.gamma for one in groups.values()]
        found[family] = ExponentCheck(
            shared=shared,
            groups=groups,
            spread=float(np.std(slopes, ddof=1)) if len(slopes) > 1 else math.nan,
            p_value=_f_test(
                _scatter(members, {place: shared.gamma for place in members}),
                shared.rows - shared.groups - 1,
                _scatter(members, {place: one.gamma for place, one in groups.items()}),
                shared.rows - 2 * shared.groups,
            ),
        )
    return found


def transfer_check(
    table: RunsTable, laws: Mapping[str, FamilyLaw], settings: FitSettings | None = None
) -> dict[str, TransferCheck]:
    """`TransferCheck` by family, for laws that `fit_law` fitted to this table with these settings.

    Residuals of ln L are regressed on the derivatives of the law (which are thereby refitted, to
    first order) with and without p_g - (1 - p_f) / (others) of every other family g. What all the
    others do together is a function of p_f alone and belongs to the law. It is a test by a linear
    term, in the spirit of ATLAS (arXiv 2510.22037) and not its law: that one, as summaries
    of it tell, weighs target, transfer and other languages' tokens into an effective number of
    them, with saturation under repetition. Raises ValueError for fewer than 3 families, whose rest
    cannot be split in two ways.
    """
    settings = settings or FitSettings()
    usable, _ = select_rows(table, settings)
    names = table.families
    if len(names) < 3:
        raise ValueError(
            f"transfer_check needs 3 families or more, the table has {', '.join(names)}: the rest "
            "of a mixture of two can be split in one way only"
        )
    ratios = table.wide
    model = model_of(settings.fixed)
    found = {}
    for family, law in laws.items():
        rows = rows_of_family(usable, family)
        predicted, jacobian = model.jacobian(centred(asdict(law), rows), rows)
        residual = rows.log_loss - predicted
        plain = jacobian[:, model.free]
        others = [name for name in names if name != family]
        of_row = np.array(
            [[ratios[run][g] for g in others] for run in usable.of_family(family).runs]
        )
        contrasts = of_row - of_row.mean(axis=1, keepdims=True)
        found[family] = _compare(residual, plain, contrasts, others)
    return found


def _compare(
    residual: np.ndarray, plain: np.ndarray, contrasts: np.ndarray, others: list[str]
) -> TransferCheck:
    # contrasts sum to 0 in every row: without the last column they are independent if ever
    both = np.concatenate([plain, contrasts], axis=1)
    inverse = np.linalg.pinv(both, rcond=RANK)
    coefficients = inverse @ residual
    without = residual - plain @ (np.linalg.pinv(plain, rcond=RANK) @ residual)
    with_them = residual - both @ coefficients
    left, left_with = len(residual) - _rank(plain), len(residual) - _rank(both)
    scatter = with_them @ with_them / left_with if left_with > 0 else math.nan
    error = np.sqrt(scatter * np.diag(inverse @ inverse.T))[plain.shape[1] :]
    leverage, leverage_with = _leverage(plain), _leverage(both)
    # where either has a parameter for a single row, it has nothing to predict that row from
    told = np.maximum(leverage, leverage_with) <= 1 - 1e-6
    return TransferCheck(
        effect=dict(zip(others, coefficients[plain.shape[1] :].tolist(), strict=True)),
        std_error=dict(zip(others, error.tolist(), strict=True)),
        p_value=_f_test(without @ without, left, with_them @ with_them, left_with),
        held_out_rms=_held_out(without[told], leverage[told]),
        held_out_rms_with=_held_out(with_them[told], leverage_with[told]),
    )


def _rank(columns: np.ndarray) -> int:
    # tol is absolute, and all that numpy 1 knows
    return int(np.linalg.matrix_rank(columns, tol=RANK * np.linalg.norm(columns, 2)))


def _leverage(columns: np.ndarray) -> np.ndarray:
    """How far each row's prediction follows the row itself, [rows] in [0, 1]."""
    left, values, _ = np.linalg.svd(columns, full_matrices=False)
    return (left[:, values > RANK * values.max()] ** 2).sum(axis=1)


def _held_out(residual: np.ndarray, leverage: np.ndarray) -> float:
    """Error of each row by the regression without it: residual / (1 - leverage)."""
    if len(residual) < LEAST_ROWS:
        return math.nan
    return float(np.sqrt(np.mean((residual / (1 - leverage)) ** 2)))


def _scatter(
    members: Mapping[tuple[float, float], tuple[np.ndarray, np.ndarray]],
    gamma: Mapping[tuple[float, float], float],
) -> float:
    """Squared error around lines of these slopes, each through its group's middle."""
    return sum(
        float(((y - y.mean() + gamma[place] * (x - x.mean())) ** 2).sum())
        for place, (x, y) in members.items()
    )


def _f_test(plain: float, left_plain: int, full: float, left_full: int) -> float:
    """Chance of so large a gain of the fuller model if the plain one holds; nan: none to judge."""
    gained = left_plain - left_full
    if gained < 1 or left_full < 1 or not full > 0:
        return math.nan
    ratio = (plain - full) / gained / (full / left_full)
    return float(f_distribution.sf(ratio, gained, left_full))
