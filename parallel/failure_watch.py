"""When one rank fails, all end, and say which one it was and where.

A rank that raises while the others wait for it in a collective would leave them there until the
collective's timeout, and then with an error about a closed connection. Here a failing rank first
leaves a note in the store that all ranks share. The others find it in two ways: as the reason of
their own error, when the connection breaks under them (`PeerFailed`), or by a thread that looks
every few seconds, and ends a process whose main thread is still stuck after a grace time.

A rank that is killed leaves no note; then the first error anywhere is taken for the cause.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from parallel.runtime import Runtime

KEY = "failure"
ROOT = Path(__file__).resolve().parent.parent
# Seconds a stuck rank has after another's failure to notice by itself: connections break on their
# own when the failing process ends, which is the gentler way.
GRACE_SECONDS = 10.0
# Store look-ups a second, over all ranks; one of them hosts the store.
LOOKS_PER_SECOND = 50.0


class PeerFailed(RuntimeError):
    """This rank stopped because another one failed; the message names it, its error and place."""


class FailureWatch:
    """Around everything ranks do together after start-up:

        with FailureWatch(runtime):
            ...

    Raises PeerFailed in place of any error of the body that another rank's failure came before.
    """

    def __init__(self, runtime: Runtime, *, grace_seconds: float = GRACE_SECONDS) -> None:
        self.rank = runtime.rank
        self.store = runtime.store
        self._world_size = runtime.world_size
        self.grace_seconds = grace_seconds
        self.interval = max(1.0, runtime.world_size / LOOKS_PER_SECOND)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="failure watch")

    def __enter__(self) -> FailureWatch:
        global _current
        _current = self
        if self._world_size > 1:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        global _current
        _current = None
        self._ended.set()
        if error is None or isinstance(error, KeyboardInterrupt | SystemExit):
            return
        first = self.announce(error)
        if first is not None and first["rank"] != self.rank:
            raise PeerFailed(
                f"{_describe(first)}\n  rank {self.rank} was at {_place(error)}"
            ) from None

    def announce(self, error: BaseException) -> dict[str, Any] | None:
        """Leave a note of this rank's failure, unless there is one; returns the one that stands.

        None where the store is gone, and with it the rank that hosts it.
        """
        note = {
            "rank": self.rank,
            "host": platform.node(),
            "error": f"{type(error).__name__}: {str(error).strip() or '(no message)'}",
            "place": _place(error),
        }
        with suppress(dist.DistError):
            return json.loads(self.store.compare_set(KEY, "", json.dumps(note)))
        return None

    def withdraw(self) -> None:
        """Take this rank's note back: all ranks have learnt of the failure and deal with it."""
        with suppress(dist.DistError):
            note = self._note()
            if note is not None and note["rank"] == self.rank:
                self.store.set(KEY, "")

    def _note(self) -> dict[str, Any] | None:
        if not self.store.check([KEY]):
            return None
        text = self.store.get(KEY)
        return json.loads(text) if text else None

    def _look(self) -> None:
        while not self._ended.wait(self.interval):
            with suppress(dist.DistError):  # a store that has hiccups, or has gone
                note = self._note()
                if note is None or note["rank"] == self.rank:
                    continue
                if self._ended.wait(self.grace_seconds):
                    return  # the main thread has noticed
                if self._note() == note:
                    self._end_stuck_process(note)

    def _end_stuck_process(self, note: dict[str, Any]) -> None:
        print(
            f"PeerFailed: {_describe(note)}\n  rank {self.rank} was still waiting after "
            f"{self.grace_seconds:g} s and ends now; its stack:",
            file=sys.__stderr__,
            flush=True,
        )
        faulthandler.dump_traceback(file=2, all_threads=True)  # file descriptor of stderr
        os._exit(1)


_current: FailureWatch | None = None


def current() -> FailureWatch | None:
    """The watch this process is under, if any."""
    return _current


def _describe(note: dict[str, Any]) -> str:
    return f"rank {note['rank']} on {note['host']} failed: {note['error']}\n  at {note['place']}"


def _place(error: BaseException) -> str:
    """The innermost line of this project's code that the error came through."""
    place = "an unknown place"
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            place = f"{path.relative_to(ROOT)}:{frame.lineno}, in {frame.name}"
    return place
