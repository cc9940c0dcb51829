import gc
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from data.batch import Batch
from data.prefetch import Prefetcher, PrefetchLoader


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


class Counting:
    """Items 0, 1, ...; `made` says how many have been asked for."""

    def __init__(self, stop: int, fail_at: int | None = None):
        self.stop, self.fail_at, self.made = stop, fail_at, 0

    def __iter__(self) -> Iterator[int]:
        for item in range(self.stop):
            self.made += 1
            if item == self.fail_at:
                self.read_a_damaged_store()
            yield item

    def read_a_damaged_store(self) -> None:
        raise OSError("the store was cut off")


def settled(items: Counting) -> int:
    """How many items were made once no more come."""
    before = -1
    while items.made != before:
        before = items.made
        time.sleep(0.05)
    return before


@pytest.mark.parametrize("depth", [1, 2, 7, 100])
def test_items_come_in_order_and_all(depth: int) -> None:
    with Prefetcher(Counting(50), depth) as ahead:
        assert list(ahead) == list(range(50))
        assert list(ahead) == []


@pytest.mark.parametrize("depth", [1, 4])
def test_no_more_than_depth_are_kept(depth: int) -> None:
    items = Counting(1000)
    with Prefetcher(items, depth) as ahead:
        assert settled(items) == depth + 1  # one more is in the thread's hand
        assert [next(ahead) for _ in range(10)] == list(range(10))
        assert settled(items) == depth + 11


def test_an_exception_arrives_in_its_turn_with_its_traceback() -> None:
    with Prefetcher(Counting(50, fail_at=3), depth=10) as ahead:
        assert [next(ahead) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="cut off") as caught:
            next(ahead)
        names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert names[-1] == "read_a_damaged_store" and "__next__" in names
        assert list(ahead) == []


def test_close_stops_the_thread_and_forgets_what_it_holds() -> None:
    items = Counting(10**9)
    ahead = Prefetcher(items, depth=3)
    assert next(ahead) == 0 and threads()
    ahead.close()
    assert not threads()
    made = items.made
    time.sleep(0.05)
    assert items.made == made
    assert list(ahead) == []
    ahead.close()  # twice is once


def test_the_thread_does_not_hold_on_to_what_was_taken() -> None:
    class Thing:
        pass

    go_on = threading.Event()

    def things() -> Iterator[Thing]:
        yield Thing()
        go_on.wait()  # the thread is busy with the next one
        yield Thing()

    with Prefetcher(things(), depth=2) as ahead:
        taken = weakref.ref(next(ahead))
        time.sleep(0.05)
        gc.collect()
        held = taken() is not None
        go_on.set()
    assert not held


class Steps:
    """A loader of numbered batches that counts how often each step was read."""

    num_micro_batches, global_batch_size = 3, 12

    def __init__(self) -> None:
        self.read: list[int] = []

    def micro_batches(self, consumed_sequences: int) -> Iterator[Batch]:
        if consumed_sequences == 12_000:
            raise ValueError("nothing there")
        self.read.append(consumed_sequences)
        for j in range(self.num_micro_batches):
            x = torch.full((1, 1), 100 * consumed_sequences + j)
            yield Batch(x, x, torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))

    def fingerprint(self) -> dict[str, Any]:
        return {"seed": 1}


def numbers(loader: Steps | PrefetchLoader, consumed: int) -> list[int]:
    return [int(batch.tokens) for batch in loader.micro_batches(consumed)]


def test_a_prefetched_loader_gives_the_same_steps() -> None:
    with PrefetchLoader(Steps(), depth=2) as loader:
        assert loader.fingerprint() == {"seed": 1}
        # following steps; a jump; the same step again; a step left half-way and asked for anew
        for consumed in (0, 12, 24, 120, 132, 132, 0):
            assert numbers(loader, consumed) == numbers(Steps(), consumed)
        next(iter(loader.micro_batches(12)))
        assert numbers(loader, 12) == numbers(Steps(), 12)
        assert len(threads()) == 1
    assert not threads()
    assert numbers(loader, 24) == numbers(Steps(), 24)
    loader.close()


def test_following_steps_are_read_once_and_ahead() -> None:
    steps = Steps()
    with PrefetchLoader(steps, depth=2) as loader:
        for consumed in (0, 12, 24):
            numbers(loader, consumed)
        for _ in range(100):
            if len(steps.read) == 6:
                break
            time.sleep(0.01)
        time.sleep(0.05)
        # two whole steps ahead, and the first batch of a third
        assert steps.read == [0, 12, 24, 36, 48, 60]


def test_an_error_of_the_loader_is_the_steps_own_and_can_be_tried_again() -> None:
    with PrefetchLoader(Steps(), depth=1) as loader:
        assert numbers(loader, 11_988) == numbers(Steps(), 11_988)
        for _ in range(2):
            with pytest.raises(ValueError, match="nothing there"):
                numbers(loader, 12_000)
        assert numbers(loader, 0) == numbers(Steps(), 0)


def test_refuses_to_read_nothing_ahead() -> None:
    with pytest.raises(ValueError, match=r"data\.prefetch=0"):
        PrefetchLoader(Steps(), depth=0)
    with pytest.raises(ValueError, match="depth=0"):
        Prefetcher(range(3), 0)
