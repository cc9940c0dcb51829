"""benchmarks.data: its job, its arithmetic and tables, and a loader that really runs."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data_job, peer_venvs
from benchmarks.data import (
    OURS,
    PEERS,
    Bench,
    Figures,
    PeerProcess,
    measure_rates,
    measure_resume,
    parse_arguments,
    rate_table,
    start_table,
    targets,
)
from benchmarks.data_job import EOD_ID, LANGUAGES, RATIOS, TOKENS, Copying, language_of, worst_error


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loaders") / "raw"
    data_job.make_raw(folder)
    return folder


def bench(raw: Path, seconds: float = 0.02) -> Bench:
    return Bench(raw.parent, raw.parent, seconds, timeout_seconds=120)


def turn(cpu_us_per_sample: float) -> dict[str, float]:
    return {
        "samples_per_second": 0.5e6 / cpu_us_per_sample,
        "cpu_us_per_sample": cpu_us_per_sample,
        "waited_share": 0.5,
        "share_of_copying": 0.25,
    }


def figures(single: float, batch: float, seconds: float = 0.01) -> Figures:
    start = {"seconds": seconds, "cpu_seconds": 0.01, "memory_mb": 1.0, "disk_mb": 0.0}
    return Figures(
        version="1.0",
        length="endless",
        worst_error=0.9,
        far_errors=[0.5, 0.95],
        singles=[turn(single - 1), turn(single + 9), turn(single)],
        batches=[turn(batch)],
        starts={10**6: start, 10**8: start, 10**10: start},
        resume={"exact": True, "seconds": 0.001, "state_bytes": 15},
    )


def test_the_job_is_what_it_says(raw: Path) -> None:
    assert len(LANGUAGES) == 23
    assert sum(TOKENS) == pytest.approx(18e6, rel=0.02)
    assert TOKENS[0] / TOKENS[-1] == pytest.approx(236, rel=0.01)
    assert RATIOS.sum() == pytest.approx(1)
    assert RATIOS[0] / RATIOS[-1] == pytest.approx(236**0.3, rel=1e-3)
    for language in (0, 22):
        ids, lengths = data_job.raw(raw, language)
        assert len(ids) == lengths.sum() == TOKENS[language]
        assert {language_of(ids[at:]) for at in range(0, len(ids) - 1, 997)} == {language}


def test_a_sample_that_begins_with_the_end_of_a_document() -> None:
    assert language_of(np.array([EOD_ID, 4001, 5])) == 2
    assert language_of(np.array([1999, 4001])) == 0


def test_worst_error_looks_at_every_prefix() -> None:
    share = RATIOS[0]
    assert worst_error(np.zeros(10, int)) == pytest.approx(10 * (1 - share))
    # right at the end, wrong on the way
    count = 1000
    counts = np.round(RATIOS * count).astype(int)
    in_blocks = np.repeat(np.arange(23), counts)
    assert worst_error(in_blocks) == pytest.approx(counts[0] * (1 - share))
    assert worst_error(np.array([22])) == pytest.approx(1 - RATIOS[22])


def test_copying_copies_what_it_says(raw: Path) -> None:
    copying = Copying(raw)
    assert copying.sample().shape == (2049,)
    for batch in (copying.batch(), copying.block()):
        assert batch.shape == (64, 2049)
        assert batch.dtype == np.int64
    # each row from one language
    assert len({*(copying.batch()[0] // 2000).tolist()}) == 1
    assert copying.samples_per_second(0.01) > 0


def test_rates_are_medians_over_the_turns() -> None:
    row = rate_table({OURS: figures(20, 4)}).splitlines()[-1]
    assert row.split(" | ") == [
        "| magnetron", "1.0", "20.0", "25,000 (26,316)", "-", "4.0", "125,000 (125,000)", "0.25",
        "50%", "0.9 |",
    ]  # fmt: skip


def test_start_table_says_what_was_not_run() -> None:
    asked = figures(20, 4)
    asked.length, asked.resume["exact"] = "asked", False
    asked.starts = {10**6: asked.starts[10**6] | {"disk_mb": 34.0, "seconds_from_disk": 0.04}}
    cells = start_table({"megatron-core": asked}).splitlines()[-1].split(" | ")
    assert cells == [
        "| megatron-core", "0.010 (0.010) / 1.0 / 34.0; again 0.040", "not run", "not run",
        "asked", "0.0", "**wrong**", "0.0010", "15 |",
    ]  # fmt: skip


def test_targets_compare_with_the_fastest_that_mixes() -> None:
    found = {
        OURS: figures(20, 9),
        "torchdata": figures(20, 30),
        "litdata": figures(200, 30),
        "datatrove": figures(10, 5),  # has no ratios, so it sets no mark
    }
    assert [target.met for target in targets(found)] == [True] * 7
    assert "(torchdata) 50,000/s" in targets(found)[5].text
    slow = found | {OURS: figures(21, 11, seconds=0.06)}
    slow[OURS].far_errors = [1.1]
    assert [target.met for target in targets(slow)] == [
        False,
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert targets({"torchdata": found["torchdata"]}) == []


@pytest.mark.slow
def test_this_project_runs_mixes_and_resumes(raw: Path) -> None:
    peer, found, failures = PEERS[OURS], Figures(), {}
    run = bench(raw)
    assert run.prepare(peer) > 0
    measure_rates(run, [peer], {OURS: found}, failures, rounds=2)
    assert failures == {}
    assert len(found.singles) == len(found.batches) == len(found.anywhere) == 2
    assert found.worst_error is not None
    assert found.worst_error <= 1
    assert found.far_errors is not None
    assert max(found.far_errors) <= 1
    measure_resume(run, peer, found)
    assert found.resume["exact"]
    start = run.once(peer, "start", "--planned", 10**10)
    assert start["disk_mb"] == 0
    assert start["memory_mb"] < 20


def test_a_peer_that_dies_is_reported_and_the_others_go_on(raw: Path) -> None:
    broken = replace(PEERS["copying"], name="broken", module="no_such_peer")
    found = {"broken": Figures(), "copying": Figures()}
    failures: dict[str, str] = {}
    measure_rates(bench(raw), [broken, PEERS["copying"]], found, failures, rounds=1)
    assert "no_such_peer" in failures["broken"]
    assert len(found["copying"].singles) == 1


def test_a_peer_that_hangs_is_reported() -> None:
    process = PeerProcess([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    try:
        with pytest.raises(RuntimeError, match="no result within 0 s"):
            process.answer()
        with pytest.raises(RuntimeError, match="no result within"):
            process.ask("singles")
    finally:
        process.stop()


def test_an_environment_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    broken = peer_venvs.Environment("broken", ("torch==2.13.0",))
    python = peer_venvs.python_of(broken, tmp_path)
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho no such package\nexit 1\n")  # stands where pip would be
    python.chmod(0o755)
    environments = [peer_venvs.OWN, broken, broken]
    assert peer_venvs.install_all(environments, tmp_path, 30) == {"broken": "pip: no such package"}


def test_no_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--rounds", "0"])
    assert "--rounds=0: at least 1 is needed" in capsys.readouterr().err
