"""One rank fails: all end soon, and say which one it was and where."""

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel import failure_watch
from parallel.checkpoint_io import CheckpointError, _on_every_rank
from parallel.config import ParallelConfig
from parallel.failure_watch import FailureWatch, Note, PeerFailed
from parallel.progress_beacon import beacon
from parallel.runtime import Runtime, initialize
from tests.distributed import RankFailed, close_pool, run_on_gloo


def test_the_others_name_the_rank_its_error_and_its_place() -> None:
    # whether the connection breaks or the note is found first: rank 0 blames rank 1
    with pytest.raises(RankFailed) as caught:
        run_on_gloo(2, own_error_after_the_peers)
    reports = caught.value.reports
    assert "ValueError: my own error" not in reports[0].splitlines()[-1]
    assert "PeerFailed: rank 1 on " in reports[0]
    assert "failed: ValueError: this rank's batch is empty" in reports[0]
    assert re.search(r"at tests/parallel/test_failure_watch.py:\d+, in own_error", reports[0])
    assert "rank 0 was at tests/parallel/test_failure_watch.py" in reports[0]
    assert "this rank's batch is empty" in reports[1] and "PeerFailed" not in reports[1]


def own_error_after_the_peers() -> None:
    runtime = initialize(ParallelConfig(), seed=1)
    with FailureWatch(runtime):
        if runtime.rank == 1:
            raise ValueError("this rank's batch is empty")
        while not runtime.store.check([failure_watch.KEY]):
            time.sleep(0.01)
        raise RuntimeError("my own error: a connection was closed")


def stuck() -> None:
    runtime = initialize(ParallelConfig(), seed=1)
    with FailureWatch(runtime, grace_seconds=0.2):
        if runtime.rank == 0:
            dist.barrier()  # the other one never comes
        current = failure_watch.current()
        assert current is not None
        current.announce(ValueError("gone astray"))
        time.sleep(60)  # alive, so that no connection breaks


def test_a_stuck_rank_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    close_pool()  # workers forked before this test write to another stderr
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_on_gloo(2, stuck, timeout=60)
    assert time.monotonic() - started < 30
    assert "exit code 1" in caught.value.reports[0]
    said = capfd.readouterr().err
    assert re.search(r"PeerFailed: rank 1 on \S+ failed: ValueError: gone astray", said)
    assert "rank 0 was still waiting after 0.2 s and ends now" in said
    assert "in stuck" in said  # its stack


def failing_together() -> str:
    runtime = initialize(ParallelConfig(), seed=1)
    with FailureWatch(runtime, grace_seconds=0.1) as watch:
        with pytest.raises(CheckpointError, match=r"rank 1 on \S+: OSError: disk full"):
            _on_every_rank(fails_on_rank_one, "write")
        time.sleep(1.5)  # long enough for the thread to look
        assert watch._note() is None
        total = torch.ones(1)
        dist.all_reduce(total)
    return f"{total.item():g}"


def fails_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise OSError("disk full")


def test_a_failure_that_all_ranks_deal_with_ends_nobody() -> None:
    assert run_on_gloo(2, failing_together) == ["2", "2"]


def watched_alone() -> None:
    with FailureWatch(initialize(ParallelConfig(), seed=1)):
        raise ValueError("plain")


def test_alone_the_error_is_the_error() -> None:
    with pytest.raises(RankFailed, match="ValueError: plain"):
        run_on_gloo(1, watched_alone)


# ---- ranks that die without a word ----


def quick(runtime: Runtime, **settings: object) -> FailureWatch:
    """A watch that waits for seconds where a real one waits for tens of them."""
    quickly = {"heartbeat_interval_seconds": 0.4, "heartbeat_timeout_seconds": 2.0}
    return FailureWatch(runtime, **quickly | settings)  # type: ignore[arg-type]


def killed() -> None:
    runtime = initialize(ParallelConfig(), seed=1)
    with FailureWatch(runtime):
        if runtime.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()


def test_a_rank_that_is_killed_is_named_although_it_left_no_note() -> None:
    with pytest.raises(RankFailed) as caught:
        run_on_gloo(3, killed)
    reports = caught.value.reports
    assert "ended by SIGKILL" in reports[1]
    for survivor in (0, 2):
        said = reports[survivor]
        assert re.search(r"PeerFailed: rank 1 on \S+ died: its process has ended without", said)
        assert "found by rank" in said
        assert f"rank {survivor} was at tests/parallel/test_failure_watch.py" in said


def stopped() -> None:
    runtime = initialize(ParallelConfig(), seed=1)
    with quick(runtime), beacon.stage("forward_backward", 12):
        if runtime.rank == 2:
            time.sleep(1)  # long enough for a beat with its place
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


def test_a_rank_that_is_stopped_is_named_and_the_others_end(
    capfd: pytest.CaptureFixture[str],
) -> None:
    close_pool()  # workers forked before this test write to another stderr
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_on_gloo(3, stopped, timeout=60)
    assert time.monotonic() - started < 30
    reports = caught.value.reports
    ended = [rank for rank in (0, 1) if "exit code 1" in reports.get(rank, "")]
    assert ended  # the pool kills those who need more than a moment longer than the first
    said = capfd.readouterr().err
    assert re.search(r"PeerFailed: rank 2 on \S+ died: no sign of life for \d s", said)
    assert "at step 12, forward_backward" in said
    assert "was still waiting after 0.5 s and ends now" in said


def holding_the_lock() -> None:
    runtime = initialize(ParallelConfig(), seed=1)
    # once one rank has ended, the pool kills the others: let the guilty one speak first
    failure_watch.DEATH_GRACE_SECONDS = 4.0
    with quick(runtime):
        time.sleep(1)  # until its thread has given a sign of life
        if runtime.rank == 1:
            ctypes.PyDLL(None).sleep(30)  # a call into C that keeps Python's lock
        dist.barrier()


@pytest.mark.slow
def test_a_rank_that_keeps_the_lock_is_dead_and_its_stack_shows_the_call(
    capfd: pytest.CaptureFixture[str],
) -> None:
    close_pool()
    with pytest.raises(RankFailed):
        run_on_gloo(2, holding_the_lock, timeout=60)
    said = capfd.readouterr().err
    assert re.search(r"PeerFailed: rank 1 on \S+ died: no sign of life for \d s", said)
    assert "Timeout (0:00:02)!" in said
    assert "in holding_the_lock" in said.partition("Timeout (0:00:02)!")[2]


def announced() -> str:
    runtime = initialize(ParallelConfig(), seed=1)
    with quick(runtime) as watch:
        time.sleep(1)
        if runtime.rank == 1:
            with watch.pause(30.0):
                ctypes.PyDLL(None).sleep(4)
        dist.barrier()
        time.sleep(1)  # alive after it, too
    return "alive"


def test_a_rank_that_announces_to_keep_the_lock_is_alive(
    capfd: pytest.CaptureFixture[str],
) -> None:
    close_pool()
    assert run_on_gloo(2, announced) == ["alive", "alive"]
    assert "Timeout" not in capfd.readouterr().err


class SlowStore(dist.HashStore):
    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        time.sleep(0.1)
        return super().compare_set(key, expected, desired)


def reading_all_ranks() -> tuple[int, float]:
    runtime = initialize(ParallelConfig(), seed=1)
    watch = quick(replace(runtime, world_size=20, store=SlowStore()))
    watch._heartbeat.beats()
    faulthandler.cancel_dump_traceback_later()
    return watch._heartbeat._number, time.monotonic() - watch._answered


def test_a_rank_that_reads_a_slow_store_goes_on_beating() -> None:
    [(beats, since_answer)] = run_on_gloo(1, reading_all_ranks)
    assert beats >= 4  # in two seconds
    assert since_answer < 1


def busy() -> str:
    runtime = initialize(ParallelConfig(), seed=1)
    with quick(runtime, heartbeat_timeout_seconds=3.0):
        if runtime.rank == 0:
            dist.barrier()  # in C++, for longer than the timeout
        else:
            end = time.monotonic() + 4
            while time.monotonic() < end:
                gc.collect()
                time.sleep(0.05)
            dist.barrier()
        assert failure_watch.current() is not None
    return "alive"


def test_ranks_that_are_busy_or_wait_are_alive() -> None:
    assert run_on_gloo(2, busy) == ["alive", "alive"]


def leaving_early() -> str:
    runtime = initialize(ParallelConfig(), seed=1)
    with quick(runtime, heartbeat_timeout_seconds=3.0):
        if runtime.rank == 0:
            time.sleep(4)
    return "through"


def test_a_rank_that_is_through_is_not_missed() -> None:
    assert run_on_gloo(3, leaving_early) == ["through"] * 3


def resumed_too_late() -> str:
    runtime = initialize(ParallelConfig(), seed=1)
    watch = quick(runtime)
    note = Note("dead", [1], "there", "no sign of life for 9 s", "step 1")
    with watch:
        if runtime.rank == 1:
            watch._publish(runtime.store, note)  # what the others have found meanwhile
            time.sleep(60)
        dist.barrier()
    return "?"


def test_a_rank_that_comes_back_from_the_dead_ends_too(capfd: pytest.CaptureFixture[str]) -> None:
    close_pool()
    with pytest.raises(RankFailed) as caught:
        run_on_gloo(2, resumed_too_late, timeout=60)
    assert "exit code 1" in caught.value.reports[1]
    assert "rank 1 is that rank, or one of them" in capfd.readouterr().err


def nobody_is_to_blame() -> list[tuple[str, str]]:
    runtime = initialize(ParallelConfig(), seed=1)
    told: list[tuple[str, str]] = []
    watch = quick(runtime, report=lambda kind, text: told.append((kind, text)))
    with pytest.raises((RuntimeError, PeerFailed), match="gloo says so"), watch:
        if runtime.rank == 0:
            raise RuntimeError("Connection closed by peer, or gloo says so")
        time.sleep(3.5)
        assert watch._known.is_set()
        raise RuntimeError("broken pipe")
    return told


def test_a_broken_connection_that_nobody_broke_is_the_failure() -> None:
    first, second = run_on_gloo(2, nobody_is_to_blame)
    assert [kind for kind, _ in first] == ["error"]
    assert re.match(r"rank 0 on \S+ failed: RuntimeError: Connection closed by peer", first[0][1])
    assert second == []


# ---- hangs ----


def hanging(stacks: Path, guilty: int, report: Path) -> None:
    runtime = initialize(ParallelConfig(), seed=1)

    def write(kind: str, text: str) -> None:
        report.write_text(f"{kind} {text}")

    def last_words(error: PeerFailed) -> None:
        (report.parent / f"words{runtime.rank}").write_text(str(error))

    with quick(runtime, hang_timeout_seconds=1.5, stacks=stacks, report=write) as watch:
        watch.last_words = last_words
        with beacon.stage("optimizer", 6):
            dist.barrier()
        with beacon.stage("data", 7):
            if runtime.rank == guilty:
                asleep_over_the_data()
        with beacon.stage("forward_backward"):
            dist.all_reduce(torch.ones(1))


def asleep_over_the_data() -> None:
    time.sleep(60)


@pytest.mark.parametrize("guilty", [1, 0])
def test_a_hang_names_who_is_behind_and_keeps_the_stacks_of_all(
    guilty: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    close_pool()
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_on_gloo(3, hanging, tmp_path / "stacks", guilty, tmp_path / "report", timeout=60)
    assert time.monotonic() - started < 30
    assert "exit code 1" in "".join(caught.value.reports.values())
    report = (tmp_path / "report").read_text()
    assert re.match(rf"hang rank {guilty} on \S+ hangs: no rank has got on for \d s", report)
    assert "at step 7, data, last collective barrier 1 of default_pg (3 ranks)" in report
    others = "0, 2" if guilty == 1 else "1-2"
    waiting = "step 7, forward_backward, waiting in all_reduce 2 of default_pg (3 ranks)"
    assert f"ranks {others}: {waiting}" in report
    for rank in range(3):
        stack = (tmp_path / "stacks" / f"rank{rank:05d}.txt").read_text()
        assert ("in asleep_over_the_data" in stack) == (rank == guilty)
        assert "in hanging" in stack
    for words in tmp_path.glob("words*"):
        assert words.read_text() == report.removeprefix("hang ")
    assert list(tmp_path.glob("words*"))
    said = capfd.readouterr().err
    assert f"PeerFailed: rank {guilty} on " in said
    if f"rank {guilty} was still waiting" in said:  # the pool may have been faster
        assert "in asleep_over_the_data" in said


def hanging_at_the_end(report: Path) -> None:
    runtime = initialize(ParallelConfig(), seed=1)

    def write(kind: str, text: str) -> None:
        report.write_text(f"{kind} {text}")

    with quick(runtime, hang_timeout_seconds=1.5, report=write):
        with beacon.stage("optimizer", 6):
            dist.barrier()
        if runtime.rank == 0:
            time.sleep(30)


def test_ranks_that_are_through_do_not_hide_a_hang_at_the_end(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match="rank 0"):
        run_on_gloo(3, hanging_at_the_end, tmp_path / "report", timeout=60)
    assert time.monotonic() - started < 20
    report = (tmp_path / "report").read_text()
    assert re.match(r"hang rank 0 on \S+ hangs: no rank has got on for \d s, and this one", report)
    assert "ranks 1-2" not in report


def slow_but_moving() -> str:
    runtime = initialize(ParallelConfig(), seed=1)
    with FailureWatch(runtime, hang_timeout_seconds=1.5):
        time.sleep(5)  # before the first stage: preparing data takes its time
        with beacon.stage("forward_backward", 1):
            time.sleep(2)  # the first step has twice the time
        with beacon.stage("optimizer"):
            dist.barrier()
        with beacon.stage("evaluation"):
            for _ in range(20):
                time.sleep(0.3)
                if runtime.rank == 1:
                    beacon.tick()
    return "alive"


@pytest.mark.slow
def test_slow_is_not_hanging() -> None:
    assert run_on_gloo(2, slow_but_moving) == ["alive", "alive"]


# ---- the store is lost ----


def serve_a_store(pipe: Connection) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    time.sleep(120)


def without_a_store(port: int, pid: int, number: int, breaks: bool) -> None:
    runtime = initialize(ParallelConfig(), seed=1)
    base = dist.TCPStore(
        "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    with quick(replace(runtime, store=dist.PrefixStore("watch", base))):
        time.sleep(1)
        if runtime.rank == 0:
            os.kill(pid, number)
        if breaks:
            time.sleep(0.5)
            raise RuntimeError("gloo: Connection reset by peer")
        time.sleep(60)


@contextmanager
def a_store_elsewhere() -> Iterator[tuple[int, int]]:
    """(port, process) of a store in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=serve_a_store, args=(theirs,))
    server.start()
    assert server.pid is not None
    try:
        yield ours.recv(), server.pid
    finally:
        server.kill()
        server.join()


def waiting_for_a_key(port: int) -> str:
    runtime = initialize(ParallelConfig(), seed=1)
    base = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    with quick(replace(runtime, store=dist.PrefixStore("watch", base))):
        if runtime.rank == 0:
            with pytest.raises(dist.DistStoreError, match="timeout"):
                base.wait(["never set"], timedelta(seconds=4))  # new groups are made like this
        else:
            time.sleep(4)
    return "alive"


def test_a_thread_that_waits_in_the_store_does_not_hold_the_beats_up() -> None:
    with a_store_elsewhere() as (port, _):
        assert run_on_gloo(2, waiting_for_a_key, port) == ["alive", "alive"]


@pytest.mark.parametrize(
    ("number", "breaks"),
    [(signal.SIGKILL, True), (signal.SIGKILL, False), (signal.SIGSTOP, False)],
)
def test_ranks_that_cannot_reach_the_store_end_and_say_so(
    number: int, breaks: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    close_pool()
    started = time.monotonic()
    with a_store_elsewhere() as (port, pid), pytest.raises(RankFailed) as caught:
        run_on_gloo(2, without_a_store, port, pid, int(number), breaks, timeout=60)
    assert time.monotonic() - started < 30
    said = capfd.readouterr().err if not breaks else "".join(caught.value.reports.values())
    assert f"PeerFailed: the store on 127.0.0.1:{port} is out of reach: " in said
    assert "Rank 0 hosts it: its process or its host has died, or the network" in said
    if not breaks:
        assert "no answer for " in said


def threads_of_the_watch() -> list[str]:
    with FailureWatch(initialize(ParallelConfig(), seed=1), hang_timeout_seconds=600):
        return [thread.name for thread in threading.enumerate() if "watch" in thread.name]


def test_a_rank_alone_has_nobody_to_lose() -> None:
    assert run_on_gloo(1, threads_of_the_watch) == [["failure watch"]]
    assert run_on_gloo(2, threads_of_the_watch)[1] == ["failure watch", "store watch"]
