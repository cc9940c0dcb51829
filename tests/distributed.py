"""Real gloo processes for tests: `run_on_gloo(2, function, ...)` calls function on two ranks.

The workers are forked once from a process that has torch and megatron-core imported already, and
stay alive over the session, each waiting for its next job. Measured on 2 cores, after the first
job: 40 ms with 2 ranks and 130 ms with 8 for a job that does one all-reduce (120 and 350 ms if
the workers were forked anew for each job); 0.25 and 0.75 s with `parallel.runtime.initialize` in
it. Failed jobs lose their workers; a new one is forked in 10 ms.

A job's function is sent by its importable name: it must sit at the top level of a module. It has
the environment variables that the caller has, not those its worker was forked with. What a
job leaves behind in its process (process groups, megatron-core's state, environment variables,
seeds, a running `parallel.runtime`) is taken away afterwards; modules it patched are not. A worker
that gathers threads nevertheless is replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import IO, Any

# before torch is imported: forked children must not inherit a pool of OpenMP threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

MAX_WORKERS = 8
# A worker with more than these is replaced. DeepSpeed's hooks keep each engine's groups, 48 threads
# of gloo's that wake up all the time: two thousand of them left a machine of two cores no time.
MAX_THREADS = 300
# After the first failure, how long the other ranks have to report theirs before they are killed.
_GRACE_SECONDS = 0.3
_FORK = multiprocessing.get_context("fork")


class RankFailed(Exception):
    """A job raised, died or hung on some ranks. `reports` maps each of those ranks to its text."""

    def __init__(self, headline: str, reports: dict[int, str]) -> None:
        self.reports = reports
        parts = [f"---- rank {rank} ----\n{text.rstrip()}" for rank, text in reports.items()]
        super().__init__("\n".join([headline, *parts]))


def run_on_gloo(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """`function(*args)` on `world_size` ranks of a fresh gloo process group; results by rank.

    The default process group exists, so `parallel.runtime.initialize` uses it; RANK, WORLD_SIZE
    and LOCAL_RANK are set. Arguments and results are pickled by value, tensors too.

    Raises:
        RankFailed: a rank raised (its traceback is in the message), died, or was still busy
            after `timeout` seconds (each rank's Python stack is in the message). The workers of
            that job are killed and replaced.
        TypeError: the function or its arguments cannot be sent.
        ValueError: `world_size` is not in 1..MAX_WORKERS.
        RuntimeError: the calling process has a default process group of its own.
    """
    return _pool.run(world_size, function, args, timeout)


def close_pool() -> None:
    """End all workers; the next `run_on_gloo` starts new ones."""
    _pool.close()


@dataclass
class _Worker:
    process: Any  # multiprocessing's ForkProcess
    connection: Connection
    stacks: IO[bytes]  # where the worker writes its stack on SIGUSR1

    def stack(self) -> str:
        """The Python stack of every thread of the worker, even if it is stuck in C++."""
        assert self.process.pid is not None
        self.stacks.seek(0, os.SEEK_END)
        start = self.stacks.tell()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        text = b""
        for _ in range(50):  # up to 1 s: a stopped process answers nothing
            time.sleep(0.02)
            self.stacks.seek(start)
            previous, text = text, self.stacks.read()
            if text and text == previous:
                break
        return text.decode(errors="replace") or "(no stack: the process does not answer)"

    @property
    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.stacks.close()


class _Pool:
    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        self._warm = False

    def run(
        self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float
    ) -> list[Any]:
        if not 1 <= world_size <= MAX_WORKERS:
            raise ValueError(f"world_size={world_size} is not in 1..MAX_WORKERS={MAX_WORKERS}")
        try:
            job = pickle.dumps((function, args))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"run_on_gloo cannot send {function!r} with its arguments: {error}. The function"
                " must be at the top level of an importable module, the arguments picklable."
            ) from error
        self._warm_up()
        import torch.distributed as dist

        if dist.is_initialized():  # a forked worker would inherit half of it
            raise RuntimeError(
                "run_on_gloo: this process holds a process group itself; call"
                " parallel.runtime.shutdown (or destroy_process_group) before."
            )
        self.workers = [w for w in self.workers if w.process.is_alive()]
        while len(self.workers) < world_size:
            self.workers.append(self._fork())
        team = self.workers[:world_size]
        try:
            # A file, because each connection to a TCPStore costs reverse DNS lookups, and a
            # nameserver that drops one costs 5 s.
            with tempfile.TemporaryDirectory(prefix="gloo-") as folder:
                store_path = os.path.join(folder, "store")
                results = self._run_on(team, store_path, job, timeout, function.__qualname__)
        except BaseException:  # also pytest-timeout and Ctrl-C: nobody stays busy
            for worker in team:
                worker.kill()
            self.workers = self.workers[world_size:]
            raise
        crowded = [worker for worker in team if worker.threads > MAX_THREADS]
        for worker in crowded:
            worker.kill()
        self.workers = [worker for worker in self.workers if worker not in crowded]
        return results

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def _warm_up(self) -> None:
        """Import once what every worker needs, in the parent, before the first fork."""
        if self._warm:
            return
        import torch

        torch.set_num_threads(1)
        # _dynamo is what the first optimizer of a process imports: 0.8 s once instead of per rank
        for name in ("torch._dynamo", "parallel.megatron", "parallel.runtime"):
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # the children's collections leave these pages shared
        self._warm = True

    def _fork(self) -> _Worker:
        ours, theirs = _FORK.Pipe()
        # a worker that held the others' pipes would keep them from seeing the parent's end
        inherited = [ours, *(worker.connection for worker in self.workers)]
        stacks = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by kill()
        process = _FORK.Process(target=_work, args=(theirs, inherited, stacks))
        process.start()
        theirs.close()
        return _Worker(process, ours, stacks)

    def _run_on(
        self, team: list[_Worker], store_path: str, job: bytes, timeout: float, name: str
    ) -> list[Any]:
        world_size = len(team)
        environment = dict(os.environ)
        deadline = time.monotonic() + timeout
        for rank, worker in enumerate(team):
            worker.connection.send((store_path, rank, world_size, timeout, environment, job))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        busy = dict(enumerate(team))
        while busy:
            ready = wait([w.connection for w in busy.values()], deadline - time.monotonic())
            if not ready:
                break
            for rank, worker in list(busy.items()):
                if worker.connection not in ready:
                    continue
                try:
                    kind, content = worker.connection.recv()
                except EOFError:
                    worker.process.join()
                    kind, content = "failure", _epitaph(worker.process.exitcode)
                del busy[rank]
                if kind == "result":
                    results[rank] = pickle.loads(content)
                    continue
                if not failures:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                failures[rank] = content
        if failures:
            raise RankFailed(
                f"{name} failed on rank(s) {sorted(failures)} of {world_size}", failures
            )
        if busy:
            raise RankFailed(
                f"{name} hung: still busy after timeout={timeout:g} s on rank(s) {sorted(busy)}"
                f" of {world_size}",
                {rank: worker.stack() for rank, worker in busy.items()},
            )
        return [results[rank] for rank in range(world_size)]


_pool = _Pool()
# registered after multiprocessing's own handler, hence run before it: that one would wait
atexit.register(close_pool)


def _epitaph(exitcode: int) -> str:
    if exitcode < 0:
        return f"the process was ended by {signal.Signals(-exitcode).name}"
    return f"the process left by itself with exit code {exitcode}"


def _work(connection: Connection, inherited: list[Connection], stacks: IO[bytes]) -> None:
    """A worker's life: jobs from the pipe until the parent is gone."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    gc.freeze()
    try:
        while True:
            connection.send(_do(*connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        os._exit(0)  # no destructors, no handlers the parent registered


def _do(
    store_path: str,
    rank: int,
    world_size: int,
    timeout: float,
    environment: dict[str, str],
    job: bytes,
) -> tuple[str, Any]:
    import torch
    import torch.distributed as dist

    try:
        # before the job and not after it: what the caller changed since this worker was forked, too
        os.environ.clear()
        os.environ.update(environment)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store_path, world_size),
            rank=rank,
            world_size=world_size,
            # longer than the job's: what hangs shows the collective it hangs in, not its time-out
            timeout=timedelta(seconds=timeout + 5.0),
        )
        torch.manual_seed(0)
        _forget_the_loss_scale()  # which this worker has from the process it was forked from
        function, args = pickle.loads(job)
        result = pickle.dumps(function(*args))
        if dist.is_initialized():
            dist.barrier()  # nobody takes connections down that another rank still uses
        _tidy_up()
        return "result", result
    except BaseException:
        # process groups stay as they are: the parent kills this worker
        return "failure", traceback.format_exc()


def _forget_the_loss_scale() -> None:
    if (megatron := sys.modules.get("parallel.megatron")) is not None:
        megatron.MoEAuxLossAutoScaler.main_loss_backward_scale = None


def _tidy_up() -> None:
    import torch
    import torch.distributed as dist

    from parallel import runtime
    from parallel.megatron import tensor_parallel

    _forget_the_loss_scale()
    if runtime._current is not None:
        runtime.shutdown(runtime._current)
    runtime._drop_model_parallel_groups()
    tensor_parallel.get_cuda_rng_tracker().reset()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    gc.collect()
