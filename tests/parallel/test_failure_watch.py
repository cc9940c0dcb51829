"""One rank fails: all end soon, and say which one it was and where."""

import re
import time

import pytest
import torch
import torch.distributed as dist

from parallel import failure_watch
from parallel.checkpoint_io import CheckpointError, _on_every_rank
from parallel.config import ParallelConfig
from parallel.failure_watch import FailureWatch
from parallel.runtime import initialize
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
        with pytest.raises(CheckpointError, match="rank 1: OSError: disk full"):
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
