"""The runs of a sweep: which mixtures, at which sizes and token budgets, with which seeds.

SweepConfig + shapes of its models ─► mixtures ─► PlannedRun, one by one
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.scaling_law.fit_settings import FitSettings, rows_of_family, select_rows
from data.scaling_law.grid_mixtures import candidates, d_optimal
from data.scaling_law.identify import UnderdeterminedError, missing_runs
from data.scaling_law.runs_table import RunsTable, make_table
from data.scaling_law.sweep_config import LEAST_RATIOS, GridRuns, HypothesisRuns, SweepConfig

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
    cheapest budget that would, where the sweep as described cannot determine it, and where two
    runs would have one name.
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
    if problems := _same_names(runs):
        raise ValueError("\n".join(problems))
    if config.must_determine_law and (problems := undetermined(runs)):
        raise ValueError("\n".join(problems))
    return runs


def total_flops(runs: Sequence[PlannedRun]) -> float:
    return math.fsum(run.flops for run in runs)


def undetermined(runs: Sequence[PlannedRun]) -> list[str]:
    """What is missing to fit the law, a line each; empty where the runs determine it.

    `fit_law`'s own check of the table that these runs would make, by its default settings: runs of
    purpose "confirm" do not count.
    """
    try:
        usable, _ = select_rows(_planned_table(runs), FitSettings())
    except UnderdeterminedError as error:
        problems = error.missing
    except ValueError as error:
        problems = [str(error)]
    else:
        rows_of = {family: rows_of_family(usable, family) for family in usable.families}
        problems = missing_runs(rows_of, {})
    if not problems:
        return []
    return [
        *problems,
        "sizes and lengths come from single_family.cells, ratios from grid.points and from a cell "
        "that grid and single_family share; must_determine_law=false accepts a sweep whose runs "
        "are to be joined with others",
    ]


def _planned_table(runs: Sequence[PlannedRun]) -> RunsTable:
    """What the runs would be collected to, but for the losses: these are all 1."""
    return make_table(
        {
            "run": run.name,
            "model": run.model,
            "num_parameters": run.num_parameters,
            "tokens": run.tokens,
            "seed": run.seed,
            "purpose": run.purpose,
            "family": family,
            "ratio": ratio,
            "loss": 1.0,
            "eval_tokens": 0,
            "epochs": 0.0,
        }
        for run in runs
        for family, ratio in run.ratios.items()
    )


def _same_names(runs: Sequence[PlannedRun]) -> list[str]:
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if not twice:
        return []
    more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
    return [
        f"more than one run is named {', '.join(twice[:3])}{more}: a run's name is made of model, "
        "tokens, mixture and seed; give each token budget of a model once, and tell the names of "
        "models and families apart"
    ]


# ---------------------------------------------------------------- mixtures


def _grid_mixtures(config: SweepConfig) -> list[Ratios]:
    grid: GridRuns = config.grid
    if not grid.cells:
        return []
    among = candidates(len(config.families), grid.step, grid.floor, config.first_seed)
    chosen = d_optimal(among, grid.points, degree=grid.degree, seed=config.first_seed)
    return [_named(config.families, among[place]) for place in chosen]


def _hypothesis_mixtures(families: Sequence[str], runs: HypothesisRuns) -> dict[str, Ratios]:
    """Name -> ratios: each pair at runs.ratio, and each family alone at it."""
    groups = [*itertools.combinations(families, 2), *((family,) for family in families)]
    short = _short_names(families)
    mixtures = {}
    for group in groups:
        rest = (1 - len(group) * runs.ratio) / (len(families) - len(group))
        mixtures["-".join(short[family] for family in group)] = {
            family: runs.ratio if family in group else rest for family in families
        }
    return mixtures


def _short_names(families: Sequence[str]) -> dict[str, str]:
    """The first four letters where no other family has the same, else the whole name."""
    shared = Counter(family[:4] for family in families)
    return {family: family[:4] if shared[family[:4]] == 1 else family for family in families}


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
                if isinstance(part, GridRuns) and int(label) <= part.repeated:
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
