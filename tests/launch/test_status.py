import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import launch.status
from launch.status import (
    SILENT_SECONDS,
    TAIL_BYTES,
    ask_slurm,
    job_numbers,
    last_training_record,
    main,
)
from pretrain import run_lock
from pretrain.events import Events
from pretrain.metrics_file import MetricsFile
from pretrain.run_lock import RunLock
from pretrain.run_status import RunStatus
from tests.disks import fill, small_disk

ROOT = Path(__file__).resolve().parents[2]


def run_folder(folder: Path, steps: int = 40) -> Path:
    """What a run leaves in its folder that is at step `steps` of 100."""
    with RunLock(folder) as lock:
        status = RunStatus(folder, lock)
        status.starting(step=0, train_steps=100, world_size=8)
        metrics = MetricsFile(folder)
        metrics.log(0, {"eval/loss": 9.0})
        for step in range(1, steps + 1):
            rates = {"throughput/step_seconds": 0.5, "throughput/tokens_per_second": 2048.0}
            metrics.log(step, {"train/loss": 5.0 - step / 100, **rates})
        metrics.log(steps, {"eval/loss": 4.0})
        metrics.close()
        for step in (20, 40):
            (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        (folder / "checkpoints" / "step_00000060.partial").mkdir()
        events = Events(folder, enabled=True)
        events.write("resume", 20, "goes on from step_00000020")
        for step in range(25, 30):
            events.write("spike", step, f"loss {step}")
        status.running(steps)
        status.heartbeat()
    return folder


def status_of(path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main([str(path), "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert isinstance(reports, list)
    return reports


def change_status(folder: Path, **values: object) -> None:
    path = folder / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "a")
    (report,) = status_of(folder, capsys)
    assert (report["state"], report["step"], report["train_steps"]) == ("running", 40, 100)
    assert (report["loss"], report["tokens_per_second"]) == (4.6, 2048.0)
    assert report["remaining_seconds"] == 30.0  # 60 steps of half a second
    assert 0 <= report["heartbeat_age_seconds"] < 30
    assert [checkpoint["step"] for checkpoint in report["checkpoints"]] == [20, 40]
    assert report["restarts"] == 1
    assert [event["step"] for event in report["events"]] == [25, 26, 27, 28, 29]
    assert main([str(folder)]) == 0
    told = capsys.readouterr().out
    for words in (
        "running",
        "40 of 100 (40.0 %), loss 4.6000, 2,048 tokens/s, 0:30 left",
        "step_00000040",
        "2 kept",
        "spike at step 29",
    ):
        assert words in told


def test_a_run_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "a")
    change_status(folder, heartbeat=time.time() - SILENT_SECONDS - 1)
    (report,) = status_of(folder, capsys)
    assert report["state"] == "lost" and "killed while running" in report["reason"]
    assert report["remaining_seconds"] is None
    change_status(folder, state="stopped", reason="SIGUSR1")  # which may be as old as it likes
    (report,) = status_of(folder, capsys)
    assert (report["state"], report["reason"]) == ("stopped", "SIGUSR1")


def test_a_run_whose_disk_is_full_is_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(launch.status, "SILENT_SECONDS", 0.5)
    with small_disk(tmp_path / "disk", "64k") as disk, RunLock(disk / "a") as lock:
        status = RunStatus(disk / "a", lock)
        status.starting(step=0, train_steps=100, world_size=1)
        status.running(40)
        fill(disk)
        time.sleep(0.8)
        (report,) = status_of(disk / "a", capsys)
        assert report["state"] == "running" and report["heartbeat_age_seconds"] < 0.5
        assert "could not write status.json for 0:01: is the disk full?" in report["reason"]
        (disk / "filler").unlink()
        time.sleep(0.3)
        (report,) = status_of(disk / "a", capsys)
        assert (report["state"], report["reason"]) == ("running", "")


def test_a_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path / "runs" / "one")
    run_folder(tmp_path / "runs" / "sweep" / "lr=1", steps=3)
    (tmp_path / "runs" / "cache").mkdir()
    (tmp_path / "runs" / "waiting" / "slurm").mkdir(parents=True)
    submitted = tmp_path / "runs" / "waiting" / "slurm" / "submitted.jsonl"
    submitted.write_text('{"time": 1, "job_id": "4711"}\n')
    assert main([str(tmp_path / "runs")]) == 0
    one, sweep, waiting = capsys.readouterr().out.splitlines()
    assert one.split()[1:5] == ["running", "40", "of", "100"]
    assert "lr=1" in sweep and "3 of 100" in sweep
    assert "waiting" in waiting and "no status" in waiting


def test_damaged_files_hide_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "train/lo')
    (folder / "status.json").write_text("{")
    (folder / "slurm").mkdir()
    (folder / "slurm" / "submitted.jsonl").write_text('{"time": 1, "job_id": "7"}\n{"time": 2, "jo')
    (report,) = status_of(folder, capsys)
    assert (report["state"], report["step"], report["loss"]) == ("no status", 40, 4.6)
    assert job_numbers(folder) == ["7"]


def test_lines_of_squeue_that_are_not_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'Welcome to n1'\necho '7|RUNNING|n1|None|10:00'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_slurm(["7"])["7"]["state"] == "RUNNING"
    squeue.write_bytes(b"\x7fELF")
    assert ask_slurm(["7"]) == {}


def test_only_the_end_of_long_metrics_is_read(tmp_path: Path) -> None:
    line = json.dumps({"step": 1, "train/loss": 1.0}) + "\n"
    last = json.dumps({"step": 2, "train/loss": 0.5}) + "\n"
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((line * (2 * TAIL_BYTES // len(line))).encode() + last.encode())
    assert last_training_record(tmp_path) == {"step": 2, "train/loss": 0.5}


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path / "none")]) == 2
    assert "there is no run here or below" in capsys.readouterr().err


def test_it_is_quick_and_light(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a")
    command = [sys.executable, "-X", "importtime", "-m", "launch.status", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert not imported & {"torch", "megatron", "numpy", "wandb", "hydra", "omegaconf"}
