import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data.folder_lock import LockFile
from pretrain import run_lock
from pretrain.run_lock import RunFolderBusyError, RunLock
from pretrain.run_status import RunStatus, read_status


def states(run_dir: Path) -> tuple[Any, ...]:
    status = read_status(run_dir)
    assert status is not None
    return status["state"], status["step"], status["reason"]


def test_the_life_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "98")
    with RunLock(tmp_path) as lock, RunStatus(tmp_path, lock) as status:
        assert read_status(tmp_path) is None  # the start is not accepted yet
        status.starting(5, 100, 8)
        started = read_status(tmp_path)
        assert started is not None
        assert started.keys() == {
            *("state", "step", "train_steps", "reason", "time", "heartbeat"),
            *("host", "pid", "slurm_job_id", "world_size"),
        }
        assert (started["train_steps"], started["world_size"]) == (100, 8)
        assert (started["pid"], started["slurm_job_id"]) == (os.getpid(), "98")
        assert states(tmp_path) == ("starting", 5, "")
        status.running(5)
        assert states(tmp_path) == ("running", 5, "")
        status.running(6)
        assert states(tmp_path) == ("running", 5, "")  # not a file for each step
        status.heartbeat()
        assert states(tmp_path) == ("running", 6, "")
        status.saving(7)
        assert states(tmp_path) == ("saving", 7, "")
        status.running(7)
        assert states(tmp_path) == ("running", 7, "")
        status.saving(8)
        status.ended("SIGUSR1")
    assert states(tmp_path) == ("stopped", 8, "SIGUSR1")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_finished_and_failed(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        with RunStatus(tmp_path, lock) as status:
            status.starting(0, 10, 1)
            status.saving(10)
            status.ended(None)
            status.heartbeat()  # from the thread, a moment too late
        assert states(tmp_path) == ("finished", 10, "")
        with pytest.raises(ValueError), RunStatus(tmp_path, lock) as status:
            status.starting(10, 20, 1)
            raise ValueError("rank 3 failed\n  at some place")
        assert states(tmp_path) == ("failed", 10, "ValueError: rank 3 failed")
        with pytest.raises(KeyboardInterrupt), RunStatus(tmp_path, lock) as status:
            status.starting(11, 20, 1)
            raise KeyboardInterrupt
        assert states(tmp_path) == ("failed", 11, "KeyboardInterrupt: ")


def test_a_refused_start_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    with pytest.raises(ValueError), RunLock(tmp_path) as lock, RunStatus(tmp_path, lock):
        raise ValueError("another model's checkpoint")
    assert read_status(tmp_path) == {"state": "finished"}


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    with pytest.raises(ValueError), RunStatus(tmp_path) as status:
        status.starting(0, 10, 2)
        status.running(1)
        status.saving(2)
        status.ended(None)
        status.heartbeat()
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_the_lock_s_heartbeat_renews_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    with RunLock(tmp_path) as lock, RunStatus(tmp_path, lock) as status:
        status.starting(0, 10, 1)
        status.running(0)
        status.running(4)
        deadline = time.monotonic() + 10
        while states(tmp_path)[1] != 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert states(tmp_path) == ("running", 4, "")


def test_who_lost_the_folder_says_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    with RunLock(tmp_path) as lock, RunStatus(tmp_path, lock) as status:
        status.starting(0, 10, 1)
        status.running(1)
        other = LockFile(tmp_path / "lock", since=time.time())
        assert other.take(lambda path, holder: True)
        deadline = time.monotonic() + 10
        while not lock.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RunFolderBusyError, match=r"was taken over by process \d+ on .*without"):
            status.running(2)
        with pytest.raises(RunFolderBusyError, match="was taken over by process"):
            status.saving(3)
        status.ended(None)
    assert states(tmp_path) == ("running", 1, "")
    assert json.loads((tmp_path / "lock").read_text())["token"]  # the other's stays


def test_who_may_publish_is_read_from_the_lock_at_once(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        status = RunStatus(tmp_path, lock)
        assert status.may_publish()
        (tmp_path / "lock").unlink()  # by hand; the heartbeat brings it back
        assert status.may_publish()
        assert LockFile(tmp_path / "lock", since=time.time()).take(lambda path, holder: True)
        assert not lock.lost and not status.may_publish()
        (tmp_path / "lock").unlink()
    assert not status.may_publish()  # given back
    assert RunStatus(tmp_path).may_publish()


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    done = threading.Event()
    seen = []

    def read() -> None:
        while not done.is_set():
            if (tmp_path / "status.json").exists():
                seen.append(read_status(tmp_path))

    with RunLock(tmp_path) as lock, RunStatus(tmp_path, lock) as status:
        status.starting(0, 10, 1)
        thread = threading.Thread(target=read)
        thread.start()
        for step in range(300):
            status.saving(step)
        done.set()
        thread.join()
    assert seen and None not in seen


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_file_that_is_no_status(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None
