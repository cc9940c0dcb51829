"""Who is declared dead, and who is not: by time, with a real store and no real waiting."""

import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import asdict, replace

import pytest
import torch.distributed as dist

from parallel import heartbeat as heartbeat_module
from parallel.heartbeat import AT_ONCE, FIRST_BEAT_ALLOWANCE, Beat, Heartbeat
from parallel.progress_beacon import Position

TIMEOUT, LOOK = 8.0, 1.0


class World:
    """Ranks that beat as they are told, on hosts of two ranks each; time is a number."""

    def __init__(self, size: int) -> None:
        self.store = dist.HashStore()
        self.ranks = [
            Heartbeat(self.store, rank, size, Position, timeout_seconds=TIMEOUT, look_seconds=LOOK)
            for rank in range(size)
        ]
        self.now = 1000.0
        for rank in range(size):
            self.beat(rank)

    def beat(self, rank: int, *, left: bool = False) -> None:
        self.ranks[rank].beat(left=left)
        text = self.store.get(f"beat/{rank}")
        # elsewhere: processes of this machine can be looked up
        beat = replace(Beat.parse(text), host=f"n{rank // 2}", machine=f"n{rank // 2}")
        self.store.set(f"beat/{rank}", json.dumps(asdict(beat)))

    def live(
        self, seconds: float, beating: list[int], looking: list[int]
    ) -> dict[int, tuple[float, dict[int, str]]]:
        """What each looking rank finds first, and after how long."""
        found: dict[int, tuple[float, dict[int, str]]] = {}
        start, step = self.now, 0
        while self.now < start + seconds:
            if step % 2 == 0:
                for rank in beating:
                    self.beat(rank)
            for rank in looking:
                dead = self.ranks[rank].dead(self.now)
                if dead and rank not in found:
                    found[rank] = self.now - start, dead
            self.now += LOOK
            step += 1
        return found


def test_ranks_that_beat_are_alive() -> None:
    world = World(4)
    everybody = [0, 1, 2, 3]
    assert world.live(100, everybody, everybody) == {}


def test_all_ranks_of_a_silent_host_are_named_by_the_rank_before_it() -> None:
    world = World(6)
    everybody, alive = list(range(6)), [0, 1, 4, 5]
    assert world.live(10, everybody, everybody) == {}
    found = world.live(20, alive, alive)
    assert list(found) == [1]  # of those alive, the one whose neighbour is silent
    seconds, dead = found[1]
    since_last_beat = seconds + 2 * LOOK
    assert TIMEOUT - 2 * LOOK <= since_last_beat <= TIMEOUT
    assert list(dead) == [2, 3]
    assert "no sign of life for 7 s" in dead[2]
    assert world.ranks[1].beats()[2].host == "n1"


def test_silence_is_measured_by_the_clock_of_who_listens() -> None:
    """A neighbour whose beats all come late, evenly, is alive."""
    world = World(2)
    world.live(10, [0, 1], [0, 1])
    for _ in range(5):
        assert world.live(TIMEOUT - 3 * LOOK, [0], [0]) == {}
        world.beat(1)


def test_a_rank_that_is_through_is_not_dead_and_the_next_one_is_watched_instead() -> None:
    world = World(4)
    world.live(10, [0, 1, 2, 3], [0, 1, 2, 3])
    world.beat(1, left=True)
    assert world.live(30, [0, 2, 3], [0, 2, 3]) == {}
    found = world.live(30, [0, 3], [0])
    assert list(found[0][1]) == [2]


def test_all_others_may_be_through() -> None:
    world = World(3)
    world.beat(1, left=True)
    world.beat(2, left=True)
    assert world.live(100, [0], [0]) == {}


def test_the_first_beat_of_a_thread_may_take_longer() -> None:
    world = World(2)
    assert world.live(FIRST_BEAT_ALLOWANCE, [], [0]) == {}
    found = world.live(TIMEOUT + 2, [], [0])
    assert list(found[0][1]) == [1]


def test_a_rank_that_never_beat_is_silent_too() -> None:
    world = World(2)
    world.store.delete_key("beat/1")
    found = world.live(FIRST_BEAT_ALLOWANCE + TIMEOUT, [], [0])
    assert list(found[0][1]) == [1]
    assert list(world.ranks[0].beats()) == [0]


def test_a_rank_that_was_stopped_does_not_blame_the_others() -> None:
    world = World(2)
    world.live(10, [0, 1], [0, 1])
    world.now += 60  # rank 0 did not look; rank 1 has not beaten in its sight since
    assert world.ranks[0].dead(world.now) == {}
    assert list(world.live(TIMEOUT + 2, [], [0])[0][1]) == [1]


def test_an_announced_pause_is_not_death() -> None:
    world = World(2)
    world.live(10, [0, 1], [0, 1])
    world.ranks[1].pause = 60.0
    world.beat(1)
    assert world.live(60, [0], [0]) == {}
    assert list(world.live(TIMEOUT + 2, [0], [0])[0][1]) == [1]
    world.ranks[1].pause = 0.0
    world.beat(1)
    assert world.live(TIMEOUT - 2 * LOOK, [0], [0]) == {}
    assert list(world.live(TIMEOUT, [0], [0])[0][1]) == [1]


class SlowStore(dist.HashStore):
    """Its first write takes a while."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = threading.Event()

    def set(self, key: str, value: str) -> None:
        if not self.writing.is_set():
            self.writing.set()
            time.sleep(0.3)
        super().set(key, value)


def test_a_beat_under_way_does_not_come_after_the_last_one() -> None:
    store = SlowStore()
    rank = Heartbeat(store, 0, 2, Position, timeout_seconds=TIMEOUT, look_seconds=LOOK)
    other_thread = threading.Thread(target=rank.beat)
    other_thread.start()
    assert store.writing.wait(10)
    rank.beat(left=True)
    other_thread.join()
    rank.beat()  # the thread has not ended yet
    assert rank.beats()[0].left


def test_a_slow_store_is_not_stormed() -> None:
    reads = 0

    def answered() -> None:
        nonlocal reads
        reads += 1
        if reads == comes_back:
            world.beat(1)

    world, comes_back = World(100), 0
    world.live(10, [1], [0])
    world.ranks[0]._answered = answered
    world.live(5 * LOOK, [], [0])
    assert reads == 5 + 99 + 99 // AT_ONCE  # its neighbour at every look, the others once
    world.live(10, [1], [0])
    reads, comes_back = 0, 3 + AT_ONCE // 2  # in the midst of reading the others
    assert world.live(5 * LOOK, [], [0]) == {}
    assert reads == 5 + AT_ONCE + 1


def test_a_process_of_this_machine_is_missed_at_once() -> None:
    store = dist.HashStore()
    mine = Heartbeat(store, 0, 2, Position, timeout_seconds=TIMEOUT, look_seconds=LOOK)
    beat = Heartbeat(store, 1, 2, Position, timeout_seconds=TIMEOUT, look_seconds=LOOK).beat
    other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    other.start()
    assert other.pid is not None
    born = heartbeat_module._start_of(other.pid)

    def beat_of_other(**changes: object) -> None:
        beat()
        text = json.loads(store.get("beat/1"))
        text |= {"pid": other.pid, "born": born} | changes
        store.set("beat/1", json.dumps(text))

    beat_of_other()
    assert mine.dead(0.0) == {}
    beat_of_other(born="4711")  # the number is another process's by now
    assert mine.dead(1.0) == {1: "its process has ended without a word"}
    beat_of_other(born="4711", machine="elsewhere")
    assert mine.dead(2.0) == {}
    beat_of_other()
    os.kill(other.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not mine.dead(3.0):  # a zombie is dead as well: nobody has waited for it yet
        assert time.monotonic() < deadline
    other.join()
    assert mine.dead(4.0) == {1: "its process has ended without a word"}
    beat_of_other(left=True)
    assert mine.dead(5.0) == {}  # its neighbour is another one from now on
    assert mine.dead(6.0) == {}


def test_ranks_nearby_are_looked_for_when_something_broke() -> None:
    store = dist.HashStore()
    first, *others = [
        Heartbeat(store, rank, 20, Position, timeout_seconds=TIMEOUT, look_seconds=LOOK)
        for rank in range(20)
    ]
    for other in others:
        other.beat()
    for rank in (8, 9):
        text = json.loads(store.get(f"beat/{rank}"))
        store.set(f"beat/{rank}", json.dumps(text | {"born": "4711"}))
    assert first.dead(0.0) == {}
    assert list(first.dead(1.0, near=True)) == [8]


@pytest.mark.parametrize("left", [True, False])
def test_a_beat_survives_the_store(left: bool) -> None:
    position = Position(step=3, stage="optimizer", collective="barrier", group="g", number=2)
    store = dist.HashStore()
    rank = Heartbeat(store, 1, 2, lambda: position, timeout_seconds=TIMEOUT, look_seconds=LOOK)
    rank.beat(left=left)
    beat = rank.beats()[1]
    assert (beat.position, beat.left, beat.pid) == (position, left, os.getpid())
    assert not beat.process_is_gone()
