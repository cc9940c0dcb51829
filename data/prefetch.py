"""Prepares the next micro-batches in a thread while a step runs.

    loader = PrefetchLoader(loader, depth=2)      # same micro_batches(consumed_sequences)
    ...
    loader.close()                                # or: with PrefetchLoader(...) as loader

A thread and not processes: reading is copying out of memory maps by numpy, which lets go of the
interpreter while it copies, and a batch then needs no trip through shared memory.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from itertools import count
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch

from data.batch import Batch

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The items of an iterable in their order, up to `depth` of them prepared ahead by a thread.

    An exception of the iterable is raised to the consumer in its turn, after the items before it,
    with the traceback of the thread. `close` stops the thread after the item it is at; so does
    leaving the `with` block. Not for more than one consumer.
    """

    def __init__(self, items: Iterable[T], depth: int):
        if depth < 1:
            raise ValueError(f"depth={depth}: must be at least 1 item ahead")
        self._depth = depth
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = self._finished = False
        self._error: BaseException | None = None
        # daemon: a run that ends in an exception elsewhere must not wait for it
        self._thread = threading.Thread(
            target=self._produce, args=(items,), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished or self._closed)
            if self._ready and not self._closed:
                item = self._ready.popleft()
                self._changed.notify()
                return item
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stops the thread and drops what it prepared; waits for the item it is at."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _produce(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                    if self._closed:
                        return
                    self._ready.append(item)
                    self._changed.notify()
                del item  # or the thread holds a batch more than depth while it reads the next
        except BaseException as error:  # raised again by the consumer
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify()


class Loader(Protocol):
    """What is prefetched: data.loader.MicroBatchLoader."""

    num_micro_batches: int
    global_batch_size: int

    def micro_batches(self, consumed_sequences: int) -> Iterator[Batch]: ...

    def fingerprint(self) -> dict[str, Any]: ...


class PrefetchLoader:
    """A loader whose micro-batches are prepared ahead, steps following each other.

    The same batches in the same order as the loader's own. Asking for another step than the next
    is allowed and costs what was prepared. depth: steps ahead, since a step takes all its
    micro-batches at once. device: where the batches will go; for CUDA they are put into page-locked
    memory, which the device copies from by itself, and their content stays what it is.
    """

    def __init__(self, loader: Loader, *, depth: int, device: torch.device | None = None):
        if depth < 1:
            raise ValueError(
                f"data.prefetch={depth}: a thread must read at least 1 step ahead; 0 is "
                "for none at all"
            )
        self._loader, self._depth, self._device = loader, depth, device
        self.num_micro_batches = loader.num_micro_batches
        self.global_batch_size = loader.global_batch_size
        self._ahead: Prefetcher[Batch] | None = None
        self._next: tuple[int, int] | None = None  # consumed sequences, micro-batches taken

    def micro_batches(self, consumed_sequences: int) -> Iterator[Batch]:
        """This rank's num_micro_batches batches of the step that begins there."""
        if self._ahead is None or self._next != (consumed_sequences, 0):
            self.close()
            self._ahead = Prefetcher(
                self._batches(consumed_sequences), self._depth * self.num_micro_batches
            )
        return self._step(self._ahead, consumed_sequences)

    def fingerprint(self) -> dict[str, Any]:
        return self._loader.fingerprint()

    def close(self) -> None:
        """Stops the thread; the next micro_batches starts another."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = self._next = None

    def __enter__(self) -> "PrefetchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _step(self, ahead: Prefetcher[Batch], consumed_sequences: int) -> Generator[Batch]:
        for taken in range(1, self.num_micro_batches + 1):
            # a step left half-way is not the one the next request may go on from
            self._next = (consumed_sequences, taken)
            batch = next(ahead)
            if taken == self.num_micro_batches:
                self._next = (consumed_sequences + self.global_batch_size, 0)
            yield batch

    def _batches(self, consumed_sequences: int) -> Iterator[Batch]:
        pin = self._device is not None and self._device.type == "cuda"
        if pin:
            # a thread starts on device 0, and page-locking there would cost every rank of the node
            # a context on that device
            torch.cuda.set_device(self._device)
        for start in count(consumed_sequences, self.global_batch_size):
            for batch in self._loader.micro_batches(start):
                yield batch.pin_memory() if pin else batch
