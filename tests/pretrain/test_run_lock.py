"""Two runs, one folder."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from data import folder_lock
from data.folder_lock import LockFile
from parallel.config import ConfigError
from pretrain import run_lock
from pretrain.run_lock import RunFolderBusyError, RunLock
from tests.disks import read_only, small_disk

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pretrain.run_lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def write_lock(run_dir: Path, *, age: float = 0.0, **changes: Any) -> None:
    content = folder_lock._this_process() | {"token": "t", "since": 0.0} | changes
    (run_dir / "lock").write_text(json.dumps(content))
    then = time.time() - age
    os.utime(run_dir / "lock", (then, then))


DEAD_HERE = {"started": 1.0}
ELSEWHERE = {"host": "other", "pid": 1}


def test_the_second_is_refused_with_the_name_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "98")
    run_dir = tmp_path / "deep" / "run"
    with RunLock(run_dir):
        (run_dir / "config.yaml").touch()
        monkeypatch.setenv("SLURM_JOB_ID", "99")
        with pytest.raises(RunFolderBusyError) as refused:
            RunLock(run_dir).__enter__()
    said = str(refused.value)
    name = f"process {os.getpid()} on {os.uname().nodename} (SLURM job 98) since "
    assert said.startswith(f"run_dir={run_dir} is being written by {name}")
    assert "UTC, last heartbeat 0 s ago; let that run end, stop it, or choose another" in said
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]
    with RunLock(run_dir):
        pass


def test_a_killed_run_s_folder_is_taken_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(RunFolderBusyError, match=rf"process {holder.pid} on "):
            RunLock(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        start = time.monotonic()
        with RunLock(tmp_path):
            assert time.monotonic() - start < 1


def test_a_holder_elsewhere_that_beats_is_refused_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lock(tmp_path, age=3, **ELSEWHERE)
    beat = threading.Timer(0.5, os.utime, [tmp_path / "lock"])
    beat.start()
    with pytest.raises(RunFolderBusyError, match="process 1 on other since 1970-01-01 00:00:00"):
        RunLock(tmp_path).__enter__()
    beat.join()
    assert "last heartbeat 3 s ago: waiting for a sign of life" in capsys.readouterr().out


def test_a_holder_elsewhere_that_stays_silent_is_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 5.0)
    write_lock(tmp_path, age=4, **ELSEWHERE)
    start = time.monotonic()
    with RunLock(tmp_path):
        assert 0.5 < time.monotonic() - start < 3
    write_lock(tmp_path, age=6, **ELSEWHERE)
    start = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - start < 0.5


@pytest.mark.parametrize("place", [{}, ELSEWHERE])
def test_a_requeued_job_takes_over_from_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: dict[str, Any]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "98")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write_lock(tmp_path, slurm_job_id="98", slurm_restart_count="0", **place)
    with RunLock(tmp_path):
        holder = json.loads((tmp_path / "lock").read_text())
        assert (holder["slurm_job_id"], holder["slurm_restart_count"]) == ("98", "1")


def test_two_steps_of_one_job_are_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "98")
    write_lock(tmp_path, slurm_job_id="98", slurm_restart_count="0")
    with pytest.raises(RunFolderBusyError):
        RunLock(tmp_path).__enter__()


@pytest.mark.parametrize(("of_holder", "ours"), [("a", "a"), ("none", "none"), ("a", "b")])
def test_a_torchrun_waits_less_for_a_host_it_has_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_holder: str, ours: str
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 21.0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", ours)
    write_lock(tmp_path, age=20, torchrun_id=of_holder, ends_alone_after=15.0, **ELSEWHERE)
    start = time.monotonic()
    with RunLock(tmp_path):
        assert (time.monotonic() - start < 0.5) == (ours == of_holder == "a")


def test_a_host_that_ends_late_is_given_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    write_lock(tmp_path, age=20, torchrun_id="a", ends_alone_after=21.0, **ELSEWHERE)
    start = time.monotonic()
    with RunLock(tmp_path, ends_alone_after=33.0):
        assert time.monotonic() - start > 0.5
        assert json.loads((tmp_path / "lock").read_text())["ends_alone_after"] == 33.0


def test_a_refused_start_takes_the_folder_away_from_one_that_waits(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_lock(tmp_path / "run", age=0, **ELSEWHERE)
    remove = threading.Timer(0.5, shutil.rmtree, [tmp_path / "run"])
    remove.start()
    with RunLock(tmp_path / "run") as lock:
        lock.check()
    remove.join()


def test_a_lock_that_says_nothing_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.02)
    (tmp_path / "lock").write_text("")
    name = threading.Timer(0.3, write_lock, [tmp_path])
    name.start()
    with pytest.raises(RunFolderBusyError, match=rf"process {os.getpid()} on "):
        RunLock(tmp_path).__enter__()
    name.join()
    (tmp_path / "lock").write_text("{")
    (beat := threading.Timer(0.3, os.utime, [tmp_path / "lock"])).start()
    with pytest.raises(RunFolderBusyError, match="that has not written its name yet"):
        RunLock(tmp_path).__enter__()
    beat.join()


def test_heartbeats_and_a_lock_removed_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    beats = threading.Semaphore(0)
    with RunLock(tmp_path) as lock:
        lock.on_heartbeat = beats.release
        os.utime(tmp_path / "lock", (0, 0))
        assert all(beats.acquire(timeout=10) for _ in range(3))
        assert time.time() - (tmp_path / "lock").stat().st_mtime < 10
        (tmp_path / "lock").unlink()
        assert all(beats.acquire(timeout=10) for _ in range(3))
        assert (tmp_path / "lock").exists() and not lock.lost
        lock.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moved", [False, True])
def test_a_folder_removed_or_moved_is_held_anew_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moved: bool
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    folder, told = tmp_path / "run", threading.Event()
    with RunLock(folder) as lock:
        lock.on_new_folder = lambda text: told.set()
        if moved:
            folder.rename(tmp_path / "moved")
        else:
            shutil.rmtree(folder)
        assert told.wait(timeout=10)
        lock.check()
        with pytest.raises(RunFolderBusyError, match="is being written by"):
            RunLock(folder).__enter__()
    assert capsys.readouterr().err.count("was removed or moved while this run writes it") == 1


class Flaky:
    """Raises `error` the first three times it is called; an OSError in other words each time, as
    those have that name a temporary file."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls, self.worked = 0, threading.Semaphore(0)

    def __call__(self, *given: Any) -> None:
        self.calls += 1
        if self.calls <= 3:
            if isinstance(self.error, OSError) and self.calls > 1:
                raise OSError(f"disk full: {self.calls}")
            raise self.error
        self.worked.release()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyError("state")])
def test_what_fails_at_a_heartbeat_is_told_and_does_not_end_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    folder, record, status = tmp_path / "run", Flaky(error), Flaky(error)
    with RunLock(folder) as lock:
        lock.on_new_folder, lock.on_heartbeat = record, status
        assert status.worked.acquire(timeout=10)
        shutil.rmtree(folder)
        assert record.worked.acquire(timeout=10)
        os.utime(folder / "lock", (0, 0))
        assert all(status.worked.acquire(timeout=10) for _ in range(status.calls + 3))
        assert time.time() - (folder / "lock").stat().st_mtime < 10
    assert record.calls == 4  # and not again once it has worked
    told = capsys.readouterr().err
    said = f"failed: {type(error).__name__}: {error}. It is tried again every 0.02 s"
    assert told.count("It is tried again every") == 2
    for what in ("what a new run folder needs", "what is done at a heartbeat"):
        assert told.count(f"WARNING: run_dir={folder}: {what} {said}") == 1


def test_a_new_folder_that_cannot_be_opened_at_once_is_held_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What NFS answers for a while, put in by hand. The descriptor of the old folder stays open
    meanwhile: its number could be another file's, which the next heartbeat would close."""
    folder, refused = tmp_path / "run", list[Any]()
    real = os.open

    def refuse_twice(path: Any, *given: Any, **named: Any) -> int:
        if Path(path) == folder and len(refused) < 2:
            refused.append(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, *given, **named)

    with RunLock(folder) as lock:
        before = lock._folder
        shutil.rmtree(folder)
        monkeypatch.setattr(os, "open", refuse_twice)
        for _ in range(2):
            with pytest.raises(OSError, match="Stale file handle"):
                lock._renew()
            assert lock._folder == before and os.fstat(before).st_nlink == 0
        assert lock._renew() and len(refused) == 2
        assert os.path.samestat(folder.stat(), os.fstat(lock._folder))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(before)  # given back, and once


@pytest.mark.parametrize("by", ["its lock", "its record"])
def test_another_run_in_the_place_of_a_moved_folder_is_not_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
    folder, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    if by == "its lock":
        write_lock(other)
    else:
        (other / "run.json").write_text("{}")
    before = sorted(path.name for path in other.iterdir())
    with RunLock(folder) as lock:
        monkeypatch.setattr(lock, "_renew", lambda: True)  # no heartbeat between the two renames
        folder.rename(tmp_path / "moved")
        other.rename(folder)
        monkeypatch.undo()
        monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.02)
        deadline = time.monotonic() + 10
        while not lock.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RunFolderBusyError, match="removed or moved"):
            lock.check()
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_claim_left_by_a_killed_starter_blocks_nobody(tmp_path: Path) -> None:
    """It was killed between its claim to a dead run's lock and the rename."""
    write_lock(tmp_path, token="dead", **DEAD_HERE)
    write_lock(tmp_path, token="killed", **DEAD_HERE)
    (tmp_path / "lock").rename(tmp_path / "lock.after-dead")
    write_lock(tmp_path, token="dead", **DEAD_HERE)
    with RunLock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_one_who_judged_an_earlier_holder_does_not_take_the_next_one_s(tmp_path: Path) -> None:
    """Between its judgement and its claim another one has taken over."""
    write_lock(tmp_path, token="dead", **DEAD_HERE)
    late, quick = LockFile(tmp_path / "lock"), LockFile(tmp_path / "lock")
    asked = []

    def is_dead(path: Path, holder: dict[str, Any]) -> bool:
        asked.append(holder["token"])
        if len(asked) == 1:
            assert quick.take(lambda *_: True)
            return True
        return holder["token"] == "dead"

    assert not late.take(is_dead)
    assert quick.is_ours() and asked[0] == "dead"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


STARTERS, ROUNDS = 8, 25


def start(run_dir: Path, barrier: Any, results: Any) -> None:
    for number in range(ROUNDS):
        barrier.wait()  # the parent has laid out the folder
        lock, won = RunLock(run_dir / str(number)), True
        try:
            lock.__enter__()
        except RunFolderBusyError:
            won = False
        barrier.wait()  # everybody has tried
        results.put((number, won))
        if won:
            lock.__exit__(None, None, None)


@pytest.mark.parametrize("before", ["nothing", "dead here", "silent elsewhere", "unreadable"])
def test_of_many_starters_exactly_one_wins(tmp_path: Path, before: str) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(STARTERS + 1), context.SimpleQueue()
    processes = [
        context.Process(target=start, args=(tmp_path, barrier, results)) for _ in range(STARTERS)
    ]
    for process in processes:
        process.start()
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        if before == "dead here":
            write_lock(folder, **DEAD_HERE)
        elif before == "silent elsewhere":
            write_lock(folder, age=1000, **ELSEWHERE)
        elif before == "unreadable":
            (folder / "lock").write_text("")
            os.utime(folder / "lock", (0, 0))
        barrier.wait()
        barrier.wait()
        outcomes = [results.get() for _ in range(STARTERS)]
        assert sorted(outcomes) == [(number, False)] * (STARTERS - 1) + [(number, True)]
    for process in processes:
        process.join()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_made_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for run_dir, said in (
        (tmp_path / "file", f"{tmp_path / 'file'} is a file; name a folder"),
        (tmp_path / "file" / "run", f"{tmp_path / 'file'} is a file; name a folder"),
        (tmp_path / ("a" * 300), f"cannot be written below {tmp_path} (File name too long)"),
        (Path("/proc/run"), "cannot be written below /proc (No such file or directory)"),
    ):
        with pytest.raises(ConfigError) as refused:
            RunLock(run_dir).__enter__()
        assert str(refused.value).startswith(f"run_dir={run_dir}: {said}")


def test_a_full_or_read_only_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        with suppress(OSError), open(disk / "fills", "wb") as file:
            file.write(bytes(2 << 20))
        with pytest.raises(
            ConfigError, match=f"^no space left on the file system of run_dir={disk}"
        ):
            RunLock(disk / "run").__enter__()
        assert not (disk / "run").exists()
        read_only(disk)
        with pytest.raises(ConfigError, match=f"^run_dir={disk}/run: {disk} may not be written"):
            RunLock(disk / "run").__enter__()


def test_a_folder_of_its_own_making_that_stays_empty_goes(tmp_path: Path) -> None:
    for name, made_before, written in (("a", False, False), ("b", True, False), ("c", False, True)):
        run_dir = tmp_path / name
        if made_before:
            run_dir.mkdir()
        with RunLock(run_dir):
            assert run_dir.is_dir()
            if written:
                (run_dir / "config.yaml").write_text("")
        assert run_dir.exists() == (made_before or written)
