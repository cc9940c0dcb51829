"""The list of a checkpoint's files with their sizes and checksums, and whether they still hold.

    {"format": 1, "algorithm": "crc32",
     "files": {"common.pt": {"bytes": 2104, "checksum": "8c3a61b0"}, ...}}

`manifest.json` is written last, before the rename that publishes a checkpoint. The checksum is the
CRC-32 of the whole file (zlib's, as the `crc32` command prints it): it finds every flipped bit and
every damaged stretch of up to 32 bits, and misses other damage once in 4 billion. It guards against
accidents, not against somebody. ISA-L takes it, at 12 GB/s on one core of a Xeon where zlib does
2.2 (which made a checkpoint on a fast disk a third slower) and SHA-256 1.2.

Imports neither torch nor megatron-core. ISA-L lets go of the interpreter lock, so threads scale.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from isal.isal_zlib import crc32

NAME = "manifest.json"
FORMAT = 1
ALGORITHM = "crc32"
MISSING = f"{NAME} is missing"  # the problem of a folder without a manifest
NO_CHECKSUMS = "none"  # in place of the algorithm: sizes are all that can be compared

_BLOCK_BYTES = 4 << 20
_THREADS = 4
# Written bytes are brought to the disk in parts of so many: the count of them then says how far
# the disk is, and the last part does not take minutes.
_SYNC_BYTES = 1 << 30
# The kernel is asked to begin with the disk after so many; by itself it would collect pages first,
# while the disk has nothing to do (measured: two thirds of the time for 0.8 GB), and keep them all
# (measured in a virtual machine that had to ask its host for their memory: 4.3 s instead of 1.6 s
# for 3.6 GB).
_HAND_OVER_BYTES = 32 << 20

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# of one file: {"bytes": n} or {"bytes": n, "checksum": "hex"}
Entry = dict[str, Any]


class Progress:
    """Bytes of checkpoints that this process has written or compared so far, over all threads.

    For seeing that it gets on: two threads that add at the same moment may lose a part.
    """

    bytes = 0


class ManifestError(ValueError):
    """A manifest that is missing or cannot be understood."""


class NewerManifestError(ManifestError):
    """A manifest of a format this version does not know: nothing can be said about the files."""


class ChecksummedFile:
    """A new file that is written front to back, with its checksum taken on the way.

    Has of a file what torch.save needs: `write`, `tell`, `flush`. Every OSError names the file.
    """

    def __init__(self, path: Path, *, checksums: bool = True) -> None:
        self.path = path
        self._checksum: int | None = 0 if checksums else None
        self._bytes = 0
        self._unsynced = 0
        self._handed_over = 0
        self.failure: OSError | None = None  # what `write` raised, if it did
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by close()

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = self._named(error)
            raise self.failure from error
        if self._checksum is not None:
            self._checksum = crc32(data, self._checksum)
        size = memoryview(data).nbytes
        self._bytes += size
        self._unsynced += size
        if self._unsynced >= _SYNC_BYTES:
            self._sync()
        elif self._bytes - self._handed_over >= _HAND_OVER_BYTES:
            self._hand_over()
        Progress.bytes += size
        return size

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        """Nothing: `close` hands everything over at once."""

    def close(self) -> Entry:
        """Bring the content to the disk; the file's entry in the manifest."""
        self._sync()
        try:
            self._file.close()
        except OSError as error:
            raise self._named(error) from error
        return entry_of(self._bytes, self._checksum)

    def _sync(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self.failure = self._named(error)
            raise self.failure from error
        self._unsynced, self._handed_over = 0, self._bytes

    def _hand_over(self) -> None:
        """Have the kernel begin to write, without waiting for it: what Linux makes of the advice
        that these pages are not needed. All that is written by then leaves its cache, where new
        pages are dearer than used ones and others have better use for the memory."""
        self._handed_over = self._bytes
        with contextlib.suppress(OSError):  # advice: what cannot be written is told by fsync
            os.posix_fadvise(self._file.fileno(), 0, self._bytes, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> ChecksummedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # of what is in the buffer still, after an error
            self._file.close()

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self.path))


def write_manifest(
    folder: Path, known: Mapping[str, Entry] | None = None, *, checksums: bool = True
) -> None:
    """Write `folder`/manifest.json over all files below it, and bring it to the disk.

    Args:
        known: entries of files whose checksums were taken while they were written; the others
            are read.
        checksums: False: only sizes.
    """
    known = known or {}
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != NAME:
            files[name] = known.get(name) or file_entry(path, checksums=checksums)
    algorithm = ALGORITHM if checksums else NO_CHECKSUMS
    content = {"format": FORMAT, "algorithm": algorithm, "files": files}
    with open(folder / NAME, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder` as written by `write_manifest`.

    Raises:
        NewerManifestError: its format or its algorithm is unknown here.
        ManifestError: there is none, or it cannot be read.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
        written, algorithm = content["format"], content["algorithm"]
        sizes = [entry["bytes"] for entry in content["files"].values()]
    except FileNotFoundError:
        raise ManifestError(MISSING) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{NAME} cannot be read: {type(error).__name__}: {error}") from error
    if written != FORMAT or algorithm not in (ALGORITHM, NO_CHECKSUMS):
        raise NewerManifestError(
            f"{path} has format {written!r} with {algorithm!r} checksums; this version knows "
            f"format {FORMAT} with {ALGORITHM!r} or {NO_CHECKSUMS!r}: use the version that wrote it"
        )
    if not all(isinstance(size, int) for size in sizes):
        raise ManifestError(f"{NAME} cannot be read: a size is not a number")
    return content


def verify(
    folder: Path,
    *,
    checksums: bool = True,
    names: Collection[str] | None = None,
    known: Mapping[str, Entry] | None = None,
    unreadable_is_damage: bool = True,
) -> list[str]:
    """What is wrong with the files of `folder`: one line for each problem, empty when sound.

    Files that the manifest does not list are not looked at.

    Args:
        checksums: also read every file and compare its checksum, where the manifest has them.
        names: only these files (a rank's share); None: all.
        known: what somebody has already found by reading files; these are not read again.
        unreadable_is_damage: False: raise where a file is there and cannot be read; that may be
            the fault of this host.

    Raises:
        NewerManifestError: see `read_manifest`.
        OSError: see `unreadable_is_damage`.
    """
    try:
        manifest = read_manifest(folder)
    except NewerManifestError:
        raise
    except ManifestError as error:
        if not unreadable_is_damage and isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        return [str(error)]
    compare = checksums and manifest["algorithm"] != NO_CHECKSUMS
    files = {
        name: entry
        for name, entry in sorted(manifest["files"].items())
        if names is None or name in names
    }

    def problem(name: str) -> str | None:
        taken = (known or {}).get(name)
        return _problem(folder / name, name, files[name], compare, unreadable_is_damage, taken)

    threads = min(_THREADS, max(1, len(os.sched_getaffinity(0))))
    return [line for line in in_threads(problem, files, threads) if line]


def in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int
) -> list[_Result]:
    """`function` of each item, in the order of the items; raises what the first of them raised.

    Unlike those of a ThreadPoolExecutor, its threads do not keep a process from ending.
    """
    waiting = list(enumerate(items))
    results: dict[int, _Result] = {}
    errors: dict[int, BaseException] = {}
    waiting.reverse()

    def work() -> None:
        while True:
            try:
                index, item = waiting.pop()
            except IndexError:
                return
            try:
                results[index] = function(item)
            except BaseException as error:
                errors[index] = error

    workers = [
        threading.Thread(target=work, daemon=True, name="checkpoint file")
        for _ in range(min(threads, len(waiting)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[min(errors)]
    return [results[index] for index in sorted(results)]


def file_entry(path: Path, *, checksums: bool = True) -> Entry:
    """The entry of a file that lies there."""
    if not checksums:
        return entry_of(path.stat().st_size, None)
    size, checksum = 0, 0
    block = memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            checksum = crc32(block[:count], checksum)
            size += count
            Progress.bytes += count
    return entry_of(size, checksum)


def entry_of(size: int, checksum: int | None) -> Entry:
    """What the manifest says of a file of that size and CRC-32."""
    return {"bytes": size} if checksum is None else {"bytes": size, "checksum": f"{checksum:08x}"}


def _problem(
    path: Path,
    name: str,
    expected: Entry,
    checksums: bool,
    unreadable_is_damage: bool,
    taken: Entry | None,
) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        found = taken or file_entry(path) if checksums else expected
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        if not unreadable_is_damage:
            raise
        return f"{name} cannot be read: {error.strerror or error}"
    if found != expected:
        return (
            f"{name} has checksum {found['checksum']} instead of {expected.get('checksum')}: "
            "its content has changed"
        )
    return None
