"""data.scaling_law.runs_table: files in and out, and what a table must not hold."""

import csv
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.scaling_law.runs_table import COLUMNS, levels, make_table, read_runs
from tests.data.scaling_law.synthetic import row


@pytest.mark.parametrize("name", ["runs.parquet", "runs.csv"])
def test_a_saved_table_is_the_same_when_read(tmp_path: Path, name: str) -> None:
    table = make_table(
        [
            row(family="a", ratio=1 / 3, loss=3.1),
            row(family="b", ratio=2 / 3, loss=math.nan),
            row(run="s", family="a", ratio=1.0, loss=2.5, purpose="single_family", seed=2),
        ]
    )
    table.save(tmp_path / "new" / name)
    again = read_runs(tmp_path / "new" / name)
    assert again.checksum() == table.checksum()
    assert [item.name for item in (tmp_path / "new").iterdir()] == [name]
    assert again.families == ["a", "b"] and again.runs == ["r", "s"]
    assert again.wide == {"r": {"a": 1 / 3, "b": 2 / 3}, "s": {"a": 1.0, "b": 0.0}}
    assert make_table([row(loss=2.0)]).checksum() != make_table([row(loss=3.0)]).checksum()


def test_tables_written_by_others(tmp_path: Path) -> None:
    """Counts as floats, an empty cell for a loss that is not there, columns of their own."""
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "note"])
        writer.writeheader()
        writer.writerow(row(num_parameters="1e6", tokens="3e7", loss="") | {"note": "x"})
    table = read_runs(path)
    assert table.rows[0]["num_parameters"] == 1_000_000
    assert math.isnan(table.rows[0]["loss"])
    assert "note" not in table.rows[0]


def test_what_cannot_be_fitted_is_left_out_and_named() -> None:
    table = make_table(
        [
            row(family="a", ratio=0.5, epochs=9.0),
            row(family="b", ratio=0.5, loss=math.nan),
            row(run="s", family="a", ratio=1.0, loss=math.inf),
            row(run="s", family="b", ratio=0.0, loss=9.0),
        ]
    )
    usable, left_out = table.usable()
    assert [(r["run"], r["family"]) for r in usable.rows] == [("r", "a")]
    assert left_out[:2] == [
        "r, b: loss=nan: the run failed or diverged",
        "s, a: loss=inf: the run failed or diverged",
    ]
    assert left_out[2].startswith("s, b: ratio=0: the law is infinite")
    assert "floor ratio" in left_out[2]
    assert len(usable.remarks()) == 1 and "r, a: 9 passes" in usable.remarks()[0]
    with pytest.raises(ValueError, match="no row of the table can be used:\nr, b: loss=nan"):
        make_table([row(family="b", loss=math.nan)]).usable()


def test_levels() -> None:
    assert levels([0.4, 0.2, 0.2001, 0.1999], 0.05) == [0.1999, 0.4]
    assert levels(np.array([3e7, 1e7]), 0.02) == [1e7, 3e7]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([row(), row(ratio=0.1)], "r: a family stands there twice"),
        ([row(), row(family="b", seed=2)], "r: its rows disagree about seed: 1, 2"),
        ([row(tokens=0)], "r: tokens=0: must be above 0"),
        ([row(ratio=-0.1)], r"r: ratios \[-0.1\]: each must lie between 0 and 1"),
        ([row(ratio=math.nan)], r"r: ratios \[nan\]: each must lie between 0 and 1"),
        ([row(ratio=0.8), row(family="b", ratio=0.8)], "r: its ratios sum to 1.6"),
        ([row(ratio="much")], "row 1: ratio='much' is not of kind float"),
        ([row(seed=math.inf)], "row 1: seed=inf is not of kind int"),
        ([row(family="")], "row 1: family is empty"),
        ([{"run": "r"}], "row 1 has no model, num_parameters, tokens"),
    ],
)
def test_tables_without_meaning(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_table(rows)


def test_all_problems_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)r: tokens=0.*s: tokens=-1"):
        make_table([row(tokens=0), row(run="s", tokens=-1)])


def test_files_that_are_no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no such table of runs"):
        read_runs(tmp_path / "runs.parquet")
    path = tmp_path / "runs.parquet"
    path.write_text("run,family\n")
    with pytest.raises(ValueError, match=r"runs.parquet: "):
        read_runs(path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: .* or use a .csv file"):
        read_runs(path)
