"""The runs of a sweep: which mixtures, at which sizes and token budgets, with which seeds.

    SweepConfig + shapes of its models ─► mixtures ─► PlannedRun, one by one

Mixtures of the grid are those of which the law's parameters come out most exactly (D-optimal
design): in each family log loss is a polynomial in log ratio, so what n runs tell about it is the
information matrix X'X of their rows (1, log p, (log p)^2), and the runs are chosen to make the
product of all families' determinants large. Greedy first, then Fedorov's exchange (Theory of
Optimal Experiments, 1972) until no swap helps. The greedy order also says which mixtures to drop
where the budget is tight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.scaling_law.sweep_config import (
    LEAST_CELLS,
    LEAST_RATIOS,
    LEAST_SIZES,
    GridRuns,
    HypothesisRuns,
    SweepConfig,
)

# Ratios to choose from; of a larger grid a sample of so many, drawn with the sweep's seed.
MOST_CANDIDATES = 20_000
# Added to information matrices, so that the first runs' singular ones have a determinant.
RIDGE = 1e-6
MOST_EXCHANGES = 1000

Ratios = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the design must know of a model and its settings."""

    num_parameters: int  # without the embedding
    flops_per_token: float  # of training
    tokens_per_step: int


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training."""

    name: str
    purpose: str  # "grid", "single_family", "hypothesis" or "confirm"
    model: str
    num_parameters: int
    train_steps: int
    tokens: int  # train_steps whole steps
    seed: int
    ratios: Ratios
    flops: float


def design(config: SweepConfig, shapes: Mapping[str, ModelShape]) -> list[PlannedRun]:
    """All runs of the sweep; the same for the same arguments.

    The grid has as many mixtures as config.grid.points and config.budget_flops allow. Raises
    ValueError where the budget does not allow the least that determines the law, naming the
    cheapest budget that would, and where the sweep as described cannot determine it.
    """
    chosen = _grid_mixtures(config)
    least = min(LEAST_RATIOS, len(chosen)) if chosen else 0
    for points in range(len(chosen), least - 1, -1):
        runs = _all_runs(config, shapes, chosen[:points])
        if config.budget_flops is None or total_flops(runs) <= config.budget_flops:
            break
    else:
        raise ValueError(
            f"budget_flops={config.budget_flops:.4g}: the cheapest form of this sweep, with "
            f"{least} mixtures in its grid, is {len(runs)} runs of {total_flops(runs):.4g} FLOPs; "
            "raise budget_flops to that, or take fewer or smaller cells"
        )
    if config.must_determine_law and (problems := undetermined(config.families, runs)):
        raise ValueError("\n".join(problems))
    return runs


def total_flops(runs: Sequence[PlannedRun]) -> float:
    return math.fsum(run.flops for run in runs)


def undetermined(families: Sequence[str], runs: Sequence[PlannedRun]) -> list[str]:
    """What is missing to fit the law, a line each; empty where the runs determine it.

    Runs with all the weight on a family count as ratio 1 of it.
    """
    problems = []
    for family in families:
        at_cell: dict[tuple[int, int], set[float]] = {}
        for run in runs:
            if run.ratios[family] > 0:
                cell = (run.num_parameters, run.tokens)
                at_cell.setdefault(cell, set()).add(round(run.ratios[family], 6))
        sizes, budgets = ({cell[i] for cell in at_cell} for i in (0, 1))
        most = max((len(ratios) for ratios in at_cell.values()), default=0)
        if most < LEAST_RATIOS:
            problems.append(
                f"{family}: at no size and budget has it {LEAST_RATIOS} ratios, which its exponent "
                f"gamma needs (at most {most}); add grid.points, or a cell that grid and "
                "single_family share"
            )
        if len(at_cell) < LEAST_CELLS or min(len(sizes), len(budgets)) < LEAST_SIZES:
            problems.append(
                f"{family}: {len(sizes)} sizes, {len(budgets)} token budgets, {len(at_cell)} "
                f"pairs of them; E, A, alpha, B and beta need {LEAST_SIZES}, {LEAST_SIZES} and "
                f"{LEAST_CELLS} or more: add to single_family.cells"
            )
    if problems:
        problems.append(
            "must_determine_law=false accepts a sweep whose runs are to be joined with others"
        )
    return problems


# ---------------------------------------------------------------- mixtures


def simplex_grid(families: int, step: float, floor: float) -> Iterator[tuple[float, ...]]:
    """Ratios of so many families: floor + whole steps each, 1 in all.

    What whole steps leave over is shared by all alike, so that each sum is 1 exactly.
    """
    steps = int((1 - families * floor) / step + 1e-9)
    base = (1 - steps * step) / families  # the floor, and its part of what is left over
    bars = itertools.combinations(range(steps + families - 1), families - 1)
    for places in bars:
        edges = (-1, *places, steps + families - 1)
        yield tuple(base + step * (b - a - 1) for a, b in itertools.pairwise(edges))


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


def _grid_mixtures(config: SweepConfig) -> list[Ratios]:
    grid: GridRuns = config.grid
    if not grid.cells:
        return []
    candidates = np.array(list(simplex_grid(len(config.families), grid.step, grid.floor)))
    if len(candidates) > MOST_CANDIDATES:
        random = np.random.default_rng(config.first_seed)
        places = random.choice(len(candidates), MOST_CANDIDATES, replace=False)
        candidates = candidates[np.sort(places)]
    chosen = d_optimal(candidates, grid.points, degree=grid.degree, seed=config.first_seed)
    return [_named(config.families, candidates[place]) for place in chosen]


def _hypothesis_mixtures(families: Sequence[str], runs: HypothesisRuns) -> dict[str, Ratios]:
    """Name -> ratios: each pair at runs.ratio, and each family alone at it."""
    groups = [*itertools.combinations(families, 2), *((family,) for family in families)]
    mixtures = {}
    for group in groups:
        rest = (1 - len(group) * runs.ratio) / (len(families) - len(group))
        mixtures["-".join(f[:4] for f in group)] = {
            family: runs.ratio if family in group else rest for family in families
        }
    return mixtures


def _named(families: Sequence[str], ratios: Sequence[float]) -> Ratios:
    """Rounded, so that files read well, and made to sum to 1 again by the largest."""
    rounded = [round(float(ratio), 6) for ratio in ratios]
    rounded[int(np.argmax(rounded))] += 1 - math.fsum(rounded)
    return dict(zip(families, rounded, strict=True))


# ---------------------------------------------------------------- runs


def _all_runs(
    config: SweepConfig, shapes: Mapping[str, ModelShape], mixtures: Sequence[Ratios]
) -> list[PlannedRun]:
    families = config.families
    alone = {f: {other: float(other == f) for other in families} for f in families}
    grid = {f"{number:02d}": ratios for number, ratios in enumerate(mixtures, 1)}
    rest = _hypothesis_mixtures(families, config.hypothesis) if config.hypothesis.cells else {}
    parts = {
        "grid": grid,
        "single_family": alone,
        "hypothesis": rest,
        "confirm": config.confirm.mixtures,
    }
    runs = []
    for purpose, named in parts.items():
        part = config.parts()[purpose]
        for (model, budgets), (label, ratios) in itertools.product(
            part.cells.items(), named.items()
        ):
            for tokens in budgets:
                seeds = part.seeds
                if isinstance(part, GridRuns) and label <= f"{part.repeated:02d}":
                    seeds += 1
                run = _run(config, shapes[model], purpose, model, label, ratios, tokens)
                runs += [
                    replace(run, name=f"{run.name}_s{seed}", seed=seed)
                    for seed in range(config.first_seed, config.first_seed + seeds)
                ]
    return runs


def _run(
    config: SweepConfig,
    shape: ModelShape,
    purpose: str,
    model: str,
    label: str,
    ratios: Ratios,
    tokens: float,
) -> PlannedRun:
    steps = round(tokens / shape.tokens_per_step)
    if steps < 1:
        raise ValueError(
            f"{purpose}.cells.{model}: {tokens:.4g} tokens are less than one step of "
            f"{shape.tokens_per_step:,}; use more, or a smaller train.global_batch_size"
        )
    drawn = steps * shape.tokens_per_step
    short = {"single_family": "single", "hypothesis": "hyp"}.get(purpose, purpose)
    return PlannedRun(
        name=f"{short}_{model}_{_short(tokens)}_{label}",
        purpose=purpose,
        model=model,
        num_parameters=shape.num_parameters,
        train_steps=steps,
        tokens=drawn,
        seed=config.first_seed,
        ratios=ratios,
        flops=drawn * shape.flops_per_token,
    )


def _short(tokens: float) -> str:
    """800000 -> 800k, 2.5e9 -> 2500m: of letters and digits alone."""
    for size, unit in ((1e12, "t"), (1e9, "b"), (1e6, "m"), (1e3, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens / size:.0f}{unit}"
    return f"{tokens:.0f}"
