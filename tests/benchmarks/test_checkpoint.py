"""benchmarks.checkpoint: its arithmetic, and all it measures, once."""

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks import checkpoint
from benchmarks.checkpoint import WAYS, model_of, ratios, table, verdict, verdict_on_disk
from models.parameter_count import parameter_count
from tests.distributed import run_on_gloo


def test_ratios_are_taken_round_by_round() -> None:
    seconds = {way: [1.0, 2.0, 4.0] for way in WAYS} | {"stall": [0.5, 0.2, 0.1]}
    assert ratios(seconds)["stall / synchronous"] == 0.1  # of 0.5, 0.1 and 0.025
    text = table(1_000_000, 2, 4_000_000_000, seconds)
    assert "| copy | 2.000 | 2.00 |" in text and "1 M parameters, 2 rank(s), 4.00 GB" in text


@pytest.mark.parametrize(
    ("stall", "copies", "expected"),
    [
        (0.04, 2.0, "below 5%"),
        (0.2, 1.05, "20.0% of a"),
        (0.2, 1.05, "bound by memory"),
        (0.1, 2.0, "not for"),
    ],
)
def test_the_verdict_says_what_the_stall_is_bound_by(
    stall: float, copies: float, expected: str
) -> None:
    assert expected in verdict({"stall / synchronous": stall, "stall / copy": copies})


@pytest.mark.parametrize("millions", [1, 50, 200])
def test_models_have_about_the_size_asked_for(millions: int) -> None:
    assert parameter_count(model_of(millions)).total == pytest.approx(millions * 1e6, rel=0.15)


def measure(folder: Path) -> None:
    sys.argv = ["checkpoint", "--millions", "0.6", "--rounds", "1", "--folder", str(folder)]
    sys.argv += ["--json", str(folder / "result.json")]
    assert checkpoint.main() == 0


def test_every_way_is_measured(tmp_path: Path) -> None:
    run_on_gloo(2, measure, tmp_path)
    (result,) = json.loads((tmp_path / "result.json").read_text())
    assert result["ranks"] == 2 and result["bytes"] > 12 * result["parameters"]
    assert set(result["seconds"]) == set(WAYS)
    assert all(len(values) == 1 and values[0] > 0 for values in result["seconds"].values())
    assert os.listdir(tmp_path) == ["result.json"]


def test_the_verdict_names_what_is_far_from_the_disk() -> None:
    ratio = {"disk write / synchronous": 0.8, "disk read / load": 0.79}
    assert verdict_on_disk(ratio) == [
        "a save has 80% of the disk's rate: at least 80%",
        "a load has 79% of the disk's rate: below 80%",
    ]
