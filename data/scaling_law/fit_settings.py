"""How the law is fitted, and which rows of the table that takes."""

import math
from dataclasses import dataclass, field

import numpy as np

from data.scaling_law.huber_fit import PARAMETERS, Rows
from data.scaling_law.identify import UnderdeterminedError
from data.scaling_law.law import TERMS
from data.scaling_law.runs_table import RunsTable


@dataclass(kw_only=True)
class FitSettings:
    """How the law is fitted. Raises ValueError with all broken rules."""

    # Residuals of ln L beyond this count linearly. Seeds of small runs scatter by about 0.005:
    # within it least squares is the better estimate. Chinchilla's 0.001 (arXiv 2203.15556 section
    # 3.3) lies below that scatter, and amounts to least absolute deviations
    huber_delta: float = 0.01
    # parameters that are set for all families: E to nats a token, A or B to 0 (no such term),
    # exponents to numbers. E=0 is a law without a floor
    fixed: dict[str, float] = field(default_factory=dict)
    bootstrap: int = 200  # refits to resampled runs; 0: none, and intervals hold only the scatter
    folds: int = 5  # parts of the runs that are left out in turn; 0: no held-out error
    families: list[str] = field(default_factory=list)  # empty: all of the table
    # runs for these purposes are left out: they are there to check predictions
    without_purposes: list[str] = field(default_factory=lambda: ["confirm"])
    seed: int = 0  # of resamples and folds

    def __post_init__(self) -> None:
        found = []
        if not (math.isfinite(self.huber_delta) and self.huber_delta > 0):
            found.append(f"huber_delta={self.huber_delta}: must be above 0, such as 0.01")
        for name, value in self.fixed.items():
            if name not in PARAMETERS:
                found.append(f"fixed: {name} is none of {', '.join(PARAMETERS)}")
            elif not (math.isfinite(value) and value >= 0):
                found.append(f"fixed: {name}={value}: must be a number of at least 0")
            elif name in ("A", "B") and value:
                found.append(f"fixed: {name}={value}: can only be 0, which takes its term out")
        if {name: self.fixed.get(name) for name in TERMS} == dict.fromkeys(TERMS, 0):
            found.append("fixed: E=0, A=0, B=0 leave no loss; let one of them free")
        for name, least in (("bootstrap", 0), ("folds", 0), ("seed", 0)):
            if getattr(self, name) < least:
                found.append(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.folds == 1:
            found.append("folds=1: leaving all runs out at once tells nothing; 0 or at least 2")
        if found:
            raise ValueError("\n".join(found))


def select_rows(table: RunsTable, settings: FitSettings) -> tuple[RunsTable, list[str]]:
    """The rows to fit, and a line for each other row or purpose."""
    unknown = sorted(set(settings.families) - set(table.families))
    if unknown:
        raise ValueError(
            f"families: the table has none of {', '.join(unknown)}; it has "
            f"{', '.join(table.families)}"
        )
    kept = np.ones(len(table.rows), dtype=bool)
    if settings.families:
        kept &= np.isin(table.column("family"), settings.families)
    checks = np.isin(table.column("purpose"), settings.without_purposes)
    lines = [
        f"{run}: its purpose is one of {', '.join(settings.without_purposes)}"
        for run in dict.fromkeys(table.column("run")[kept & checks])
    ]
    if not (kept & ~checks).any():
        raise ValueError(
            f"all runs are for {', '.join(settings.without_purposes)}, which "
            "without_purposes leaves out"
        )
    selected = table.where(kept & ~checks)
    usable, unusable = selected.usable()
    gone = [name for name in selected.families if name not in usable.families]
    if gone:
        raise UnderdeterminedError(
            [
                f"{name}: no run has a loss of it at a ratio above 0; leave it out (families=...) "
                "or draw it"
                for name in gone
            ],
            None,
        )
    return usable, lines + unusable


def rows_of_family(table: RunsTable, family: str) -> Rows:
    """One family of a usable table as the arrays the regression works on."""
    place = {run: number for number, run in enumerate(table.runs)}
    part = table.of_family(family)
    log_n, log_d = np.log(part.column("num_parameters")), np.log(part.column("tokens"))
    return Rows(
        log_n=log_n - log_n.mean(),
        log_d=log_d - log_d.mean(),
        log_p=np.minimum(np.log(part.column("ratio")), 0.0),
        log_loss=np.log(part.column("loss")),
        run=np.array([place[run] for run in part.column("run")]),
        log_n0=float(log_n.mean()),
        log_d0=float(log_d.mean()),
    )
