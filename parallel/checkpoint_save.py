"""Saving a checkpoint by all ranks together, behind the training if need be.

    plan_save           all ranks together   who writes what (`parallel.checkpoint_plan`); copies
                                             to host memory; no file
    PendingSave         a thread of each
      Shards.write        ... rank             its files, on the disk
      _publish            ... of rank 0        when all have written: index, manifest, rename
    PendingSave.wait    each rank            the same answer on all

The threads hold no collective, which would mix with those of the training; they coordinate through
the store that all ranks share. The files are those megatron-core's `dist_checkpointing` reads:

    __<rank>_<n>.distcp   this rank's tensors, each as torch.save writes it
    .metadata             where each tensor lies                                  } rank 0
    common.pt             the values that are not sharded                         } writes
    metadata.json         the name of the format                                  } these

megatron-core's own writer is not used. It forks: the fork of a process with threads (gloo, data
prefetch, CUDA) may deadlock in the child, and a helper process is one more to clean up after. And
it copies views of the gradient buffers to new memory at each save.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from parallel import failure_watch
from parallel.checkpoint_manifest import (
    ChecksummedFile,
    Entry,
    Progress,
    file_entry,
    in_threads,
    write_manifest,
)
from parallel.checkpoint_plan import Plans
from parallel.megatron import CheckpointingConfig, save_preprocess
from parallel.progress_beacon import beacon

COMMON = "common.pt"
METADATA = ".metadata"
TENSORS_SUFFIX = ".distcp"
FORMAT_NAME = "metadata.json"  # what `dist_checkpointing` takes for a checkpoint's mark

# Files a rank writes at the same time: checksums and copies of one overlap those of the other.
_FILES_PER_RANK = 2
_ALIGNMENT = 64  # bytes
# Store look-ups a second while a save is written, over all ranks; one of them hosts the store.
_LOOKS_PER_SECOND = 1000.0
# Between two looks at whether what is waited for gets on.
_SLICE_SECONDS = 1.0

_Result = TypeVar("_Result")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, with what to do about it."""


class SaveFailed(CheckpointError):
    """Files could not be written: a full disk, a mount that is gone. The state is as it was, what
    had been written is removed, and a later save may succeed."""


class StoreLost(ConnectionError):
    """The ranks cannot agree on a save any more: nobody knows whether it is there."""


class Background(Generic[_Result]):
    """`action` in a thread of its own, which does not keep the process from ending."""

    def __init__(self, action: Callable[[], _Result]) -> None:
        self._action = action
        self._results: list[_Result] = []
        self._error: Exception | None = None
        self._finished = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="checksums").start()

    def result(self) -> _Result:
        """Wait for what it returns, or raise what it raised."""
        wait_for(self._finished, lambda: Progress.bytes)
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._action())
        except Exception as error:
            self._error = error
        finally:
            self._finished.set()


def wait_for(
    event: threading.Event, progress: Callable[[], object], seconds: float | None = None
) -> bool:
    """Whether `event` was set, within `seconds`. While `progress` changes, the beacon is told that
    this rank gets on: writing and reading may take longer than a hang is given."""
    until = float("inf") if seconds is None else time.monotonic() + seconds
    before = progress()
    while not event.wait(max(0.0, min(_SLICE_SECONDS, until - time.monotonic()))):
        if time.monotonic() >= until:
            return False
        now = progress()
        if now != before:
            before = now
            beacon.tick()
    return True


class HostMemory:
    """Host memory that copies of a state live in, kept from one save to the next.

    New memory costs more than the copy (the kernel hands it out zeroed, page by page), and on a
    GPU it must be page-locked to be copied to at full speed. Holds one copy at a time: whoever
    reads it must be done before the next one is made.
    """

    def __init__(self) -> None:
        self._arena = torch.empty(0, dtype=torch.uint8)

    @property
    def bytes(self) -> int:
        return self._arena.numel()

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous copies, each with a storage of its own; on return they are complete."""
        offsets, total = [], 0
        for tensor in tensors:
            offsets.append(total)
            total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if total > self.bytes:
            self._arena = torch.empty(0, dtype=torch.uint8)  # let go before asking for more
            self._arena = _host_memory(total)
        copies = [
            _tensor_at(self._arena, offset, tensor)
            for offset, tensor in zip(offsets, tensors, strict=True)
        ]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the host waits here, for all copies at once
        return copies


@dataclass
class Written:
    """What a rank says of its files when all are on the disk."""

    results: list[WriteResult]
    entries: dict[str, Entry]  # of the manifest, by file name


@dataclass
class Shards:
    """One rank's part of a planned save."""

    folder: Path
    checksums: bool
    files: dict[str, list[tuple[WriteItem, Tensor | io.BytesIO]]]
    common: bytes  # of common.pt; empty but on rank 0
    metadata: Metadata | None  # on rank 0: the index, but for where things lie

    def write(self) -> Written:
        """Write this rank's files and bring them to the disk. Any thread may call it.

        Raises OSError with the name of the file.
        """
        written = Written([], {})
        if self.common:
            written.entries[COMMON] = _write_file(self.folder / COMMON, self.common, self.checksums)
        files = in_threads(self._write, self.files, _FILES_PER_RANK)
        for name, (results, entry) in zip(self.files, files, strict=True):
            written.results += results
            written.entries[name] = entry
        return written

    def _write(self, name: str) -> tuple[list[WriteResult], Entry]:
        results = []
        path = self.folder / name
        with _no_checksums_of_torch(), ChecksummedFile(path, checksums=self.checksums) as file:
            for item, data in self.files[name]:
                start = file.tell()
                if isinstance(data, Tensor):
                    _save_tensor(data, file)
                else:
                    file.write(data.getbuffer())
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            return results, file.close()

    def write_index(self, everyone: Sequence[Written]) -> dict[str, Entry]:
        """On rank 0, when all ranks have written: the files that make the folder a checkpoint.

        Returns the manifest's entries of all files of the folder.
        """
        assert self.metadata is not None
        index = FileSystemWriter(self.folder)
        index.finish(self.metadata, [written.results for written in everyone])
        entries = {name: entry for written in everyone for name, entry in written.entries.items()}
        entries[METADATA] = file_entry(self.folder / METADATA, checksums=self.checksums)
        content = json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode()
        entries[FORMAT_NAME] = _write_file(self.folder / FORMAT_NAME, content, self.checksums)
        return entries


def plan_save(
    state: dict[str, Any],
    folder: Path,
    *,
    metadata: dict[str, Any],
    memory: HostMemory | None,
    checksums: bool,
    plans: Plans | None = None,
    validate: bool = True,
) -> Shards:
    """Decide who writes what of `state`. All ranks must call it; nothing is written yet.

    Args:
        state: megatron-core sharded tensors and objects, and plain values, which are taken from
            rank 0; consumed.
        metadata: plain values stored beside it (`dist_checkpointing.load_content_metadata`).
        memory: copy the tensors there, so that the training may change them once this returns;
            None: write them from where they are.
        checksums: take checksums while writing.
        plans: knows the plan of the last save.
        validate: see that each part of each tensor has exactly one rank that writes it; gathers
            what everyone has.
    """
    sharded, common = save_preprocess({**state, "content_metadata": metadata}, validate)
    plan = (plans or Plans()).plan(sharded)
    data = list(plan.data)
    tensors = {index: one for index, one in enumerate(data) if isinstance(one, Tensor)}
    if memory is None and any(tensor.device.type != "cpu" for tensor in tensors.values()):
        memory = HostMemory()
    if memory is not None:
        for index, copy in zip(tensors, memory.copy(list(tensors.values())), strict=True):
            data[index] = copy
    rank = dist.get_rank()
    return Shards(
        folder,
        checksums,
        _split(f"__{rank}_", list(zip(plan.items, data, strict=True))),
        _serialised(common) if rank == 0 else b"",
        plan.metadata,
    )


class PendingSave:
    """A save that a thread of each rank is busy with.

    Through the store, under a key of its own for each save, go: what each rank has written, how
    many have, and rank 0's verdict on the whole, which makes the outcome the same everywhere.
    """

    def __init__(
        self,
        shards: Shards,
        folder: Path,
        token: str,
        when_published: Callable[[], None] | None = None,
        may_publish: Callable[[], bool] = lambda: True,
    ) -> None:
        self.folder = folder
        self._when_published = when_published
        self._may_publish = may_publish
        self._shards = shards
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._prefix = f"checkpoint/{token}"
        self._ranks_done = 0  # that have written, as far as this rank has looked
        self._failure: str | None = None
        self._lost: StoreLost | None = None
        self._finished = threading.Event()
        self._started, self._ended = time.monotonic(), 0.0
        threading.Thread(target=self._run, daemon=True, name="checkpoint").start()

    @property
    def done(self) -> bool:
        """Whether this rank knows how it went; the others may learn of it a moment later."""
        return self._finished.is_set()

    @property
    def seconds(self) -> float:
        """Since the writing began, or until it ended."""
        return (self._ended or time.monotonic()) - self._started

    def wait(self, seconds: float | None = None) -> None:
        """Return when the checkpoint is there, or not known to be there after `seconds`.

        Raises:
            SaveFailed: it could not be written; on every rank alike.
            StoreLost: this rank does not know; the failure watch ends the others.
        """
        if not wait_for(self._finished, lambda: (Progress.bytes, self._ranks_done), seconds):
            return
        if self._lost is not None:
            raise self._lost
        if self._failure is not None:
            raise SaveFailed(f"could not write {self.folder}: {self._failure}")

    def _run(self) -> None:
        try:
            written = self._write()
            self._store = dist.PrefixStore(self._prefix, _own_connection())
            self._tell(written)
            if self._rank == 0:
                self._store.set("verdict", self._publish_or_remove())
            else:
                self._poll(lambda: self._store.check(["verdict"]))
            self._failure = self._store.get("verdict").decode() or None
        except Exception as error:  # an outcome for this rank alone: the others wait for it
            self._lose(error)
        finally:
            del self._shards  # with the memory of its tensors
            self._ended = time.monotonic()
            self._finished.set()

    def _lose(self, error: Exception) -> None:
        """All ranks must end: leave a note that says why."""
        self._lost = StoreLost(
            f"rank {self._rank} lost the store that all ranks share while {self.folder} was being "
            f"written: {_text(error)}"
        )
        self._lost.__traceback__ = error.__traceback__
        watch = failure_watch.current()
        if watch is not None:
            watch.announce(self._lost)

    def _write(self) -> Written | str:
        try:
            return self._shards.write()
        except Exception as error:
            return f"rank {self._rank}: {_text(error)}"

    def _tell(self, written: Written | str) -> None:
        self._store.set(f"rank {self._rank}", pickle.dumps(written))  # type: ignore[arg-type]
        self._store.add("written", 1)

    def _publish_or_remove(self) -> str:
        """Rank 0's verdict: what went wrong, or nothing."""
        self._poll(self._all_have_written)
        everyone = []
        for rank in range(self._world_size):
            everyone.append(pickle.loads(self._store.get(f"rank {rank}")))
            self._store.delete_key(f"rank {rank}")  # some hundred bytes for each tensor
        failures = [written for written in everyone if isinstance(written, str)]
        if not self._still_ours():  # what lies there may be the other run's by now
            return "this run does not hold its folder any more; nothing was published or removed"
        if not failures:
            try:
                self._publish(everyone)
                if self._when_published is not None:
                    self._when_published()
                return ""
            except Exception as error:
                failures = [f"rank 0: {_text(error)}"]
        shutil.rmtree(self._shards.folder, ignore_errors=True)
        return "; ".join(failures[:3])

    def _all_have_written(self) -> bool:
        self._ranks_done = self._store.add("written", 0)
        return self._ranks_done == self._world_size

    def _still_ours(self) -> bool:
        try:
            return self._may_publish()
        except OSError:  # it cannot be seen
            return False

    def _publish(self, everyone: list[Written]) -> None:
        partial = self._shards.folder
        entries = self._shards.write_index(everyone)
        write_manifest(partial, entries, checksums=self._shards.checksums)
        _sync(partial)
        os.rename(partial, self.folder)
        _sync(self.folder.parent)

    def _poll(self, condition: Callable[[], bool]) -> None:
        """Not Store.wait: while one thread waits, it keeps the others from the store."""
        pause, longest = 0.002, max(0.05, self._world_size / _LOOKS_PER_SECOND)
        while not condition():
            time.sleep(pause)
            pause = min(2 * pause, longest)


def _split(
    prefix: str, content: list[tuple[WriteItem, Any]]
) -> dict[str, list[tuple[WriteItem, Any]]]:
    """Over a rank's files, of about the same size each; no file without content."""
    bins: list[list[tuple[WriteItem, Any]]] = [[] for _ in range(_FILES_PER_RANK)]
    sizes = [0] * _FILES_PER_RANK
    for item, data in sorted(content, key=lambda pair: -_bytes(pair[1])):
        smallest = sizes.index(min(sizes))
        bins[smallest].append((item, data))
        sizes[smallest] += _bytes(data)
    return {f"{prefix}{number}{TENSORS_SUFFIX}": one for number, one in enumerate(bins) if one}


def _bytes(data: Tensor | io.BytesIO) -> int:
    return data.nbytes if isinstance(data, Tensor) else data.getbuffer().nbytes


def _serialised(common: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def _no_checksums_of_torch() -> Iterator[None]:
    """torch.save would add a checksum to each tensor, at 2 GB/s, that torch.load ignores.

    The setting is the thread's own, or the process's in older versions of torch: there files of
    the same save may have them in part.
    """
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(True)


def _save_tensor(tensor: Tensor, file: ChecksummedFile) -> None:
    try:
        torch.save(_whole_storage(tensor), cast(IO[bytes], file))
    except RuntimeError as error:  # of torch's zip writer, about what `file.write` raised
        raise file.failure or error from None


def _host_memory(size: int) -> Tensor:
    if torch.cuda.is_available():
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except (RuntimeError, MemoryError) as error:
            print(
                f"{size / 2**30:.1f} GiB of host memory for checkpoints cannot be page-locked: "
                f"{str(error).splitlines()[0]}. Copies to other memory are slower",
                file=sys.stderr,
                flush=True,
            )
    try:
        return torch.empty(size, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        raise MemoryError(
            f"no {size / 2**30:.1f} GiB of host memory for a copy of weights and optimizer: "
            f"{str(error).splitlines()[0]}. On a CPU, checkpoint.async_save=false needs no copy."
        ) from error


def _tensor_at(arena: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor like `like` in a part of `arena`, with a storage of that part alone: torch.save
    writes whole storages."""
    if like.numel() == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    flat = torch.frombuffer(arena.numpy(), dtype=like.dtype, count=like.numel(), offset=offset)
    return flat.view(like.shape)


def _whole_storage(tensor: Tensor) -> Tensor:
    """`tensor`, a view of a gradient buffer perhaps, with a storage of its own; no copy."""
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return _tensor_at(tensor.view(-1).view(torch.uint8), 0, tensor)


def _write_file(path: Path, content: bytes, checksums: bool) -> Entry:
    with ChecksummedFile(path, checksums=checksums) as file:
        file.write(content)
        return file.close()


def _own_connection() -> dist.Store:
    """To the store: the process's own has other users, and may have been idle for hours. The same
    one where torch is too old to make another."""
    store = dist.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
