"""Whole runs on forked processes: `torchrun launch/pretrain.py ...` without its start-up.

Every process of a torchrun imports torch and megatron-core anew, 6 s each on a busy core. Here they
are forked from one that has imported all. What is left out is torchrun itself (its store, its
signals, its restarts): tests of those start it.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.ports import free_port

# before torch: forked children must not inherit a pool of OpenMP threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]


class ForkedRun:
    """`ranks` processes that each call `body`, in one world on this machine; started at once.

    Use it as a context manager: whoever is left at the end is killed.

    Args:
        body: called in each child after RANK and the like are set; what it raises ends the child
            with exit code 1 and a traceback in its output, SystemExit with its code.
        environment: set on top of this process's.
        folder: for the output of each rank, "rank0.log" and so on; appended to.
    """

    def __init__(
        self, ranks: int, body: Callable[[], object], environment: dict[str, str], folder: Path
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        _warm_up()
        port = free_port()
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.pids = [
            _fork(body, environment | world | {"RANK": str(r), "LOCAL_RANK": str(r)}, self.log(r))
            for r in range(ranks)
        ]
        self.codes: dict[int, int] = {}  # rank -> exit code, negative for a signal

    def log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"

    def output(self) -> str:
        return "\n".join(
            f"---- rank {rank} ----\n{self.log(rank).read_text()}" for rank in range(len(self.pids))
        )

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, timeout: float = 120.0, *, rank: int | None = None) -> list[int]:
        """Exit codes by rank; those there are as soon as `rank` has ended, if it is given."""
        deadline = time.monotonic() + timeout
        while not self.poll() and rank not in self.codes:
            if time.monotonic() > deadline:
                raise TimeoutError(f"still running after {timeout:g} s\n{self.output()}")
            time.sleep(0.005)
        return [code for _, code in sorted(self.codes.items())]

    def signal(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if rank not in self.codes:
                os.kill(self.pids[rank], number)

    def kill(self) -> None:
        self.poll()
        self.signal(signal.SIGKILL)
        self.wait()

    def __enter__(self) -> ForkedRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def launcher(*settings: str) -> Callable[[], None]:
    """What `python launch/pretrain.py SETTINGS` does."""

    def body() -> None:
        import launch.pretrain

        sys.argv = ["launch/pretrain.py", *settings]
        launch.pretrain.main()

    return body


@functools.cache
def _warm_up() -> None:
    """Import once, in the parent, what a run imports; torch._dynamo is the first optimizer's."""
    needed = ("torch._dynamo", "matplotlib.figure", "wandb", "pretrain.run")
    for name in (*needed, "launch.pretrain"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the children's collections leave these pages shared


def _fork(body: Callable[[], object], environment: dict[str, str], log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()  # as under torchrun
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        os.environ.update(environment)
        os.chdir(ROOT)
        body()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no handlers that the parent registered
    return 0
