import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data import folder_lock
from data.folder_lock import FolderBusyError, FolderLock, describe_holder

HOLD = """
import sys, time
from pathlib import Path
from data.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def write_lock(folder: Path, **changes: object) -> None:
    folder.mkdir(exist_ok=True)
    me = folder_lock._this_process() | {"token": "t"} | changes
    (folder / "lock").write_text(json.dumps(me))


def age(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / "lock", (then, then))


def test_the_second_is_refused_and_the_next_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    with FolderLock(folder) as lock:
        assert lock.is_ours()
        with pytest.raises(FolderBusyError, match=rf"process {os.getpid()} on .* is at work here"):
            FolderLock(folder).__enter__()
    assert list(folder.iterdir()) == []
    with FolderLock(folder):
        pass


def test_a_killed_holder_s_lock_is_taken_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        assert describe_holder(tmp_path).startswith(f"process {holder.pid} on ")
        with pytest.raises(FolderBusyError):
            FolderLock(tmp_path).__enter__()
        holder.kill()
        start = time.monotonic()
        with FolderLock(tmp_path, wait=5):  # it is not even waited for yet: a zombie
            assert time.monotonic() - start < 4
            assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_number_given_to_another_process_is_not_the_holder(tmp_path: Path) -> None:
    write_lock(tmp_path, started=1.0)
    assert describe_holder(tmp_path) == ""


@pytest.mark.parametrize("elsewhere", [{"host": "other"}, {"pid_namespace": "pid:[1]"}])
def test_a_holder_elsewhere_lives_by_its_heartbeat(tmp_path: Path, elsewhere: dict) -> None:
    write_lock(tmp_path, pid=1, started=1.0, **elsewhere)
    assert describe_holder(tmp_path)
    age(tmp_path, folder_lock.STALE_SECONDS + 5)
    assert describe_holder(tmp_path) == ""
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_lock_that_says_nothing(tmp_path: Path, content: str) -> None:
    """Its writer is writing it, or was killed at it."""
    (tmp_path / "lock").write_text(content)
    assert describe_holder(tmp_path) == "a process"
    age(tmp_path, folder_lock.STALE_SECONDS + 5)
    assert describe_holder(tmp_path) == ""


def test_waiting(tmp_path: Path) -> None:
    order = []
    entered = threading.Event()

    def first() -> None:
        with FolderLock(tmp_path):
            entered.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with FolderLock(tmp_path, wait=30):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_taken_over_is_noticed_and_left_alone(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock:
        write_lock(tmp_path, token="other")
        assert not lock.is_ours()
    assert (tmp_path / "lock").exists()


def test_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", 0.02)
    with FolderLock(tmp_path):
        age(tmp_path, 1000)
        for _ in range(100):
            time.sleep(0.02)
            if time.time() - (tmp_path / "lock").stat().st_mtime < 100:
                break
        assert time.time() - (tmp_path / "lock").stat().st_mtime < 100
