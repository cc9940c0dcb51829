"""A sweep for the scaling law as an array of jobs on a real SLURM, disturbed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from data.scaling_law.runs_table import read_runs
from launch import sweep
from launch.sweep_collect import collect
from launch.sweep_folder import BEGUN, DONE, FAILED, SweepFolder
from launch.sweep_slurm import SlurmJobs, queued
from pretrain.run_status import read_status
from tests.cluster.slurm_lab import SlurmLab, missing
from tests.launch.test_sweep import DESIGN, STAND_IN, make, make_by_command

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = Path(__file__).with_name("stand_in_launcher.py")
STEPS = 600  # enough to go that a job can be disturbed after its first checkpoint
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "SLURM is here")


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmLab]:
    with SlurmLab(nodes=3, cpus_per_node=1, node_timeout=10) as lab:
        monkeypatch.setenv("SLURM_CONF", str(lab.conf))
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        yield lab


def test_stand_ins_requeued_failed_and_cancelled(
    lab: SlurmLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.sweep_slurm.LAUNCHER_SECONDS", 0.5)
    folder = make(tmp_path, confirm={"cells": {"n1": [3 * 64]}})
    requeued, failing, cancelled = names = list(folder.by_name)
    (folder.path / "hold").touch()  # the others do not take their last step
    (folder.path / "fail").write_text(failing)

    def disturb() -> None:
        for name in (requeued, cancelled):
            lab.wait((folder.run_dir(name) / "checkpoints" / "step").is_file, 60)
        jobs = queued(folder)
        lab.run("scancel", jobs[cancelled])
        lab.run("scontrol", "requeue", jobs[requeued])
        lab.wait(lambda: lab.job(jobs[requeued])["JobState"] == "PENDING", 60)
        (folder.path / "hold").unlink()

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    said: list[str] = []
    command = [sys.executable, str(LAUNCHER), str(STAND_IN), str(folder.path), *names]
    assert not SlurmJobs(folder, look_seconds=0.2, say=said.append).run(names, command)
    disturbing.join()
    assert list(folder.states().values()) == [DONE, FAILED, BEGUN]
    assert f"{failing}: FAILED: error: as asked" in said and f"{requeued}: finished" in said
    assert any(line.startswith(f"{cancelled}: stopped or killed (job ") for line in said)
    assert (folder.path / "started").read_text().count(requeued) == 2
    assert not (folder.run_dir(requeued) / "checkpoints").exists()
    assert collect(folder)[1] == [f"{failing}: error: as asked", f"{cancelled}: begun"]


def a_sweep(folder: Path) -> SweepFolder:
    """Three runs that save every few steps."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install '.[slurm]'")
    confirm = DESIGN["confirm"] | {"cells": {"n1": [64 * STEPS]}}
    return make_by_command(folder, confirm=confirm, save_minutes=1e-3)


def start(folder: SweepFolder, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.sweep", "run", str(folder.path), "--slurm"]
    return subprocess.Popen(
        [*command, *more], cwd=ROOT, env=os.environ.copy(), stdout=subprocess.PIPE, text=True
    )


def has_saved(folder: SweepFolder, name: str) -> Callable[[], object]:
    return lambda: list((folder.run_dir(name) / "checkpoints").glob("step_????????"))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # eight trainings, half a minute of CPU each
def test_jobs_requeued_late_and_killed_end_as_runs_left_alone(
    lab: SlurmLab, tmp_path: Path
) -> None:
    folder = a_sweep(tmp_path)
    requeued, late, killed = folder.by_name
    waiting = start(folder, "hydra.launcher.timeout_min=20")
    lab.wait(lambda: len(queued(folder)) == 3, 120)
    jobs = queued(folder)
    assert {job.partition("_")[2] for job in jobs.values()} == {"0", "1", "2"}  # of one array
    waiting.send_signal(signal.SIGINT)
    told, _ = waiting.communicate(timeout=120)
    assert (
        waiting.returncode == 1 and f"the jobs go on. To end them: scancel {jobs[requeued]}" in told
    )

    waiting = start(folder)  # for the jobs that there are
    assert waiting.stdout is not None  # it has looked before they are disturbed
    assert "3 runs are in SLURM's queue already" in waiting.stdout.readline()
    lab.wait(has_saved(folder, requeued), 240)
    lab.run("scontrol", "requeue", jobs[requeued])
    lab.wait(has_saved(folder, late), 240)
    lab.run("scancel", "--signal=USR2", jobs[late])  # as submitit has SLURM do before time is up
    lab.wait(has_saved(folder, killed), 240)
    kill(folder, killed)
    told, _ = waiting.communicate(timeout=600)
    assert waiting.returncode == 1, told
    assert "submitting" not in told
    assert list(folder.states().values()) == [DONE, BEGUN, BEGUN], told
    for name in (late, killed):
        assert f"{name}: stopped or killed (job {jobs[name]})" in told
    assert "1 of 3 runs finished" in told and "to go on: the same command again" in told
    assert lab.job(jobs[requeued])["Restarts"] == "1"

    again = start(folder)
    told, _ = again.communicate(timeout=600)
    assert again.returncode == 0 and "submitting 2 runs" in told and "3 of 3 runs" in told, told
    assert not queued(folder) and not list(folder.path.glob("runs/*/checkpoints"))
    assert sweep.main(["collect", str(folder.path)]) == 0

    alone = a_sweep(tmp_path / "alone")
    assert sweep.main(["run", str(alone.path)]) == 0
    assert sweep.main(["collect", str(alone.path)]) == 0
    assert read_runs(folder.table).rows == read_runs(alone.table).rows


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_that_fail_and_a_job_that_its_launcher_waits_for_in_vain(
    lab: SlurmLab,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launch.sweep_slurm.LAUNCHER_SECONDS", 20.0)
    folder = a_sweep(tmp_path)
    refused, failing, killed = folder.by_name
    change(folder, refused, "optimizer", {"lr": -1})  # seen before the run starts
    change(folder, failing, "data", {"corpus": "nowhere"})  # by the run itself
    change(folder, killed, "train", {"train_steps": 100_000})
    stop = threading.Thread(target=kill_once_saved, args=(lab, folder, killed))
    stop.start()
    assert sweep.main(["run", str(folder.path), "--slurm"]) == 1
    stop.join()
    assert list(folder.states().values()) == [FAILED, FAILED, BEGUN]
    told = capsys.readouterr().out
    assert f"{refused}: FAILED: " in told and "optimizer.lr=-1.0 must be a finite" in told
    assert f"{failing}: FAILED: " in told and "data.corpus=nowhere: no such" in told
    assert f"{killed}: stopped or killed" in told and "0 of 3 runs finished" in told
    assert sweep.main(["run", str(folder.path), "--slurm", "--multirun", "--retry"]) == 0
    assert f"+run={refused},{failing},{killed}" in capsys.readouterr().out
    assert sweep.main(["run", str(folder.path), "--slurm", "hydra.launcher.partition=none"]) == 1
    told = capsys.readouterr().out
    assert f"1 runs were not submitted: {folder.path}/slurm.log says why" in told
    assert "invalid partition" in (folder.path / "slurm.log").read_text()


def change(folder: SweepFolder, name: str, section: str, values: dict[str, object]) -> None:
    path = folder.conf / "run" / f"{name}.yaml"
    content = yaml.safe_load(path.read_text())
    content[section] = content.get(section, {}) | values
    path.write_text("# @package _global_\n" + yaml.safe_dump(content, sort_keys=False))


def kill_once_saved(lab: SlurmLab, folder: SweepFolder, name: str) -> None:
    lab.wait(has_saved(folder, name), 240)
    kill(folder, name)


def kill(folder: SweepFolder, name: str) -> None:
    """As the kernel does where there is no memory left: the job fails without a word."""
    status = read_status(folder.run_dir(name))
    assert status is not None
    os.kill(status["pid"], signal.SIGKILL)
