"""When one rank fails, dies or holds the others up, all end, and say which one it was and where.

A rank that raises while the others wait for it in a collective would leave them there until the
collective's timeout, and then with an error about a closed connection. Here every cause leads to
one note in the store that all ranks share, and the first note stands:

    error   a rank raised: it leaves the note itself, before its connections break
    dead    a rank is silent, or its process gone: the rank before it on a ring leaves the note
            (`parallel.heartbeat`)
    hang    no rank gets on any more: rank 0 leaves the note, and says who is behind
            (`parallel.progress_beacon`)
    store   the store itself cannot be reached: its host is dead, or this one is cut off; each rank
            that finds this out keeps the note for itself

Ranks find the note in two ways: as the reason of their own error, when a connection breaks under
them (`PeerFailed`), or by a thread, which ends a process whose main thread is still stuck after a
grace time. An error of a broken connection is taken for a consequence: a rank that has one waits
for the cause to be found, and leaves a note of its own only if there is none.

Two threads do it, and neither needs the main thread, which may be stuck in a collective. One talks
to the store; the other does not, and notices when the first gets no answer. What they cannot do
without is Python's lock: a call into C that holds it for the heartbeat's timeout makes its rank
look dead, unless it is announced (`FailureWatch.pause`). Then, and only then, Python's own timer
prints that rank's stacks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from parallel.config import FIRST_STEP_ALLOWANCE
from parallel.heartbeat import FIRST_BEAT_ALLOWANCE, Beat, Heartbeat
from parallel.progress_beacon import beacon, behind
from parallel.rank_layout import describe_ranks
from parallel.runtime import Runtime, leave_hard_at_exit

KEY = "failure"
ROOT = Path(__file__).resolve().parent.parent
# Seconds a stuck rank has after another's error to notice by itself: connections break on their
# own when the failing process ends, which is the gentler way.
GRACE_SECONDS = 10.0
# The same after a death, which has taken long enough to be noticed.
DEATH_GRACE_SECONDS = 0.5
# Seconds between two looks while something is known or suspected to be wrong, and how many looks
# a second all ranks together may take then: a look is three requests to the store.
ALERT_SECONDS = 0.2
ALERT_LOOKS_PER_SECOND = 5000.0

_BROKEN_CONNECTION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket", re.IGNORECASE
)
# around every collective: not where anything went wrong
_WRAPPERS = tuple(
    f"parallel/{name}.py" for name in ("progress_beacon", "stage_clock", "collectives")
)


class PeerFailed(RuntimeError):
    """This rank stopped because another one failed; the message names it, its error and place."""


@dataclass(frozen=True)
class Note:
    """Why all ranks end."""

    kind: str  # "error", "dead", "hang" or "store"
    ranks: list[int]  # whose fault it is
    host: str
    error: str
    place: str
    details: list[str] = field(default_factory=list)

    @property
    def rank(self) -> int | None:
        return self.ranks[0] if self.ranks else None

    def describe(self) -> str:
        who = describe_ranks(self.ranks) if self.ranks else "the store"
        verb = {"error": "failed", "dead": "died", "hang": "hangs", "store": "is out of reach"}
        at = "last seen at" if self.kind == "dead" else "at"
        lines = [f"{who} on {self.host} {verb[self.kind]}: {self.error}", f"  {at} {self.place}"]
        return "\n".join([*lines, *(f"    {line}" for line in self.details)])


class FailureWatch:
    """Around everything ranks do together after start-up:

        with FailureWatch(runtime):
            ...

    Raises PeerFailed in place of any error of the body that another rank's failure came before.

    Args:
        heartbeat_interval_seconds: between two signs of life of this rank.
        heartbeat_timeout_seconds: a rank silent for longer is dead; so is the store.
        hang_timeout_seconds: without any rank getting on, after which all end; 0: never. The
            first step may take FIRST_STEP_ALLOWANCE times as long.
        stacks: folder for the Python stacks of all ranks of a hang, `rank00000.txt` and so on.
        report: told the kind of a failure and its text, on the one rank that noted it.
        grace_seconds: what a stuck rank has after another's error.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        heartbeat_interval_seconds: float = 2.0,
        heartbeat_timeout_seconds: float = 8.0,
        hang_timeout_seconds: float = 0.0,
        stacks: Path | None = None,
        report: Callable[[str, str], None] | None = None,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self.rank = runtime.rank
        self.store = runtime.store
        self.grace_seconds = grace_seconds
        self.interval = heartbeat_interval_seconds
        self.timeout = heartbeat_timeout_seconds
        self.hang_timeout = hang_timeout_seconds
        self.stacks = stacks
        # Told why, by a thread, before a process whose main thread is stuck ends.
        self.last_words: Callable[[PeerFailed], None] | None = None
        self._report = report
        self._world_size = runtime.world_size
        self._hosts_store = runtime.hosts_store
        self._look_seconds = heartbeat_interval_seconds / 2
        self._alert_seconds = min(
            self._look_seconds, max(ALERT_SECONDS, self._world_size / ALERT_LOOKS_PER_SECOND)
        )
        self._heartbeat = Heartbeat(
            self.store,
            runtime.rank,
            runtime.world_size,
            beacon.position,
            timeout_seconds=heartbeat_timeout_seconds,
            look_seconds=self._look_seconds,
            answered=self._store_answered,
        )
        self._next_beat = 0.0
        self._ended = threading.Event()
        self._wake = threading.Event()
        self._suspicious = threading.Event()  # a connection broke under the main thread
        self._verdict: Note | None = None  # another rank's failure
        self._known = threading.Event()  # there is a verdict
        self._known_since = 0.0
        self._answered = time.monotonic()  # by the store
        targets = {"failure watch": self._look}
        if self._world_size > 1:  # one rank needs nobody, and outlives a store without time for it
            targets["store watch"] = self._guard
        self._threads = [
            threading.Thread(target=target, daemon=True, name=name)
            for name, target in targets.items()
        ]

    def __enter__(self) -> FailureWatch:
        global _current
        _current = self
        beacon.reset()
        beacon.watch_collectives()
        if self._world_size > 1 or self.hang_timeout > 0:
            self._heartbeat.beat()
            self._answered = time.monotonic() + FIRST_BEAT_ALLOWANCE
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        global _current
        _current = None
        try:
            if isinstance(error, Exception):
                self._blame(error)
            elif error is None and self._world_size > 1:
                with suppress(dist.DistError):
                    self._heartbeat.beat(left=True)
        finally:
            self._stop()

    def announce(self, error: Exception) -> Note | None:
        """Leave a note of this rank's failure, unless there is one; returns the one that stands.

        None, and no note, for a broken connection: whoever broke it is the cause. None also where
        the store is gone, and with it the rank that hosts it.
        """
        return None if _is_consequence(error) else self._leave_note(error)

    @contextmanager
    def pause(self, seconds: float) -> Iterator[None]:
        """The body may hold Python's lock: for so long no missing beat of this rank is death.

        If the rank does die meanwhile, ranks on other hosts learn of it that much later.
        """
        self._tell_pause(seconds)
        try:
            yield
        finally:
            self._tell_pause(0.0)

    def _tell_pause(self, seconds: float) -> None:
        self._heartbeat.pause = seconds
        if self._world_size > 1:
            with suppress(dist.DistError):  # the thread that talks to the store deals with it
                self._heartbeat.beat()
            self._watch_the_lock()

    def withdraw(self) -> None:
        """Take this rank's note back: all ranks have learnt of the failure and deal with it."""
        with suppress(dist.DistError):
            note = self._note()
            if note is not None and note.rank == self.rank:
                self.store.set(KEY, "")

    def _blame(self, error: Exception) -> None:
        """Raise PeerFailed if another rank's failure came before this error."""
        note = self._leave_note(error) if not _is_consequence(error) else self._cause(error)
        if self._world_size > 1:
            if _is_consequence(error):
                leave_hard_at_exit()  # destructors of groups would wait for ranks that are gone
            if self._hosts_store:  # which ends with this process; the others must have read it
                time.sleep(2 * self._look_seconds)
        if note is not None and note.rank != self.rank:
            place = f"rank {self.rank} was at {_place(error)}"
            raise PeerFailed(f"{note.describe()}\n  {place}") from None

    def _cause(self, error: Exception) -> Note | None:
        """Whose failure broke the connection; this rank's own error if nobody's is found."""
        if self._world_size > 1:
            self._suspicious.set()
            self._wake.set()
            self._known.wait(self.timeout + 2 * self._look_seconds)
        return self._verdict or self._leave_note(error)

    def _leave_note(self, error: Exception) -> Note | None:
        text = f"{type(error).__name__}: {str(error).strip() or '(no message)'}"
        with suppress(dist.DistError):
            return self._publish(
                self.store, Note("error", [self.rank], platform.node(), text, _place(error))
            )
        return self._verdict

    def _publish(self, store: dist.Store, note: Note) -> Note:
        """Make it the note that stands, unless there is one; returns the one that does."""
        text = json.dumps(asdict(note))
        standing = store.compare_set(KEY, "", text)
        if standing.decode() == text and self._report is not None:
            _without_waiting(self._report, note.kind, note.describe())
            self._report = None  # the same error may come by again on its way up
        return Note(**json.loads(standing))

    def _note(self) -> Note | None:
        store = self._heartbeat.store if threading.current_thread() in self._threads else self.store
        if not store.check([KEY]):
            return None
        text = store.get(KEY)
        return Note(**json.loads(text)) if text else None

    def _stop(self) -> None:
        self._ended.set()
        self._wake.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=1.0)  # it may wait for a store that will never answer
        beacon.leave_collectives()

    # ---- the thread that talks to the store ----

    def _look(self) -> None:
        self._heartbeat.store = _own_connection(self.store, self.timeout)
        while not self._ended.is_set():
            try:
                now = time.monotonic()
                self._beat_when_due()
                note = self._note()
                self._store_answered()
                self._hold(note or self._search(now), now)
                self._answered = time.monotonic()
            except dist.DistError as error:
                self._lose_store(error)
            alert = self._suspicious.is_set() or self._known.is_set()
            self._wake.wait(self._alert_seconds if alert else self._look_seconds)
            self._wake.clear()
        faulthandler.cancel_dump_traceback_later()

    def _beat_when_due(self) -> None:
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + self.interval - self._look_seconds / 2
            self._heartbeat.beat()
            self._answered = time.monotonic()
            self._watch_the_lock()

    def _store_answered(self) -> None:
        """A look can be many requests to a slow store: this rank must not fall silent meanwhile."""
        self._answered = time.monotonic()
        self._beat_when_due()

    def _search(self, now: float) -> Note | None:
        """Look for a dead rank or a hang, and leave a note if there is one."""
        if self._world_size > 1:
            dead = self._heartbeat.dead(now, near=self._suspicious.is_set())
            if dead:
                return self._publish(self._heartbeat.store, self._death(dead))
        if self.rank == 0 and self._is_overdue(beacon.position().quiet):
            return self._find_hang()
        return None

    def _death(self, dead: dict[int, str]) -> Note:
        beats = self._heartbeat.beats()
        hosts = {
            rank: beats[rank].host if rank in beats else "an unknown host" for rank in sorted(dead)
        }
        places = [
            beats[rank].position.describe() if rank in beats else "start-up" for rank in hosts
        ]
        details = [
            f"rank {rank} on {host}: {dead[rank]}, last seen at {place}"
            for (rank, host), place in zip(hosts.items(), places, strict=True)
        ]
        found_by = f"found by rank {self.rank} on {platform.node()}"
        return Note(
            kind="dead",
            ranks=list(hosts),
            host=", ".join(dict.fromkeys(hosts.values())),
            error=f"{dead[min(dead)]} ({found_by})",
            place=places[0],
            details=details[1:],
        )

    def _is_overdue(self, quiet: float) -> bool:
        position = beacon.position()
        allowance = FIRST_STEP_ALLOWANCE if position.first_step else 1.0
        return (
            self.hang_timeout > 0
            and position.in_training
            and quiet >= self.hang_timeout * allowance
        )

    def _find_hang(self) -> Note | None:
        """Rank 0 does not get on. Unless another rank does, say who is behind."""
        # those that are through stand still, and hold nobody up
        beats = {rank: beat for rank, beat in self._heartbeat.beats().items() if not beat.left}
        beats[self.rank] = replace(beats[self.rank], position=beacon.position())
        quiet = min(beat.position.quiet for beat in beats.values())
        if not self._is_overdue(quiet):
            return None
        ranks = behind({rank: beat.position for rank, beat in beats.items()})
        first = beats[ranks[0]]
        where = "this one is behind" if len(ranks) < self._world_size else "all are in one place"
        return self._publish(
            self._heartbeat.store,
            Note(
                kind="hang",
                ranks=ranks,
                host=", ".join(dict.fromkeys(beats[rank].host for rank in ranks)),
                error=f"no rank has got on for {quiet:.0f} s, and {where}",
                place=first.position.describe(),
                details=_places(beats),
            ),
        )

    def _hold(self, note: Note | None, now: float) -> None:
        """Keep another rank's failure in mind, and end a main thread that stays stuck with it."""
        if note is not None and note.kind == "error" and note.rank == self.rank:
            note = None
        if note != self._verdict:
            self._verdict, self._known_since = note, now
            if note is not None and note.kind == "hang":
                self._write_stacks()
        if note is None:
            self._known.clear()
            return
        self._known.set()
        if now - self._known_since >= self._grace(note) and _current is self:
            self._end_stuck_process(note)

    def _grace(self, note: Note) -> float:
        if note.kind == "error":
            return self.grace_seconds
        # all must have read it before the first one goes, and before the store does
        slow = note.kind == "hang" or self._hosts_store
        return 2 * self._look_seconds if slow else DEATH_GRACE_SECONDS

    def _watch_the_lock(self) -> None:
        """Have Python's own timer print the stacks if no beat follows in time."""
        if self._world_size > 1:
            faulthandler.dump_traceback_later(self.timeout + self._heartbeat.pause, file=2)

    # ---- when the store is gone ----

    def _lose_store(self, error: dist.DistError) -> None:
        """A connection that broke does not come back; while all else is well, wait and see."""
        note = self._verdict
        if note is None and self._suspicious.is_set():
            note = self._lost_store(str(error).strip().splitlines()[0])
        if note is not None:
            self._hold(note, time.monotonic())

    def _guard(self) -> None:
        """End this rank once the store has not answered for the heartbeat's timeout."""
        before = time.monotonic()
        while not self._ended.wait(self._look_seconds):
            now = time.monotonic()
            # this process was stopped, the store was not
            if self._heartbeat.pause or now - before > self.timeout / 2:
                self._answered = max(self._answered, now)
            before = now
            silence = now - self._answered
            if silence + self._look_seconds < self.timeout:
                continue
            note = self._verdict or self._lost_store(f"no answer for {silence:.0f} s")
            self._hold(note, now)
            if not self._ended.wait(DEATH_GRACE_SECONDS) and _current is self:
                self._end_stuck_process(note)

    def _lost_store(self, error: str) -> Note:
        base = self.store
        while isinstance(base, dist.PrefixStore):
            base = base.underlying_store
        host = f"{base.host}:{base.port}" if isinstance(base, dist.TCPStore) else "this machine"
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Note(
            kind="store",
            ranks=[],
            host=host,
            error=f"{error}. {'torchrun on the first node' if agent else 'Rank 0'} hosts it: its "
            f"process or its host has died, or the network between it and {platform.node()} is cut",
            place=beacon.position().describe(),
        )

    # ---- the end ----

    def _end_stuck_process(self, note: Note) -> None:
        if note.kind == "dead" and self.rank in note.ranks:
            state = "is that rank, or one of them; the others have ended without it, and it"
        else:
            state = f"was still waiting after {self._grace(note):g} s and"
        print(
            f"PeerFailed: {note.describe()}\n  rank {self.rank} {state} ends now; its stack:\n",
            end="",  # one write, which other ranks' lines do not part
            file=sys.__stderr__,
            flush=True,
        )
        if note.kind != "hang" or self.rank in note.ranks:
            faulthandler.dump_traceback(file=2, all_threads=True)  # file descriptor of stderr
        if self.last_words is not None:
            _without_waiting(self.last_words, PeerFailed(note.describe()))
        os._exit(1)

    def _write_stacks(self) -> None:
        if self.stacks is None:
            return
        with suppress(OSError):  # a file system that hangs or is full must not keep us here
            self.stacks.mkdir(parents=True, exist_ok=True)
            with open(self.stacks / f"rank{self.rank:05d}.txt", "w", encoding="utf-8") as file:
                file.write(f"rank {self.rank} on {platform.node()}, pid {os.getpid()}: ")
                file.write(beacon.position().describe() + "\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)


_current: FailureWatch | None = None


def current() -> FailureWatch | None:
    """The watch this process is under, if any."""
    return _current


def _own_connection(store: dist.Store, timeout: float) -> dist.Store:
    """A second connection to the store: on one, a thread that waits for a key keeps all others
    waiting. The same store where torch is too old to make another."""
    if not hasattr(store, "clone"):
        return store
    mine = store.clone()
    mine.set_timeout(timedelta(seconds=timeout))
    return mine


def _without_waiting(tell: Callable[..., None], *words: object) -> None:
    """Call it, but wait only for a moment: it writes to a file system that may hang as well."""
    thread = threading.Thread(target=tell, args=words, daemon=True)
    thread.start()
    thread.join(timeout=DEATH_GRACE_SECONDS)


def _is_consequence(error: Exception) -> bool:
    """Whether the error says no more than that a connection to another rank broke."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _BROKEN_CONNECTION.search(str(error)) is not None
    )


def _places(beats: dict[int, Beat]) -> list[str]:
    """Who is where, ranks in the same place together, those behind first."""
    places: dict[str, list[int]] = {}
    for rank, beat in sorted(beats.items(), key=lambda item: item[1].position.order):
        places.setdefault(beat.position.describe(), []).append(rank)
    return [f"{describe_ranks(sorted(ranks))}: {place}" for place, ranks in places.items()]


def _place(error: BaseException) -> str:
    """The innermost line of this project's code that the error came through."""
    place = "an unknown place"
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if not path.is_relative_to(ROOT) or "site-packages" in path.parts:
            continue
        if str(path.relative_to(ROOT)) not in _WRAPPERS:
            place = f"{path.relative_to(ROOT)}:{frame.lineno}, in {frame.name}"
    return place
