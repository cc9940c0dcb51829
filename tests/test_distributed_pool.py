"""The pool of gloo workers itself: values, failures, hangs, and nothing left behind."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.megatron import parallel_state
from parallel.runtime import initialize, shutdown
from tests.distributed import MAX_THREADS, MAX_WORKERS, RankFailed, _pool, close_pool, run_on_gloo


def sum_of_ranks(offset: torch.Tensor) -> dict[str, object]:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return {"total": total, "rank": dist.get_rank(), "pid": os.getpid()}


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ArithmeticError(f"no number on rank {rank}")
    dist.barrier()


def raise_everywhere() -> None:
    raise ArithmeticError(f"no number on rank {dist.get_rank()}")


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)  # a marker to find in the stack
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leave_with(code: int) -> None:
    os._exit(code)


def leave_a_mess() -> None:
    initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.float64)


def what_is_left() -> tuple[bool, bool, torch.dtype]:
    groups = parallel_state.model_parallel_is_initialized()
    return groups, "LEFT_BEHIND" in os.environ, torch.get_default_dtype()


def make_a_closure() -> object:
    return lambda: None


def nothing() -> None:
    pass


def workers() -> list[int]:
    return [worker.process.pid for worker in _pool.workers]


@pytest.mark.parametrize("world_size", [1, 2, MAX_WORKERS])
def test_results_come_back_by_rank_and_by_value(world_size: int) -> None:
    results = run_on_gloo(world_size, sum_of_ranks, torch.tensor([1.0, 2.0]))
    ranks = sum(range(world_size))
    for rank, result in enumerate(results):
        assert result["rank"] == rank
        expected = torch.tensor([world_size + ranks, 2.0 * world_size + ranks])
        torch.testing.assert_close(result["total"], expected)
    assert len({result["pid"] for result in results}) == world_size


def test_workers_are_kept_between_jobs() -> None:
    first = [r["pid"] for r in run_on_gloo(2, sum_of_ranks, torch.zeros(1))]
    started = time.monotonic()
    second = [r["pid"] for r in run_on_gloo(2, sum_of_ranks, torch.zeros(1))]
    assert second == first
    assert time.monotonic() - started < 5.0  # milliseconds on an idle machine


def test_a_job_leaves_nothing_behind() -> None:
    run_on_gloo(2, leave_a_mess)
    assert run_on_gloo(2, what_is_left) == [(False, False, torch.float32)] * 2


def variable(name: str) -> str | None:
    return os.environ.get(name)


def test_a_job_has_the_environment_of_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    close_pool()
    monkeypatch.setenv("OF_ONE_TEST", "when the workers were forked")
    assert run_on_gloo(1, variable, "OF_ONE_TEST") == ["when the workers were forked"]
    monkeypatch.delenv("OF_ONE_TEST")
    assert run_on_gloo(1, variable, "OF_ONE_TEST") == [None]
    monkeypatch.setenv("OF_ONE_TEST", "later")
    assert run_on_gloo(1, variable, "OF_ONE_TEST") == ["later"]


def test_a_failing_rank_shows_its_traceback_and_the_pool_recovers() -> None:
    run_on_gloo(2, nothing)
    before = workers()
    with pytest.raises(RankFailed, match=r"raise_on failed on rank\(s\) \[1\] of 2") as caught:
        run_on_gloo(2, raise_on, 1)
    assert list(caught.value.reports) == [1]
    assert "ArithmeticError: no number on rank 1" in str(caught.value)
    assert "in raise_on" in str(caught.value)
    assert not set(before[:2]) & set(workers())
    assert [r["rank"] for r in run_on_gloo(2, sum_of_ranks, torch.zeros(1))] == [0, 1]


def test_every_rank_that_fails_is_shown() -> None:
    with pytest.raises(RankFailed) as caught:
        run_on_gloo(2, raise_everywhere)
    assert "no number on rank 0" in caught.value.reports[0]
    assert "no number on rank 1" in caught.value.reports[1]


def test_a_hang_is_killed_and_shows_every_stack() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match="hang_on hung: still busy after timeout=1") as caught:
        run_on_gloo(2, hang_on, 1, timeout=1.0)
    assert time.monotonic() - started < 10.0
    assert "in hang_on" in caught.value.reports[1]
    assert "barrier" in caught.value.reports[0]


def test_a_worker_that_dies_is_named_with_its_signal() -> None:
    with pytest.raises(RankFailed) as caught:
        run_on_gloo(2, die_on, 1)
    assert "ended by SIGKILL" in caught.value.reports[1]
    with pytest.raises(RankFailed, match="left by itself with exit code 7"):
        run_on_gloo(1, leave_with, 7)


def test_functions_that_cannot_be_sent_are_refused() -> None:
    with pytest.raises(TypeError, match="top level of an importable module"):
        run_on_gloo(1, make_a_closure())


@pytest.mark.parametrize("world_size", [0, MAX_WORKERS + 1])
def test_impossible_world_sizes_are_refused(world_size: int) -> None:
    with pytest.raises(ValueError, match=f"world_size={world_size} is not in 1..MAX_WORKERS"):
        run_on_gloo(world_size, nothing)


def test_a_parent_with_a_process_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    runtime = initialize(ParallelConfig(), seed=1)
    try:
        with pytest.raises(RuntimeError, match="holds a process group itself"):
            run_on_gloo(1, nothing)
    finally:
        shutdown(runtime)
    run_on_gloo(1, nothing)


def test_the_pool_can_be_closed_and_used_again() -> None:
    run_on_gloo(1, nothing)
    pids = workers()
    close_pool()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    run_on_gloo(1, nothing)


def leave_threads(count: int) -> None:
    if dist.get_rank() == 1:
        for _ in range(count):
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()


def test_a_worker_full_of_threads_is_replaced() -> None:
    run_on_gloo(2, leave_threads, 10)
    before = workers()
    run_on_gloo(2, leave_threads, MAX_THREADS)
    run_on_gloo(2, nothing)
    first, *others = workers()
    assert first == before[0] and before[1] not in others
