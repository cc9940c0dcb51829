"""Training on a real SLURM: stopped or struck by a dead node, a run ends with the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.schema import load
from launch.slurm import main
from launch.status import main as status_main
from pretrain.events import read_events
from tests.cluster.slurm_lab import SlurmLab, missing
from tests.pretrain.forked_run import ForkedRun
from tests.pretrain.test_exact_resume import SMALL, curves

ROOT = Path(__file__).resolve().parents[2]
STEPS, FIRST_SAVE = 120, 20  # enough to go that a job can be disturbed in time
# tensor parallel over the two nodes: no rank can take a step without the other
WORDS = [*SMALL, "parallel=tp2", f"train.train_steps={STEPS}", "train.mixture_interval=1"]
WORDS += [f"checkpoint.save_interval={FIRST_SAVE}", "checkpoint.keep_last=0"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing() or "SLURM is here"),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    with (
        SlurmLab(nodes=3, cpus_per_node=1, node_timeout=10) as lab,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SLURM_CONF", str(lab.conf))
        yield lab


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], float]:
    """Losses of the same run on two processes of this machine, without SLURM."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = load([*WORDS, f"run_dir={folder}/run"])

    def body() -> None:
        from pretrain.run import run

        run(config)

    with ForkedRun(2, body, environment={}, folder=folder / "logs") as local:
        assert local.wait() == [0, 0], local.output()
    return curves(folder / "run")


def start(lab: SlurmLab, run_dir: Path, *words: str) -> str:
    """Number of a job on two nodes that has begun to train and saved once."""
    assert main([*WORDS, "cluster=lab", "nodes=2", f"run_dir={run_dir}", *words, "--submit"]) == 0
    job = (run_dir / "slurm" / "submitted.jsonl").read_text()
    lab.wait(lambda: (run_dir / "checkpoints" / f"step_{FIRST_SAVE:08d}").is_dir(), 240)
    return str(json.loads(job)["job_id"])


def end(lab: SlurmLab, job: str, run_dir: Path) -> str:
    """The state in which the job ends; what it has written, where it is not as it should be."""
    lab.wait(lambda: lab.job_state(job) in ENDED, 300)
    for log in sorted((run_dir / "logs").iterdir()):
        print(f"==== {log.name}\n{log.read_text()}")
    return lab.job_state(job)


def test_a_job_that_is_stopped_ends_with_the_losses_of_one_that_is_not(
    lab: SlurmLab,
    undisturbed: dict[tuple[int, str], float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    job = start(lab, run_dir)
    lab.run("scancel", "--batch", "--signal=USR1", job)
    assert end(lab, job, run_dir) == "COMPLETED"
    assert lab.job(job)["Restarts"] == "1"
    assert curves(run_dir) == undisturbed
    capsys.readouterr()
    assert status_main([str(run_dir), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["state"], report["step"], report["restarts"]) == ("finished", STEPS, 1)
    assert [seen["state"] for seen in report["jobs"]] == ["COMPLETED"]
    stops = [event for event in read_events(run_dir) if "USR1" in event["text"]]
    assert stops


def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(
    lab: SlurmLab, undisturbed: dict[tuple[int, str], float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = start(lab, run_dir)
    _, second = lab.run("scontrol", "show", "hostnames", lab.job(job)["NodeList"]).split()
    lab.kill_node(second)
    assert end(lab, job, run_dir) == "COMPLETED"
    assert lab.job(job)["Restarts"] == "1"
    assert second not in lab.run("scontrol", "show", "hostnames", lab.job(job)["NodeList"]).split()
    assert curves(run_dir) == undisturbed


def test_preempted_and_requeued_a_job_ends_with_the_losses_of_one_left_alone(
    undisturbed: dict[tuple[int, str], float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with SlurmLab(cpus_per_node=1, grace_time=60) as lab, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(lab.conf))
        job = start(lab, run_dir)
        words = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
        urgent = lab.run("sbatch", "--parsable", *words, "--wrap=sleep 1")
        assert end(lab, urgent, run_dir) == "COMPLETED"
        assert end(lab, job, run_dir) == "COMPLETED"
        assert lab.job(job)["Restarts"] == "1"
    assert curves(run_dir) == undisturbed
    (stop,) = [event for event in read_events(run_dir) if event["kind"] == "stop"]
    (resumed,) = [event for event in read_events(run_dir) if event["kind"] == "resume"]
    assert resumed["step"] == stop["step"]  # what it had when it was told, and not one step less
    print(f"training again {resumed['time'] - stop['time']:.1f} s after the stop")


def test_preempted_without_a_grace_time_a_job_goes_on_from_its_last_checkpoint(
    undisturbed: dict[tuple[int, str], float], tmp_path: Path
) -> None:
    """SLURM requeues it at once; whether there is time to save is for the machine to say."""
    run_dir = tmp_path / "run"
    with (
        SlurmLab(cpus_per_node=1, grace_time=0, kill_wait=0) as lab,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SLURM_CONF", str(lab.conf))
        job = start(lab, run_dir)
        words = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
        urgent = lab.run("sbatch", "--parsable", *words, "--wrap=sleep 1")
        assert end(lab, urgent, run_dir) == "COMPLETED"
        assert end(lab, job, run_dir) == "COMPLETED"
        assert lab.job(job)["Restarts"] == "1"
    assert curves(run_dir) == undisturbed
    (resumed,) = [event for event in read_events(run_dir) if event["kind"] == "resume"]
    log = (run_dir / "logs" / f"slurm-{job}.log").read_text()
    assert f"start 1: 2 nodes (n[1-2]), 127.0.0.1:20001; from {run_dir}/checkpoints/" in log
    assert f"/step_{resumed['step']:08d}\n" in log


def test_restarts_within_a_job(lab: SlurmLab, tmp_path: Path) -> None:
    """torchrun's own, after a process was killed: SLURM does not notice."""
    run_dir = tmp_path / "run"
    job = start(lab, run_dir, "cluster.max_restarts=1")
    lab.kill_worker(lab.run("squeue", "--noheader", f"--jobs={job}", "--format=%B"))
    assert end(lab, job, run_dir) == "COMPLETED"
    assert lab.job(job)["Restarts"] == "0"
    resumed = [event for event in read_events(run_dir) if event["kind"] == "resume"]
    assert len(resumed) == 1


def test_a_sweep_of_jobs(lab: SlurmLab, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install '.[slurm]'")
    sweep = ["--multirun", "hydra/launcher=submitit_slurm", f"hydra.sweep.dir={tmp_path}/sweep"]
    sweep += ["hydra.launcher.nodes=2", "hydra.launcher.timeout_min=20"]
    words = [*SMALL, "parallel=tp2", "train.train_steps=3", f"run_dir={tmp_path}/run"]

    def launch(rates: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *sweep, *words, *more]
        return subprocess.run(
            [*command, f"optimizer.lr={rates}"],
            cwd=tmp_path,
            env=lab.environment | {"GLOO_SOCKET_IFNAME": "lo"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    ended = launch("1e-3,2e-3")
    assert ended.returncode == 0, ended.stderr
    statuses = [json.loads(path.read_text()) for path in tmp_path.glob("run/*/status.json")]
    assert [(status["state"], status["world_size"]) for status in statuses] == [("finished", 2)] * 2
    refused = launch("-1")
    assert refused.returncode == 2
    assert "error: optimizer.lr=-1.0 must be a finite number above 0" in refused.stderr
    assert "Traceback" not in refused.stderr
    impossible = launch("1e-3", "data.corpus=nowhere")  # seen by the run itself
    assert impossible.returncode != 0
    assert "data.corpus=nowhere: no such" in impossible.stderr
