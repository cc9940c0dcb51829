"""Helper processes that live exactly as long as the rank that started them.

Imports nothing heavy: with the spawn method a helper imports this module and no more of ours.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.managers import SyncManager
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def results_queue(method: str) -> Any:
    """A queue served by a manager process that stays out of the way of signals.

    megatron-core's own manager is an ordinary child. When a batch system signals the process
    group so that the run saves and leaves, that child dies first and the save with it; and when
    the rank is killed, it stays behind for good and holds the rank's output open.

    Args:
        method: "fork", or "spawn" where a CUDA context must not be forked.
    """
    manager = SyncManager(ctx=multiprocessing.get_context(method))
    manager.start(initializer=outlive_signals_but_not_the_parent)
    return manager.Queue()


def outlive_signals_but_not_the_parent() -> None:
    """Run in the helper: ignore what asks the run to stop, die when the rank has died."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # the rank died before the line above
            os._exit(1)
