"""Runs a sweep's trainings on this machine, several at a time, each a process of its own.

The longest runs come first, so that the last ones to end are short and no core idles for long.
Whatever ends this process, the trainings end too, saving first where they can: Ctrl-C and SIGTERM
are handed on to them, and the kernel signals them should this process be killed.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]

from data.folder_lock import FolderLock, describe_holder
from data.scaling_law.design import PlannedRun
from launch.sweep_devices import environment, training_command
from launch.sweep_folder import (
    CARRIED_ON,
    DONE,
    FAILED,
    RUNNING,
    SweepFolder,
    run_seconds,
)
from pretrain.progress import format_duration

REPOSITORY = Path(__file__).resolve().parents[1]
LOG_FILE = "output.log"  # in a run's folder, of all its starts
POLL_SECONDS = 0.2
# When all that is left is held by others, such as an earlier runner's training that still saves.
WAIT_FOR_OTHERS = 60.0
LOOK_AGAIN_SECONDS = 1.0  # at runs that others hold: two small files each
# The last line of a traceback, as torch may begin it; torchrun's own says only that there was one.
_EXCEPTION = re.compile(r"(\[rank\d+\]: )?(?!\S*ChildFailedError)[\w.]*(Error|Exception)\b")
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass
class Started:
    """A training at work."""

    name: str
    process: subprocess.Popen[bytes]
    began: float
    slot: int  # of the runner's `jobs`
    told: int = 0  # how many of the runner's stop signals it has been told


@dataclass
class Runner:
    """Runs what is left of a sweep. `run` returns whether all of it is finished.

    gpus: what the slots share, `processes_per_run` each. A run that somebody else is at work on is
    not started here and nothing is recorded of it.
    """

    folder: SweepFolder
    jobs: int
    threads: int
    retry: bool = False
    keep_checkpoints: bool = False
    gpus: Sequence[str] = ()
    wait_for_others: float = WAIT_FOR_OTHERS
    say: Callable[[str], None] = print
    script: Path = REPOSITORY / "launch" / "pretrain.py"  # what trains a run
    _signals: list[int] = field(default_factory=list)  # that came, in their order
    _queue: list[PlannedRun] = field(default_factory=list)
    _held: float = 0.0  # since when (time.monotonic) nothing is left but what others hold; 0: not
    _looked: float = 0.0
    _working: list[Started] = field(default_factory=list)
    _cpu_seconds: float = 0.0

    def run(self) -> bool:
        """Raises FolderBusyError where another runner is at work on the sweep."""
        with FolderLock(self.folder.path):
            before = {
                number: signal.signal(number, self._stop)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
            try:
                return self._run()
            finally:
                self._end_all()
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _run(self) -> bool:
        began = time.monotonic()
        states = self.folder.states()
        wanted = (*CARRIED_ON, RUNNING, *((FAILED,) if self.retry else ()))
        self._queue = [run for run in self.folder.runs if states[run.name] in wanted]
        config = self.folder.config
        self._queue.sort(key=lambda run: -run_seconds(config, run))
        done = sum(state == DONE for state in states.values())
        self.say(f"{done} of {len(states)} runs are finished, {len(self._queue)} to go")
        while self._working or (self._queue and not self._signals and not self._given_up()):
            while len(self._working) < self.jobs and (name := self._next()):
                self._start(name)
            self._tell()
            self._reap()
            time.sleep(POLL_SECONDS)
        self._summary(time.monotonic() - began)
        return all(state == DONE for state in self.folder.states().values())

    def _next(self) -> str | None:
        """The longest run left that nobody else is at work on, out of the queue; None: none now."""
        if self._signals or not self._queue:
            return None
        now = time.monotonic()
        if self._looked and now < self._looked + LOOK_AGAIN_SECONDS:
            return None
        states = self.folder.states()
        self._queue = [run for run in self._queue if states[run.name] != DONE]  # by another
        for run in self._queue:
            if states[run.name] != RUNNING:
                self._queue.remove(run)
                self._looked = self._held = 0.0
                return run.name
        self._looked, self._held = now, self._held or now
        return None

    def _given_up(self) -> bool:
        """Whether all that is left has been held by others for long."""
        return self._held > 0 and time.monotonic() > self._held + self.wait_for_others

    def _start(self, name: str) -> None:
        run_dir = self.folder.run_dir(name)
        run_dir.mkdir(parents=True, exist_ok=True)
        config = self.folder.config
        slot = min(set(range(self.jobs)) - {started.slot for started in self._working})
        if self._signals:  # since the run was chosen
            return
        with open(run_dir / LOG_FILE, "ab") as log:
            process = subprocess.Popen(
                training_command(config, self.script, self.folder.words([name])),
                env=os.environ | environment(config, self.gpus, slot, self.threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches them through this process alone
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )
        self._working.append(Started(name, process, time.time(), slot))

    def _reap(self) -> None:
        """Notes the trainings that have ended, and what they cost."""
        for started in list(self._working):
            pid, status, usage = os.wait4(started.process.pid, os.WNOHANG)
            if not pid:
                continue
            started.process.returncode = code = os.waitstatus_to_exitcode(status)
            self._working.remove(started)
            self._note(started, code, usage.ru_utime + usage.ru_stime)

    def _note(self, started: Started, code: int, cpu_seconds: float) -> None:
        name, seconds = started.name, time.time() - started.began
        self._cpu_seconds += cpu_seconds
        state = self.folder.states()[name] if code == 0 else ""
        # a signal's number is negative; 75: stopped before its end, after saving
        # torchrun leaves with 1 when it was told to stop, also where its workers have saved
        failed = code > 0 and code != os.EX_TEMPFAIL and not started.told
        if failed and describe_holder(self.folder.run_dir(name)):  # another was faster
            self._queue.append(self.folder.by_name[name])
            return
        reason = self._last_line(name) if failed else ""
        self.folder.record(
            {
                "run": name,
                "began": round(started.began, 3),
                "seconds": round(seconds, 3),
                "cpu_seconds": round(cpu_seconds, 3),
                "exit_code": code,
                "failed": failed,
                "reason": reason,
            }
        )
        if state == DONE:
            if not self.keep_checkpoints:
                shutil.rmtree(self.folder.run_dir(name) / "checkpoints", ignore_errors=True)
            self.say(f"{name}: finished in {format_duration(seconds)}, {cpu_seconds:.0f} CPU-s")
        elif failed:
            self.say(f"{name}: FAILED with exit code {code}: {reason}")
        else:
            self.say(f"{name}: stopped (exit code {code}), goes on from its last checkpoint")

    def _last_line(self, name: str) -> str:
        path = self.folder.run_dir(name) / LOG_FILE
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return last_error(path) or (lines[-1][:500] if lines else "it said nothing")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Only notes it: a training that is being started right now could not be told here."""
        self._signals.append(number)

    def _tell(self) -> None:
        """Hands on the signals that came: the first as SIGTERM, a further one as SIGKILL."""
        wanted = min(len(self._signals), 2)
        late = [started for started in self._working if started.told < wanted]
        for started in late:
            if wanted == 2:
                _kill(started.process.pid)
            else:
                with suppress(ProcessLookupError):
                    started.process.terminate()
            started.told = wanted
        if late and wanted == 1:
            number = self._signals[0]
            self.say(
                f"{signal.Signals(number).name}: {len(late)} runs finish their step and "
                "save; once more ends them at once"
            )

    def _end_all(self) -> None:
        """Of an error here: no training is left behind."""
        for started in self._working:
            with suppress(ProcessLookupError):
                started.process.terminate()
        for started in self._working:
            with suppress(ChildProcessError):
                started.process.wait()

    def _summary(self, seconds: float) -> None:
        states = self.folder.states()
        count = {state: list(states.values()).count(state) for state in set(states.values())}
        cores = min(self.jobs * self.threads * self.folder.config.processes_per_run, usable_cores())
        used = self._cpu_seconds / (cores * seconds) if seconds else 0
        self.say(
            f"{count.get(DONE, 0)} of {len(states)} runs finished; {format_duration(seconds)}, "
            f"{self._cpu_seconds:,.0f} CPU-s of trainings, {used:.0%} of {cores} cores"
        )
        failed = [name for name, state in states.items() if state == FAILED]
        for name, attempt in self.folder.last_attempts().items():
            if name in failed:
                self.say(f"  failed: {name}: {attempt['reason']}")
        if failed:
            self.say(f"--retry runs failed ones again; their logs: runs/NAME/{LOG_FILE}")
        elsewhere = [name for name, state in states.items() if state == RUNNING]
        for name in elsewhere:
            self.say(f"  at work elsewhere: {name}: {describe_holder(self.folder.run_dir(name))}")
        if count.get(DONE, 0) + len(failed) < len(states):
            self.say(f"to go on: python -m launch.sweep run {self.folder.path}")


def last_error(log: Path) -> str:
    """The last line of a log that says what ended the training; "" where none does."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if _EXCEPTION.match(line)]
    told = [line for line in lines if line.startswith("error")] or errors
    return told[-1][:500] if told else ""


def _kill(pid: int) -> None:
    """A training and all processes below it: torchrun's workers would outlive it."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.kill()


def end_with_parent() -> None:
    """In the child, before it becomes another program: SIGTERM when the parent dies, however."""
    libc: Any = ctypes.CDLL(None)
    libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
