"""One run at a time writes a run folder, also where several machines share it.

Two jobs on one folder would publish each other's checkpoints and mix their metrics. The first one
leaves its name in `run_dir`/lock and renews the file's time stamp while it runs; the second is
refused before it trains. Imports neither torch nor megatron-core.
"""

import errno
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.folder_lock import LockFile, is_dead, is_local, lock_age, read_lock
from parallel.config import ConfigError
from pretrain.provenance import RUN_RECORD

HEARTBEAT_SECONDS = 5.0
# A holder on another machine counts as dead after so long without a heartbeat: twelve missed ones.
# NFS shows a file's time stamp anew when the file is opened, and it is opened for each look.
STALE_SECONDS = 60.0

_LOCK = "lock"
_POLL_SECONDS = 0.2
_NO_ID = "none"  # torchrun's --rdzv-id where none is given


class RunFolderBusyError(RuntimeError):
    """Another run writes the run folder; the message names it."""


class RunLock:
    """Holds a run folder; a context manager for the one process of a run that writes there.

    Whose lock is taken over:

    - on this machine: of a process that is no longer there, at once;
    - of this very SLURM job before it was requeued, at once: SLURM has ended it;
    - on another machine: once its heartbeats have stayed away for STALE_SECONDS, or for as long
      as it said it would outlive a lost network, where the same torchrun started it (`--rdzv-id`
      tells). A start waits until it has seen either a heartbeat or that.

    A folder that is removed or moved under the run is noticed at the next heartbeat: it is made
    again and held, loudly, and what the run writes from there on goes into it. Where another run
    has begun there meanwhile, by its lock or its run.json, the lock is lost.

    A run that lost its lock (it was suspended, or cut off from the file system, for longer) must
    stop: `check` says so.

    Args:
        run_dir: made if need be; if it was, and nothing has been written there, it is gone again
            when the lock is given back.
        ends_alone_after: seconds after which this run, cut off from the other ranks, has ended.

    Raises RunFolderBusyError on entering where another one lives, ConfigError where the folder
    cannot be made or written.
    """

    def __init__(self, run_dir: str | Path, ends_alone_after: float = STALE_SECONDS) -> None:
        self.run_dir = Path(run_dir)
        self.lost = False
        self._made: list[Path] = []  # folders of its path that were not there, inner ones first
        # Called after each heartbeat, from its thread; what they raise is told and ends nothing.
        self.on_heartbeat: Callable[[], None] | None = None
        # Called again at each heartbeat until it has worked once.
        self.on_new_folder: Callable[[str], None] | None = None
        self._new_folder = ""  # what `on_new_folder` has yet to be called with
        self._told: dict[str, tuple[Any, Any]] = {}  # the last error of each, told already
        # the folder itself, whatever its name; open, or a new one might get its inode number
        self._folder = -1
        self._job = slurm_job()
        self._torchrun = os.environ.get("TORCHELASTIC_RUN_ID", _NO_ID)
        about = self._job | {"torchrun_id": self._torchrun, "ends_alone_after": ends_alone_after}
        self._file = LockFile(self.run_dir / _LOCK, since=time.time(), **about)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run folder lock")

    def __enter__(self) -> "RunLock":
        try:
            self._made = [p for p in (self.run_dir, *self.run_dir.parents) if not p.exists()]
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._take()
            self._folder = os.open(self.run_dir, os.O_RDONLY)
        except OSError as error:
            self._remove_if_unused()
            raise ConfigError(unusable(self.run_dir, error)) from error
        self._thread.start()
        return self

    def _take(self) -> None:
        first_look: tuple[Any, float] | None = None
        while not self._taken():
            holder = read_lock(self._file.path)
            if holder is None:
                continue
            look = (holder.get("token"), self._time_stamp())
            if first_look is None:
                first_look = look
                if not is_local(holder):
                    print(f"{self._describe(holder)}: waiting for a sign of life", flush=True)
            if is_local(holder) or look != first_look:
                raise RunFolderBusyError(
                    f"run_dir={self.run_dir} is being written by {self._describe(holder)}; let "
                    "that run end, stop it, or choose another run_dir"
                )
            time.sleep(_POLL_SECONDS)

    def _taken(self) -> bool:
        try:
            return self._file.take(self._gives_way)
        except FileNotFoundError:  # another start that made the folder was refused, and removed it
            self.run_dir.mkdir(parents=True, exist_ok=True)
            return False

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()  # or it might renew what is given back
        with suppress(OSError):
            self._file.give_back()
        os.close(self._folder)
        self._remove_if_unused()

    def _remove_if_unused(self) -> None:
        with suppress(OSError):  # it holds something
            for folder in self._made:
                folder.rmdir()

    def check(self) -> None:
        """Raises RunFolderBusyError once another run has taken the folder over. Costs nothing."""
        if not self.lost:
            return
        holder = read_lock(self._file.path)
        by = self._describe(holder) if holder else "another run"
        raise RunFolderBusyError(
            f"run_dir={self.run_dir} was taken over by {by}: this run gave no sign of life for "
            f"{STALE_SECONDS:g} s (less where its own torchrun has started another), or its folder "
            "was removed or moved. It ends here, without saving"
        )

    def holds(self) -> bool:
        """Whether the folder is still this run's: looks at the file, which costs an opening of it.
        One that somebody removed counts; the next heartbeat makes it anew."""
        if self.lost or self._stop.is_set():
            return False
        return self._file.is_ours() or not self._file.path.exists()

    def _gives_way(self, path: Path, holder: dict[str, Any]) -> bool:
        job, restarts = self._job["slurm_job_id"], self._job["slurm_restart_count"]
        same_job = job is not None and holder.get("slurm_job_id") == job
        if same_job and holder.get("slurm_restart_count") != restarts:
            return True
        ours = self._torchrun != _NO_ID and holder.get("torchrun_id") == self._torchrun
        its_end = float(holder.get("ends_alone_after", STALE_SECONDS)) if ours else STALE_SECONDS
        return is_dead(path, holder, min(its_end, STALE_SECONDS))

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # a file system that has hiccups
                if not self._renew():
                    self.lost = True
                    return
            if self._new_folder and self.on_new_folder is not None:
                act = functools.partial(self.on_new_folder, self._new_folder)
                if self._works("what a new run folder needs", act):
                    self._new_folder = ""
            if self.on_heartbeat is not None:
                self._works("what is done at a heartbeat", self.on_heartbeat)

    def _works(self, what: str, act: Callable[[], None]) -> bool:
        """Whether `act` went through. It must not end the heartbeat: the lock would grow stale, and
        another run would take the folder."""
        try:
            act()
        except Exception as error:
            # once, not at every heartbeat; texts differ by the names of temporary files
            kind = type(error), getattr(error, "errno", None)
            if kind != self._told.get(what):
                _warn(
                    f"run_dir={self.run_dir}: {what} failed: {type(error).__name__}: {error}. It "
                    f"is tried again every {HEARTBEAT_SECONDS:g} s"
                )
            self._told[what] = kind
            return False
        self._told.pop(what, None)
        return True

    def _renew(self) -> bool:
        """Renew the lock, in a folder made anew if need be; False: the folder is another run's."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self._is_same_folder():
            return self._file.renew()
        if not self._file.is_ours() and (self.run_dir / RUN_RECORD).exists():
            return False  # only a start writes it
        if not self._file.renew():
            return False
        before, self._folder = self._folder, os.open(self.run_dir, os.O_RDONLY)
        with suppress(OSError):  # NFS: the one that was there is gone
            os.close(before)
        text = (
            f"run_dir={self.run_dir} was removed or moved while this run writes it. The run goes "
            "on, in a new folder of that name: later checkpoints and records go there, and earlier "
            "checkpoints are not in it. If it was moved, stop this run before you start another"
        )
        _warn(text)
        if self.on_new_folder is not None:
            self._new_folder = text
        return True

    def _is_same_folder(self) -> bool:
        now = self.run_dir.stat()
        try:
            return os.path.samestat(now, os.fstat(self._folder))
        except OSError:  # NFS: the one that was there is gone
            return False

    def _time_stamp(self) -> float:
        with suppress(OSError):
            return self._file.path.stat().st_mtime
        return 0.0

    def _describe(self, holder: dict[str, Any]) -> str:
        return _describe(self._file.path, holder)


def _warn(text: str) -> None:
    print(f"\nWARNING: {text}\n", file=sys.stderr, flush=True)


def unusable(folder: Path, error: OSError | None = None, *, setting: str = "run_dir") -> str:
    """Why no run can write the folder that `setting` names, and what to do: what `error` says,
    where it is of a kind that a look at the path does not tell. Empty where nothing seems wrong."""
    if error is not None and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left on the file system of {setting}={folder} "
            f"({os.strerror(error.errno)}); make room there, or choose another {setting}"
        )
    place = folder
    while not os.path.exists(place):  # no error for a path that cannot be looked at
        place = place.parent
    if not place.is_dir():
        return f"{setting}={folder}: {place} is a file; name a folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{setting}={folder}: {place} may not be written; choose another folder"
    if error is None:
        return ""
    return (
        f"{setting}={folder}: cannot be written below {place} "
        f"({error.strerror or error}); choose another folder"
    )


def held_by(run_dir: Path) -> str | None:
    """Who writes the run folder now, in words; None where nobody does who lives. Takes nothing."""
    path = run_dir / _LOCK
    holder = read_lock(path)
    if holder is None or is_dead(path, holder, STALE_SECONDS):
        return None
    return _describe(path, holder)


def _describe(path: Path, holder: dict[str, Any]) -> str:
    if not {"since", "pid", "host"} <= holder.keys():
        return "a process that has not written its name yet"
    job = holder.get("slurm_job_id")
    since = datetime.fromtimestamp(holder["since"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f"process {holder['pid']} on {holder['host']}"
        + (f" (SLURM job {job})" if job else "")
        + f" since {since}, last heartbeat {lock_age(path):.0f} s ago"
    )


def slurm_job() -> dict[str, Any]:
    """Job id and how often SLURM has requeued it, for files that name a run; None outside SLURM."""
    return {
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart_count": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }
