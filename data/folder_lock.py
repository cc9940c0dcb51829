"""One builder at a time in a folder, also on a file system that several machines share.

The lock saves work; nothing's correctness hangs on it. Whoever publishes a result does so by one
rename of a whole folder, so that two builders, should clocks and networks conspire to let both
work, cost time and nothing else.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

HEARTBEAT_SECONDS = 15.0
# Without a heartbeat for so long, a holder on another machine counts as dead. One on this machine
# is asked for directly, so that a killed run can be resumed at once.
STALE_SECONDS = 120.0


class FolderBusyError(OSError):
    """Someone else is building in the folder."""


class LockFile:
    """A file that says who holds something: created, taken over and renewed, never waited for.

    Of many who try at once, on one or on many machines, exactly one gets a file that is not there
    (exclusive creation), and exactly one gets a dead holder's: who creates the claim named after
    that holder's token may rename it over the file, and one who comes late finds another token.

    about: what the file shall say of its holder besides host, process and a token of its own.
    """

    def __init__(self, path: Path, **about: Any) -> None:
        self.path = path
        self._content = _this_process() | about | {"token": uuid.uuid4().hex}

    def take(self, is_dead: Callable[[Path, dict[str, Any]], bool]) -> bool:
        """Whether the file is ours now; False: somebody holds it of whom `is_dead` says False.

        `is_dead` is asked with the file and its content, {} where that is unreadable. The folder
        must exist.
        """
        while not self._create(self.path):
            holder = read_lock(self.path)
            if holder is None:  # given back a moment ago
                continue
            if not is_dead(self.path, holder):
                return False
            if self._succeed(holder, is_dead):
                return True
        return True

    def is_ours(self) -> bool:
        """False once somebody else has taken it over, or it is gone."""
        return (read_lock(self.path) or {}).get("token") == self._content["token"]

    def renew(self) -> bool:
        """Heartbeat: renews the time stamp, or the file if somebody removed it.

        False if it is somebody else's by now.
        """
        with suppress(FileNotFoundError):
            if self.is_ours():
                os.utime(self.path)
                return True
        return self._create(self.path)

    def give_back(self) -> None:
        if self.is_ours():
            self.path.unlink(missing_ok=True)

    def _succeed(
        self, holder: dict[str, Any], is_dead: Callable[[Path, dict[str, Any]], bool]
    ) -> bool:
        token = holder.get("token", "")
        claim = self.path.with_name(f"{self.path.name}.after-{token}")
        if not self._create(claim):
            rival = read_lock(claim)
            if rival is not None and is_dead(claim, rival):  # killed between claim and rename
                claim.unlink(missing_ok=True)
            time.sleep(0.01)
            return False
        now = read_lock(self.path)
        if now is None or now.get("token", "") != token or not is_dead(self.path, now):
            claim.unlink(missing_ok=True)
            return False
        with suppress(FileNotFoundError):  # a rival thought us dead: the file says who has it
            os.replace(claim, self.path)
        return self.is_ours()

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._content, file)
        except OSError:  # a full disk; half a lock would keep others out
            path.unlink(missing_ok=True)
            raise
        return True


class FolderLock:
    """A file `lock` in the folder that names its holder; a context manager.

    Makes the folder if need be. While it is held, a thread renews the file's time stamp.

    wait: how many seconds to wait for another holder to finish. Raises FolderBusyError if it does
    not, OSError if the folder cannot be written.
    """

    def __init__(self, folder: Path, wait: float = 0.0):
        self.folder = folder
        self._wait = wait
        self._file = LockFile(folder / "lock")
        self._stop = threading.Event()

    def __enter__(self) -> "FolderLock":
        give_up = time.monotonic() + self._wait
        while not self._take():
            holder = describe_holder(self.folder)
            if holder and time.monotonic() >= give_up:
                raise FolderBusyError(
                    f"{self.folder}: {holder} is at work here already; let it finish, or stop it "
                    "first"
                )
            if holder:
                time.sleep(0.1)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()  # or it might renew what is given back
        self._file.give_back()

    def is_ours(self) -> bool:
        """False once somebody else has taken the lock over, or the folder is gone."""
        return self._file.is_ours()

    def _take(self) -> bool:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # the folder was removed by one who finished
                return self._file.take(is_dead)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                if not self._file.renew():
                    return


def describe_holder(folder: Path) -> str:
    """Who is at work in the folder, empty if nobody is."""
    path = folder / "lock"
    holder = read_lock(path)
    if holder is None or is_dead(path, holder):
        return ""
    if not holder:  # being written at this moment, or its writer was killed doing so
        return "a process"
    return f"process {holder['pid']} on {holder['host']}"


def is_dead(path: Path, holder: dict[str, Any], stale_seconds: float = STALE_SECONDS) -> bool:
    """Whether the holder of a lock file is: asked directly on this machine, else by heartbeat."""
    if is_local(holder):
        return not _is_alive(holder["pid"], holder["started"])
    return lock_age(path) > stale_seconds


def is_local(holder: dict[str, Any]) -> bool:
    """Whether the holder is, or was, a process that this machine can be asked about."""
    me = _this_process()
    return bool(holder) and all(holder[key] == me[key] for key in ("host", "pid_namespace"))


def read_lock(path: Path) -> dict[str, Any] | None:
    """The lock file's content: {} if it is not readable, None if there is no file."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return content if {"pid", "host", "pid_namespace", "started"} <= content.keys() else {}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        return {}


def _this_process() -> dict[str, Any]:
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # containers may share a host's name
    except OSError:
        namespace = ""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "pid_namespace": namespace,
        "started": psutil.Process().create_time(),
    }


def _is_alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        # the number may have been given to another process since
        return abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def lock_age(path: Path) -> float:
    """Seconds since the file's last heartbeat, by the clock of the file system that holds it."""
    probe = path.with_name(f".clock-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)
