"""Designs: the ratios they choose, the budget they keep, and what they refuse."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.scaling_law.design import (
    ModelShape,
    PlannedRun,
    design,
    total_flops,
    undetermined,
)
from data.scaling_law.fit import FitSettings, UnderdeterminedError, fit_law
from data.scaling_law.grid_mixtures import (
    candidates,
    d_optimal,
    log_determinant,
    sample_simplex_grid,
    simplex_grid,
    simplex_grid_size,
)
from data.scaling_law.law import FamilyLaw
from data.scaling_law.runs_table import RunsTable, make_table
from data.scaling_law.sweep_config import make_sweep, read_sweep
from tests.data.scaling_law.synthetic import row

FAMILIES = ["germanic", "indic", "romance", "sino-tibetan", "slavic"]
SHAPES = {
    "small": ModelShape(num_parameters=100, flops_per_token=10.0, tokens_per_step=8),
    "middle": ModelShape(num_parameters=200, flops_per_token=20.0, tokens_per_step=8),
    "large": ModelShape(num_parameters=400, flops_per_token=40.0, tokens_per_step=8),
}
SWEEP: dict[str, Any] = {
    "name": "test",
    "families": FAMILIES,
    "models": {name: {"base": "magneto_tiny"} for name in SHAPES},
    "grid": {"cells": {"small": [800]}, "points": 10, "repeated": 3},
    "single_family": {"cells": {"small": [400, 800, 1600], "middle": [800], "large": [800]}},
    "hypothesis": {"cells": {"small": [800]}, "ratio": 0.4, "seeds": 2},
}


def runs_of(**changes: Any) -> list[PlannedRun]:
    return design(make_sweep(SWEEP, "test", changes), SHAPES)


def table_of(runs: list[PlannedRun]) -> RunsTable:
    """What these runs would be collected to, of a plain law with a little noise."""
    random = np.random.default_rng(0)
    law = FamilyLaw(E=1.5, A=9.0, alpha=0.3, B=20.0, beta=0.3, gamma=0.1)
    return make_table(
        row(
            run=run.name,
            num_parameters=run.num_parameters,
            tokens=run.tokens,
            seed=run.seed,
            purpose=run.purpose,
            family=family,
            ratio=ratio,
            loss=float(
                law.loss(run.num_parameters, run.tokens, ratio or 1.0)
                * np.exp(random.normal(scale=0.003))
            ),
        )
        for run in runs
        for family, ratio in run.ratios.items()
    )


def problems(**changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        design(make_sweep(SWEEP, "test", changes), SHAPES)
    return str(caught.value)


# ---------------------------------------------------------------- mixtures


@pytest.mark.parametrize(("step", "floor"), [(0.1, 0.05), (0.05, 0.05), (0.2, 0.03)])
def test_the_grid_has_every_ratio_vector_once(step: float, floor: float) -> None:
    grid = list(simplex_grid(4, step, floor))
    steps = int((1 - 4 * floor) / step + 1e-9)
    assert len(grid) == len({tuple(np.round(p, 9)) for p in grid}) == math.comb(steps + 3, 3)
    assert all(math.isclose(math.fsum(p), 1) and min(p) >= floor - 1e-12 for p in grid)


def test_a_grid_too_large_to_write_down_is_sampled() -> None:
    """23 families: 9e9 mixtures."""
    assert simplex_grid_size(4, 0.1, 0.05) == len(list(simplex_grid(4, 0.1, 0.05)))
    assert simplex_grid_size(23, 0.05, 0.01) > 9e9
    sample = sample_simplex_grid(23, 0.05, 0.01, 200, seed=1)
    assert len(set(sample)) == len(sample) == 200
    assert all(math.isclose(math.fsum(p), 1) and min(p) >= 0.01 - 1e-12 for p in sample)
    assert sample == sample_simplex_grid(23, 0.05, 0.01, 200, seed=1)
    assert sample != sample_simplex_grid(23, 0.05, 0.01, 200, seed=2)


def test_a_sample_is_even_over_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = {tuple(np.round(p, 9)) for p in simplex_grid(3, 0.1, 0.05)}
    drawn = {tuple(np.round(p, 9)) for p in sample_simplex_grid(3, 0.1, 0.05, 2000, seed=1)}
    assert drawn == grid
    monkeypatch.setattr("data.scaling_law.grid_mixtures.MOST_CANDIDATES", len(grid) - 1)
    assert {tuple(np.round(p, 9)) for p in candidates(3, 0.1, 0.05, 1)} < grid
    monkeypatch.setattr("data.scaling_law.grid_mixtures.MOST_CANDIDATES", len(grid))
    assert len(candidates(3, 0.1, 0.05, 1)) == len(grid)


@pytest.mark.parametrize("degree", [1, 2])
def test_the_chosen_mixtures_are_better_than_random_ones(degree: int) -> None:
    grid = np.array(list(simplex_grid(4, 0.1, 0.05)))
    chosen = d_optimal(grid, 8, degree=degree, seed=1)
    assert len(set(chosen)) == 8
    random = np.random.default_rng(0)
    best_of_random = max(
        log_determinant(grid, list(random.choice(len(grid), 8, replace=False)), degree)
        for _ in range(500)
    )
    ours = log_determinant(grid, chosen, degree)
    assert ours > best_of_random
    # no single swap is better, which is where an exchange ends
    for place, other in itertools.product(range(8), range(0, len(grid), 7)):
        swapped = [other if i == place else row for i, row in enumerate(chosen)]
        if other not in chosen:
            assert log_determinant(grid, swapped, degree) <= ours + 1e-3
    # the first ones alone are a good design too: better than most as many of them
    fives = [log_determinant(grid, five, degree) for five in itertools.combinations(chosen, 5)]
    assert log_determinant(grid, chosen[:5], degree) > np.median(fives)


def test_a_second_degree_has_ratios_in_between() -> None:
    grid = np.array(list(simplex_grid(3, 0.1, 0.05)))
    levels = [
        len({round(p, 6) for p in grid[d_optimal(grid, 6, degree=degree, seed=1)].ravel()})
        for degree in (1, 2)
    ]
    assert levels[1] > levels[0]


def test_more_mixtures_than_the_grid_has() -> None:
    grid = np.array(list(simplex_grid(3, 0.5, 0.1)))
    with pytest.raises(ValueError, match="the grid has 3 mixtures"):
        d_optimal(grid, 4, degree=1, seed=1)


# ---------------------------------------------------------------- runs


def test_the_runs_of_a_sweep() -> None:
    runs = runs_of()
    assert len({run.name for run in runs}) == len(runs)
    assert Counter(run.purpose for run in runs) == {
        "grid": 13,
        "single_family": 25,
        "hypothesis": 30,  # 10 pairs and 5 families, twice
    }
    for run in runs:
        assert list(run.ratios) == FAMILIES
        assert math.isclose(math.fsum(run.ratios.values()), 1, abs_tol=1e-12)
        assert run.tokens == run.train_steps * 8
        assert run.flops == run.tokens * SHAPES[run.model].flops_per_token
    assert runs == runs_of()  # nothing is left to chance


def test_the_hypothesis_keeps_a_ratio_beside_each_other_family() -> None:
    runs = [run for run in runs_of() if run.purpose == "hypothesis" and run.seed == 1]
    for family in FAMILIES:
        rests = {
            tuple(round(p, 6) for name, p in run.ratios.items() if name != family)
            for run in runs
            if math.isclose(run.ratios[family], 0.4)
        }
        assert len(rests) == 5  # one even, four with another family at 0.4
    beside = [run.ratios for run in runs if math.isclose(run.ratios["indic"], 0.2 / 3)]
    assert len(beside) == 6


def test_a_budget_takes_mixtures_away_from_the_end() -> None:
    whole = runs_of()
    part = runs_of(budget_flops=total_flops(whole) - 3 * whole[0].flops)
    assert total_flops(part) <= total_flops(whole) - 3 * whole[0].flops
    names = [run.name for run in part]
    assert names == [run.name for run in whole if run.name in names]
    assert len(part) == len(whole) - 3


def test_a_budget_that_is_too_small() -> None:
    told = problems(budget_flops=1e5)
    cheapest = float(told.split("runs of ")[1].split(" FLOPs")[0])
    assert total_flops(runs_of(budget_flops=cheapest * 1.001)) <= cheapest * 1.001
    with pytest.raises(ValueError, match="budget_flops"):
        runs_of(budget_flops=cheapest * 0.98)


def test_less_than_a_step() -> None:
    told = problems(grid={"cells": {"small": [3]}})
    assert "grid.cells.small: 3 tokens are less than one step of 8" in told


def test_runs_that_do_not_determine_the_law() -> None:
    told = problems(single_family={"cells": {"small": [400, 800], "middle": [800], "large": [800]}})
    assert "B and beta need runs of 3 training lengths, there are 2 (tokens=400, 800)" in told
    assert "sizes and lengths come from single_family.cells" in told
    alone = {k: v for k, v in SWEEP.items() if k not in ("grid", "hypothesis")}
    with pytest.raises(
        ValueError, match=r"indic, .*: gamma needs runs of at least 2 .* all 5 have ratio 1"
    ):
        design(make_sweep(alone, "test"), SHAPES)
    assert len(design(make_sweep(alone, "test", {"must_determine_law": False}), SHAPES)) == 25
    assert undetermined(runs_of()) == []


def test_sizes_and_lengths_that_move_together_do_not_determine_the_law() -> None:
    """20 tokens a parameter at 5 sizes: enough of each, and the fit could not tell them apart."""
    shapes = {
        f"m{n}": ModelShape(num_parameters=n, flops_per_token=6.0 * n, tokens_per_step=10)
        for n in (100, 200, 400, 800, 1600)
    }
    cells = {name: [20.0 * shape.num_parameters] for name, shape in shapes.items()}
    sweep: dict[str, Any] = {
        "name": "chinchilla",
        "families": FAMILIES[:3],
        "models": {name: {"base": "magneto_tiny"} for name in shapes},
        "grid": {"cells": cells, "points": 5},
        "single_family": {"cells": cells},
    }
    with pytest.raises(
        ValueError, match=r"cannot be told apart: .* add a size at a training"
    ) as caught:
        design(make_sweep(sweep, "test"), shapes)
    runs = design(make_sweep(sweep, "test", {"must_determine_law": False}), shapes)
    with pytest.raises(UnderdeterminedError) as refused:  # the same, after all compute
        fit_law(table_of(runs))
    assert str(caught.value).splitlines()[:-1] == refused.value.missing


def test_a_design_that_passes_can_be_fitted() -> None:
    assert set(fit_law(table_of(runs_of()), FitSettings(bootstrap=0)).families) == set(FAMILIES)


def test_runs_that_check_predictions_do_not_determine_the_law() -> None:
    only_confirm = {k: v for k, v in SWEEP.items() if k in ("name", "families", "models")}
    confirm = {"cells": {"small": [800]}, "mixtures": {"m": dict.fromkeys(FAMILIES, 0.2)}}
    with pytest.raises(ValueError, match="all runs are for confirm"):
        design(make_sweep(only_confirm | {"confirm": confirm}, "test"), SHAPES)
    single = {"cells": {"small": [400, 800, 1600], "middle": [800], "large": [800]}}
    grid = {"cells": {"small": [800]}, "points": 10, "repeated": 0}
    sweep = only_confirm | {"single_family": single, "confirm": confirm}
    with pytest.raises(ValueError, match="all 5 have ratio 1"):  # 0.2 of each is a check's
        design(make_sweep(sweep, "test"), SHAPES)
    assert design(make_sweep(sweep | {"grid": grid}, "test"), SHAPES)


def test_a_family_no_run_draws() -> None:
    alone = {other: float(other == "indic") for other in FAMILIES}
    told = undetermined([replace(run, ratios=alone) for run in runs_of()[:3]])
    assert "germanic: no run has a loss of it at a ratio above 0" in told[0]


def test_families_that_begin_alike_have_runs_of_their_own() -> None:
    families = ["austroasiatic", "austronesian", "germanic", "indic"]
    runs = [
        run
        for run in design(make_sweep(SWEEP | {"families": families}, "test"), SHAPES)
        if run.purpose == "hypothesis" and run.seed == 1
    ]
    assert len(runs) == 6 + 4
    labels = [run.name.removeprefix("hyp_small_800_").removesuffix("_s1") for run in runs]
    assert {"austroasiatic-austronesian", "austroasiatic-germ", "germ-indi", "germ"} < set(labels)


def test_names_of_hypothesis_runs_stay_as_finished_sweeps_have_them() -> None:
    names = {run.name for run in runs_of() if run.purpose == "hypothesis"}
    assert {"hyp_small_800_roma-sino_s2", "hyp_small_800_germ-indi_s1", "hyp_small_800_slav_s1"} < (
        names
    )


def test_runs_of_one_name_are_refused() -> None:
    told = problems(grid={"cells": {"small": [1e5, 100000]}})
    assert "more than one run is named grid_small_100k_01_s1" in told and "and " in told


def test_repeated_mixtures_are_counted_as_numbers() -> None:
    families = {"families": FAMILIES[:3], "hypothesis": {"cells": {}}}
    grid = {"points": 101, "repeated": 12, "degree": 1, "cells": {"small": [800]}}
    runs = [run for run in runs_of(**families, grid=grid) if run.purpose == "grid"]
    twice = {run.name.split("_")[3] for run in runs if run.seed == 2}
    assert twice == {f"{number:02d}" for number in range(1, 13)}


# ---------------------------------------------------------------- settings

REFUSED: dict[str, dict[str, Any]] = {
    "grid.floor=0.0: the law has no loss at ratio 0": {"grid": {"floor": 0.0}},
    "5 families leave nothing to share out": {"grid": {"floor": 0.2}},
    "grid.step=1.5: must lie between": {"grid": {"step": 1.5}},
    "grid.points=2: a family's exponent needs 3": {"grid": {"points": 2, "repeated": 0}},
    "grid.degree=3: must be 1": {"grid": {"degree": 3}},
    "grid.repeated=11: must lie between 0": {"grid": {"repeated": 11}},
    "hypothesis.ratio=0.5": {"hypothesis": {"ratio": 0.5}},
    "at least 3, or leave hypothesis.cells out": {"families": ["germanic", "indic"]},
    "ratios need at least two families": {"families": ["germanic"]},
    "families names germanic more than once": {"families": ["germanic", "germanic", "indic"]},
    "models is empty": {"models": None},
    "'a b' names files": {"name": "a b"},
    "grid.cells names the model huge, which models has not": {"grid": {"cells": {"huge": [1e9]}}},
    "grid.cells.small=[-1.0]: give token budgets": {"grid": {"cells": {"small": [-1]}}},
    "grid.seeds=0: must be at least 1": {"grid": {"seeds": 0}},
    "confirm.mixtures=[]: give both or neither": {"confirm": {"cells": {"small": [800]}}},
    "confirm.mixtures.a/b: names files": {"confirm": {"mixtures": {"a/b": {}}}},
    "norse is none of families; germanic is missing": {
        "confirm": {
            "mixtures": {"m": {"norse": 0.2} | dict.fromkeys(FAMILIES[1:], 0.2)},
            "cells": {"small": [800]},
        }
    },
    "the ratio of indic must be above 0": {
        "confirm": {
            "mixtures": {"m": dict.fromkeys(FAMILIES, 0.25) | {"indic": 0}},
            "cells": {"small": [800]},
        }
    },
    "ratios sum to 1.25; they must sum to 1": {
        "confirm": {
            "mixtures": {"m": dict.fromkeys(FAMILIES, 0.25)},
            "cells": {"small": [800]},
        }
    },
    "warmup=1.0": {"warmup": 1.0},
    "flops_per_second=0.0: must be": {"flops_per_second": 0},
    "budget_flops=nan: must be": {"budget_flops": math.nan},
    "first_seed=-1: must be at least 0": {"first_seed": -1},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(words: str) -> None:
    sweep = SWEEP | {"models": {}} if "models is empty" in words else SWEEP
    changes = {} if "models is empty" in words else REFUSED[words]
    with pytest.raises(ValueError) as caught:
        make_sweep(sweep, "file", changes)
    assert words in str(caught.value)
    assert all(line.startswith("file: ") for line in str(caught.value).splitlines())


def test_what_was_typed_is_named_and_not_the_file() -> None:
    for words, changes in {
        "grid.steps=3: Key 'steps' not in 'GridRuns'": {"grid": {"steps": 3}},
        "grid.points=many: Value 'many'": {"grid": {"points": "many"}},
    }.items():
        with pytest.raises(ValueError) as caught:
            make_sweep(SWEEP, "file", changes)
        assert str(caught.value).startswith(words)


def test_nothing_to_run() -> None:
    empty = {"name": "e", "families": FAMILIES, "models": SWEEP["models"]}
    with pytest.raises(ValueError, match="there is nothing to run"):
        make_sweep(empty, "file")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    for text, words in (("a: [", "is not YAML"), ("- a", "must hold the settings")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_sweep(file)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "name: s\nfamilies: [a, b]\nmodels: {m: {base: x, settings: {optimizer: {lr: 4e-3}}}}\n"
        "grid: {cells: {m: [1e9, 5e8]}}\n"
    )
    sweep = read_sweep(file)
    assert sweep.grid.cells == {"m": [1e9, 5e8]}
    assert sweep.models["m"].settings["optimizer"]["lr"] == 4e-3
