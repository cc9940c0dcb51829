"""What a sweep measured: one row for each run and family, as Parquet or CSV.

run             name of the run; its rows differ in family, ratio, loss, eval_tokens, epochs
model           name of the model
num_parameters  without the embedding
tokens          training tokens of the whole mixture
seed
purpose         what the run was for: grid, single_family, hypothesis, confirm, ...
family
ratio           the family's realised share of the tokens; 0: none drawn
loss            validation loss in nats a token; nan where the run failed
eval_tokens     validation tokens behind it
epochs          passes over the family's training text
"""

import csv
import hashlib
import importlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS: dict[str, type] = {
    "run": str,
    "model": str,
    "num_parameters": int,
    "tokens": int,
    "seed": int,
    "purpose": str,
    "family": str,
    "ratio": float,
    "loss": float,
    "eval_tokens": int,
    "epochs": float,
}
OF_RUN = ("model", "num_parameters", "tokens", "seed", "purpose")  # the same in all rows of a run
RATIO_SUM = 0.01  # how far from 1 the ratios of a run may sum
MANY_EPOCHS = 4.0  # beyond so many passes more text is no longer as good as new (2305.16264)


@dataclass(frozen=True)
class RunsTable:
    """Rows in the order they came in; checked for what no fit can work with at all.

    Raises ValueError with all problems: no rows, a run twice in one family, rows of a run that
    disagree about it, sizes not above 0, ratios outside of [0, 1] or that sum to more than 1.
    """

    rows: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("the table of runs has no rows")
        problems = [problem for rows in self._by_run().values() for problem in _problems(rows)]
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def families(self) -> list[str]:
        """In the order of their first rows."""
        return list(dict.fromkeys(row["family"] for row in self.rows))

    @property
    def runs(self) -> list[str]:
        return list(dict.fromkeys(row["run"] for row in self.rows))

    @property
    def wide(self) -> dict[str, dict[str, float]]:
        """run -> ratio of every family, 0 for those it has no row of."""
        return {
            run: {name: 0.0 for name in self.families} | {r["family"]: r["ratio"] for r in rows}
            for run, rows in self._by_run().items()
        }

    def column(self, name: str) -> np.ndarray:
        """All values of a column, in the order of the rows."""
        return np.array([row[name] for row in self.rows])

    def of_family(self, family: str) -> "RunsTable":
        """The rows of one family."""
        return RunsTable(tuple(row for row in self.rows if row["family"] == family))

    def where(self, keep: Iterable[bool]) -> "RunsTable":
        """The rows for which `keep` is true."""
        return RunsTable(tuple(r for r, kept in zip(self.rows, keep, strict=True) if kept))

    def usable(self) -> tuple["RunsTable", list[str]]:
        """The rows a law can be fitted to, and a line for each other one with the reason.

        Left out are losses that are not finite numbers above 0, and ratios of 0, where the law is
        infinite. Raises ValueError where nothing is left.
        """
        reasons = [_unusable(row) for row in self.rows]
        left_out = [
            f"{row['run']}, {row['family']}: {reason}"
            for row, reason in zip(self.rows, reasons, strict=True)
            if reason
        ]
        if all(reasons):
            raise ValueError("no row of the table can be used:\n" + "\n".join(left_out[:10]))
        return self.where(not reason for reason in reasons), left_out

    def remarks(self) -> list[str]:
        """What can be fitted and yet deserves a look: rows of many passes over the same text."""
        return [
            f"{row['run']}, {row['family']}: {row['epochs']:.3g} passes over its text; beyond "
            f"about {MANY_EPOCHS:g} repeated tokens teach less than the law counts them for"
            for row in self.rows
            if row["epochs"] > MANY_EPOCHS
        ]

    def save(self, path: str | Path) -> None:
        """Write Parquet, or CSV where the name ends in .csv; old content or all of the new."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            if path.suffix == ".csv":
                with partial.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(COLUMNS))
                    writer.writeheader()
                    writer.writerows(self.rows)
            else:
                pyarrow = _pyarrow(path)
                values = {name: [row[name] for row in self.rows] for name in COLUMNS}
                pyarrow.parquet.write_table(pyarrow.table(values), partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def checksum(self) -> str:
        """SHA-256 of the values, the same whatever file they stand in."""
        lines = ("\t".join(repr(row[name]) for name in COLUMNS) for row in self.rows)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _by_run(self) -> dict[str, list[dict[str, Any]]]:
        grouped: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            grouped.setdefault(row["run"], []).append(row)
        return grouped


def make_table(rows: Iterable[Mapping[str, Any]]) -> RunsTable:
    """A table of mappings column -> value; further columns are dropped.

    An empty loss is nan. Raises ValueError for missing columns and for values of another kind,
    naming row and column.
    """
    made, problems = [], []
    for number, row in enumerate(rows, 1):
        row = {**row, "loss": math.nan if row.get("loss") in (None, "") else row["loss"]}
        missing = [name for name in COLUMNS if row.get(name) is None]
        if missing:
            problems.append(f"row {number} has no {', '.join(missing)}")
            continue
        try:
            made.append({name: _converted(name, row[name]) for name in COLUMNS})
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        raise ValueError("\n".join(problems[:20]))
    return RunsTable(tuple(made))


def read_runs(path: str | Path) -> RunsTable:
    """Read a table from Parquet, or from CSV where the name ends in .csv.

    Raises FileNotFoundError for none, and ValueError, naming the file, for what is not one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such table of runs")
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                return make_table(csv.DictReader(file))
        return make_table(_pyarrow(path).parquet.read_table(path).to_pylist())
    except ValueError as error:  # pyarrow's are too
        raise ValueError(f"{path}: {error}") from error


def levels(values: Iterable[float], tolerance: float) -> list[float]:
    """The different ones among positive values, ascending; a step of less than (1 + tolerance)
    between neighbours is none: realised ratios and rounded token counts of equal plans."""
    found: list[float] = []
    previous = 0.0
    for value in sorted(values):
        if not found or value > previous * (1 + tolerance):
            found.append(value)
        previous = value
    return found


def _problems(rows: list[dict[str, Any]]) -> list[str]:
    run = rows[0]["run"]
    found = []
    names = [row["family"] for row in rows]
    if len(set(names)) < len(names):
        found.append(f"{run}: a family stands there twice: {', '.join(names)}")
    for name in OF_RUN:
        values = {row[name] for row in rows}
        if len(values) > 1:
            said = ", ".join(sorted(map(str, values)))
            found.append(f"{run}: its rows disagree about {name}: {said}")
    for name in ("num_parameters", "tokens"):
        if not rows[0][name] > 0:
            found.append(f"{run}: {name}={rows[0][name]}: must be above 0")
    ratios = [row["ratio"] for row in rows]
    if not all(0 <= p <= 1 + 1e-9 for p in ratios):
        found.append(f"{run}: ratios {ratios}: each must lie between 0 and 1")
    elif math.fsum(ratios) > 1 + RATIO_SUM:
        found.append(
            f"{run}: its ratios sum to {math.fsum(ratios):.4g}; they are shares of one mixture"
        )
    return found


def _unusable(row: Mapping[str, Any]) -> str:
    if not (math.isfinite(row["loss"]) and row["loss"] > 0):
        return f"loss={row['loss']}: the run failed or diverged"
    if row["ratio"] == 0:
        return (
            "ratio=0: the law is infinite where a family is not drawn. To have such runs count, "
            "draw it at a floor ratio, such as 0.01"
        )
    return ""


def _converted(name: str, value: Any) -> Any:
    try:
        kind = COLUMNS[name]
        converted = kind(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={value!r} is not of kind {COLUMNS[name].__name__}") from None
    if kind is str and not value:
        raise ValueError(f"{name} is empty")
    return converted


def _pyarrow(path: Path) -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        raise ValueError(
            f"{path} is Parquet, which needs pyarrow: pip install pyarrow, or use a .csv file"
        ) from None
