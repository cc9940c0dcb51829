"""Reading a checkpoint's tensors straight into the memory they belong in.

torch's own reader has torch.load make every piece anew, and copies what is wanted of it: each byte
is moved twice, the first time into memory that the kernel hands out zeroed. Here the bytes of a
file go where they belong, with a thread for each file. Of a file that one rank wants as a whole the
checksum is taken on the way: it is read once, and what was compared is what was loaded.

A block that is a single stretch of its piece's bytes (rows, or the whole) is read by itself. Of a
piece that any other block is wanted of (columns) all bytes are read, once for all blocks together,
and the blocks are copied out of them: each rank that shares a piece by columns reads the whole of
it. What has another type or lies on another device goes through a tensor of its own as well.

What no other rank wants leaves the kernel's cache as soon as it is read (`parallel.page_cache`).

Each piece must have the shape and the type that the index gives it. One in a form that torch.save
does not write today is left to torch's reader, which trusts it no more than we do.

torch would also run the pickles of the index and of values that are no tensors. Here they are read
by `parallel.safe_pickle`, on every rank, and the bytes that were looked at are those that are used.
"""

from __future__ import annotations

import io
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from isal.isal_zlib import crc32
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from parallel.checkpoint_manifest import Entry, Progress, entry_of, in_threads
from parallel.checkpoint_reader import (
    INDEX_NAMES,
    Box,
    CheckpointFormatError,
    CheckpointReader,
    Piece,
    Values,
)
from parallel.checkpoint_save import Background
from parallel.page_cache import PagesBehind
from parallel.progress_beacon import beacon

if TYPE_CHECKING:
    from parallel.checkpoint_io import DamageSearch

_THREADS = 4  # of a rank, each with a file
_BLOCK_BYTES = 1 << 20  # of which the checksum is taken while the processor has them in its cache
# Files of which a rank wants at least so much are read front to back.
_NEARLY_ALL = 0.9


@contextmanager
def reading_directly(
    reader: CheckpointReader, search: DamageSearch | None = None, read_once: Collection[str] = ()
) -> Iterator[None]:
    """torch's distributed checkpointing reads as described above, while this lasts.

    Each rank plans by itself what it reads: torch would gather the plans of all on rank 0 and send
    each back as it came. What fails on one rank is for the caller to tell the others.

    Args:
        search: is told of the files whose checksums are taken on the way, and begins with the
            others.
        read_once: names of stored tensors of which no part is wanted by two ranks.
    """
    original, originally_index = FileSystemReader.read_data, FileSystemReader.read_metadata
    together = checkpoint.load_state_dict

    def read_data(self: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        left = _read(self, plan, planner, reader, search, read_once)
        return original(self, replace(plan, items=left), planner)

    def read_metadata(self: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        index = _torchs_index(reader)
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

    FileSystemReader.read_data = read_data  # type: ignore[method-assign]
    FileSystemReader.read_metadata = read_metadata  # type: ignore[method-assign]
    checkpoint.load_state_dict = partial(together, no_dist=True)
    try:
        yield
    finally:
        FileSystemReader.read_data = original  # type: ignore[method-assign]
        FileSystemReader.read_metadata = originally_index  # type: ignore[method-assign]
        checkpoint.load_state_dict = together


def _torchs_index(reader: CheckpointReader) -> Metadata:
    """With the classes that torch and megatron-core expect in it, whose constructors are all that
    is executed. What is not imported here has no business in it."""
    classes = {}
    for name in INDEX_NAMES:
        module, _, last = name.rpartition(".")
        module = "pathlib" if module == "pathlib._local" else module  # written by Python 3.13
        if hasattr(sys.modules.get(module), last):
            classes[name] = getattr(sys.modules[module], last)
    index = reader.unpickled_index(classes)
    if not isinstance(index, Metadata):
        raise CheckpointFormatError(f"{reader.folder} is damaged: its index is none")
    return index


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
    read_once: Collection[str],
) -> list[ReadItem]:
    """Fill the planner's tensors; returns what is left to torch."""
    index = _Index(cast(Metadata, cast(DefaultLoadPlanner, planner).metadata))
    left: list[ReadItem] = []
    wishes: defaultdict[str, list[_Wish]] = defaultdict(list)
    for item in plan.items:
        if item.type is LoadItemType.BYTE_IO:
            content = reader.read_object(item.storage_index.fqn)
            planner.load_bytes(item, io.BytesIO(content))
            continue
        stored = torchs.storage_data[item.storage_index]
        piece = Piece(index.box(item), stored.relative_path, stored.offset, stored.length)
        target = planner.resolve_tensor(item).detach()
        wishes[piece.file].append(_Wish(item, piece, target))
    through: set[str] = set()
    if search is not None:
        through = search.leave_to_loader(_wanted_as_a_whole(reader, wishes))

    def read(file: str) -> list[ReadItem]:
        by_piece: defaultdict[Piece, list[_Wish]] = defaultdict(list)
        for wish in wishes[file]:
            by_piece[wish.piece].append(wish)
        unknown: list[ReadItem] = []

        def stretches(heads: FileIO) -> Iterator[_Stretch]:
            """Front to back, each piece's head read when its turn comes: pages that have been
            looked at before keep the kernel from reading ahead (a load takes twice as long)."""
            for piece in sorted(by_piece, key=lambda piece: piece.start):
                wanted = by_piece[piece]
                values = reader.values(piece, heads.fileno())
                if values is None:
                    unknown.extend(wish.item for wish in wanted)
                    continue
                index.check(reader.folder, wanted[0], values)
                once = wanted[0].item.storage_index.fqn in read_once
                yield from _stretches(values, wanted, once)

        path = reader.path_of(file)
        with open(path, "rb", buffering=0) as heads:
            entry = _read_file(path, stretches(heads), through=file in through)
        if search is not None and entry is not None:
            search.found(file, entry)
        return unknown

    # This rank's own share first: what it wants of the others' is in the cache by then, where they
    # have read it, and all ranks have about as much to do.
    files = sorted(wishes, key=lambda file: file not in through)
    # a thread of its own waits for them, so that this one can tell that it gets on
    threads = min(_THREADS, len(os.sched_getaffinity(0)))
    for unknown in Background(lambda: in_threads(read, files, threads)).result():
        left += unknown
    beacon.tick()  # also where all were read too quickly to wait
    return left


def _wanted_as_a_whole(reader: CheckpointReader, wishes: dict[str, list[_Wish]]) -> set[str]:
    """Names of files of which nearly everything is wanted."""
    names = set()
    for name, wanted in wishes.items():
        size = reader.path_of(name).stat().st_size
        stored = {wish.piece: 0 for wish in wanted}
        for wish in wanted:
            stored[wish.piece] += wish.target.nbytes
        if sum(min(piece.length, bytes) for piece, bytes in stored.items()) >= _NEARLY_ALL * size:
            names.add(name)
    return names


class _Index:
    """What the checkpoint's index says of its pieces."""

    def __init__(self, metadata: Metadata) -> None:
        self._entries = metadata.state_dict_metadata
        self._sizes: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}

    def box(self, item: ReadItem) -> Box:
        """Of the piece that `item` is cut out of."""
        name, offset = item.storage_index.fqn, tuple(item.storage_index.offset or ())
        if name not in self._sizes:
            chunks = cast(TensorStorageMetadata, self._entries[name]).chunks
            self._sizes[name] = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in chunks}
        return offset, self._sizes[name][offset]

    def check(self, folder: Path, wish: _Wish, values: Values) -> None:
        """Raises CheckpointFormatError where a piece's shape or type is another one."""
        name = wish.item.storage_index.fqn
        dtype = cast(TensorStorageMetadata, self._entries[name]).properties.dtype
        expected = f"{dtype} {list(wish.piece.box[1])}".removeprefix("torch.")
        found = f"{values.dtype} {list(values.shape)}"
        if found != expected:
            raise CheckpointFormatError(
                f"{folder / wish.piece.file} is damaged where {name} lies: its piece at "
                f"{list(wish.piece.box[0])} should be {expected}, by the index, and is {found}"
            )


@dataclass(frozen=True)
class _Stretch:
    """Bytes of a file that hold a block, or a piece that blocks are cut out of."""

    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: bool
    once: bool  # and nobody else reads them
    wishes: list[_Wish] = field(default_factory=list)

    def read_with(self, reader: _FileReader) -> None:
        target = self.wishes[0].target
        if (
            not self.cut
            and len(self.wishes) == 1
            and target.device.type == "cpu"
            and target.dtype == self.dtype
            and target.is_contiguous()
        ):
            reader.fill(_memory(target), once=self.once)
            return
        values = torch.empty(self.shape, dtype=self.dtype)
        reader.fill(_memory(values), once=self.once)
        for wish in self.wishes:
            wish.target.copy_(_block(values, wish.item) if self.cut else values)


def _stretches(values: Values, wishes: list[_Wish], once: bool) -> list[_Stretch]:
    """What has to be read of a piece for these blocks of it, front to back."""
    dtype = getattr(torch, values.dtype)
    whole = torch.empty(values.shape, dtype=dtype, device="meta")
    blocks = [_block(whole, wish.item) for wish in wishes]
    if not all(block.is_contiguous() for block in blocks):
        # the others read all of it as well
        return [_Stretch(values.first, values.shape, dtype, cut=True, once=False, wishes=wishes)]
    found: dict[tuple[int, tuple[int, ...]], _Stretch] = {}
    for wish, block in zip(wishes, blocks, strict=True):
        begin = values.first + block.storage_offset() * dtype.itemsize
        place = begin, tuple(block.shape)
        stretch = found.setdefault(place, _Stretch(*place, dtype, cut=False, once=once))
        stretch.wishes.append(wish)
    return sorted(found.values(), key=lambda stretch: stretch.begin)


def _block(piece: Tensor, item: ReadItem) -> Tensor:
    return narrow_tensor_by_index(piece, item.storage_offsets, item.lengths)


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
        for stretch in stretches:
            if stretch.begin < reader.at:  # blocks that overlap
                again.append(stretch)
                continue
            reader.skip(stretch.begin - reader.at)
            stretch.read_with(reader)
        reader.skip(os.fstat(file.fileno()).st_size - reader.at)
        _read_singly(path, file, again)
        reader.behind.let_go()
        return entry_of(reader.at, reader.checksum)


def _read_singly(path: Path, file: FileIO, stretches: Iterable[_Stretch]) -> None:
    reader = _FileReader(path, file, checksum=False)
    for stretch in stretches:
        reader.at = file.seek(stretch.begin)
        stretch.read_with(reader)
    reader.behind.let_go()


class _FileReader:
    """Reads on from where a file is."""

    def __init__(self, path: Path, file: FileIO, *, checksum: bool) -> None:
        self.at = 0  # where in the file that is
        self.checksum = 0
        self.behind = PagesBehind(file.fileno())
        self._path, self._file, self._check = path, file, checksum

    def fill(self, memory: memoryview, *, once: bool = False) -> None:
        """once: nobody else will read these bytes.

        Raises CheckpointFormatError where the file ends before.
        """
        if self._read(memory, once) != len(memory):
            raise CheckpointFormatError(f"{self._path} is damaged: it is cut off")

    def skip(self, count: int) -> None:
        """Read `count` bytes for nothing but the checksum; less at the end of the file."""
        scratch = memoryview(bytearray(min(count, _BLOCK_BYTES)))
        while count > 0 and (read := self._read(scratch[:count], False)):
            count -= read

    def _read(self, memory: memoryview, once: bool) -> int:
        """Bytes read: all of `memory`, or up to the end of the file."""
        read = 0
        while read < len(memory):
            block = memory[read : read + _BLOCK_BYTES]
            count = self._file.readinto(block)
            if count == 0:
                break
            if self._check:
                self.checksum = crc32(block[:count], self.checksum)
            read += count
            self.at += count
            if once:
                self.behind.done_with(self.at - count, self.at)
            Progress.bytes += count
        return read
