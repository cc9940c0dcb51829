"""The arithmetic of benchmarks/mixture_study.py: what its tables of runs say about the law."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import f as f_distribution  # type: ignore[import-untyped]

from data.scaling_law.law import ScalingLaw
from data.scaling_law.runs_table import RunsTable

SAME = 0.02  # ratios and relative sizes so close are taken for the same


@dataclass(frozen=True)
class SplitTest:
    """ln L of a family at one own ratio, over all splits of the rest and over seeds.

    Two-way analysis of variance without interaction: a split's effect beside that of the seed,
    which splits share (weights and order of data are drawn from it).
    """

    family: str
    ratio: float
    splits: int
    seeds: int
    split_std: float  # of the splits' true means: what the hypothesis says is 0
    seed_std: float  # what is left of a run once split and seed are taken off; nan for one seed
    largest: float  # highest minus lowest mean of a split
    p_value: float  # of splits as different from noise alone; nan for one seed


@dataclass(frozen=True)
class Prediction:
    """A loss the law was not fitted to."""

    mixture: str
    seed: int
    num_parameters: int
    family: str
    measured: float
    predicted: float
    low: float  # of the law's 90 % interval
    high: float


@dataclass(frozen=True)
class MixtureResult:
    """A mixture at one size and length: means over seeds, and standard deviations (n - 1)."""

    mixture: str
    num_parameters: int
    tokens: int
    seeds: int
    ratios: dict[str, float]
    losses: dict[str, float]  # by family
    normalized: float  # Σ L_f / L_f*, L_f* measured in the runs of one family
    normalized_std: float
    against_uniform: float  # of the same seeds: mean difference of `normalized`
    against_uniform_std: float
    total: float  # Σ L_f
    predicted: float  # `normalized` by the law: Σ p_f^-gamma_f


def split_tests(table: RunsTable) -> list[SplitTest]:
    """One test for each family and own ratio that the runs for the hypothesis have."""
    found = []
    for family in table.families:
        cells = _by_split(table, family)
        for ratio in sorted({round(own, 2) for own, _ in cells}):
            of_ratio = {rest: logs for (own, rest), logs in cells.items() if round(own, 2) == ratio}
            found.append(_split_test(family, ratio, of_ratio))
    return found


def _by_split(
    table: RunsTable, family: str
) -> dict[tuple[float, tuple[float, ...]], dict[int, float]]:
    """(own ratio, ratios of the others) -> seed -> ln L."""
    ratios = table.wide
    cells: dict[tuple[float, tuple[float, ...]], dict[int, float]] = {}
    for row in table.rows:
        if row["family"] == family and row["purpose"] == "hypothesis" and row["loss"] > 0:
            own = ratios[row["run"]]
            rest = tuple(round(p, 2) for name, p in own.items() if name != family)
            key = (round(own[family], 2), rest)
            cells.setdefault(key, {})[row["seed"]] = math.log(row["loss"])
    return cells


def _split_test(
    family: str, ratio: float, cells: Mapping[tuple[float, ...], Mapping[int, float]]
) -> SplitTest:
    seeds = sorted(set.intersection(*(set(logs) for logs in cells.values())))
    y = np.array([[logs[seed] for seed in seeds] for logs in cells.values()])  # [splits, seeds]
    splits, count = y.shape
    means = y.mean(axis=1)
    between = count * means.var(ddof=1) if splits > 1 else math.nan
    residual = y - means[:, None] - y.mean(axis=0) + y.mean()
    left = (splits - 1) * (count - 1)
    within = float((residual**2).sum()) / left if left else math.nan
    return SplitTest(
        family=family,
        ratio=ratio,
        splits=splits,
        seeds=count,
        split_std=math.sqrt(max(0.0, between - (within if left else 0.0)) / count),
        seed_std=math.sqrt(within) if left else math.nan,
        largest=float(np.ptp(means)),
        p_value=float(f_distribution.sf(between / within, splits - 1, left)) if left else math.nan,
    )


def partner_effects(table: RunsTable, ratio: float) -> dict[str, dict[str, float]]:
    """family -> partner -> how ln L of the family at `ratio` differs, when that partner has the
    same ratio, from its mean over all partners. Negative: the partner helps more than others."""
    effects: dict[str, dict[str, float]] = {}
    wide = table.wide
    for family in table.families:
        logs: dict[str, list[float]] = {}
        for row in table.rows:
            own = wide[row["run"]]
            big = [name for name, p in own.items() if abs(p - ratio) < SAME]
            if row["purpose"] == "hypothesis" and row["family"] == family and family in big:
                for partner in (name for name in big if name != family):
                    logs.setdefault(partner, []).append(math.log(row["loss"]))
        means = {partner: float(np.mean(values)) for partner, values in logs.items()}
        overall = float(np.mean(list(means.values()))) if means else math.nan
        effects[family] = {partner: mean - overall for partner, mean in means.items()}
    return effects


def predictions(law: ScalingLaw, table: RunsTable) -> list[Prediction]:
    """Every loss of the runs that compare mixtures, beside the law's."""
    wide, found = table.wide, []
    for row in table.rows:
        if row["purpose"] != "confirm" or not math.isfinite(row["loss"]):
            continue
        size = (row["num_parameters"], row["tokens"])
        ratios = wide[row["run"]]
        low, high = law.interval(*size, ratios)[row["family"]]
        found.append(
            Prediction(
                mixture=mixture_of(row["run"]),
                seed=row["seed"],
                num_parameters=row["num_parameters"],
                family=row["family"],
                measured=row["loss"],
                predicted=law.loss(*size, ratios)[row["family"]],
                low=low,
                high=high,
            )
        )
    return found


def mixture_of(run: str) -> str:
    """The mixture's name out of a run's: confirm_MODEL_TOKENS_MIXTURE_sSEED."""
    return run.split("_")[3]


def compare_mixtures(law: ScalingLaw, main: RunsTable, confirm: RunsTable) -> list[MixtureResult]:
    """Mixtures by size, the lowest normalised loss first."""
    alone = single_family_losses(main)
    sizes = sorted({(row["num_parameters"], row["tokens"]) for row in confirm.rows})
    found = []
    for size in sizes:
        rows = [r for r in confirm.rows if (r["num_parameters"], r["tokens"]) == size]
        if size not in alone:
            raise ValueError(f"there are no runs of single families at N, D = {size}")
        totals = {
            key: math.fsum(r["loss"] / alone[size][r["family"]] for r in run)
            for key, run in _grouped(rows, lambda r: (mixture_of(r["run"]), r["seed"])).items()
        }
        results = [
            _result(law, name, own, totals, confirm.wide[own[0]["run"]])
            for name, own in _grouped(rows, lambda r: mixture_of(r["run"])).items()
        ]
        found += sorted(results, key=lambda result: result.normalized)
    return found


def single_family_losses(table: RunsTable) -> dict[tuple[int, int], dict[str, float]]:
    """(N, D) -> family -> mean loss of the runs of it alone; sizes that lack a family are out."""
    rows = [r for r in table.rows if r["purpose"] == "single_family" and r["ratio"] > 0.99]
    cells = _grouped(rows, lambda r: (r["num_parameters"], r["tokens"]))
    found = {}
    for size, members in cells.items():
        by_family = _grouped(members, lambda r: r["family"])
        if set(by_family) == set(table.families):
            found[size] = {
                f: float(np.mean([r["loss"] for r in rs])) for f, rs in by_family.items()
            }
    return found


def _result(
    law: ScalingLaw,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    totals: Mapping[tuple[str, int], float],
    ratios: dict[str, float],
) -> MixtureResult:
    seeds = sorted({row["seed"] for row in rows})
    own = np.array([totals[name, seed] for seed in seeds])
    differences = np.array(
        [totals[name, s] - totals["uniform", s] for s in seeds if ("uniform", s) in totals]
    )
    losses = {
        family: float(np.mean([r["loss"] for r in rows if r["family"] == family]))
        for family in ratios
    }
    return MixtureResult(
        mixture=name,
        num_parameters=rows[0]["num_parameters"],
        tokens=rows[0]["tokens"],
        seeds=len(seeds),
        ratios=ratios,
        losses=losses,
        normalized=float(own.mean()),
        normalized_std=_std(own),
        against_uniform=float(differences.mean()) if len(differences) else math.nan,
        against_uniform_std=_std(differences),
        total=math.fsum(losses.values()),
        predicted=math.fsum(p ** -law.gamma[f] for f, p in ratios.items()),
    )


def _std(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _grouped(rows: Iterable[Mapping[str, Any]], key: Any) -> dict[Any, list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
