"""Reading a checkpoint's tensors straight into the memory they belong in.

torch's own reader has torch.load make every piece anew, and copies what is wanted of it: each byte
is moved twice, the first time into memory that the kernel hands out zeroed. Here the bytes of a
file go where they belong, with a thread for each file. Of a file that one rank wants as a whole the
checksum is taken on the way: it is read once, and what was compared is what was loaded.

What does not lie in a file as it is wanted (another type, another device, a block that is no single
stretch of bytes) goes through a tensor of its own. A piece in a form that torch.save does not
write today is left to torch's reader.
"""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from parallel.checkpoint_manifest import Entry, Progress, entry_of, in_threads
from parallel.checkpoint_reader import CheckpointFormatError, CheckpointReader, Piece
from parallel.checkpoint_save import Background
from parallel.progress_beacon import beacon

if TYPE_CHECKING:
    from parallel.checkpoint_io import DamageSearch

_THREADS = 4  # of a rank, each with a file
_BLOCK_BYTES = 1 << 20  # of which the checksum is taken while the processor has them in its cache
# Files of which a rank wants at least so much are read front to back.
_NEARLY_ALL = 0.9


@contextmanager
def reading_directly(folder: Path, search: DamageSearch | None = None) -> Iterator[None]:
    """torch's distributed checkpointing reads tensors as described above, while this lasts.

    search: is told of the files whose checksums are taken on the way, and begins with the others.
    """
    original = FileSystemReader.read_data

    def read_data(self: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        left = _read(self, plan, planner, CheckpointReader(folder), search)
        return original(self, replace(plan, items=left), planner)

    FileSystemReader.read_data = read_data  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystemReader.read_data = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Wish:
    """A block of a stored piece, and the tensor it goes to."""

    item: ReadItem
    piece: Piece
    target: Tensor


def _read(
    torchs: FileSystemReader,
    plan: LoadPlan,
    planner: LoadPlanner,
    reader: CheckpointReader,
    search: DamageSearch | None,
) -> list[ReadItem]:
    """Fill the planner's tensors; returns what is left to torch."""
    left: list[ReadItem] = []
    wishes: defaultdict[str, list[_Wish]] = defaultdict(list)
    for item in plan.items:
        if item.type is LoadItemType.BYTE_IO:
            left.append(item)
            continue
        stored = torchs.storage_data[item.storage_index]
        piece = Piece(((), ()), stored.relative_path, stored.offset, stored.length)
        target = planner.resolve_tensor(item).detach()
        wishes[piece.file].append(_Wish(item, piece, target))
    through: set[str] = set()
    if search is not None:
        through = search.leave_to_loader(_wanted_as_a_whole(reader, wishes))

    def read(file: str) -> list[ReadItem]:
        stretches: list[_Stretch] = []
        unknown: list[ReadItem] = []
        for wish in wishes[file]:
            stretch = _stretch(reader, wish)
            if stretch is None:
                unknown.append(wish.item)
            else:
                stretches.append(stretch)
        entry = _read_file(reader.folder / file, stretches, through=file in through)
        if search is not None and entry is not None:
            search.found(file, entry)
        return unknown

    # a thread of its own waits for them, so that this one can tell that it gets on
    threads = min(_THREADS, len(os.sched_getaffinity(0)))
    for unknown in Background(lambda: in_threads(read, wishes, threads)).result():
        left += unknown
    beacon.tick()  # also where all were read too quickly to wait
    return left


def _wanted_as_a_whole(reader: CheckpointReader, wishes: dict[str, list[_Wish]]) -> set[str]:
    """Names of files of which nearly everything is wanted."""
    names = set()
    for name, wanted in wishes.items():
        size = (reader.folder / name).stat().st_size
        stored = {wish.piece: 0 for wish in wanted}
        for wish in wanted:
            stored[wish.piece] += wish.target.nbytes
        if sum(min(piece.length, bytes) for piece, bytes in stored.items()) >= _NEARLY_ALL * size:
            names.add(name)
    return names


@dataclass(frozen=True)
class _Stretch:
    """Bytes of a file that hold a block, or the piece that it is cut out of."""

    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    wish: _Wish
    cut: bool

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read_with(self, reader: _FileReader) -> None:
        target = self.wish.target
        if (
            not self.cut
            and target.device.type == "cpu"
            and target.dtype == self.dtype
            and target.is_contiguous()
        ):
            reader.fill(_memory(target))
            return
        values = torch.empty(self.shape, dtype=self.dtype)
        reader.fill(_memory(values))
        if self.cut:
            item = self.wish.item
            values = narrow_tensor_by_index(values, item.storage_offsets, item.lengths)
        target.copy_(values)


def _stretch(reader: CheckpointReader, wish: _Wish) -> _Stretch | None:
    """Where the block lies; None for a piece in another form than torch.save's of a plain tensor.

    Raises CheckpointFormatError where the piece does not contain it.
    """
    values = reader.values(wish.piece)
    if values is None:
        return None
    dtype, item = getattr(torch, values.dtype), wish.item
    ends = [a + n for a, n in zip(item.storage_offsets, item.lengths, strict=True)]
    if len(ends) != len(values.shape) or any(
        end > size for end, size in zip(ends, values.shape, strict=True)
    ):
        raise CheckpointFormatError(
            f"{reader.folder / wish.piece.file} is damaged: a piece of {item.storage_index.fqn} "
            f"should reach to {ends}, and has the shape {list(values.shape)}"
        )
    whole = torch.empty(values.shape, dtype=dtype, device="meta")
    block = narrow_tensor_by_index(whole, item.storage_offsets, item.lengths)
    if not block.is_contiguous():
        return _Stretch(values.first, values.shape, dtype, wish, cut=True)
    begin = values.first + block.storage_offset() * dtype.itemsize
    return _Stretch(begin, tuple(block.shape), dtype, wish, cut=False)


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read_file(path: Path, stretches: Iterable[_Stretch], *, through: bool) -> Entry | None:
    """Read them; `through`: and everything else of the file, for its entry in the manifest."""
    with open(path, "rb", buffering=0) as file:
        if not through:
            _read_singly(path, file, stretches)
            return None
        reader = _FileReader(path, file, checksum=True)
        again = []
        for stretch in sorted(stretches, key=lambda stretch: stretch.begin):
            if stretch.begin < reader.at:  # wanted twice
                again.append(stretch)
                continue
            reader.skip(stretch.begin - reader.at)
            stretch.read_with(reader)
        reader.skip(os.fstat(file.fileno()).st_size - reader.at)
        _read_singly(path, file, again)
        return entry_of(reader.at, reader.checksum)


def _read_singly(path: Path, file: FileIO, stretches: Iterable[_Stretch]) -> None:
    for stretch in stretches:
        file.seek(stretch.begin)
        stretch.read_with(_FileReader(path, file, checksum=False))


class _FileReader:
    """Reads on from where a file is."""

    def __init__(self, path: Path, file: FileIO, *, checksum: bool) -> None:
        self.at = 0  # bytes read
        self.checksum = 0
        self._path, self._file, self._check = path, file, checksum

    def fill(self, memory: memoryview) -> None:
        """Raises CheckpointFormatError where the file ends before."""
        if self._read(memory) != len(memory):
            raise CheckpointFormatError(f"{self._path} is damaged: it is cut off")

    def skip(self, count: int) -> None:
        """Read `count` bytes for nothing but the checksum; less at the end of the file."""
        scratch = memoryview(bytearray(min(count, _BLOCK_BYTES)))
        while count > 0 and (read := self._read(scratch[:count])):
            count -= read

    def _read(self, memory: memoryview) -> int:
        """Bytes read: all of `memory`, or up to the end of the file."""
        read = 0
        while read < len(memory):
            block = memory[read : read + _BLOCK_BYTES]
            count = self._file.readinto(block)
            if count == 0:
                break
            if self._check:
                self.checksum = zlib.crc32(block[:count], self.checksum)
            read += count
            Progress.bytes += count
        self.at += read
        return read
