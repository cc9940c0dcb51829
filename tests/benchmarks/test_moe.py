"""benchmarks.moe: the arithmetic of its tables, and the layers it compares, once each."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import moe
from benchmarks.moe import OURS, PEERS, PRODUCTS, ROUTING, Size, markdown_table, summarize
from tests.distributed import run_on_gloo

TINY = Size(tokens=64, topk=2, hidden_size=16, ffn_hidden_size=32, num_experts=4)


def test_summary_is_taken_round_by_round() -> None:
    seconds = {OURS: [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 6.0], PRODUCTS: [0.5, 1.5, 2.0]}
    rows = {row.name: row for row in summarize(seconds, dict.fromkeys(seconds, 7.0))}
    assert rows["peer"].seconds == 4.0
    assert rows["peer"].ratio == 2.0  # of 3, 2 and 1.5
    assert rows["peer"].share_of_products == pytest.approx(1 / 3)  # of 1/6, 3/8 and 1/3
    assert rows[OURS].ratio == 1.0
    assert "| peer | 4.0000 | 2.00 | 62500.0 | 0.33 | 7 |" in markdown_table(TINY, [rows["peer"]])


def test_flop_by_hand() -> None:
    # two products forward, four backward, of 2 T h f each
    assert TINY.gflop == 6 * 2 * 128 * 16 * 32 / 1e9


def compare(folder: Path) -> None:
    torch.distributed.destroy_process_group()  # the benchmark brings its own
    sys.argv = ["moe", "--tokens", "64", "--topk", "1", "2", "--hidden-size", "16"]
    sys.argv += ["--ffn-hidden-size", "32", "--num-experts", "4", "--rounds", "2"]
    sys.argv += ["--json", str(folder / "moe.json")]
    assert moe.main() == 0


def test_all_layers_take_their_steps(tmp_path: Path) -> None:
    run_on_gloo(1, compare, tmp_path)
    written = json.loads((tmp_path / "moe.json").read_text())
    assert [result["size"]["topk"] for result in written["results"]] == [1, 2]
    names = {OURS, *PEERS, ROUTING, PRODUCTS}
    for result in written["results"]:
        assert {row["name"] for row in result["rows"]} == names
        for row in result["rows"]:
            assert row["seconds"] > 0 and not math.isnan(row["peak_mb"])
        assert all(len(seconds) == 2 for seconds in result["seconds"].values())
    assert (tmp_path / "moe.md").read_text().count("| torchscale-xmoe |") == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--rounds", "0"], "--rounds=0"), (["--tokens", "100"], "--tokens=100 must be a multiple")],
)
def test_wrong_arguments(
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["moe", *arguments])
    with pytest.raises(SystemExit):
        moe.main()
    assert expected in capsys.readouterr().err
