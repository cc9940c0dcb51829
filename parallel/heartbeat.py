"""Signs of life of all ranks through the store they share, and who has stopped giving them.

Every rank writes a beat every few seconds and reads that of one other, the next rank on a ring.
One neighbour is enough: wherever some ranks are dead and some alive, one that is alive is followed
by one that is dead. Only when its neighbour is late does a rank read the beats of all, so that all
who are silent are named, and not only the first of a dead host.

Load of the store, with the look for failure notes (`parallel.failure_watch`): five small requests
each heartbeat interval and rank, which no training thread waits for (docs/reliability.md).

Beats are compared by the reader's own monotonic clock: clocks of hosts need not agree.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from parallel.progress_beacon import Position

# Seconds a rank has between its first beat, which start-up sends, and those of its thread, which
# connects to the store first: where a nameserver does not answer, that takes 5 s or 10.
FIRST_BEAT_ALLOWANCE = 30.0
# Ranks on either side whose processes are looked for when connections break; a host has 8 GPUs.
NEAR = 8
# Ranks read in a row before the neighbour is read again: it may only have been the store that was
# slow, for everybody, and all ranks reading all others' beats would keep it so.
AT_ONCE = 32


@dataclass(frozen=True)
class Beat:
    """One sign of life: who gives it, and where that rank is."""

    number: int
    host: str
    machine: str  # equal only where process numbers mean the same
    pid: int
    born: str  # start of the process, in the kernel's ticks: tells a number used again
    left: bool  # the rank is through; it will give no more
    pause: float  # seconds for which it may give no more, and is not dead
    position: Position

    @classmethod
    def parse(cls, text: bytes) -> Beat:
        values = json.loads(text)
        return cls(**values | {"position": Position(**values["position"])})

    def process_is_gone(self) -> bool:
        """Whether this is a process of this machine that has ended."""
        return self.machine == _machine() and _start_of(self.pid) != self.born


class Heartbeat:
    """This rank's beats, and what it has heard of others.

    Args:
        store: a connection of its own: other threads' waiting would hold beats up.
        position: this rank's, sent along.
        timeout_seconds: silence that counts as death.
        look_seconds: between two calls of `dead`.
        answered: called whenever the store has answered a read; reading all ranks takes a while.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        position: Callable[[], Position],
        *,
        timeout_seconds: float,
        look_seconds: float,
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout_seconds
        self.look_seconds = look_seconds
        self.pause = 0.0  # seconds, told with every beat
        self._answered = answered
        self._position = position
        self._lock = threading.Lock()  # no thread overwrites a newer beat by an older one
        self._left = False
        self._number = 0
        self._neighbour = (rank + 1) % world_size
        self._heard: dict[int, tuple[Beat | None, float]] = {}  # what last changed, and when
        self._last_look: float | None = None
        self._last_sweep: float | None = None

    def beat(self, *, left: bool = False) -> None:
        """Give a sign of life; `left`: the last one, whose silence is not death.

        Any thread may call it; after the last one it does nothing.
        """
        pid = os.getpid()
        with self._lock:
            if self._left:
                return
            self._left = left
            beat = Beat(
                number=self._number,
                host=platform.node(),
                machine=_machine(),
                pid=pid,
                born=_start_of(pid),
                left=left,
                pause=self.pause,
                position=self._position(),
            )
            self.store.set(_key(self.rank), json.dumps(asdict(beat)))
            self._number += 1

    def dead(self, now: float, *, near: bool = False) -> dict[int, str]:
        """Ranks found dead, and how it showed; mostly none, at the cost of one read.

        Args:
            now: time.monotonic().
            near: look at the ranks beside this one as well, because something broke.
        """
        self._forgive_own_absence(now)
        neighbour = self._hear(self._neighbour, now)
        if neighbour is not None and neighbour.left and self._neighbour != self.rank:
            self._neighbour = (self._neighbour + 1) % self.world_size
            return {}
        if self._is_late(now):
            if self._is_due(now) or self._has_not_swept(now):
                self._sweep(now)
        elif near:
            for rank in self._others():  # once: after that their processes tell
                if abs(rank - self.rank) <= NEAR and rank not in self._heard:
                    self._hear(rank, now)
        return self._gone() or self._silent(now)

    def beats(self) -> dict[int, Beat]:
        """The newest beat of every rank that gave one, this one included."""
        found = {rank: self._read(rank) for rank in range(self.world_size)}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def _gone(self) -> dict[int, str]:
        """Ranks of this machine whose processes have ended, and not because they were through."""
        gone = [rank for rank, (beat, _) in self._heard.items() if beat and beat.process_is_gone()]
        last_words = {rank: self._read(rank) for rank in gone}
        return {
            rank: "its process has ended without a word"
            for rank, beat in last_words.items()
            if beat is not None and not beat.left
        }

    def _silent(self, now: float) -> dict[int, str]:
        if self._neighbour == self.rank or not self._is_due(now):
            return {}
        # the others have been listened to for half the time
        silences = {rank: self._silence(rank, now) for rank in self._heard}
        return {
            rank: f"no sign of life for {silences[self._neighbour]:.0f} s"
            for rank, (beat, _) in self._heard.items()
            if silences[rank] + self.look_seconds >= self.timeout / 2
            and not (beat is not None and beat.left)
        }

    def _sweep(self, now: float) -> None:
        """Hear all others, unless the neighbour is heard of meanwhile."""
        self._last_sweep = now
        for count, rank in enumerate(self._others(), start=1):
            self._hear(rank, now)
            if count % AT_ONCE == 0:
                self._hear(self._neighbour, now)
                if not self._is_late(now):
                    return

    def _has_not_swept(self, now: float) -> bool:
        return self._last_sweep is None or now - self._last_sweep >= self.timeout / 2

    def _is_late(self, now: float) -> bool:
        return self._silence(self._neighbour, now) >= self.timeout / 2

    def _is_due(self, now: float) -> bool:
        # one look is taken off because the beat may have come right after the look before
        return self._silence(self._neighbour, now) + self.look_seconds >= self.timeout

    def _silence(self, rank: int, now: float) -> float:
        """Seconds since something new was heard."""
        if rank not in self._heard or rank == self.rank:
            return 0.0
        beat, since = self._heard[rank]
        if beat is None or beat.number == 0:
            return now - since - FIRST_BEAT_ALLOWANCE
        return now - since - beat.pause

    def _hear(self, rank: int, now: float) -> Beat | None:
        beat = self._read(rank)
        before, _ = self._heard.get(rank, (None, 0.0))
        if rank not in self._heard or beat != before:
            self._heard[rank] = beat, now
        return beat

    def _read(self, rank: int) -> Beat | None:
        # `get` would wait for a key that is not there yet; this reads, or makes it, empty
        text = self.store.compare_set(_key(rank), "", "")
        self._answered()
        return Beat.parse(text) if text else None

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def _forgive_own_absence(self, now: float) -> None:
        """A rank that was stopped itself has heard nobody; that says nothing about the others."""
        if self._last_look is not None and now - self._last_look > self.timeout / 2:
            self._heard.clear()
        self._last_look = now


def _key(rank: int) -> str:
    return f"beat/{rank}"


@functools.cache
def _machine() -> str:
    """The host's name, its boot, and the space its process numbers are from."""
    name = platform.node()
    with suppress(OSError):  # not Linux: then only the name tells
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{name} {boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{name} {os.getpid()}"  # nobody else's: no process is looked for


def _start_of(pid: int) -> str:
    """When the process started, in the kernel's ticks since boot; "" if it is no more."""
    with suppress(OSError):
        # the name, in parentheses, may hold anything; the state and 18 more fields follow it
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""
