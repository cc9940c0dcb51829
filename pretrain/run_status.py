"""`run_dir`/status.json: whether a run is at work, where it stands, and how it ended.

    {"state": "running", "step": 120, "train_steps": 1000, "reason": "", "time": 1700000000.0,
     "heartbeat": 1700000312.5, "host": "n1", "pid": 4711, "slurm_job_id": "98", "world_size": 8}

state: starting, running, saving, finished (the last step is saved), stopped (saved before it, on a
signal or because the time was up: start again to go on), failed. "reason" is what stopped it, or
the first line of the error. "time": when the state began; "heartbeat": when the file was written,
every few seconds while the run lives; both Unix seconds. A state other than the last three with an
old heartbeat is that of a run that was killed. A start that is refused leaves the file as it was.

Imports neither torch nor megatron-core.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.run_lock import RunLock, slurm_job

STATUS_FILE = "status.json"
STARTING, RUNNING, SAVING = "starting", "running", "saving"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


class RunStatus:
    """Writes the status of the run that holds `lock`; without a lock (other ranks) it is silent.

    A context manager: an error that comes through it is recorded as the run's failure. Nothing is
    written before `starting`. The training loop's calls write only where the state changes; steps
    reach the file with the heartbeat.
    """

    def __init__(self, run_dir: str | Path = "", lock: RunLock | None = None) -> None:
        self.path = Path(run_dir) / STATUS_FILE
        self._lock = lock
        self._record: dict[str, Any] = {}
        self._writing = threading.Lock()
        if lock is not None:
            lock.on_heartbeat = self.heartbeat

    def when_folder_goes(self, act: Callable[[str], None]) -> None:
        """`act` is called, from a thread, with what to say, each time the run folder was removed or
        moved under the run and is held again under its name."""
        if self._lock is not None:
            self._lock.on_new_folder = act

    def __enter__(self) -> "RunStatus":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.failed(error)

    def failed(self, error: BaseException) -> None:
        """The error has ended the run. May be called from any thread."""
        lines = str(error).strip().splitlines()
        self._change(FAILED, f"{type(error).__name__}: {lines[0] if lines else ''}")

    def starting(self, step: int, train_steps: int, world_size: int) -> None:
        """The start is accepted; from here on the file is this run's."""
        self._record = {
            "state": "",
            "step": step,
            "train_steps": train_steps,
            "reason": "",
            "time": 0.0,
            "heartbeat": 0.0,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job_id": slurm_job()["slurm_job_id"],
            "world_size": world_size,
        }
        self._change(STARTING)

    def running(self, step: int) -> None:
        """After `step` steps the run goes on.

        Raises RunFolderBusyError where the run folder has been taken over by another run.
        """
        if self._lock is None:
            return
        self._lock.check()
        self._record["step"] = step
        if self._record["state"] != RUNNING:
            self._change(RUNNING)

    def saving(self, step: int) -> None:
        """A save of `step` begins. Raises as `running`."""
        if self._lock is None:
            return
        self._lock.check()
        self._record["step"] = step
        self._change(SAVING)

    def may_publish(self) -> bool:
        """Whether the run folder is still this run's, by what stands in its lock. From any thread.

        Raises OSError where that cannot be read.
        """
        return self._lock is None or self._lock.holds()

    def ended(self, stopped_by: str | None) -> None:
        """The run came to its end, or was stopped before it."""
        self._change(STOPPED if stopped_by else FINISHED, stopped_by or "")

    def heartbeat(self) -> None:
        """Renews the file if the run is under way. May be called from any thread."""
        with self._writing:
            if self._record.get("state") in (STARTING, RUNNING, SAVING):
                self._write()

    def _change(self, state: str, reason: str = "") -> None:
        with self._writing:
            if self._lock is not None and self._record:
                self._record |= {"state": state, "reason": reason, "time": round(time.time(), 3)}
                self._write()

    def _write(self) -> None:
        """In one rename, so that readers find a whole file; not flushed to disk: it is soon old."""
        if self._lock is None or self._lock.lost:
            return
        self._record["heartbeat"] = round(time.time(), 3)
        new = self.path.with_name(f".{STATUS_FILE}.{os.getpid()}")
        with suppress(OSError):  # a file system that has hiccups must not end the run for this
            new.write_text(json.dumps(self._record) + "\n", encoding="utf-8")
            new.replace(self.path)


def read_status(run_dir: str | Path) -> dict[str, Any] | None:
    """What stands in a run's status.json; None where there is none that can be read."""
    try:
        status = json.loads((Path(run_dir) / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None
