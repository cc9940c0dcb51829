"""A sweep's runs as jobs of SLURM: submits what is left, waits until all have ended, tells how.

Hydra's submitit launcher submits the runs as one job array and starts them. It takes a job that was
queued again for one that has ended, stops waiting at the first error, and without SLURM's
accounting never learns of a job that was killed. So the queue itself is asked here, and the run
folders. What the launcher prints stands in SWEEP/slurm.log. Imports neither torch nor
megatron-core.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.scaling_law.sweep_config import Device, SweepConfig
from launch.sweep_folder import DONE, SweepFolder, run_seconds
from launch.sweep_runner import REPOSITORY, end_with_parent, last_error
from pretrain.run_status import FAILED as STATUS_FAILED
from pretrain.run_status import read_status

LAUNCHER = "hydra/launcher=submitit_slurm"
DEFAULT_MINUTES = 60  # hydra.launcher.timeout_min of the plugin
MULTIRUN_FOLDER = "multirun"  # Hydra's, in the sweep's
JOBS_FILE, LOG_FILE = "jobs.jsonl", "slurm.log"  # run and job of every submission; its output
LOOK_SECONDS = 10.0  # between two looks at the queue
# How long the launcher may take to see that its last job has ended; submitit waits 15 s for results
# that the file system does not show yet.
LAUNCHER_SECONDS = 60.0


def multirun_command(
    folder: SweepFolder, names: Sequence[str], words: Sequence[str] = ()
) -> list[str]:
    """One command of Hydra's that runs these, each in the run folder it has with the runner."""
    script = str(REPOSITORY / "launch" / "pretrain.py")
    own = [f"hydra.sweep.dir={folder.path / MULTIRUN_FOLDER}", *words]
    return [sys.executable, script, "--multirun", *folder.words(names), *own]


def slurm_words(
    config: SweepConfig, typed: Sequence[str], jobs: int | None = None, threads: int = 1
) -> list[str]:
    """Hydra's words for what a job asks for, one task a process; typed ones are left alone.

    jobs: most that run at a time. threads: of each process, which has as many cores.

    Raises ValueError where the processes cannot be shared out among the nodes that are typed.
    """
    said = _said(typed)
    tasks, gpus = "hydra.launcher.tasks_per_node", "hydra.launcher.gpus_per_node"
    nodes = said.get("hydra.launcher.nodes", "1")
    whole = nodes.isdigit() and int(nodes) > 0 and config.processes_per_run % int(nodes) == 0
    if not whole and tasks not in said:
        raise ValueError(
            f"hydra.launcher.nodes={nodes}: processes_per_run={config.processes_per_run} processes "
            f"cannot be shared out among so many nodes; name others, or type {tasks}"
        )
    each = said.get(tasks) or str(config.processes_per_run // int(nodes))
    wanted = {tasks: each} | ({gpus: each} if config.device is Device.gpu else {})
    if jobs is not None:
        wanted["hydra.launcher.array_parallelism"] = str(jobs)
    if threads > 1:
        wanted["hydra.launcher.cpus_per_task"] = str(threads)
    return [f"{name}={value}" for name, value in wanted.items() if name not in said]


def too_short(folder: SweepFolder, names: Sequence[str], typed: Sequence[str]) -> str | None:
    """A line where the longest of these runs takes longer, by the estimate, than a job may."""
    text = _said(typed).get("hydra.launcher.timeout_min", str(DEFAULT_MINUTES))
    longest = max(run_seconds(folder.config, folder.by_name[name]) for name in names) / 60
    if not text.isdigit() or longest <= int(text):
        return None
    return (
        f"hydra.launcher.timeout_min={text}: the longest run takes {longest:,.0f} minutes by the "
        "estimate; it is stopped before its end, saves, and the same command again goes on"
    )


def _said(typed: Sequence[str]) -> dict[str, str]:
    return dict(word.lstrip("+").split("=", 1) for word in typed if "=" in word)


def queued(folder: SweepFolder) -> dict[str, str]:
    """Run -> job, of the runs whose jobs wait or run; {} also where SLURM does not answer."""
    submitted = _submitted(folder)
    queue = (_queue() or set()) if submitted else set()
    return {run: job.number for run, job in submitted.items() if job.number in queue}


@dataclass(frozen=True)
class Job:
    """That a run was submitted as."""

    number: str  # 4711_0 in an array
    since: float  # Unix seconds


@dataclass
class SlurmJobs:
    """Submits runs and waits. `run` returns whether the whole sweep is finished.

    waiting: the jobs of runs whose end has not been noted yet, also of earlier submissions.
    """

    folder: SweepFolder
    keep_checkpoints: bool = False
    look_seconds: float = LOOK_SECONDS
    say: Callable[[str], None] = print
    _launcher: subprocess.Popen[bytes] | None = None
    _names: Sequence[str] = ()  # that the launcher submits, in this order
    _named: int = 0  # of these, so many whose jobs are known
    _before: frozenset[Path] = frozenset()  # earlier submissions

    def __post_init__(self) -> None:
        noted = {attempt.get("job") for attempt in self.folder.attempts()}
        self.waiting: dict[str, Job] = {
            run: job for run, job in _submitted(self.folder).items() if job.number not in noted
        }

    def run(self, names: Sequence[str], command: Sequence[str], threads: int = 1) -> bool:
        """command: Hydra's, which submits `names`; nothing is submitted where there are none."""
        if self.waiting:
            self.say(f"{len(self.waiting)} runs are in SLURM's queue already")
        try:
            if names:
                self._submit(names, command, threads)
            self._wait()
        except KeyboardInterrupt:
            self._name_jobs()
            jobs = " ".join(job.number for job in self.waiting.values())
            self.say(f"no longer waiting; the jobs go on. To end them: scancel {jobs}")
        finally:
            if self._launcher is not None:
                self._launcher.terminate()
                self._launcher.wait()
        return self._summary()

    def _submit(self, names: Sequence[str], command: Sequence[str], threads: int) -> None:
        self._before, self._names = frozenset(self._submissions()), names
        with open(self.folder.path / LOG_FILE, "ab") as log:
            self._launcher = subprocess.Popen(
                command,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )
        self.say(f"submitting {len(names)} runs and waiting for them; Ctrl-C ends the waiting only")

    def _wait(self) -> None:
        """Until nothing of it is left in the queue."""
        idle_since = 0.0
        while True:
            launcher_ended = self._launcher is None or self._launcher.poll() is not None
            self._name_jobs()
            if not self.look() or self.waiting or self._named < len(self._names):
                idle_since = 0.0
            idle_since = idle_since or time.monotonic()
            if not self.waiting and launcher_ended:
                return
            if time.monotonic() > idle_since + LAUNCHER_SECONDS:
                return  # the launcher waits for jobs that there are no more
            time.sleep(self.look_seconds)

    def look(self) -> bool:
        """Notes the runs whose jobs have left the queue; whether SLURM told what is in it."""
        queue = _queue() if self.waiting else set()
        for run, job in list(self.waiting.items()):
            if queue is not None and job.number not in queue:
                del self.waiting[run]
                self._note(run, job)
        return queue is not None

    def _submissions(self) -> list[Path]:
        """submitit's file of each job, in the order of their submission."""
        found = (self.folder.path / MULTIRUN_FOLDER / ".submitit").glob("*/*_submitted.pkl")
        return sorted(found, key=lambda path: [int(n) for n in path.parent.name.split("_")])

    def _name_jobs(self) -> None:
        """Notes which jobs the launcher has made of the runs, as far as it has."""
        if self._named == len(self._names):
            return
        new = [path.parent.name for path in self._submissions() if path not in self._before]
        found = list(zip(self._names, new, strict=False))[self._named :]
        self._named += len(found)
        with open(self.folder.path / JOBS_FILE, "a", encoding="utf-8") as file:
            for run, number in found:
                self.waiting[run] = Job(number, time.time())
                file.write(json.dumps({"run": run} | asdict(self.waiting[run])) + "\n")
                self.say(f"{run}: job {number}")

    def _note(self, run: str, job: Job) -> None:
        """Of a run whose job has left the queue: finished, failed, or to go on."""
        done = self.folder.states()[run] == DONE
        reason = "" if done else self._why_failed(run, job)
        self.folder.record(
            {
                "run": run,
                "job": job.number,
                # as if it had run here
                "exit_code": 0 if done else 1 if reason else os.EX_TEMPFAIL,
                "failed": bool(reason),
                "reason": reason,
            }
        )
        if done:
            if not self.keep_checkpoints:
                shutil.rmtree(self.folder.run_dir(run) / "checkpoints", ignore_errors=True)
            self.say(f"{run}: finished")
        elif reason:
            self.say(f"{run}: FAILED: {reason}")
        else:
            self.say(f"{run}: stopped or killed (job {job.number}), goes on from its checkpoint")

    def _why_failed(self, run: str, job: Job) -> str:
        """The error that ended the run; "" where none did."""
        status = read_status(self.folder.run_dir(run))
        if status is not None and status["heartbeat"] >= job.since:  # of this job's start
            return str(status["reason"]) if status["state"] == STATUS_FAILED else ""
        logs = self.folder.path / MULTIRUN_FOLDER / ".submitit" / job.number
        errors = [last_error(log) for log in sorted(logs.glob("*_log.err"))]
        return next((error for error in errors if error), "")

    def _summary(self) -> bool:
        states = self.folder.states()
        done = sum(state == DONE for state in states.values())
        self.say(f"{done} of {len(states)} runs finished")
        if self._named < len(self._names):
            log = self.folder.path / LOG_FILE
            self.say(f"{len(self._names) - self._named} runs were not submitted: {log} says why")
        if done < len(states):
            self.say("to go on: the same command again; failed runs only with --retry")
        return done == len(states)


def _submitted(folder: SweepFolder) -> dict[str, Job]:
    """Run -> its newest job."""
    path = folder.path / JOBS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {one.pop("run"): Job(**one) for one in map(json.loads, lines)}


def _queue() -> set[str] | None:
    """This user's jobs that wait or run, those of arrays as 12_3; None: SLURM does not answer."""
    command = ["squeue", "--me", "--all", "--array", "--noheader", "--format=%i"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return set(told.stdout.split()) if told.returncode == 0 else None
