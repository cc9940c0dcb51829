"""Does a family's loss depend on its own ratio only? Measured on runs made for the question.

The hypothesis of arXiv 2410.12883: the loss of family f depends on p_f, and not on how the other
families share the remaining 1 - p_f. Runs of one size and length with the same p_f and two splits
of the rest, over several seeds, tell by how much it fails.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import t as t_distribution  # type: ignore[import-untyped]

from data.scaling_law.identify import SAME_SIZE
from data.scaling_law.runs_table import RunsTable

SAME = 0.02  # ratios so close (in shares of the whole mixture) are taken for the same


@dataclass(frozen=True)
class SplitEffect:
    """ln L of one family under one split of the rest, minus that under another."""

    family: str
    num_parameters: float
    tokens: float
    ratio: float  # the family's own
    splits: tuple[dict[str, float], dict[str, float]]  # ratios of the others
    runs: tuple[int, int]  # of each split
    difference: float  # of mean ln L: first minus second
    low: float  # ends of its interval (Student's t with the pooled scatter); nan without seeds
    high: float
    seed_std: float  # of ln L between runs of equal ratios, pooled over the splits; nan without
    effect_size: float  # difference / seed_std

    @property
    def line(self) -> str:
        """The finding in one line."""
        one, other = (
            "/".join(f"{name} {p:.2f}" for name, p in split.items()) for split in self.splits
        )
        said = f"{self.difference:+.4f}"
        if not math.isnan(self.low):
            said += f" [{self.low:+.4f}, {self.high:+.4f}], {self.effect_size:+.1f} seed std"
        return f"{self.family} at {self.ratio:.2f}: ln L with {one} minus with {other}: {said}"


def split_effects(
    table: RunsTable, *, purpose: str | None = None, level: float = 0.95
) -> list[SplitEffect]:
    """All pairs of splits with the same own ratio, size and length, by family.

    purpose: only runs for it; None: all. An interval misses 0 by chance once in 1 / (1 - level)
    pairs, so that some of many do. The scatter between seeds is pooled over all splits at the same
    size, length and own ratio. Raises ValueError for a level outside of (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: must lie between 0 and 1, such as 0.95")
    ratios = table.wide
    rows = [row for row in table.rows if purpose is None or row["purpose"] == purpose]
    rows = [row for row in rows if math.isfinite(row["loss"]) and row["loss"] > 0 and row["ratio"]]
    found = []
    for family in table.families:
        for group in _alike([row for row in rows if row["family"] == family]):
            splits = _splits(group, family, ratios)
            found += [
                _effect(family, pair, splits, ratios, level)
                for pair in combinations(range(len(splits)), 2)
            ]
    return found


def _alike(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows by size, length and own ratio."""
    groups: list[list[dict[str, Any]]] = []
    for row in rows:
        for group in groups:
            first = group[0]
            if abs(row["ratio"] - first["ratio"]) < SAME / 2 and all(
                abs(math.log(row[name] / first[name])) < SAME_SIZE
                for name in ("num_parameters", "tokens")
            ):
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def _splits(
    group: list[dict[str, Any]], family: str, ratios: Mapping[str, Mapping[str, float]]
) -> list[list[dict[str, Any]]]:
    """Rows by how the others share the rest."""
    splits: list[list[dict[str, Any]]] = []
    for row in group:
        own = ratios[row["run"]]
        for split in splits:
            first = ratios[split[0]["run"]]
            if all(abs(own[name] - first[name]) < SAME for name in own if name != family):
                split.append(row)
                break
        else:
            splits.append([row])
    return splits


def _effect(
    family: str,
    pair: tuple[int, int],
    splits: list[list[dict[str, Any]]],
    ratios: Mapping[str, Mapping[str, float]],
    level: float,
) -> SplitEffect:
    logs = [np.log([row["loss"] for row in split]) for split in splits]
    one, other = logs[pair[0]], logs[pair[1]]
    left = sum(len(values) - 1 for values in logs)
    scatter = sum(float(((values - values.mean()) ** 2).sum()) for values in logs)
    std = math.sqrt(scatter / left) if left else math.nan
    difference = float(one.mean() - other.mean())
    reach = (
        float(t_distribution.ppf((1 + level) / 2, left))
        * std
        * math.sqrt(1 / len(one) + 1 / len(other))
        if left
        else math.nan
    )
    first = splits[pair[0]][0]
    left_split, right_split = (
        {name: p for name, p in ratios[splits[k][0]["run"]].items() if name != family} for k in pair
    )
    return SplitEffect(
        family=family,
        num_parameters=first["num_parameters"],
        tokens=first["tokens"],
        ratio=first["ratio"],
        splits=(left_split, right_split),
        runs=(len(one), len(other)),
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        seed_std=std,
        effect_size=difference / std if std else math.nan,
    )
