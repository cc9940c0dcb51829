"""The data-mixing law of arXiv 2403.16952 beside ours, at one size and length.

    L_i(r) = c_i + k_i exp(sum_j t_ij r_j)

r are the ratios of all families and sum to 1, so that k_i is one with a constant added to all t_ij
and is left out (k_i = 1). A family has as many t as there are families, and c; our law, at one size
and length, has its level and gamma. It is finite where a family is not drawn.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from data.scaling_law.identify import SAME_SIZE
from data.scaling_law.runs_table import RunsTable, levels

FLOORS = np.linspace(0.001, 0.98, 50)  # of c, in shares of the smallest loss: where fits start
STARTS = 5  # of them, the best, that are refined


@dataclass(frozen=True)
class MixingFit:
    """The mixing law of one family. `loss` takes ratios in the order of `t`."""

    c: float
    t: dict[str, float]
    rms: float  # of ln L

    def loss(self, ratios: np.ndarray) -> np.ndarray:
        """Nats a token for ratios [..., families]."""
        return self.c + np.exp(ratios @ np.array(list(self.t.values())))


@dataclass(frozen=True)
class MixingComparison:
    """Errors in ln L of runs left out, on the same runs for both laws."""

    rows: int
    fit: MixingFit
    held_out_rms: float  # of the mixing law
    power_held_out_rms: float  # of level * p^-gamma


def largest_group(table: RunsTable) -> RunsTable:
    """The rows of the size and length most runs share."""
    sizes, lengths = table.column("num_parameters"), table.column("tokens")
    best = np.zeros(len(sizes), dtype=bool)
    for size in levels(sizes, SAME_SIZE):
        for length in levels(lengths, SAME_SIZE):
            there = (np.abs(np.log(sizes / size)) < SAME_SIZE) & (
                np.abs(np.log(lengths / length)) < SAME_SIZE
            )
            best = there if there.sum() > best.sum() else best
    return table.where(best)


def compare_mixing_law(
    table: RunsTable, *, folds: int = 5, seed: int = 0
) -> dict[str, MixingComparison]:
    """Both laws by family, on runs of one size and length (`largest_group`) that draw the family.

    Raises ValueError for runs of several sizes or lengths, and where they are too few: a fold left
    out must leave more of them than there are parameters.
    """
    for name in ("num_parameters", "tokens"):
        found = levels(table.column(name), SAME_SIZE)
        if len(found) > 1:
            raise ValueError(
                f"{name}: {len(found)} different ones; the mixing law holds at one size and "
                "length (largest_group picks the one most runs share)"
            )
    usable, _ = table.usable()
    wide = table.wide
    random = np.random.default_rng(seed)
    result = {}
    for family in usable.families:
        part = usable.of_family(family)
        ratios = np.array([list(wide[run].values()) for run in part.runs])
        loss, own = part.column("loss"), part.column("ratio")
        free = len(table.families) + 1
        parts = min(folds, len(loss))
        if len(loss) - math.ceil(len(loss) / max(parts, 1)) <= free:
            raise ValueError(
                f"{family}: {len(loss)} runs at this size and length for the {free} parameters of "
                f"the mixing law, a part of them left out in turn; it takes {free + 2} or more"
            )
        fold = random.permutation(np.arange(len(loss)) % parts)
        errors = np.zeros((2, len(loss)))
        for number in range(parts):
            out = fold == number
            mixing = fit_mixing(ratios[~out], loss[~out], table.families)
            slope, level = np.polyfit(np.log(own[~out]), np.log(loss[~out]), 1)
            errors[0, out] = np.log(loss[out] / mixing.loss(ratios[out]))
            errors[1, out] = np.log(loss[out]) - level - slope * np.log(own[out])
        rms = np.sqrt((errors**2).mean(axis=1))
        result[family] = MixingComparison(
            len(loss), fit_mixing(ratios, loss, table.families), float(rms[0]), float(rms[1])
        )
    return result


def fit_mixing(ratios: np.ndarray, loss: np.ndarray, families: list[str]) -> MixingFit:
    """Least squares of ln L; ratios [runs, families].

    At a given c, ln(L - c) is linear in t: from a grid of c, the best few are refined.
    """
    starts = []
    for floor in FLOORS * loss.min():
        share = (loss - floor) / loss  # what an error of ln(L - c) is in ln L
        t = np.linalg.lstsq(ratios * share[:, None], share * np.log(loss - floor), rcond=None)[0]
        error = np.log((floor + np.exp(ratios @ t)) / loss)
        starts.append((float(error @ error), np.array([floor, *t])))
    starts.sort(key=lambda start: start[0])

    def residual(x: np.ndarray) -> np.ndarray:
        return np.log((x[0] + np.exp(np.minimum(ratios @ x[1:], 50.0))) / loss)

    def jacobian(x: np.ndarray) -> np.ndarray:
        term = np.exp(np.minimum(ratios @ x[1:], 50.0))[:, None]
        return np.concatenate([np.ones_like(term), term * ratios], axis=1) / (x[0] + term)

    low = np.array([0.0, *[-np.inf] * ratios.shape[1]])
    refined = [
        least_squares(residual, start, jacobian, bounds=(low, np.inf))
        for _, start in starts[:STARTS]
    ]
    best = min(refined, key=lambda one: float(one.cost))
    c, *t = (float(value) for value in best.x)
    rms = math.sqrt(2 * float(best.cost) / len(loss))
    return MixingFit(c, dict(zip(families, t, strict=True)), rms)
