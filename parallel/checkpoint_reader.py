"""Reading a checkpoint of any layout from one process, tensor by tensor, and without trusting it.

Needs neither megatron-core nor process groups, and torch only where a tensor is read. A checkpoint
is a folder in megatron-core's "torch_dist" format:

    metadata.json     which format it is
    common.pt         plain values, by torch.save
    .metadata         a pickle: shape and type of each tensor, and where its pieces lie
    __0_0.distcp ...  the pieces, one torch.save behind the other; a piece is what one rank held

Both pickles go through `parallel.safe_pickle`, and pieces through torch.load(weights_only=True).
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel import safe_pickle
from parallel.safe_pickle import DTYPE_BYTES, Record, record_class

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_FILE = "metadata.json"
PLAIN_FILE = "common.pt"
INDEX_FILE = ".metadata"
OPTIMIZER_PREFIX = "optimizer."
# Before a piece's storage there are 700 bytes, behind it 1 to 2 KB.
_HEAD_BYTES = 4 << 10
_DIRECTORY_BYTES = 4 << 10
# of a ZIP archive: before each entry its mark, method, lengths of its name and of an extra field,
# and behind it, as torch writes them, a mark and its size twice
_LOCAL = struct.Struct("<4s4xH16xHH")
_DESCRIPTOR = struct.Struct("<4s4xII")
# (offsets, sizes) of a block of a tensor
Box = tuple[tuple[int, ...], tuple[int, ...]]


class CheckpointFormatError(ValueError):
    """A folder that is not a checkpoint, or one that is damaged."""


@dataclass(frozen=True)
class Piece:
    """A block of a tensor, and the bytes of a file that hold it."""

    box: Box
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Values:
    """Where a piece's numbers lie in its file, one after the other, the last axis fastest."""

    first: int  # byte
    shape: tuple[int, ...]
    dtype: str  # torch's name without "torch."


@dataclass(frozen=True)
class StoredTensor:
    name: str
    shape: tuple[int, ...]
    dtype: str  # torch's name without "torch."
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


class CheckpointReader:
    """What a checkpoint holds; everything is read when asked for.

    Raises CheckpointFormatError where `folder` is not a checkpoint of this format. The properties
    raise it for a damaged one, and `parallel.safe_pickle.UnsafePickleError` for one that is not
    harmless.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._harmless: set[bytes] = set()  # SHA-256 of objects: those of most layers are the same
        path = self.folder / FORMAT_FILE
        if not path.is_file():
            raise CheckpointFormatError(f"{folder} is not a checkpoint: it has no {FORMAT_FILE}")
        try:
            backend = json.loads(path.read_bytes()).get("sharded_backend")
        except (ValueError, AttributeError) as error:
            raise CheckpointFormatError(f"{path} is damaged: {error}") from error
        if backend != "torch_dist":
            raise CheckpointFormatError(
                f"{folder} is a checkpoint in megatron-core's format {backend}; only torch_dist is "
                "read here"
            )

    @cached_property
    def plain(self) -> dict[str, Any]:
        """The values that are no sharded tensors: train_state, identity, ..."""
        return self._plain(tolerant=False)

    @cached_property
    def foreign_plain(self) -> dict[str, Any]:
        """`plain` of a program whose classes we do not know: they come as inert `Record`s."""
        return self._plain(tolerant=True)

    def _plain(self, tolerant: bool) -> dict[str, Any]:
        path = self.folder / PLAIN_FILE
        self._must_exist(PLAIN_FILE)
        try:
            values = safe_pickle.load_saved(path, tolerant=tolerant)
        except safe_pickle.UnsafePickleError:
            raise
        except ValueError as error:
            raise CheckpointFormatError(str(error)) from error
        if not isinstance(values, dict):
            raise CheckpointFormatError(f"{path} is damaged: it holds no table of values")
        return values

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every sharded tensor by its name, sorted."""
        tensors = {}
        for name, entry in self._index["state_dict_metadata"].items():
            if not _is_tensor(entry):
                continue
            shape = _size(entry.state["size"])
            boxes = [(_size(c.state["offsets"]), _size(c.state["sizes"])) for c in _chunks(entry)]
            found = tuple(Piece(box, *self._piece(name, box[0])) for box in boxes)
            tensors[name] = StoredTensor(name, shape, _dtype(entry), found)
        return dict(sorted(tensors.items()))

    @cached_property
    def objects(self) -> dict[str, Piece]:
        """Sharded values that are no tensors (megatron-core's `_extra_state`), by their name."""
        entries = self._index["state_dict_metadata"]
        return {
            name: Piece(((), ()), *self._piece(name, None))
            for name in sorted(entries)
            if not _is_tensor(entries[name])
        }

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """`tensors` without the optimizer's."""
        return {n: t for n, t in self.tensors.items() if not n.startswith(OPTIMIZER_PREFIX)}

    def problems(self) -> list[str]:
        """What is wrong with its structure, one line each: pieces that lie outside of their files
        or leave parts of a tensor out, and objects that are not harmless. Reads no tensor. Raises
        as the properties."""
        assert self.plain is not None
        sizes: dict[str, int] = {}
        problems = []
        places = [(name, piece) for name, piece in self.objects.items()]
        for tensor in self.tensors.values():
            places += [(tensor.name, piece) for piece in tensor.pieces]
            stored = sum(math.prod(piece.box[1]) for piece in tensor.pieces)
            if stored != tensor.numel:
                problems.append(f"{tensor.name}: {stored} of {tensor.numel} elements are there")
        for name, piece in places:
            if piece.file not in sizes:
                path = self.folder / piece.file
                sizes[piece.file] = path.stat().st_size if path.is_file() else -1
                if sizes[piece.file] < 0:
                    problems.append(f"{piece.file} is missing")
            if 0 <= sizes[piece.file] < piece.start + piece.length:
                problems.append(
                    f"{piece.file} has {sizes[piece.file]} bytes; {name} ends at "
                    f"{piece.start + piece.length}"
                )
        if not problems:
            try:
                for name in self.objects:
                    self.read_object(name)
            except ValueError as error:
                problems.append(str(error))
        return problems

    def check_harmless(self) -> None:
        """Read everything that megatron-core unpickles when it loads this checkpoint: the index,
        the plain values and the objects.

        Raises:
            UnsafePickleError: one of them names what no checkpoint has in it.
            CheckpointFormatError: one is damaged.
        """
        import torch

        assert self.plain is not None
        loaded: set[bytes] = set()
        for name in self.objects:
            content = self.read_object(name)
            digest = sha256(content).digest()
            if digest in loaded:
                continue
            try:
                # torch again, but told to trust nothing: it might find another file in these bytes
                torch.load(io.BytesIO(content), weights_only=True)
                loaded.add(digest)
            except Exception as error:  # torch raises RuntimeError, UnpicklingError, ...
                raise CheckpointFormatError(
                    f"{self.folder / self.objects[name].file} is damaged where {name} lies: "
                    f"{safe_pickle.torchs_reason(error)}"
                ) from None

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A tensor, or the block of it at `box`, on the CPU in its stored type.

        Holds the result and the largest piece that overlaps it at one time.
        """
        import torch

        stored = self.tensors[name]
        offsets, sizes = box or ((0,) * len(stored.shape), stored.shape)
        result, filled = None, 0
        for piece in stored.pieces:
            common = _intersection(piece.box, (offsets, sizes))
            if common is None:
                continue
            part = self.read_piece(stored, piece)[_slices(common, piece.box[0])]
            if part.shape == torch.Size(sizes):
                return part.clone() if part.numel() * 2 < math.prod(piece.box[1]) else part
            if result is None:
                result = torch.empty(sizes, dtype=part.dtype)
            result[_slices(common, offsets)] = part
            filled += part.numel()
        if result is None or filled != result.numel():
            raise CheckpointFormatError(f"{self.folder}: parts of {name} are missing")
        return result

    def read_piece(self, stored: StoredTensor, piece: Piece) -> Tensor:
        """One piece as it lies in its file."""
        import torch

        with self._open(piece) as file:
            try:
                tensor = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises RuntimeError, UnpicklingError, ...
                raise CheckpointFormatError(
                    f"{self.folder / piece.file} is damaged where {stored.name} lies: "
                    f"{safe_pickle.torchs_reason(error)}"
                ) from None
        shape = tuple(getattr(tensor, "shape", ()))
        if not torch.is_tensor(tensor) or shape != piece.box[1]:
            raise CheckpointFormatError(
                f"{self.folder / piece.file} is damaged: a piece of {stored.name} should have the "
                f"shape {list(piece.box[1])}, and has {list(shape)}"
            )
        return tensor.detach()

    def values(self, piece: Piece, file: int | None = None) -> Values | None:
        """Where the values of a tensor's piece lie, without reading them; None where they do not
        lie there as they are in memory, or are not known to.

        Args:
            file: descriptor of the piece's file, to look there at the first bytes alone, if these
                tell. Where it is stays as it is.

        Raises UnsafePickleError and CheckpointFormatError as the properties.
        """
        where = f"{self.folder / piece.file}, byte {piece.start},"
        try:
            if file is not None:
                head = os.pread(file, min(_HEAD_BYTES, piece.length), piece.start)
                values = _values_in_front(head, where, piece)
                if values is not None:
                    return values
            with (
                self._open(piece, buffer_bytes=1 << 12) as part,
                zipfile.ZipFile(part) as archive,
            ):
                return _values(archive, where, piece)
        except (safe_pickle.UnsafePickleError, OSError):
            raise
        except Exception as error:  # what is in a damaged archive may be anything
            raise CheckpointFormatError(f"{where} is damaged: {error}") from error

    def read_object(self, name: str) -> bytes:
        """The bytes of a sharded value that is no tensor, as they were written.

        Raises UnsafePickleError where loading them could run a program.
        """
        piece = self.objects[name]
        with self._open(piece) as file:
            content = file.read()
        digest = sha256(content).digest()
        if digest in self._harmless:
            return content
        try:
            safe_pickle.load_saved(io.BytesIO(content), f"{self.folder / piece.file}, {name},")
        except safe_pickle.UnsafePickleError:
            raise
        except ValueError as error:
            raise CheckpointFormatError(str(error)) from error
        self._harmless.add(digest)
        return content

    def path_of(self, file: str) -> Path:
        """Of a file that the index names, which may be anybody's: nothing outside of the folder.

        Raises CheckpointFormatError.
        """
        path = self.folder / file
        if path.parent != self.folder or not path.is_file():
            raise CheckpointFormatError(f"{self.folder}: {file} is missing")
        return path

    def _open(self, piece: Piece, buffer_bytes: int = 1 << 16) -> io.BufferedReader:
        part = _FilePart(self.path_of(piece.file), piece.start, piece.length)
        return io.BufferedReader(part, buffer_bytes)

    def _must_exist(self, name: str) -> None:
        if not (self.folder / name).is_file():
            raise CheckpointFormatError(f"{self.folder} is damaged: {name} is missing")

    def unpickled_index(self, allowed: Mapping[str, Any]) -> Any:
        """The index, made of what `allowed` has for `INDEX_NAMES`; raises as the properties."""
        self._must_exist(INDEX_FILE)
        try:
            with open(self._index_path, "rb") as file:
                return safe_pickle.load(file, str(self._index_path), allowed)
        except safe_pickle.UnsafePickleError:
            raise
        except ValueError as error:
            raise CheckpointFormatError(str(error)) from error

    @property
    def _index_path(self) -> Path:
        return self.folder / INDEX_FILE

    @cached_property
    def _index(self) -> dict[str, Any]:
        state = getattr(self.unpickled_index(INDEX_NAMES), "state", None)
        if not isinstance(state, dict) or not {"state_dict_metadata", "storage_data"} <= set(state):
            raise CheckpointFormatError(f"{self._index_path} is damaged: it is no index")
        return state

    @cached_property
    def _pieces(self) -> dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]:
        """(name, offsets; None for objects) -> file, first byte, bytes."""
        pieces = {}
        for key, place in self._index["storage_data"].items():
            offset = key.state.get("offset")
            if place.state.get("transform_descriptors"):
                raise CheckpointFormatError(
                    f"{self.folder}: its tensors are compressed, which is not read here"
                )
            name = key.state["fqn"], None if offset is None else _size(offset)
            if name in pieces:  # which one torch would read depends on the order
                raise CheckpointFormatError(f"{self._index_path} has a piece of {name[0]} twice")
            pieces[name] = (
                place.state["relative_path"],
                place.state["offset"],
                place.state["length"],
            )
        return pieces

    def _piece(self, name: str, offsets: tuple[int, ...] | None) -> tuple[str, int, int]:
        place = self._pieces.get((name, offsets))
        if place is None:
            raise CheckpointFormatError(f"{self._index_path}: {name} misses a piece")
        return place


class StoredWeights:
    """A checkpoint's weights by their names in the whole model, as `models.initialize` has them.

    megatron-core stores the layers of a dense model stacked, as `decoder.layers.mlp...` of
    [layers, ...], and those of a model with sparse ones each by itself, `decoder.layers.3.mlp...`.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader
        self._stored = reader.weights

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._named())

    def _named(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, stored in self._stored.items():
            if _is_stack(name):
                for layer in range(stored.shape[0]):
                    yield name.replace(_LAYERS, f"{_LAYERS}{layer}."), stored.shape[1:]
            else:
                yield name, stored.shape

    def dtype(self, name: str) -> str:
        return self._stored[self._place(name)[0]].dtype

    def read(self, name: str) -> Tensor:
        """Raises KeyError for a name that is not among `shapes`."""
        stored, layer = self._place(name)
        if layer is None:
            return self.reader.read(stored)
        shape = self._stored[stored].shape
        offsets = (layer, *(0 for _ in shape[1:]))
        return self.reader.read(stored, (offsets, (1, *shape[1:])))[0]

    def _place(self, name: str) -> tuple[str, int | None]:
        """Stored name, and which layer of a stack."""
        if name in self._stored:
            return name, None
        found = _IN_LAYER.fullmatch(name)
        if found is not None:
            stack = _LAYERS + found[2]
            if stack in self._stored and int(found[1]) < self._stored[stack].shape[0]:
                return stack, int(found[1])
        raise KeyError(name)


_LAYERS = "decoder.layers."
_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


def _is_stack(name: str) -> bool:
    return name.startswith(_LAYERS) and _IN_LAYER.fullmatch(name) is None


_METADATA = "torch.distributed.checkpoint.metadata"
INDEX_NAMES: dict[str, Any] = {
    **{
        f"{module}.{name}": record_class(f"{module}.{name}")
        for module, names in {
            _METADATA: (
                *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta"),
                *("TensorProperties", "ChunkStorageMetadata", "MetadataIndex"),
                "_MEM_FORMAT_ENCODING",
            ),
            "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
            # what the ranks planned to write; not looked at
            "torch.distributed.checkpoint.planner": (
                *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
            ),
            "megatron.core.dist_checkpointing.strategies.torch": (
                *("MCoreMetadata", "MCoreSavePlan"),
            ),
            "torch": ("Size",),
            "pathlib": ("PosixPath", "WindowsPath", "Path"),  # where it was written
            "pathlib._local": ("PosixPath", "WindowsPath"),  # from Python 3.13 on
            "torch.serialization": ("_get_layout",),
        }.items()
        for name in names
    },
    **{f"torch.{name}": name for name in DTYPE_BYTES},
}


def _size(record: Any) -> tuple[int, ...]:
    """A torch.Size, pickled as the call Size(tuple)."""
    values = record.args[0] if isinstance(record, Record) else record
    return tuple(int(value) for value in values)


def _is_tensor(entry: Record) -> bool:
    """By the class, as torch tells them apart: what is in an entry is up to who wrote it."""
    return entry.name == f"{_METADATA}.TensorStorageMetadata"


def _chunks(entry: Record) -> list[Any]:
    return entry.state["chunks"]


def _dtype(entry: Record) -> str:
    return entry.state["properties"].state[0]


def _values(archive: zipfile.ZipFile, where: str, piece: Piece) -> Values | None:
    """Of what torch.save wrote there, if that is one whole tensor as `parallel.checkpoint_save`
    writes it."""
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    wanted = [entries.get(name) for name in ("data.pkl", "byteorder", "data/0")]
    if any(entry is None or entry.compress_type != zipfile.ZIP_STORED for entry in wanted):
        return None
    pickled, order, storage = (entry for entry in wanted if entry is not None)
    if _content(archive, order) != sys.byteorder.encode():
        return None
    content = io.BytesIO(_content(archive, pickled))
    shape, dtype = _shape_and_type(safe_pickle.load(content, where, safe_pickle.SAVED))
    if dtype is None or storage.file_size != math.prod(shape) * DTYPE_BYTES[dtype]:
        return None
    first = _first_byte(archive, storage)
    if first + storage.file_size > piece.length:
        return None
    return Values(piece.start + first, shape, dtype)


def _values_in_front(head: bytes, where: str, piece: Piece) -> Values | None:
    """As `_values`, from the first bytes of the piece alone; None also where these do not tell.

    torch.save writes the pickle and the byte order before the storage, and the directory, where
    they should be looked up, behind it: half of the looks, and those that take the disk's head, or
    the kernel's reading ahead, away from where the storages are.
    """
    entries: dict[str, bytes] = {}
    at = 0
    while at + _LOCAL.size <= len(head):
        mark, method, name_bytes, extra_bytes = _LOCAL.unpack_from(head, at)
        first = at + _LOCAL.size + name_bytes + extra_bytes
        name = head[at + _LOCAL.size :][:name_bytes].decode(errors="replace").partition("/")[2]
        if mark != b"PK\3\4" or method != zipfile.ZIP_STORED or first > len(head):
            return None
        if name == "data/0":
            return _storage_at(first, entries, where, piece)
        end = _end_of_entry(head, first)
        if end is None:
            return None
        entries[name] = head[first:end]
        at = end + _DESCRIPTOR.size
    return None


def _end_of_entry(head: bytes, first: int) -> int | None:
    """Where the descriptor follows that holds the size of what is before it."""
    end = head.find(b"PK\7\x08", first)
    while 0 <= end <= len(head) - _DESCRIPTOR.size:
        size = end - first
        if _DESCRIPTOR.unpack_from(head, end) == (b"PK\7\x08", size, size):
            return end
        end = head.find(b"PK\7\x08", end + 1)
    return None


def _storage_at(first: int, entries: dict[str, bytes], where: str, piece: Piece) -> Values | None:
    if entries.get("byteorder") != sys.byteorder.encode() or "data.pkl" not in entries:
        return None
    pickled = io.BytesIO(entries["data.pkl"])
    shape, dtype = _shape_and_type(safe_pickle.load(pickled, where, safe_pickle.SAVED))
    if dtype is None:
        return None
    behind = piece.length - first - math.prod(shape) * DTYPE_BYTES[dtype]
    # the directory and some small entries: the size of the storage stands there, unread
    return Values(piece.start + first, shape, dtype) if 0 < behind < _DIRECTORY_BYTES else None


def _shape_and_type(saved: Any) -> tuple[tuple[int, ...], str | None]:
    """Of a tensor that fills its storage row by row; the type of anything else is None."""
    if not isinstance(saved, Record) or saved.name != "torch._utils._rebuild_tensor_v2":
        return (), None
    (_, storage, *_), first, shape, stride = saved.args[:4]
    dense = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    by_row = all(n == 1 or a == b for n, a, b in zip(shape, stride, dense, strict=True))
    return tuple(shape), _STORAGE_TYPES.get(storage.name) if first == 0 and by_row else None


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Not archive.read: the checksums in these archives are left out."""
    first = _first_byte(archive, entry)
    assert archive.fp is not None
    archive.fp.seek(first)
    return archive.fp.read(entry.file_size)


def _first_byte(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Where its content begins: behind a header whose length stands in it."""
    assert archive.fp is not None
    archive.fp.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", archive.fp.read(4))
    return entry.header_offset + 30 + name + extra


# safe_pickle's names of storages
_STORAGE_TYPES = {
    **{"Double": "float64", "Float": "float32", "BFloat16": "bfloat16", "Half": "float16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
    "Bool": "bool",
}


def _intersection(one: Box, other: Box) -> Box | None:
    begins = [max(a, b) for a, b in zip(one[0], other[0], strict=True)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True)]
    if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
        return None
    return tuple(begins), tuple(end - begin for begin, end in zip(begins, ends, strict=True))


def _slices(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(begin - start, begin - start + size)
        for begin, size, start in zip(*box, origin, strict=True)
    )


class _FilePart(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._start, self._length, self._at = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(
            0, {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence] + offset
        )
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._at))
        self._file.seek(self._start + self._at)
        read = self._file.readinto(view[:count])
        self._at += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()
