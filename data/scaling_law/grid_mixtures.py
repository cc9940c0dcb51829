"""The mixtures of a sweep's grid: those of which the law's parameters come out most exactly.

A D-optimal design: in each family log loss is a polynomial in log ratio, so what n runs tell about
it is the information matrix X'X of their rows (1, log p, (log p)^2), and the runs are chosen to
make the product of all families' determinants large. Greedy first, then Fedorov's exchange (Theory
of Optimal Experiments, 1972) until no swap helps. The greedy order also says which mixtures to drop
where the budget is tight.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

# Ratios to choose from; of a larger grid a sample of so many, drawn with the sweep's seed.
MOST_CANDIDATES = 20_000
# Added to information matrices, so that the first runs' singular ones have a determinant.
RIDGE = 1e-6
MOST_EXCHANGES = 1000


def candidates(families: int, step: float, floor: float, seed: int) -> np.ndarray:
    """Ratios [n, families] to choose from: the whole grid, or a sample of a large one."""
    if simplex_grid_size(families, step, floor) > MOST_CANDIDATES:
        return np.array(sample_simplex_grid(families, step, floor, MOST_CANDIDATES, seed))
    return np.array(list(simplex_grid(families, step, floor)))


def simplex_grid(families: int, step: float, floor: float) -> Iterator[tuple[float, ...]]:
    """Ratios of so many families: floor + whole steps each, 1 in all.

    What whole steps leave over is shared by all alike, so that each sum is 1 exactly.
    """
    places = _steps(families, step, floor) + families - 1
    for bars in itertools.combinations(range(places), families - 1):
        yield _between(bars, families, step, floor)


def sample_simplex_grid(
    families: int, step: float, floor: float, count: int, seed: int
) -> list[tuple[float, ...]]:
    """At most `count` of `simplex_grid`, each as likely as any other, without making it whole."""
    random = np.random.default_rng(seed)
    places = _steps(families, step, floor) + families - 1
    drawn = (sorted(random.choice(places, families - 1, replace=False)) for _ in range(count))
    distinct = sorted({tuple(int(place) for place in bars) for bars in drawn})
    return [_between(bars, families, step, floor) for bars in distinct]


def simplex_grid_size(families: int, step: float, floor: float) -> int:
    """How many ratio vectors `simplex_grid` has."""
    return math.comb(_steps(families, step, floor) + families - 1, families - 1)


def _steps(families: int, step: float, floor: float) -> int:
    """How many whole steps there are to share out above the floor."""
    return int((1 - families * floor) / step + 1e-9)


def _between(bars: Sequence[int], families: int, step: float, floor: float) -> tuple[float, ...]:
    """Ratios from the places of bars in a row of steps: each has the steps between two of them."""
    steps = _steps(families, step, floor)
    base = (1 - steps * step) / families  # the floor, and its part of what is left over
    edges = (-1, *bars, steps + families - 1)
    return tuple(base + step * (b - a - 1) for a, b in itertools.pairwise(edges))


def d_optimal(candidates: np.ndarray, count: int, *, degree: int, seed: int) -> list[int]:
    """Places of `count` of the candidates [n, families] (ratios), the most telling ones first.

    The order is that of a greedy choice among the ones the exchange ended with, so that the first
    k of them are a good design too. None is taken twice. Ties fall by the seed.
    """
    if count > len(candidates):
        raise ValueError(
            f"grid.points={count}: the grid has {len(candidates)} mixtures; use a smaller "
            "grid.step or grid.floor, or fewer points"
        )
    rows = _rows(candidates, degree)
    order = np.random.default_rng(seed).permutation(len(candidates))  # decides ties
    chosen = _greedy(rows, order, count)
    chosen = _exchange(rows, chosen)
    return [chosen[i] for i in _greedy(rows[chosen], np.arange(count), count)]


def log_determinant(candidates: np.ndarray, chosen: Sequence[int], degree: int) -> float:
    """What `d_optimal` makes large: Σ over families of log det X'X."""
    rows = _rows(candidates, degree)[list(chosen)]
    return _log_determinants(np.einsum("nfi,nfj->fij", rows, rows)).sum()


def _rows(ratios: np.ndarray, degree: int) -> np.ndarray:
    """[n, families, degree + 1]: powers of log ratio, scaled to [-1, 1] for equal weight."""
    logs = np.log(ratios)
    low, high = logs.min(), logs.max()
    scaled = 2 * (logs - low) / max(high - low, 1e-12) - 1
    return np.stack([scaled**power for power in range(degree + 1)], axis=-1)


def _log_determinants(information: np.ndarray) -> np.ndarray:
    size = information.shape[-1]
    return np.linalg.slogdet(information + RIDGE * np.eye(size))[1]


def _gains(rows: np.ndarray, information: np.ndarray) -> np.ndarray:
    """By how much each row would raise the criterion: log(1 + x' M^-1 x), over all families."""
    inverse = np.linalg.inv(information + RIDGE * np.eye(information.shape[-1]))
    return np.log1p(np.einsum("nfi,fij,nfj->nf", rows, inverse, rows)).sum(1)


def _greedy(rows: np.ndarray, order: np.ndarray, count: int) -> list[int]:
    information = np.zeros((rows.shape[1], rows.shape[2], rows.shape[2]))
    chosen: list[int] = []
    for _ in range(count):
        gains = _gains(rows[order], information)
        gains[np.isin(order, chosen)] = -np.inf
        best = int(order[np.argmax(gains)])
        chosen.append(best)
        information += np.einsum("fi,fj->fij", rows[best], rows[best])
    return chosen


def _exchange(rows: np.ndarray, chosen: list[int]) -> list[int]:
    """Swaps one chosen row for one that is not while that raises the criterion."""
    chosen = list(chosen)
    for _ in range(MOST_EXCHANGES):
        for place, out in enumerate(chosen):
            rest = [row for row in chosen if row != out]
            information = np.einsum("nfi,nfj->fij", rows[rest], rows[rest])
            gains = _gains(rows, information)
            gains[rest] = -np.inf
            best = int(np.argmax(gains))
            if gains[best] > gains[out] + 1e-9:
                chosen[place] = best
                break
        else:
            break
    return chosen
