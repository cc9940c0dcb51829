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
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil  # type: ignore[import-untyped]

HEARTBEAT_SECONDS = 15.0
# Without a heartbeat for so long, a holder on another machine counts as dead. One on this machine
# is asked for directly, so that a killed run can be resumed at once.
STALE_SECONDS = 120.0


class FolderBusyError(OSError):
    """Someone else is building in the folder."""


class FolderLock:
    """A file `lock` in the folder that names its holder; a context manager.

    Makes the folder if need be. While it is held, a thread renews the file's time stamp.

    wait: how many seconds to wait for another holder to finish. Raises FolderBusyError if it does
    not, OSError if the folder cannot be written.
    """

    def __init__(self, folder: Path, wait: float = 0.0):
        self.folder = folder
        self._wait = wait
        self._path = folder / "lock"
        self._token = uuid.uuid4().hex
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
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self.is_ours():
            self._path.unlink(missing_ok=True)

    def is_ours(self) -> bool:
        """False once somebody else has taken the lock over, or the folder is gone."""
        return (_read(self._path) or {}).get("token") == self._token

    def _take(self) -> bool:
        me = _this_process() | {"token": self._token}
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the folder was removed by one who finished
            try:
                descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                if describe_holder(self.folder):
                    return False
                _remove_stale(self._path)
            else:
                try:
                    with open(descriptor, "w", encoding="utf-8") as file:
                        json.dump(me, file)
                except OSError:  # a full disk; half a lock would keep others out
                    self._path.unlink(missing_ok=True)
                    raise
                return True
        return self._take()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            if not self.is_ours():
                return
            with suppress(OSError):
                os.utime(self._path)


def describe_holder(folder: Path) -> str:
    """Who is at work in the folder, empty if nobody is."""
    path = folder / "lock"
    holder = _read(path)
    if holder is None:
        return ""
    if not holder:  # being written at this moment, or its writer was killed doing so
        return "" if _age(path) > STALE_SECONDS else "a process"
    name = f"process {holder['pid']} on {holder['host']}"
    me = _this_process()
    if all(holder[key] == me[key] for key in ("host", "pid_namespace")):
        return name if _is_alive(holder["pid"], holder["started"]) else ""
    return "" if _age(path) > STALE_SECONDS else name


def _read(path: Path) -> dict | None:
    """The lock file's content: {} if it is not readable, None if there is no file."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return content if {"pid", "host", "pid_namespace", "started"} <= content.keys() else {}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        return {}


def _this_process() -> dict:
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


def _age(path: Path) -> float:
    """Seconds since the file's last heartbeat, by the clock of the file system that holds it."""
    probe = path.with_name(f".clock-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Takes a dead holder's lock away; harmless if another was quicker and holds it by now."""
    stale = (_read(path) or {}).get("token")
    aside = path.with_name(f".stale-{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if (_read(aside) or {}).get("token") != stale:
        with suppress(OSError):
            os.link(aside, path)  # it was the quicker one's: give it back
    aside.unlink(missing_ok=True)
