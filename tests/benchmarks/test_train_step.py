"""benchmarks.train_step: the arithmetic of its table, and one peer that really runs."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import peer_venvs
from benchmarks.jobs import JOBS
from benchmarks.train_step import PEERS, is_held_up, markdown_table, run_in_turns, summarize

SMALL = JOBS["small"]


def run(cpu_seconds: list[float], wall_seconds: list[float], peak_rss_mb: float = 100.0) -> dict:
    return {
        "version": "1.0",
        "parameters": 7_300_000,
        "wall_seconds": wall_seconds,
        "cpu_seconds": cpu_seconds,
        "waited_seconds": [0.2] * len(wall_seconds),
        "matmul_gflops": [100.0] * len(wall_seconds),
        "losses": [9.0, 8.5],
        "peak_rss_mb": peak_rss_mb,
    }


def test_flops_per_token_by_hand() -> None:
    weights = 4 * (4 * 256 * 256 + 2 * 256 * 1024) + 256 * 8000
    assert SMALL.flops_per_token() == 6 * weights + 12 * 4 * 256 * 256
    assert SMALL.tokens_per_step == 1024


def test_summary_of_two_rounds() -> None:
    peer = [run([0.5, 0.5], [1.0, 2.0]), run([1.0, 1.0], [4.0, 2.0], peak_rss_mb=120.0)]
    plain = [run([0.4, 0.4], [1.0, 1.0]), run([0.9, 0.9], [1.0, 1.0])]
    row = summarize(SMALL, "peer", peer, plain)
    assert row.tokens_per_second == 1024 / 2.0
    assert row.best_tokens_per_second == 1024
    assert row.cpu_seconds_per_step == 0.75
    assert row.ratio_to_plain == pytest.approx((0.8 + 0.9) / 2)  # step by step, then the median
    gflop = SMALL.flops_per_token() * 1024 / 1e9
    assert row.share_of_matmul == pytest.approx(gflop / 2.0 / 100)
    assert row.peak_rss_mb == 120


def test_waiting_for_a_core_is_noticed() -> None:
    row = summarize(SMALL, "peer", [run([0.5], [1.0])], [])
    assert is_held_up(row, SMALL)  # 0.2 s of a step of 1 s
    assert not is_held_up(replace(row, waited_seconds_per_step=0.04), SMALL)


def test_without_the_baseline_there_is_no_ratio() -> None:
    row = summarize(SMALL, "peer", [run([0.5], [1.0])], [])
    assert row.ratio_to_plain is None
    assert "| - |" in markdown_table([replace(row, first_loss=None)])


@pytest.mark.slow
def test_two_processes_take_their_steps_in_turns() -> None:
    results = run_in_turns(
        [PEERS["plain"]] * 2, SMALL, steps=2, warmup=1, venvs=Path("unused"), timeout_seconds=200
    )
    for result in results:
        assert "failed" not in result, result
        assert len(result["waited_seconds"]) == 2
        assert len(result["wall_seconds"]) == len(result["matmul_gflops"]) == 2
        assert result["losses"][-1] < result["losses"][0]
    assert results[0]["losses"] == results[1]["losses"]


@pytest.mark.slow
def test_a_peer_that_dies_is_reported_and_the_other_finishes(tmp_path: Path) -> None:
    broken = replace(PEERS["plain"], module="no_such_peer")
    settings = {"steps": 1, "warmup": 0, "venvs": tmp_path, "timeout_seconds": 200}
    dead, alive = run_in_turns([broken, PEERS["plain"]], SMALL, **settings)
    assert "no_such_peer" in dead["failed"]
    assert len(alive["losses"]) == 1


def test_a_peer_that_hangs_is_reported(tmp_path: Path) -> None:
    (result,) = run_in_turns(
        [PEERS["plain"]], SMALL, steps=1, warmup=0, venvs=tmp_path, timeout_seconds=0.01
    )
    assert "no output, or no result within 0 s" in result["failed"]


def test_failed_installation_leaves_no_stamp(tmp_path: Path) -> None:
    environment = peer_venvs.Environment("broken", ("torch==2.13.0",))
    python = peer_venvs.python_of(environment, tmp_path)
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho no such package\nexit 1\n")  # stands where pip would be
    python.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        peer_venvs.install(environment, tmp_path, timeout_seconds=30)
    assert "no such package" in caught.value.output
    assert not peer_venvs.is_ready(environment, tmp_path)


def test_changed_requirements_are_installed_again(tmp_path: Path) -> None:
    environment = peer_venvs.Environment("peer", ("numpy==1",))
    stamp = tmp_path / "peer" / peer_venvs.STAMP
    stamp.parent.mkdir()
    stamp.write_text(f"{peer_venvs.TORCH}\nnumpy==1\n")
    assert peer_venvs.is_ready(environment, tmp_path)
    assert not peer_venvs.is_ready(replace(environment, requirements=("numpy==2",)), tmp_path)
