"""launch.slurm and its batch script on a real SLURM, with several nodes on this machine."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.slurm import main
from launch.status import main as status_main
from tests.cluster.slurm_lab import GPUS, SlurmLab, missing

ROOT = Path(__file__).resolve().parents[2]
TINY = ["+model=magneto_tiny", "cluster=lab", "nodes=2"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "SLURM is here")


@dataclass
class Run:
    """A run folder, and the jobs that work on it."""

    lab: SlurmLab
    folder: Path

    def submit(self, *words: str) -> list[str]:
        """Job numbers, oldest first."""
        assert main([*TINY, f"run_dir={self.folder}", *words, "--submit"]) == 0
        lines = (self.folder / "slurm" / "submitted.jsonl").read_text().splitlines()
        return [json.loads(line)["job_id"] for line in lines]

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            path = self.folder / "status.json"
            return path.exists() and json.loads(path.read_text())["step"] >= step

        self.lab.wait(reached, 120)

    def wait_for_end(self, job: str) -> str:
        """The state in which the job ends."""
        self.lab.wait(lambda: self.lab.job_state(job) in ENDED, 150)
        return self.lab.job_state(job)

    def log(self, job: str) -> str:
        return (self.folder / "logs" / f"slurm-{job}.log").read_text()

    def steps(self) -> dict[str, list[int]]:
        """Steps the stand-in took, by how often SLURM had requeued the job before."""
        starts: dict[str, list[int]] = {}
        for line in (self.folder / "steps").read_text().splitlines():
            step, start = line.split()
            starts.setdefault(start, []).append(int(step))
        return starts


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def lab(environment: pytest.MonkeyPatch) -> Iterator[SlurmLab]:
    with SlurmLab(nodes=8) as lab:
        environment.setenv("SLURM_CONF", str(lab.conf))
        yield lab


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words for launch.slurm that put tests/cluster/stand_in.py in Python's place."""
    python = tmp_path_factory.mktemp("stand_in") / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/cluster/stand_in.py "$@"\n')
    python.chmod(0o755)
    return [
        f"cluster.python={python}",
        "train.train_steps=40",
    ]


@pytest.fixture(scope="module")
def in_vain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In Python's place: saves nothing. Says that it was stopped, with ENDS, or does not stop."""
    python = tmp_path_factory.mktemp("in_vain") / "python"
    python.write_text(
        "#!/bin/sh\n"
        'for word; do case $word in run_dir=*) cd "${word#run_dir=}";; esac; done\n'
        """echo '{"state": "stopped", "step": 0, "train_steps": 40}' >status.json\n"""
        '[ -n "$ENDS" ] && exit 0\n'
        'touch "up${SLURM_RESTART_COUNT:-0}"\n'
        "exec sleep 100\n"
    )
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module")
def runs(
    lab: SlurmLab, stand_in: list[str], in_vain: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Run, list[str]]]:
    """Jobs that run beside each other, for each takes SLURM some seconds of doing nothing."""
    words = {
        "stopped": ["chain=2", "cluster.environment.HOLD_AT=7"],
        "not requeued": ["cluster.max_requeues=0", "cluster.environment.HOLD_AT=7"],
        "failing once": ["cluster.environment.FAIL_AT=1", "cluster.environment.FAIL_ONCE=1"],
        "failing always": ["cluster.environment.FAIL_AT=1", "cluster.max_failures=2"],
        # in vain: no start leaves a checkpoint. Less requeues than would do without giving up
        "in vain, stopped": [f"cluster.python={in_vain}", "cluster.environment.ENDS=yes"],
        "in vain, too late": [f"cluster.python={in_vain}"],
    }
    for name in ("in vain, stopped", "in vain, too late"):
        words[name] += ["cluster.max_failures=2", "cluster.max_requeues=3"]
        words[name] += ["cluster.environment.SLURM_JOB_END_TIME=1"]  # that time is over already
    started = {}
    for name, extra in words.items():
        run = Run(lab, tmp_path_factory.mktemp("runs") / "run")
        started[name] = (run, run.submit(*stand_in, *extra))
    for name in ("stopped", "not requeued"):
        run, jobs = started[name]
        run.wait_for_step(7)
        lab.run("scancel", "--batch", "--signal=USR1", jobs[0])
    return started


def test_stopped_in_the_middle_it_goes_on_where_it_was(
    runs: dict[str, tuple[Run, list[str]]],
) -> None:
    run, (job, _) = runs["stopped"]
    assert run.wait_for_end(job) == "COMPLETED"
    starts = run.steps()
    assert starts == {"0": [*range(1, 8)], "1": [*range(8, 41)]}  # none lost, none twice
    log = run.log(job)
    assert "time is up" in log and "stopped before its last step; back into the queue" in log
    assert f"from {run.folder}/checkpoints/step_00000007" in log


def test_the_next_job_of_a_chain_waits_and_finds_nothing_to_do(
    runs: dict[str, tuple[Run, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, (_, second) = runs["stopped"]
    assert run.wait_for_end(second) == "COMPLETED"
    assert "nothing to do: the run has finished at step 40" in run.log(second)
    assert not list(run.folder.glob(f"logs/slurm-{second}-node*"))
    assert status_main([str(run.folder)]) == 0
    told = capsys.readouterr().out
    assert ": finished\n" in told and f"{second} COMPLETED" in told


def test_a_site_that_does_not_requeue(runs: dict[str, tuple[Run, list[str]]]) -> None:
    run, (job,) = runs["not requeued"]
    assert run.wait_for_end(job) == "FAILED"
    assert run.lab.job(job)["ExitCode"] == "75:0"
    assert "not requeued, as cluster.max_requeues=0" in run.log(job)
    assert json.loads((run.folder / "status.json").read_text())["state"] == "stopped"


def test_a_failure_is_worth_another_try(runs: dict[str, tuple[Run, list[str]]]) -> None:
    run, (job,) = runs["failing once"]
    assert run.wait_for_end(job) == "COMPLETED"
    assert run.steps()["1"][-1] == 40
    assert "failed (the why is in" in run.log(job)
    assert not (run.folder / "slurm" / "failures").exists()
    assert "no memory left" in (run.folder / "logs" / f"slurm-{job}-node1.log").read_text()


def test_failures_without_a_new_checkpoint_end_it(runs: dict[str, tuple[Run, list[str]]]) -> None:
    run, (job,) = runs["failing always"]
    assert run.wait_for_end(job) == "FAILED"
    assert run.lab.job(job)["Restarts"] == "1"
    assert "start 2 in a row without a new checkpoint, cluster.max_failures=2" in run.log(job)


def test_stopped_again_and_again_without_a_checkpoint_it_gives_up(
    runs: dict[str, tuple[Run, list[str]]],
) -> None:
    run, (job,) = runs["in vain, stopped"]
    assert run.wait_for_end(job) == "FAILED"
    assert run.lab.job(job)["Restarts"] == "1"
    assert run.lab.job(job)["ExitCode"] == "75:0"
    assert "start 2 in a row without a new checkpoint, cluster.max_failures=2" in run.log(job)


def test_a_first_save_that_never_ends_in_time_ends_it(
    runs: dict[str, tuple[Run, list[str]]],
) -> None:
    run, (job,) = runs["in vain, too late"]
    for start in range(2):
        run.lab.wait((run.folder / f"up{start}").exists, 60)
        run.lab.run("scancel", "--batch", "--signal=USR1", job)
    assert run.wait_for_end(job) == "FAILED"
    assert run.lab.job(job)["Restarts"] == "1"
    log = run.log(job)
    assert log.count("not saved in time") == 2
    assert "start 2 in a row without a new checkpoint, cluster.max_failures=2" in log


def test_what_the_partitions_do_not_allow(
    lab: SlurmLab, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "cluster.partition=mian"]) == 2
    assert "cluster.partition=mian: there is none; choose from main" in capsys.readouterr().err
    too_much = ["nodes=9", "train.global_batch_size=9", "cluster.walltime=3-00:00:00"]
    assert main([*TINY, "cluster.partition=main", *too_much]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("error: nodes=9: cluster.partition=main has 8")
    assert "use 2-00:00:00 or less" in told[1]
    assert main([*TINY, "cluster.partition=main", "nodes=8"]) == 0


def test_what_slurm_refuses_itself(
    lab: SlurmLab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, f"run_dir={tmp_path}/run", "--submit"]
    assert main([*words, "cluster.sbatch_arguments=[--reservation=none]"]) == 1
    assert "error: sbatch --parsable" in capsys.readouterr().err
    assert not (tmp_path / "run" / "slurm" / "submitted.jsonl").exists()


def test_slurm_understands_every_line(
    lab: SlurmLab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "job.sbatch"
    site = ["cluster=gpu8_infiniband", "nodes=2", "parallel=tp8_sp"]
    assert main(["+model=magneto_1b", *site, f"run_dir={tmp_path}/a run"]) == 0
    script.write_text(capsys.readouterr().out)
    told = lab.run("sbatch", "--test-only", str(script))
    assert "to start at" in told and "on nodes n[" in told
    job = lab.run("sbatch", "--parsable", "--hold", str(script))
    seen = lab.job(job)
    lab.run("scancel", job)
    assert (seen["Requeue"], seen["TimeLimit"]) == ("1", "1-00:00:00")
    assert seen["TresPerNode"] == f"gres:gpu:{GPUS}"
    assert seen["Dependency"].startswith("singleton")


def test_preempted_it_saves_and_goes_on(
    stand_in: list[str], tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    """A job of higher priority takes the nodes: SLURM sends TERM, and then the job to the queue."""
    with SlurmLab(grace_time=60) as lab, environment.context() as patch:
        patch.setenv("SLURM_CONF", str(lab.conf))
        run = Run(lab, tmp_path / "run")
        (job,) = run.submit(*stand_in, "cluster.environment.HOLD_AT=7")
        run.wait_for_step(7)
        urgent = lab.run(
            *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"),
            *("--output=/dev/null", "--wrap=sleep 1"),
        )
        assert run.wait_for_end(urgent) == "COMPLETED"
        assert run.wait_for_end(job) == "COMPLETED"
        assert lab.job(job)["Restarts"] == "1"
        assert run.steps() == {"0": [*range(1, 8)], "1": [*range(8, 41)]}  # none lost, none twice
        assert "stopped before its last step; back into the queue" in run.log(job)
        assert "failed" not in run.log(job)


def test_preempted_without_a_grace_time_as_often_as_it_may_be_requeued(
    stand_in: list[str], tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    """SLURM requeues by itself: TERM, KillWait seconds, KILL. The script is not asked."""
    with SlurmLab(grace_time=0) as lab, environment.context() as patch:
        patch.setenv("SLURM_CONF", str(lab.conf))
        run = Run(lab, tmp_path / "run")
        words = ["cluster.environment.HOLD_AT='7,14'", "cluster.environment.DEAF='1'"]
        first, second = run.submit(*stand_in, *words, "cluster.max_requeues=1", "chain=2")
        for step in (7, 14):
            run.wait_for_step(step)
            lab.run(
                *("sbatch", "--partition=urgent", "--nodes=2", "--exclusive"),
                *("--output=/dev/null", "--wrap=true"),
            )
        lab.wait(lambda: lab.job_state(first) == "PREEMPTED", 60)
        assert lab.job(first)["Restarts"] == "1"
        log = run.log(first)
        assert "the last start, as cluster.max_requeues=1: SLURM is told not to requeue" in log
        assert run.wait_for_end(second) == "COMPLETED"
        # the first start had the time to save, the second was killed after its save at 10
        starts = run.steps()
        assert starts == {"0": [*range(1, 8), *range(11, 41)], "1": [*range(8, 15)]}


@pytest.mark.slow
def test_the_node_of_the_batch_script_dies(
    stand_in: list[str], tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    """The script dies with it; SLURM starts the job again on other nodes."""
    with SlurmLab(nodes=3, node_timeout=10) as lab, environment.context() as patch:
        patch.setenv("SLURM_CONF", str(lab.conf))
        run = Run(lab, tmp_path / "run")
        (job,) = run.submit(*stand_in, "cluster.environment.HOLD_AT=7")
        run.wait_for_step(7)
        lab.kill_node(lab.job(job)["BatchHost"])
        assert run.wait_for_end(job) == "COMPLETED"
        assert run.steps() == {"0": [*range(1, 8)], "1": [*range(6, 41)]}  # from the save at 5
        assert lab.job(job)["NodeList"] == "n[2-3]"
