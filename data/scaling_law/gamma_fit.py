"""gamma alone: the slope of ln L over ln p at fixed sizes and lengths, and no other parameter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.scaling_law.fit_settings import FitSettings, select_rows
from data.scaling_law.identify import SAME_RATIO, SAME_SIZE, UnderdeterminedError
from data.scaling_law.runs_table import RunsTable, levels


@dataclass(frozen=True)
class GammaFit:
    """gamma of one family from runs that share size and length."""

    gamma: float
    std_error: float  # nan where as many intercepts and slopes as runs leave nothing to judge by
    groups: int  # sizes and lengths with 2 ratios or more
    rows: int


def fit_gamma(table: RunsTable, settings: FitSettings | None = None) -> dict[str, GammaFit]:
    """gamma by family: least squares of ln L over ln p, an intercept for each (N, D).

    Says nothing of E, A, alpha, B, beta, and needs none of them to be right. Raises
    UnderdeterminedError for families without two different ratios at one size and length.
    """
    usable, _ = select_rows(table, settings or FitSettings())
    found, missing = {}, []
    for family in usable.families:
        groups = ratio_groups(usable, family)
        if groups:
            found[family] = pooled_slope(groups)
        else:
            missing.append(
                f"{family}: gamma needs runs of at least 2 (better 3) different ratios at one size "
                "and length (num_parameters and tokens)"
            )
    if missing:
        raise UnderdeterminedError(missing, None)
    return found


def ratio_groups(
    table: RunsTable, family: str
) -> dict[tuple[float, float], tuple[np.ndarray, np.ndarray]]:
    """(num_parameters, tokens) -> ln p, ln L of its runs, where there are 2 ratios or more."""
    rows = table.of_family(family)
    sizes = levels(rows.column("num_parameters"), SAME_SIZE)
    lengths = levels(rows.column("tokens"), SAME_SIZE)
    members: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for row in rows.rows:
        place = (_level(row["num_parameters"], sizes), _level(row["tokens"], lengths))
        members.setdefault(place, []).append(row)
    return {
        place: (np.log([row["ratio"] for row in group]), np.log([row["loss"] for row in group]))
        for place, group in sorted(members.items())
        if len(levels([row["ratio"] for row in group], SAME_RATIO)) >= 2
    }


def pooled_slope(groups: Mapping[tuple[float, float], tuple[np.ndarray, np.ndarray]]) -> GammaFit:
    """One slope for all groups, an intercept for each."""
    x = np.concatenate([log_p - log_p.mean() for log_p, _ in groups.values()])
    y = np.concatenate([log_loss - log_loss.mean() for _, log_loss in groups.values()])
    slope = float(x @ y / (x @ x))
    left = len(x) - len(groups) - 1
    scatter = float(((y - slope * x) ** 2).sum())
    error = math.sqrt(scatter / left / float(x @ x)) if left > 0 else math.nan
    return GammaFit(-slope, error, len(groups), len(x))


def _level(value: float, found: list[float]) -> float:
    """The level a value belongs to: the largest that is not above it."""
    return max(level for level in found if level <= value)
