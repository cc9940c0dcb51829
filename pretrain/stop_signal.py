"""SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 end a run cleanly: finish the step, save, leave.

What arrives, and when (read in torch 2.13's elastic agent and watched with `torchrun`):

- torchrun starts each worker in a session of its own. Ctrl-C in the terminal reaches torchrun
  alone, which forwards SIGINT (or SIGTERM, SIGHUP, SIGQUIT: whatever it received of these) to the
  process group of each worker, so to a worker's children too. W&B's service has its own session
  and is spared.
- It then waits 30 s for all workers together, and sends SIGKILL to those still alive. The step in
  flight and the save must fit: `torchrun --shutdown-timeout=SECONDS` or the environment variable
  TORCH_ELASTIC_SHUTDOWN_TIMEOUT give more time.
- torchrun itself ends with a SignalException traceback and exit status 1, also when every worker
  left with 0.
- A second Ctrl-C makes torchrun send SIGTERM and wait another 30 s. A third ends torchrun and
  leaves the workers running without a parent.
- SLURM (scancel, time limit) signals every process of the step, torchrun included: each worker
  gets the same signal twice within milliseconds. KillWait (default 30 s) later comes SIGKILL.
- SIGUSR1 is what SLURM is asked to send some time before the limit (--signal). It ends torchrun,
  which does not handle it and leaves its workers behind, unless torchrun was started with it
  ignored: `bash -c 'trap "" USR1 USR2; exec torchrun ...'`. Its workers inherit that, and what
  comes before their own handler is lost: enter StopSignal before the long imports, and let the
  batch script repeat the signal until the job step ends.
- When one worker fails, torchrun sends SIGTERM to the others. Those that wait in a collective for
  the dead one see it only when the collective fails; torchrun kills them after its 30 s.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

# Signals this close together are one request that arrived twice (SLURM's and torchrun's copy).
REPEAT_SECONDS = 1.0

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_END = b"\0"  # no signal has number 0


def _print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class StopSignal:
    """Context manager that turns stop signals into a flag, and impatience into an exit.

    The first signal sets `requested`. Where SIGINT is involved (a person at a terminal), a further
    signal at least REPEAT_SECONDS later ends the process at once with status 128 + signal, without
    clean-up. Others that are repeated are ignored: they come from batch systems, which follow with
    SIGKILL.

    Ranks do not receive signals during the same step, and a rank that stops alone leaves the
    others waiting in a collective: the decision to stop is made by all, not by `requested`.

    Python runs signal handlers in the main thread between bytecodes, hence not while that thread
    waits in a collective. The flag can wait; aborting cannot, so a thread of its own sees to that.

    Use it in the main thread (Python raises ValueError elsewhere), on every rank. The handlers and
    the wake-up descriptor found on entry are put back on exit.

    Args:
        announce: told, once, in one sentence and from another thread, that the run will stop; give
            it on one rank. Default: print to stderr. None: silent.
    """

    def __init__(self, announce: Callable[[str], None] | None = _print_to_stderr) -> None:
        self._announce = announce
        self._number = 0  # of the first signal; 0: none

    @property
    def requested(self) -> str | None:
        """Name of the signal this process received first, such as "SIGINT"; None: none yet."""
        return signal.Signals(self._number).name if self._number else None

    def __enter__(self) -> "StopSignal":
        self._number = 0
        # The interpreter writes each signal's number into the pipe from its C-level handler, even
        # while the main thread is deep in C++: that is what wakes the watching thread.
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old_handlers: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._set_flag) for number in _STOP_SIGNALS
        }
        self._watcher = threading.Thread(
            target=self._watch, args=(read_end,), name="stop-signal", daemon=True
        )
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        # A word of its own ends the watcher: children forked meanwhile hold the pipe open too, so
        # closing it would not.
        os.write(self._write_end, _END)
        self._watcher.join(timeout=5)
        os.close(self._write_end)

    def _set_flag(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number

    def _watch(self, read_end: int) -> None:
        first: int | None = None
        first_time = 0.0
        try:
            while numbers := os.read(read_end, 64):
                now = time.monotonic()
                for number in numbers:
                    if number == _END[0]:
                        return
                    if number not in _STOP_SIGNALS:  # some other handler's business
                        continue
                    if first is None:
                        first, first_time = number, now
                        self._say(number)
                    elif now - first_time >= REPEAT_SECONDS and signal.SIGINT in (first, number):
                        os._exit(128 + number)
        finally:
            os.close(read_end)

    def _say(self, number: int) -> None:
        if self._announce is None:
            return
        text = f"{signal.Signals(number).name}: stopping after this step, then saving."
        if number == signal.SIGINT:
            text += " Press Ctrl-C again to leave at once, without saving."
        self._announce(text)


def stop_signal() -> StopSignal:
    """The one of a run: rank 0 says on standard output that the run will stop."""
    first = os.environ.get("RANK", "0") == "0"
    return StopSignal(announce=partial(print, flush=True) if first else None)
