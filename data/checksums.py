"""A checksum tree over files: which 64 KiB of a terabyte are wrong, in one pass on all cores.

A file is cut into chunks of CHUNK_BYTES, the last one shorter. A leaf is the SHA-256 of a chunk,
the root the SHA-256 of the leaves back to back. The roots stand in the store's sidecar and vouch
for the leaves, which lie in a file of their own (32 bytes for 64 KiB: 0.05 % of the data), so that
opening a store reads none of them. The first and the last leaf are in the sidecar too: they tell
two files of one size apart without reading either.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 16
LEAF_BYTES = 32
ALGORITHM = "sha256"

_BUFFERED_BYTES = 4 * CHUNK_BYTES  # two buffers in each of hundreds of writers at a time


@dataclass(frozen=True)
class FileChecksums:
    """What the sidecar keeps of one file. Hashes in hexadecimal."""

    bytes: int
    root: str
    first: str  # leaf of the first chunk
    last: str  # leaf of the last chunk


def chunks_of(size: int) -> int:
    """How many chunks a file of `size` bytes has."""
    return -(-size // CHUNK_BYTES)


def leaves_of(content: "bytes | bytearray | memoryview") -> bytes:
    """The leaves of whole chunks (only the last may be short), back to back.

    hashlib lets go of the interpreter lock above 2 KiB, so threads scale.
    """
    view = memoryview(content)
    return b"".join(
        hashlib.sha256(view[start : start + CHUNK_BYTES]).digest()
        for start in range(0, len(view), CHUNK_BYTES)
    )


def summarise(size: int, leaves: "bytes | bytearray") -> FileChecksums:
    """The sidecar's entry for a file of `size` bytes with these leaves. A file has some bytes."""
    return FileChecksums(
        bytes=size,
        root=hashlib.sha256(leaves).hexdigest(),
        first=leaves[:LEAF_BYTES].hex(),
        last=leaves[-LEAF_BYTES:].hex(),
    )


class HashingFile:
    """A new file that is written front to back and hashed on the way.

    keep_open=False opens the file anew for each 256 KiB: a writer of hundreds of stores would
    otherwise run into the limit of open files, which is often 1024.

    Every OSError (a full disk, a quota, a file size limit) names the file.
    """

    def __init__(self, path: Path, *, keep_open: bool = True):
        self.path, self.bytes = path, 0
        self._keep_open = keep_open
        self._buffer = bytearray()
        self._leaves = bytearray()
        self._whole = hashlib.sha256()
        self._descriptor: int | None = os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
        )
        if not keep_open:
            self.close()

    def write(self, content: "bytes | bytearray | memoryview") -> None:
        self._buffer += content
        self.bytes += len(content)
        if len(self._buffer) >= _BUFFERED_BYTES:
            self._drain(len(self._buffer) // CHUNK_BYTES * CHUNK_BYTES)

    def finish(self) -> tuple[FileChecksums, bytes, str]:
        """Writes the rest and makes it durable; (sidecar entry, leaves, SHA-256 of the file)."""
        self._drain(len(self._buffer))
        with _naming(self.path):
            os.fsync(self._open())
        self.close()
        leaves = bytes(self._leaves)
        return summarise(self.bytes, leaves), leaves, self._whole.hexdigest()

    def close(self) -> None:
        """Closes without writing what is buffered."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with _naming(self.path):  # file systems with quotas may report here
                os.close(descriptor)

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        return self._descriptor

    def _drain(self, size: int) -> None:
        with memoryview(self._buffer) as buffer, buffer[:size] as content:
            self._leaves += leaves_of(content)
            self._whole.update(content)
            written = 0
            with _naming(self.path):
                descriptor = self._open()
                while written < size:  # a disk about to be full takes a part of it
                    written += os.write(descriptor, content[written:])
        del self._buffer[:size]
        if not self._keep_open:
            self.close()


class _naming:
    """Puts the file's name into an OSError that has none: os.write knows only a number."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def read_at(descriptor: int, start: int, size: int, buffer: bytearray) -> memoryview:
    """Bytes [start, start + size) of a file, fewer if it ends before; a view of `buffer`.

    pread and not a memory map: a file cut off meanwhile gives fewer bytes, not a SIGBUS.
    """
    view = memoryview(buffer)[:size]
    found = 0
    while found < size:
        got = os.preadv(descriptor, [view[found:]], start + found)
        if not got:
            break
        found += got
    return view[:found]


def hash_file(path: Path) -> tuple[FileChecksums, bytes, str]:
    """(sidecar entry, leaves, SHA-256 of the file), read once front to back."""
    leaves, whole, size = bytearray(), hashlib.sha256(), 0
    for block in _blocks(path):
        leaves += leaves_of(block)
        whole.update(block)
        size += len(block)
    return summarise(size, bytes(leaves)), bytes(leaves), whole.hexdigest()


def _blocks(path: Path) -> Iterator[memoryview]:
    buffer = bytearray(16 * CHUNK_BYTES)
    with open(path, "rb", buffering=0) as file:
        start = 0
        while block := read_at(file.fileno(), start, len(buffer), buffer):
            yield block
            start += len(block)
