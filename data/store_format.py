"""Token stores: one stream of token ids on disk, memory-mapped, in Megatron's .bin/.idx format.

    NAME.bin   the ids, back to back, little-endian uint16 or int32
    NAME.idx   "MMIDIDX" header, version 1, type code, counts, lengths, byte offsets, document ends
    NAME.docs  ours: each document's id and source, so that a training step can be told by name
    NAME.sums  ours: a SHA-256 of every 64 KiB of the three above (data/checksums.py)
    NAME.json  ours, the sidecar: which tokenizer, language, family, sources, licences, counts,
               the roots of the checksums, and a checksum of itself

The first two are what megatron.core.datasets.indexed_dataset.IndexedDataset reads and writes. The
sidecar is written last, so a store is complete exactly if its sidecar exists. Complete stores never
change. So readers need no lock, also on shared file systems: they open the sidecar first, and lean
on a file system that shows a file's content and name to whoever opens it after its writer has
fsynced and closed it (NFS: close-to-open) and renamed it, and that keeps the order of these.

NAME.docs, little-endian, n documents:

    bytes 0-7        "MAGDOCS" and 1
    then             document ids, UTF-8, back to back; zeros up to a multiple of 8
    last 10 n + 8    int64 [n + 1] where each id begins, counted from byte 8; uint16 [n] source,
                     a place in the sidecar's list of sources

Version 1 of the sidecar (no .docs, no .sums, a SHA-256 of .bin and .idx) still opens.
"""

import hashlib
import json
import os
import struct
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from data.checksums import ALGORITHM, CHUNK_BYTES, LEAF_BYTES, FileChecksums, chunks_of

FORMAT_VERSION = 2

_HEADER = b"MMIDIDX\x00\x00"
_FIXED = struct.Struct("<9sQBQQ")  # header, version, type code, sequences, document boundaries
# megatron.core.datasets.indexed_dataset.DType
_CODE_OF_DTYPE = {"int32": 4, "uint16": 8}
_DTYPE_OF_CODE = {code: np.dtype(name).newbyteorder("<") for name, code in _CODE_OF_DTYPE.items()}
LONGEST_DOCUMENT = 2**31 - 1  # lengths are int32 in the format
DOCS_MAGIC = b"MAGDOCS\x01"
MOST_SOURCES = 2**16
# entries of the index in memory at a time, beside the arrays they come from
ENTRIES_AT_ONCE = 1 << 20

DATA_SUFFIXES = (".bin", ".idx", ".docs")  # in the order of their leaves in .sums


def dtype_for(vocab_size: int) -> str:
    """uint16 below 65 500 ids, else int32: megatron-core's own rule (DType.optimal_dtype)."""
    return "uint16" if vocab_size < 65500 else "int32"


@dataclass(frozen=True)
class StoreInfo:
    """The sidecar. Counts of tokens include end-of-document tokens, of characters and bytes not."""

    language: str
    family: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod_id: int
    source: str
    license: str
    documents: int
    tokens: int
    dtype: str
    bin_sha256: str  # of the whole file, as sha256sum prints it
    idx_sha256: str
    format_version: int = FORMAT_VERSION
    # since version 2
    split: str = ""  # name of the folder it was written in, such as train
    characters: int = 0  # of the documents' text; 0 where the writer was not told
    utf8_bytes: int = 0
    ends_in_eod: bool = True  # every document does; not so in some stores of other writers
    # by source and licence: source, license, documents, tokens, characters, utf8_bytes
    sources: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, FileChecksums] = field(default_factory=dict)  # by suffix

    @property
    def sums_bytes(self) -> int:
        """Size of the .sums file."""
        return LEAF_BYTES * sum(chunks_of(file.bytes) for file in self.files.values())


_FIELDS_OF_VERSION_1 = {f.name for f in fields(StoreInfo)[:13]}
_LAST_FIELD = "sidecar_sha256"


def with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)  # Path.with_suffix would cut "zh.v2" to "zh"


# inode, size, time of the last modification in nanoseconds
FileState = tuple[int, int, int]


def file_state(status: os.stat_result) -> FileState:
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_sidecar(prefix: Path) -> StoreInfo:
    """The sidecar of a store. Raises what TokenStore raises."""
    path = with_suffix(prefix, ".json")
    try:
        with open(path, "rb", buffering=0) as file:
            raw = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file, so there is no complete store; it may never have been "
            "written, its writer may have been killed, or it may be .bin and .idx files of "
            "Megatron's own, for which data.adopt_store.adopt writes a sidecar"
        ) from None
    try:
        record = json.loads(raw)
        version = record["format_version"]
        if version not in (1, FORMAT_VERSION):
            raise ValueError(f"format version {version}, this program reads 1 and {FORMAT_VERSION}")
        if version == 1:
            if set(record) != _FIELDS_OF_VERSION_1:
                raise ValueError("its fields are not those of format version 1")
            return StoreInfo(**record)
        if raw != _sealed(raw[:-_SEAL_BYTES]):
            raise ValueError("it was changed after it was written: its own checksum is another")
        del record[_LAST_FIELD]
        record["files"] = {
            suffix: FileChecksums(**checksums) for suffix, checksums in record["files"].items()
        }
        if (record.pop("algorithm"), record.pop("chunk_bytes")) != (ALGORITHM, CHUNK_BYTES):
            raise ValueError(f"its checksums are not {ALGORITHM} of {CHUNK_BYTES} bytes")
        return StoreInfo(**record)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the sidecar of a token store ({error})") from error


def sidecar_bytes(info: StoreInfo) -> bytes:
    """The sidecar's content: JSON whose last field is the SHA-256 of all the bytes before it."""
    record = asdict(info) | {"algorithm": ALGORITHM, "chunk_bytes": CHUNK_BYTES}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    return _sealed(text.removesuffix("\n}").encode("utf-8", "surrogatepass"))


def _sealed(content: bytes) -> bytes:
    digest = hashlib.sha256(content).hexdigest()
    return content + f',\n "{_LAST_FIELD}": "{digest}"\n}}\n'.encode()


_SEAL_BYTES = len(_sealed(b""))


def index_layout(sequences: int) -> tuple[int, int, int]:
    """Byte positions of lengths (int32), offsets (int64) and document boundaries (int64)."""
    return _FIXED.size, _FIXED.size + 4 * sequences, _FIXED.size + 12 * sequences


def read_index_header(prefix: Path) -> tuple[int, int, np.dtype]:
    """Sequences, document boundaries (one more than documents) and the type of the ids."""
    path = with_suffix(prefix, ".idx")
    try:
        with open(path, "rb", buffering=0) as file:
            fixed = file.read(_FIXED.size)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file, but a store needs it") from error
    if len(fixed) < _FIXED.size:
        raise ValueError(f"{path}: {len(fixed)} bytes are too few for an index")
    header, version, code, sequences, boundaries = _FIXED.unpack(fixed)
    if (header, version) != (_HEADER, 1):
        raise ValueError(f"{path}: not a Megatron index of version 1")
    if code not in _DTYPE_OF_CODE:
        raise ValueError(f"{path}: type code {code}, token ids are 8 (uint16) or 4 (int32)")
    if not sequences or boundaries < 2:
        raise ValueError(f"{path}: an index without documents")
    return sequences, boundaries, _DTYPE_OF_CODE[code]


def last_end(prefix: Path, sequences: int, dtype: np.dtype) -> int:
    """The token behind the last sequence, read without mapping the index."""
    _, offsets_at, boundaries_at = index_layout(sequences)
    with open(with_suffix(prefix, ".idx"), "rb", buffering=0) as file:
        (length,) = struct.unpack("<i", os.pread(file.fileno(), 4, offsets_at - 4))
        (offset,) = struct.unpack("<q", os.pread(file.fileno(), 8, boundaries_at - 8))
    return offset // dtype.itemsize + length


def index_parts(lengths: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    """The .idx of documents with these lengths (int32), one sequence each."""
    count = len(lengths)
    yield _FIXED.pack(_HEADER, 1, _CODE_OF_DTYPE[dtype.name], count, count + 1)
    for first in range(0, count, ENTRIES_AT_ONCE):
        yield lengths[first : first + ENTRIES_AT_ONCE].astype("<i4").tobytes()
    before = 0
    for first in range(0, count, ENTRIES_AT_ONCE):
        part = lengths[first : first + ENTRIES_AT_ONCE]
        ends = before + np.cumsum(part, dtype=np.int64)
        yield ((ends - part) * dtype.itemsize).astype("<i8").tobytes()
        before = int(ends[-1])
    for first in range(0, count + 1, ENTRIES_AT_ONCE):
        yield np.arange(first, min(first + ENTRIES_AT_ONCE, count + 1), dtype="<i8").tobytes()


def document_table(written: int, id_bytes: array, source_of: array) -> Iterator[bytes]:
    """What follows the ids in a .docs of which `written` bytes are there."""
    yield bytes(-written % 8)
    yield bytes(8)  # the first begins at 0
    sizes, before = np.frombuffer(id_bytes, np.int32), 0
    for first in range(0, len(sizes), ENTRIES_AT_ONCE):
        ends = before + np.cumsum(sizes[first : first + ENTRIES_AT_ONCE], dtype=np.int64)
        yield ends.astype("<i8").tobytes()
        before = int(ends[-1])
    sources = np.frombuffer(source_of, np.uint16)
    for first in range(0, len(sources), ENTRIES_AT_ONCE):
        yield sources[first : first + ENTRIES_AT_ONCE].astype("<u2").tobytes()
