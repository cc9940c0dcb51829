"""A sweep for the multilingual scaling law, as a YAML file says it (conf/sweep).

Which models, which token budgets, which ratios of language families: `design.py` makes the list of
runs of it, `launch/sweep.py` runs them. Imports neither torch nor numpy.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

LEAST_RATIOS = 3  # mixtures of a grid: two ratios of a family for γ, one to check it


class Device(Enum):
    """What each process of a run has, and its time is counted in."""

    cpu_core = "cpu_core"
    gpu = "gpu"


@dataclass(kw_only=True)
class SweepModel:
    """A model of the sweep. Its name there is that of the run's files and of the table."""

    base: str  # a file of conf/model
    # settings of its runs as a file of conf/experiment has them: {optimizer: {lr: 4e-3}}
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class GridRuns:
    """Mixtures of all families, chosen from a grid of ratios to tell as much as they can."""

    # model -> token budgets; every mixture is run at each of them
    cells: dict[str, list[float]] = field(default_factory=dict)
    points: int = 20  # mixtures, at most; fewer where budget_flops is tight
    step: float = 0.05  # of the grid of ratios
    floor: float = 0.05  # smallest ratio of a family; above 0
    # log loss is taken as a polynomial of this degree in log ratio: 1 is the law and puts all runs
    # at extremes, 2 has runs in between that would show where the law bends
    degree: int = 2
    seeds: int = 1
    repeated: int = 0  # so many of the mixtures are run with one more seed


@dataclass(kw_only=True)
class SingleFamilyRuns:
    """Runs of one family alone, whose loss is the bracket of the law: E + A/N^α + B/D^β."""

    cells: dict[str, list[float]] = field(default_factory=dict)
    seeds: int = 1


@dataclass(kw_only=True)
class HypothesisRuns:
    """Runs in which a family keeps its ratio while the others share the rest differently.

    One for each pair of families, which both get `ratio`, the others the same share of the rest;
    and one for each family, which gets `ratio`, the others the same. So each family is seen at
    `ratio` beside each other one, and at the rest's smaller ratio beside each pair.
    """

    cells: dict[str, list[float]] = field(default_factory=dict)
    ratio: float = 0.4  # above 0 and below 1/2
    seeds: int = 2


@dataclass(kw_only=True)
class NamedRuns:
    """Runs of mixtures given by name, such as an optimum and what it is compared with."""

    cells: dict[str, list[float]] = field(default_factory=dict)
    mixtures: dict[str, dict[str, float]] = field(default_factory=dict)  # name -> family -> ratio
    seeds: int = 2


@dataclass(kw_only=True)
class SweepConfig:
    """Which runs, of what, at what cost."""

    name: str
    families: list[str]  # every family of the data, as data.families groups it
    models: dict[str, SweepModel]
    # settings of all runs, as a file of conf/experiment has them; those of a model win over them
    settings: dict[str, Any] = field(default_factory=dict)
    grid: GridRuns = field(default_factory=GridRuns)
    single_family: SingleFamilyRuns = field(default_factory=SingleFamilyRuns)
    hypothesis: HypothesisRuns = field(default_factory=HypothesisRuns)
    confirm: NamedRuns = field(default_factory=NamedRuns)
    warmup: float = 0.05  # share of a run's steps in which the learning rate rises
    first_seed: int = 1  # of weights and of the order of data; the others follow it
    budget_flops: float | None = None  # training FLOPs of all runs together; None: no limit
    # whether the runs must be enough to fit the law; false for runs that add to another sweep
    must_determine_law: bool = True
    # What one process really does, for the estimate of time; the peak times the utilisation.
    flops_per_second: float = 1e10
    device: Device = Device.cpu_core  # that a process has: one GPU, or a core for each --threads
    processes_per_run: int = 1  # ranks of a run; its layout must allow so many
    startup_seconds: float = 20.0  # of a run: imports, opening data, pictures at the end
    save_minutes: float = 1.0  # between two checkpoints, by the estimate; finished runs keep none

    def __post_init__(self) -> None:
        problems = [
            *self._families_problems(),
            *self._parts_problems(),
            *self._grid_problems(),
            *self._hypothesis_problems(),
            *self._mixture_problems(),
            *self._number_problems(),
        ]
        if problems:
            raise ValueError("\n".join(problems))

    def parts(self) -> dict[str, GridRuns | SingleFamilyRuns | HypothesisRuns | NamedRuns]:
        """The parts of the sweep by the names they have in its file."""
        return {
            "grid": self.grid,
            "single_family": self.single_family,
            "hypothesis": self.hypothesis,
            "confirm": self.confirm,
        }

    def _families_problems(self) -> list[str]:
        found = []
        if len(self.families) < 2:
            found.append(
                f"families={self.families}: ratios need at least two families; name all that "
                "data.families makes of the languages"
            )
        twice = sorted({name for name in self.families if self.families.count(name) > 1})
        if twice:
            found.append(f"families names {', '.join(twice)} more than once")
        if not self.models:
            found.append("models is empty; name at least one, as in {small: {base: scaling_1m}}")
        bad = [name for name in [*self.models, self.name] if not _is_file_name(name)]
        found += [
            f"{name!r} names files and Hydra's runs; use letters, digits, _ and - only"
            for name in bad
        ]
        return found

    def _parts_problems(self) -> list[str]:
        found = []
        for part, runs in self.parts().items():
            for model, budgets in runs.cells.items():
                if model not in self.models:
                    found.append(
                        f"{part}.cells names the model {model}, which models has not; it has "
                        f"{', '.join(self.models)}"
                    )
                bad = [n for n in budgets if not (math.isfinite(n) and n > 0)]
                if bad or not budgets:
                    found.append(
                        f"{part}.cells.{model}={budgets}: give token budgets above 0, as in [1e9]"
                    )
            if runs.seeds < 1:
                found.append(f"{part}.seeds={runs.seeds}: must be at least 1")
        if not any(runs.cells for runs in self.parts().values()):
            found.append(
                "there is nothing to run: give grid, single_family, hypothesis or confirm its "
                "cells, as in grid: {cells: {small: [1e9]}}"
            )
        return found

    def _grid_problems(self) -> list[str]:
        grid, families = self.grid, len(self.families)
        if not grid.cells or families < 2:
            return []
        found = []
        if not 0 < grid.step < 1:
            found.append(f"grid.step={grid.step}: must lie between 0 and 1, as 0.05")
        if grid.floor <= 0:
            found.append(
                f"grid.floor={grid.floor}: the law has no loss at ratio 0; use 0.05, or leave a "
                "family that shall not be drawn out of families and data.languages"
            )
        elif grid.floor * families > 1 - grid.step:
            found.append(
                f"grid.floor={grid.floor}: {families} families leave nothing to share out in steps "
                f"of grid.step={grid.step}; use {(1 - grid.step) / families / 2:.2g} or less"
            )
        if grid.points < LEAST_RATIOS:
            found.append(
                f"grid.points={grid.points}: a family's exponent needs {LEAST_RATIOS} ratios or "
                f"more; use {LEAST_RATIOS * 3}"
            )
        if grid.degree not in (1, 2):
            found.append(f"grid.degree={grid.degree}: must be 1 (the law) or 2 (with its bend)")
        if not 0 <= grid.repeated <= grid.points:
            found.append(
                f"grid.repeated={grid.repeated}: must lie between 0 and grid.points={grid.points}"
            )
        return found

    def _hypothesis_problems(self) -> list[str]:
        runs, families = self.hypothesis, len(self.families)
        if not runs.cells:
            return []
        if families < 3:
            return [
                f"hypothesis: families={self.families} leaves one way to share the rest; give at "
                "least 3, or leave hypothesis.cells out"
            ]
        if not 0 < runs.ratio < 0.5:
            return [
                f"hypothesis.ratio={runs.ratio}: two families have it at a time, so it must lie "
                "between 0 and 0.5; use 0.4"
            ]
        return []

    def _mixture_problems(self) -> list[str]:
        runs, found = self.confirm, []
        if bool(runs.cells) != bool(runs.mixtures):
            found.append(
                f"confirm.cells={dict(runs.cells)} and confirm.mixtures={list(runs.mixtures)}: "
                "give both or neither"
            )
        for name, ratios in runs.mixtures.items():
            where = f"confirm.mixtures.{name}"
            if not _is_file_name(name):
                found.append(f"{where}: names files; use letters, digits, _ and - only")
            found += _ratio_problems(where, ratios, self.families)
        return found

    def _number_problems(self) -> list[str]:
        found = []
        if not 0 <= self.warmup < 1:
            found.append(f"warmup={self.warmup}: is a share of the steps; use 0.05")
        above_0 = {
            "flops_per_second": self.flops_per_second,
            "save_minutes": self.save_minutes,
            "processes_per_run": self.processes_per_run,
        }
        if self.budget_flops is not None:
            above_0["budget_flops"] = self.budget_flops
        found += [
            f"{name}={value}: must be a finite number above 0"
            for name, value in above_0.items()
            if not (math.isfinite(value) and value > 0)
        ]
        for name in ("first_seed", "startup_seconds"):
            if getattr(self, name) < 0:
                found.append(f"{name}={getattr(self, name)}: must be at least 0")
        return found


def _ratio_problems(where: str, ratios: Mapping[str, float], families: list[str]) -> list[str]:
    unknown, missing = sorted(set(ratios) - set(families)), sorted(set(families) - set(ratios))
    if unknown or missing:
        wrong = [f"{', '.join(unknown)} is none of families"] if unknown else []
        wrong += [f"{', '.join(missing)} is missing"] if missing else []
        return [f"{where}: {'; '.join(wrong)}; it must give the ratio of {', '.join(families)}"]
    found = []
    zero = sorted(name for name, p in ratios.items() if not (math.isfinite(p) and p > 0))
    if zero:
        found.append(
            f"{where}: the ratio of {', '.join(zero)} must be above 0, where the law has a loss; "
            "use 0.01, or leave the family out of families and data.languages"
        )
    elif abs(math.fsum(ratios.values()) - 1) > 1e-6:
        found.append(f"{where}: ratios sum to {math.fsum(ratios.values()):.8g}; they must sum to 1")
    return found


def _is_file_name(name: str) -> bool:
    return bool(name) and all(c.isascii() and (c.isalnum() or c in "_-") for c in name)


def read_sweep(path: Path, changes: Mapping[str, Any] | None = None) -> SweepConfig:
    """The sweep that the YAML file at `path` describes, with `changes` merged over it.

    Raises ValueError naming the file and every broken rule, OSError where it cannot be read.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold the settings of a sweep, as those in conf/sweep do")
    return make_sweep(values, str(path), changes)


def make_sweep(
    values: Mapping[str, Any], where: str, changes: Mapping[str, Any] | None = None
) -> SweepConfig:
    """The sweep of these plain values. Raises ValueError naming `where`."""
    try:
        # the plain values first: OmegaConf cannot merge into a typed dict of dicts that has content
        plain = OmegaConf.merge(_floats(dict(values)), _floats(dict(changes or {})))
        sweep = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepConfig), plain))
    except (OmegaConfBaseException, ValueError) as error:
        lines = str(error).strip().splitlines()
        # OmegaConf's lines below the first repeat it; ours are a problem each
        told = lines if not isinstance(error, OmegaConfBaseException) else lines[:1]
        if isinstance(error, OmegaConfBaseException) and error.full_key:
            told = [f"{error.full_key}: {told[0]}"]
            typed = OmegaConf.select(OmegaConf.create(dict(changes or {})), error.full_key)
            if typed is not None:
                raise ValueError(f"{error.full_key}={typed}: {lines[0]}") from None
        raise ValueError("\n".join(f"{where}: {line}" for line in told)) from None
    assert isinstance(sweep, SweepConfig)
    return sweep


def _floats(value: Any, whole: bool = False) -> Any:
    """YAML 1.1 takes 1e9, without a point, for text; in a sweep it is a number. OmegaConf takes no
    whole number for a float in a list: those of cells and mixtures are made floats (`whole`)."""
    if isinstance(value, dict):
        inside = ("cells", "mixtures")
        return {key: _floats(item, whole or key in inside) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item, whole) for item in value]
    if whole and isinstance(value, int):
        return float(value)
    if isinstance(value, str) and "e" in value and value[:1].isdigit():
        with suppress(ValueError):
            return float(value)
    return value
