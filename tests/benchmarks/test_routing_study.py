"""benchmarks.routing_study: its arithmetic by hand, what it reads and refuses, and a tiny study."""

import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from benchmarks import routing_study
from benchmarks.routing_study import (
    DENSE,
    SMOE,
    XMOE,
    BrokenRun,
    Run,
    Spread,
    Twin,
    family_agreements,
    load_correlations,
    markdown_table,
    overlaps,
    paired,
    pearson,
    read_run,
    summarize,
    summarize_families,
)
from models.config import ModelConfig

STEPS = 4
LOADS = [[[8, 0, 2], [0, 6, 4]]]  # one layer, two families, three experts
# in each of two layers four families and three experts; the second is the first, renumbered
SHARED = [[[9, 1, 0], [8, 2, 0], [0, 1, 9], [0, 5, 5]]] * 2
RENUMBERED = [[[0, 9, 1], [0, 8, 2], [9, 0, 1], [5, 0, 5]]] * 2


def write_run(
    folder: Path, *, loss: float = 5.0, sparse: bool = True, last_step: int = STEPS
) -> Path:
    """A run's folder as pretrain leaves it, with three evaluations and two tables of loads."""
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "model: {name: hand_made, num_layers: 2, hidden_size: 8, ffn_hidden_size: 16, "
        "num_attention_heads: 2}\n"
    )
    lines = []
    for step in range(0, last_step + 1, 2):
        evaluated = {"eval/loss": loss - step / 10, "eval/family/indic/loss": 1.0 + step}
        if sparse and step:
            lines.append({"step": step, "router/load_max": 1.0 + step, "router/entropy": None})
            evaluated |= {"router/collapse": 7.0, "router/fluctuation": 0.5}
        lines.append({"step": step, **evaluated})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if sparse:
        tables = [{"step": step, "load": LOADS} for step in range(2, last_step + 1, 2)]
        (folder / "router.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tables))
    return folder


def a_run(twin: Twin, seed: int, finals: Mapping[str, float]) -> Run:
    model = ModelConfig(
        name="x", num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2
    )
    curves = {name: ([0, STEPS], [9.0, value]) for name, value in finals.items()}
    return Run(twin.name, seed, model, curves, {STEPS: LOADS} if twin.sparse else {})


# ---------------------------------------------------------------- arithmetic


def test_spread_by_hand() -> None:
    assert Spread.of([1.0, 2.0, 6.0]) == Spread(3.0, math.sqrt(7.0), 3)  # (4 + 1 + 9) / (3 - 1)
    one = Spread.of([math.nan, 2.0])
    assert (one.mean, one.n) == (2.0, 1) and math.isnan(one.deviation)
    assert Spread.of([]).n == 0 and math.isnan(Spread.of([]).mean)


def test_pearson_by_hand() -> None:
    x = np.array([1.0, 2.0, 3.0])
    assert pearson(x, np.array([2.0, 4.0, 9.0])) == pytest.approx(7 / math.sqrt(2 * 26))
    assert pearson(x, -5 * x + 3) == pytest.approx(-1)
    assert math.isnan(pearson(x, np.ones(3)))


def test_overlaps_by_hand() -> None:
    # shares: (0.8, 0.2, 0), (0, 0.5, 0.5), (0.5, 0.5, 0); the third family has no tokens
    families = [[8, 2, 0], [0, 1, 1], [0, 0, 0], [4, 4, 0]]
    np.testing.assert_allclose(overlaps(families), [0.2, 0.7, 0.5])


def test_consistency_over_pairs_of_runs() -> None:
    # loads 17, 9, 14 and 14, 17, 9: deviations (11, -13, 2) / 3 and (2, 11, -13) / 3
    by_hand = (11 * 2 - 13 * 11 - 2 * 13) / (121 + 169 + 4)
    assert load_correlations([SHARED, RENUMBERED]) == [pytest.approx(by_hand)]
    assert family_agreements([SHARED, RENUMBERED]) == [pytest.approx(1.0)]
    assert load_correlations([SHARED] * 3) == [pytest.approx(1.0)] * 3  # three pairs
    mixed_up = [[SHARED[0][i] for i in (2, 0, 3, 1)]] * 2  # loads do not tell who is whose
    assert load_correlations([SHARED, mixed_up]) == [pytest.approx(1.0)]
    assert family_agreements([SHARED, mixed_up])[0] < 0.5
    assert family_agreements([SHARED]) == []


def test_consistency_is_a_mean_over_layers() -> None:
    opposite = [[[1, 3, 2]], [[3, 1, 2]]]
    half_right = [[[1, 3, 2]], [[1, 3, 2]]]
    assert load_correlations([opposite, half_right]) == [pytest.approx(0.0)]  # 1 and -1


def test_differences_are_taken_seed_by_seed() -> None:
    runs = [
        a_run(SMOE, 1, {"eval/loss": 5.0}),
        a_run(SMOE, 2, {"eval/loss": 7.0}),
        a_run(SMOE, 3, {"eval/loss": 1.0}),  # whose twin is missing
        a_run(XMOE, 2, {"eval/loss": 6.5}),
        a_run(XMOE, 1, {"eval/loss": 4.0}),
    ]
    assert paired(runs, "eval/loss", XMOE, SMOE) == [-1.0, -0.5]
    loss = summarize(runs)[0]
    against_dense, against_smoe = loss.differences
    assert (against_smoe.mean, against_smoe.n) == (-0.75, 2)
    assert against_smoe.deviation == pytest.approx(math.sqrt(0.125))
    assert against_dense.n == 0
    assert loss.twins["smoe"].n == 3 and loss.twins["dense"].n == 0


def test_tables() -> None:
    family = "eval/family/indic/loss"
    runs = [
        a_run(DENSE, 1, {"eval/loss": 6.0, family: 4.0}),
        a_run(SMOE, 1, {"eval/loss": 5.0, family: 3.0, "router/entropy": 2.0}),
        a_run(XMOE, 1, {"eval/loss": 5.5, family: 2.0, "router/entropy": 1.5}),
        a_run(XMOE, 2, {"eval/loss": 4.5, family: 2.0, "router/entropy": 1.0}),
    ]
    table = markdown_table("all tokens", summarize(runs)).splitlines()
    assert table[0].startswith(
        "| all tokens | dense | SMoE | X-MoE | SMoE − dense | X-MoE − SMoE |"
    )
    loss = "6.000 (1) | 5.000 (1) | 5.000 ± 0.707 (2) | -1.000 (1) | +0.500 (1) |"
    assert table[2] == f"| validation loss, nats per token | {loss}"
    assert "| routing entropy, nats | - | 2.000 (1) | 1.250 ± 0.354 (2) | - | -0.500 (1) |" in table
    assert table[-2].endswith("| - | - | 1.000 (1) | - | - |")  # one pair of X-MoE runs, alike
    (indic,) = summarize_families(runs)
    assert indic.name == "indic" and indic.twins["dense"].mean == 4.0


# ---------------------------------------------------------------- reading


def test_reads_a_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"), SMOE, 1, STEPS)
    assert run.final("eval/loss") == pytest.approx(4.6)
    assert run.final("router/load_max") == 5.0
    assert math.isnan(run.final("router/entropy"))  # null
    assert math.isnan(run.final("router/balance_loss"))  # missing
    assert run.loads == {2: LOADS, 4: LOADS}
    assert run.model.hidden_size == 8


def test_a_value_of_an_earlier_step_is_not_the_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 2, "router/balance_loss": 1.5}\n')
    assert math.isnan(read_run(folder, SMOE, 1, STEPS).final("router/balance_loss"))


def test_broken_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenRun, match=r"nothing: no metrics\.jsonl"):
        read_run(tmp_path / "nothing", DENSE, 1, STEPS)
    cut_short = write_run(tmp_path / "short", last_step=2)
    with pytest.raises(BrokenRun, match=r"eval/loss ends at step 2 and must reach step 4"):
        read_run(cut_short, SMOE, 1, STEPS)
    dense = write_run(tmp_path / "dense", sparse=False)
    read_run(dense, DENSE, 1, STEPS)
    with pytest.raises(BrokenRun, match="router/load_max is missing"):
        read_run(dense, SMOE, 1, STEPS)
    without_table = write_run(tmp_path / "table")
    (without_table / "router.jsonl").unlink()
    with pytest.raises(BrokenRun, match=r"router\.jsonl has no line of step 4"):
        read_run(without_table, SMOE, 1, STEPS)


# ---------------------------------------------------------------- the command


def study(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> int:
    arguments = ["routing_study", "--seeds", "1", "--steps", "20", "--out", str(out), *words]
    monkeypatch.setattr(sys, "argv", arguments)
    return routing_study.main()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seeds", "0"], "--seeds=0: at least 1"),
        (["--steps", "30"], "--steps=30 must be a multiple of 20"),
        (["--corpus", "no/such/folder"], "--corpus=no/such/folder does not exist"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        study(monkeypatch, tmp_path, *arguments)
    assert expected in capsys.readouterr().err


def test_failing_runs_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher refuses the setting in each of the three runs."""
    assert study(monkeypatch, tmp_path, "model.hidden_size=33") == 1
    said = capsys.readouterr().err
    for twin in ("dense", "smoe", "xmoe"):
        assert f"FAILED {twin} seed 1: exit code 2" in said
    assert "must divide model.hidden_size=33" in said
    # and another setting must not be taken for the same study
    assert study(monkeypatch, tmp_path, "model.hidden_size=32") == 2
    assert "model.hidden_size=32, model.hidden_size=33" in capsys.readouterr().err


@pytest.mark.slow  # three trainings: ten CPU-seconds each, nearly all of it their start
def test_tiny_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    settings = ["data.seq_length=32", "data.languages=[en,de,hi,ru,ta]", "model.hidden_size=32"]
    settings += [f"data.cache_dir={tmp_path / 'cache'}"]
    assert study(monkeypatch, out, *settings) == 0
    written = json.loads((out / "study.json").read_text())
    assert [run["twin"] for run in written["runs"]] == ["dense", "smoe", "xmoe"]
    dense, smoe, xmoe = written["runs"]
    assert dense["last_loads"] is None
    # two steps of 16 sequences of 32 tokens, a choice each, in both sparse layers
    loads = np.asarray(smoe["last_loads"])
    assert loads.shape == (2, 4, 16) and loads.sum((1, 2)).tolist() == [1024, 1024]
    assert 0 <= xmoe["final"]["router/fluctuation"] <= 1
    assert xmoe["final"]["router/balance_loss"] != smoe["final"]["router/balance_loss"]
    assert "| germanic |" in (out / "study.md").read_text()
    assert matplotlib.image.imread(out / "study.png").shape[0] > 500

    # what is missing is run again, and nothing else
    untouched = (out / "xmoe_seed1" / "metrics.jsonl").read_text()
    before = (out / "study.md").read_text()
    shutil.rmtree(out / "smoe_seed1")
    capsys.readouterr()
    assert study(monkeypatch, out, *settings) == 0
    said = capsys.readouterr().err
    assert "dense seed 1: complete already" in said and "smoe seed 1: trained" in said
    assert (out / "xmoe_seed1" / "metrics.jsonl").read_text() == untouched
    assert (out / "study.md").read_text() == before  # to the last digit
