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

import fcntl
import hashlib
import json
import logging
import mmap
import os
import socket
import struct
import uuid
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from data.checksums import (
    ALGORITHM,
    CHUNK_BYTES,
    LEAF_BYTES,
    FileChecksums,
    HashingFile,
    chunks_of,
    hash_file,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2

_HEADER = b"MMIDIDX\x00\x00"
_FIXED = struct.Struct("<9sQBQQ")  # header, version, type code, sequences, document boundaries
# megatron.core.datasets.indexed_dataset.DType
_CODE_OF_DTYPE = {"int32": 4, "uint16": 8}
_DTYPE_OF_CODE = {code: np.dtype(name).newbyteorder("<") for name, code in _CODE_OF_DTYPE.items()}
_LONGEST_DOCUMENT = 2**31 - 1  # lengths are int32 in the format
DOCS_MAGIC = b"MAGDOCS\x01"
_MOST_SOURCES = 2**16
_AT_ONCE = 1 << 20  # entries of the index in memory at a time, beside the arrays they come from
_READS_BETWEEN_CHECKS = 256

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


class TokenStoreWriter:
    """Writes one store; a context manager. Leaving it normally completes the store.

    Everything goes to hidden temporary names, is fsynced and renamed, the sidecar last: whatever
    kills the process, a store that opens is whole. A killed writer leaves hidden *.tmp files
    behind; one that fails in any other way, a full disk for instance, removes its own.

    One writer at a time: the second gets a FileExistsError at once, where the file system has
    flock across its hosts (local ones, NFS 4, Lustre mounted with flock). Elsewhere it gets it on
    completing, because the sidecar's name can be taken only once; a store that the second one has
    already written into is then told by its checksums, never silently mixed. The lock goes with its
    process, so a killed writer is in nobody's way.

    source, license: of documents that do not bring their own.

    Raises FileExistsError if the store exists already, ValueError for ids outside the vocabulary,
    for a store without any document (a memory map cannot be empty) and for more than 65 536 pairs
    of source and licence, OSError with the file's name when it cannot be written.
    Memory: 10 bytes a document and up to half a MB.
    """

    def __init__(
        self,
        prefix: Path | str,
        *,
        language: str,
        family: str,
        tokenizer_fingerprint: str,
        vocab_size: int,
        eod_id: int,
        source: str = "",
        license: str = "",
    ):
        self.prefix = Path(prefix)
        if not 0 <= eod_id < vocab_size:
            raise ValueError(f"eod_id={eod_id} is outside the vocabulary of {vocab_size}")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._about: dict[str, Any] = {
            "language": language,
            "family": family,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "vocab_size": vocab_size,
            "eod_id": eod_id,
        }
        self._source, self._license = source, license
        self._dtype = np.dtype(dtype_for(vocab_size)).newbyteorder("<")
        self._tokens = 0
        self._lengths = array("i")
        self._id_bytes = array("i")
        self._source_of = array("H")
        self._sources: dict[tuple[str, str], dict[str, Any]] = {}
        self._unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._lock = _WriterLock(self.prefix)
        try:
            self._refuse_if_complete()
            self._bin = HashingFile(self._temporary(".bin"))
            self._docs = HashingFile(self._temporary(".docs"), keep_open=False)
            self._docs.write(DOCS_MAGIC)
        except BaseException:
            self._remove_temporaries()
            self._lock.release()
            raise

    @property
    def documents(self) -> int:
        return len(self._lengths)

    @property
    def tokens(self) -> int:
        return self._tokens

    def add_document(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        doc_id: str = "",
        source: str = "",
        license: str = "",
        characters: int = 0,
        utf8_bytes: int = 0,
    ) -> None:
        """Appends the ids and the end-of-document id.

        doc_id: what the document is called in its corpus. characters, utf8_bytes: of its text.
        """
        if len(ids) >= _LONGEST_DOCUMENT:
            raise ValueError(
                f"{self.prefix}: document {self.documents} has {len(ids)} tokens, the format holds "
                f"at most {_LONGEST_DOCUMENT - 1}; split it"
            )
        if not (isinstance(ids, np.ndarray) and ids.dtype.kind in "iu"):
            ids = np.asarray(ids, dtype=np.int64)
        vocab_size = self._about["vocab_size"]
        if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
            raise ValueError(
                f"{self.prefix}: document {self.documents} has ids from {ids.min()} to "
                f"{ids.max()}, outside the tokenizer's vocabulary of {vocab_size}"
            )
        counts = self._counts_of(source or self._source, license or self._license)
        name = doc_id.encode("utf-8", "surrogatepass")
        stored = np.empty(len(ids) + 1, self._dtype)
        stored[:-1] = ids
        stored[-1] = self._about["eod_id"]
        self._bin.write(stored.view(np.uint8).data)
        self._docs.write(name)
        self._lengths.append(len(stored))
        self._id_bytes.append(len(name))
        self._source_of.append(counts["number"])
        self._tokens += len(stored)
        counts["documents"] += 1
        counts["tokens"] += len(stored)
        counts["characters"] += characters
        counts["utf8_bytes"] += utf8_bytes

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if kind is None:
                self._complete()
        finally:
            self._remove_temporaries()
            self._lock.release()

    def _counts_of(self, source: str, license: str) -> dict[str, Any]:
        counts = self._sources.get((source, license))
        if counts is None:
            if len(self._sources) == _MOST_SOURCES:
                raise ValueError(
                    f"{self.prefix}: more than {_MOST_SOURCES} pairs of source and licence; a "
                    "source is a collection, what tells its documents apart belongs into doc_id"
                )
            counts = {"number": len(self._sources), "source": source, "license": license}
            counts |= {"documents": 0, "tokens": 0, "characters": 0, "utf8_bytes": 0}
            self._sources[source, license] = counts
        return counts

    def _temporary(self, suffix: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}{suffix}.{self._unique}.tmp")

    def _remove_temporaries(self) -> None:
        for name in "_bin", "_docs":
            if hasattr(self, name):
                getattr(self, name).close()
        for suffix in (*DATA_SUFFIXES, ".sums", ".json"):
            self._temporary(suffix).unlink(missing_ok=True)

    def _refuse_if_complete(self) -> None:
        if with_suffix(self.prefix, ".json").exists():
            raise FileExistsError(f"{self.prefix}: there is a complete store of this name already")

    def _complete(self) -> None:
        if not self._lengths:
            raise ValueError(f"{self.prefix}: a store needs at least one document")
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        index = HashingFile(self._temporary(".idx"))
        try:
            for part in _index_parts(lengths, self._dtype):
                index.write(part)
            for part in _document_table(self._docs.bytes, self._id_bytes, self._source_of):
                self._docs.write(part)
            finished = {
                ".bin": self._bin.finish(),
                ".idx": index.finish(),
                ".docs": self._docs.finish(),
            }
        finally:
            index.close()
        sources = [
            {name: value for name, value in counts.items() if name != "number"}
            for counts in self._sources.values()
        ]
        info = StoreInfo(
            **self._about,
            split=self.prefix.parent.name,
            source=self._source or _joined(counts["source"] for counts in sources),
            license=self._license or _joined(counts["license"] for counts in sources),
            documents=len(lengths),
            tokens=self._tokens,
            dtype=self._dtype.name,
            bin_sha256=finished[".bin"][2],
            idx_sha256=finished[".idx"][2],
            characters=sum(counts["characters"] for counts in sources),
            utf8_bytes=sum(counts["utf8_bytes"] for counts in sources),
            sources=sources,
            files={suffix: checksums for suffix, (checksums, _, _) in finished.items()},
        )
        _write_synced(
            self._temporary(".sums"), b"".join(leaves for _, leaves, _ in finished.values())
        )
        _write_synced(self._temporary(".json"), sidecar_bytes(info))
        self._publish()

    def _publish(self) -> None:
        self._refuse_if_complete()
        ours = {}
        for suffix in (*DATA_SUFFIXES, ".sums"):
            ours[suffix] = _file_state(os.stat(self._temporary(suffix)))
            os.replace(self._temporary(suffix), with_suffix(self.prefix, suffix))
        # all names are on disk before the sidecar vouches for them
        _sync_folder(self.prefix.parent)
        self._check_nobody_interfered(ours)
        sidecar = with_suffix(self.prefix, ".json")
        try:
            os.link(self._temporary(".json"), sidecar)  # unlike a rename, replaces nothing
        except FileExistsError:
            self._interfered()
        except OSError:  # a file system without hard links
            os.replace(self._temporary(".json"), sidecar)
        _sync_folder(self.prefix.parent)
        try:
            self._check_nobody_interfered(ours)
        except FileExistsError:
            sidecar.unlink(missing_ok=True)
            raise

    def _check_nobody_interfered(self, ours: "dict[str, FileState]") -> None:
        for suffix, state in ours.items():
            try:
                found = _file_state(os.stat(with_suffix(self.prefix, suffix)))
            except FileNotFoundError:
                self._interfered()
            # some network file systems make up inode numbers: the other two are enough then
            if found != state and found[1:] != state[1:]:
                self._interfered()

    def _interfered(self) -> NoReturn:
        raise FileExistsError(
            f"{self.prefix}: another process wrote a store of this name at the same time; "
            "python -m data.verify tells whether what is there is whole"
        )


class _WriterLock:
    """Held by the one writer of a store, through flock on a hidden file; gone with its process."""

    def __init__(self, prefix: Path):
        self._path = prefix.with_name(f".{prefix.name}.lock")
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._descriptor, 200, 0).decode(errors="replace")
                os.close(self._descriptor)
                raise FileExistsError(
                    f"{prefix}: {holder or 'another process'} is writing this store; wait for it "
                    "to end, or write elsewhere"
                ) from None
            except OSError:
                return  # a file system without flock: two writers meet on completing
            # the one that held it before may have removed the file between our two calls
            if os.fstat(self._descriptor).st_nlink:
                break
            os.close(self._descriptor)
        with suppress(OSError):  # only for the words of the other's error
            os.truncate(self._descriptor, 0)
            who = f"process {os.getpid()} on {socket.gethostname()}"
            os.pwrite(self._descriptor, who.encode(), 0)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


# inode, size, time of the last modification in nanoseconds
FileState = tuple[int, int, int]


def _file_state(status: os.stat_result) -> FileState:
    return status.st_ino, status.st_size, status.st_mtime_ns


class TokenStore:
    """A complete store, memory-mapped read-only.

    info: the sidecar. tokens, documents: sizes. sequences: of the .idx, as many as documents in
    stores of our own. dtype: of the ids. Opening costs the same whatever the size, about
    0.1 ms: it checks the sidecar's own checksum and compares file sizes, header, type and counts
    with it. `verify` reads everything. One file descriptor is held.

    A memory map that reaches behind the end of its file kills the process (SIGBUS). So each read,
    or batch of reads, asks for the file's size first (0.4 us), and now and then whether the file is
    still the same: OSError if it has been cut off or written to. A store replaced or deleted under
    a running job is only logged, because the map keeps the old bytes.

    Raises FileNotFoundError for an incomplete store, ValueError for files that disagree.
    """

    def __init__(self, prefix: Path | str, *, _info: StoreInfo | None = None):
        self.prefix = Path(prefix)
        self.info = _info or read_sidecar(self.prefix)
        self.tokens, self.documents = self.info.tokens, self.info.documents
        self.language, self.family = self.info.language, self.info.family

        sequences, boundaries, dtype = _read_index_header(self.prefix)
        if dtype.name != self.info.dtype:
            self._disagree(f"the .idx says {dtype.name}, the sidecar {self.info.dtype}")
        if boundaries != self.documents + 1:
            self._disagree(f"the .idx has {boundaries - 1} documents, the sidecar {self.documents}")
        self.dtype, self.sequences = dtype, sequences
        # of each file as it was on opening, by suffix
        self.file_states = _check_sizes(self.prefix, self.info, index_layout(sequences)[2])
        self._map, self._ids = self._open_map(".bin", dtype)
        self._bytes, self._reads, self._gone_is_logged = len(self._map), 0, False
        last_end = _last_end(self.prefix, sequences, dtype)
        if last_end != self.tokens:
            self._disagree(f"the .idx ends at token {last_end}, the sidecar at {self.tokens}")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of the concatenated documents: a view of the map, as stored.

        OSError if the file is no longer as it was opened. The view itself stays unguarded: take
        its content before anything that may last.
        """
        self.guard()
        return self._ids[start:stop]

    def windows(self, size: int, step: int) -> np.ndarray:
        """Row i is ids [i * step, i * step + size) of the concatenated documents, as many rows as
        there are whole ones: a view of the map [rows, size]. Call `guard` before each use."""
        if self.tokens < size:
            return np.empty((0, size), self.dtype)
        return np.lib.stride_tricks.sliding_window_view(self._ids, size)[::step]

    def guard(self) -> None:
        """OSError if the file is no longer as it was opened. Before each use of a view of the map.

        What is cut off between this and the end of the reading is not caught, so read at once, and
        no more than a batch.
        """
        self._reads += 1
        if self._size_now() != self._bytes or not self._reads % _READS_BETWEEN_CHECKS:
            self.check_unchanged()

    def document(self, number: int) -> np.ndarray:
        """The ids of one document, its end-of-document id included."""
        return self.read(*self.document_span(number))

    def document_span(self, number: int) -> tuple[int, int]:
        """The tokens [start, stop) of one document in the stream."""
        if not 0 <= number < self.documents:
            raise IndexError(f"{self.prefix}: document {number} of {self.documents}")
        # entry d of the boundaries is the first sequence of document d
        index = self.index
        return index.token_of(number, self.dtype), index.token_of(number + 1, self.dtype)

    def document_of(self, offset: int) -> int:
        """The number of the document that holds token `offset` of the stream.

        A binary search in the memory-mapped index: a few microseconds, nothing is loaded.
        """
        if not 0 <= offset < self.tokens:
            raise IndexError(f"{self.prefix}: token {offset} of {self.tokens}")
        # bisect and not np.searchsorted, which copies an array as unaligned as this one
        sequence = bisect_right(self.index.offsets, offset * self.dtype.itemsize) - 1
        if self.sequences == self.documents:
            return sequence
        return bisect_right(self.index.boundaries, sequence) - 1

    def documents_ending(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents whose last token is one of [start, stop): numbers, and the token behind each.

        Costs a binary search and the documents' own entries of the index.
        """
        first, last = self.document_of(start), self.document_of(stop - 1)
        next_sequence = self.index.boundaries[first + 1 : last + 2].astype(np.int64)
        begin = int(next_sequence[0])
        offsets = self.index.offsets[begin : int(next_sequence[-1]) + 1].astype(np.int64)
        offsets = np.append(offsets, self.tokens * self.dtype.itemsize)  # behind the last of all
        ends = offsets[next_sequence - begin] // self.dtype.itemsize
        inside = ends <= stop
        return np.arange(first, last + 1)[inside], ends[inside]

    def document_source(self, number: int) -> tuple[str, str]:
        """(doc_id, source) of one document; the id is empty in stores that do not record it."""
        if not 0 <= number < self.documents:
            raise IndexError(f"{self.prefix}: document {number} of {self.documents}")
        if ".docs" not in self.info.files:
            return "", self.info.source
        ids, begins, sources = self.document_ids
        start, stop = int(begins[number]), int(begins[number + 1])
        name = ids[start:stop].tobytes().decode("utf-8", "surrogatepass")
        return name, self.info.sources[int(sources[number])]["source"]

    def verify(self) -> None:
        """Reads the whole store; ValueError that names all that is not as it should be."""
        from data.verify import verify_store  # that module builds on this one

        problems = verify_store(self)
        if problems:
            self._disagree("; ".join(problem.what for problem in problems))

    def check_tokenizer(self, fingerprint: str, vocab_size: int, name: str) -> None:
        """ValueError naming both sides unless the store was written with this tokenizer."""
        if (fingerprint, vocab_size) != (self.info.tokenizer_fingerprint, self.info.vocab_size):
            raise ValueError(
                f"{self.prefix}: this store was written with the tokenizer "
                f"{self.info.tokenizer_fingerprint[:16]} of {self.info.vocab_size} entries, but "
                f"data.tokenizer={name} is {fingerprint[:16]} of {vocab_size}; "
                "give the tokenizer of the stores, or tokenize the corpus again"
            )

    def check_unchanged(self) -> None:
        """OSError if the ids have been cut off or written to since the store was opened."""
        path = with_suffix(self.prefix, ".bin")
        size_now = self._size_now()
        if size_now != self._bytes:
            raise OSError(
                f"{path}: {size_now:,} bytes where there were {self._bytes:,} on opening; the file "
                "was cut off or written to while in use: restore it, run python -m data.verify on "
                "the folder, and start again from the last checkpoint"
            )
        try:
            found = _file_state(os.stat(path))
        except FileNotFoundError:
            self._log_gone(path, "deleted")
            return
        inode, size, modified = self.file_states[".bin"]
        if found[1:] == (size, modified):
            return
        if found[0] != inode:
            self._log_gone(path, "replaced")
            return
        raise OSError(
            f"{path}: somebody wrote to this file while it was in use; stop, run "
            "python -m data.verify on the folder, and start again from the last checkpoint"
        )

    @cached_property
    def index(self) -> "Index":
        """The .idx, mapped on first use: training itself does not need it."""
        _, flat = self._open_map(".idx", np.dtype(np.uint8))
        return Index(flat, self.sequences)

    @cached_property
    def document_ids(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The .docs, mapped on first use: ids as bytes, where each begins, number of its source."""
        _, flat = self._open_map(".docs", np.dtype(np.uint8))
        table = len(flat) - 10 * self.documents - 8
        sources = len(flat) - 2 * self.documents
        return (
            flat[len(DOCS_MAGIC) : table],
            flat[table:sources].view("<i8"),
            flat[sources:].view("<u2"),
        )

    def _open_map(self, suffix: str, dtype: np.dtype) -> tuple[mmap.mmap, np.ndarray]:
        path = with_suffix(self.prefix, suffix)
        with open(path, "rb", buffering=0) as file:
            if _file_state(os.fstat(file.fileno()))[1:] != self.file_states[suffix][1:]:
                raise OSError(f"{path}: this file is not the one that was there on opening")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # not np.memmap: slicing that is several times slower
        return mapped, np.frombuffer(mapped, dtype)

    def _size_now(self) -> int:
        """Of the file behind the map, whatever its name means now; a third of os.fstat's cost."""
        try:
            return self._map.size()
        except OSError as error:  # ESTALE, if the file was deleted on an NFS server
            path = str(with_suffix(self.prefix, ".bin"))
            raise OSError(error.errno, error.strerror, path) from error

    def _log_gone(self, path: Path, how: str) -> None:
        if not self._gone_is_logged:
            self._gone_is_logged = True
            logger.warning(
                "%s was %s while in use; this process keeps reading the old file, one that starts "
                "now cannot",
                path,
                how,
            )

    def _disagree(self, what: str) -> NoReturn:
        raise ValueError(
            f"{self.prefix}: damaged or mixed-up store: {what}; delete it and tokenize again"
        )


class Index:
    """The three tables of an .idx, as views.

    lengths (int32, in tokens) and offsets (int64, in bytes): one per sequence. boundaries (int64):
    one per document and one more; entry d is the first sequence of document d. We write a sequence
    a document; Megatron's tools may write several.
    """

    def __init__(self, flat: np.ndarray, sequences: int):
        lengths_at, offsets_at, boundaries_at = index_layout(sequences)
        self.lengths = flat[lengths_at:offsets_at].view("<i4")
        self.offsets = flat[offsets_at:boundaries_at].view("<i8")
        self.boundaries = flat[boundaries_at:].view("<i8")

    def token_of(self, document: int, dtype: np.dtype) -> int:
        """Where document `document` begins in the stream, or the stream ends behind the last."""
        sequence = int(self.boundaries[document])
        if sequence < len(self.offsets):
            return int(self.offsets[sequence]) // dtype.itemsize
        return int(self.offsets[-1]) // dtype.itemsize + int(self.lengths[-1])


def adopt(
    prefix: Path | str,
    *,
    language: str,
    family: str,
    tokenizer_fingerprint: str,
    vocab_size: int,
    eod_id: int,
    source: str = "",
    license: str = "",
) -> TokenStore:
    """Writes sidecar and checksums for .bin/.idx files of Megatron's own tools; opens the store.

    Reads everything twice. Whether documents end in eod_id is the other writer's business: the
    sidecar only records whether all do. Raises FileExistsError if there is a sidecar already,
    ValueError if an id is outside the vocabulary or the files do not fit together.
    """
    from data.verify import verify_store  # that module builds on this one

    prefix = Path(prefix)
    sidecar = with_suffix(prefix, ".json")
    if sidecar.exists():
        raise FileExistsError(f"{prefix}: there is a complete store of this name already")
    _, boundaries, dtype = _read_index_header(prefix)
    idx, idx_leaves, idx_sha256 = hash_file(with_suffix(prefix, ".idx"))
    bin_, bin_leaves, bin_sha256 = hash_file(with_suffix(prefix, ".bin"))
    tokens = bin_.bytes // dtype.itemsize
    if not tokens:
        raise ValueError(f"{prefix}: there is no token in it, and a memory map cannot be empty")
    info = StoreInfo(
        language=language,
        family=family,
        tokenizer_fingerprint=tokenizer_fingerprint,
        vocab_size=vocab_size,
        eod_id=eod_id,
        source=source,
        license=license,
        documents=boundaries - 1,
        tokens=tokens,
        dtype=dtype.name,
        bin_sha256=bin_sha256,
        idx_sha256=idx_sha256,
        split=prefix.parent.name,
        ends_in_eod=False,
        sources=[
            {"source": source, "license": license, "documents": boundaries - 1, "tokens": tokens}
            | {"characters": 0, "utf8_bytes": 0}
        ],
        files={".bin": bin_, ".idx": idx},
    )
    unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = prefix.with_name(f".{prefix.name}.json.{unique}.tmp")
    try:
        _write_synced(temporary, bin_leaves + idx_leaves)
        os.replace(temporary, with_suffix(prefix, ".sums"))  # means nothing without the sidecar
        store = TokenStore(prefix, _info=info)
        problems = verify_store(store)
        if problems:
            raise ValueError(f"{prefix}: " + "; ".join(problem.what for problem in problems))
        info = replace(info, ends_in_eod=_all_end_in_eod(store))
        _write_synced(temporary, sidecar_bytes(info))
        os.replace(temporary, sidecar)
    except BaseException:
        with_suffix(prefix, ".sums").unlink(missing_ok=True)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(prefix.parent)
    return TokenStore(prefix)


def _all_end_in_eod(store: TokenStore) -> bool:
    for start in range(0, store.tokens, _AT_ONCE):
        stop = min(start + _AT_ONCE, store.tokens)
        _, ends = store.documents_ending(start, stop)
        if (store.read(start, stop)[ends - 1 - start] != store.info.eod_id).any():
            return False
    return True


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
            "Megatron's own, for which data.token_store.adopt writes a sidecar"
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


def _index_parts(lengths: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    """The .idx of documents with these lengths (int32), one sequence each."""
    count = len(lengths)
    yield _FIXED.pack(_HEADER, 1, _CODE_OF_DTYPE[dtype.name], count, count + 1)
    for first in range(0, count, _AT_ONCE):
        yield lengths[first : first + _AT_ONCE].astype("<i4").tobytes()
    before = 0
    for first in range(0, count, _AT_ONCE):
        part = lengths[first : first + _AT_ONCE]
        ends = before + np.cumsum(part, dtype=np.int64)
        yield ((ends - part) * dtype.itemsize).astype("<i8").tobytes()
        before = int(ends[-1])
    for first in range(0, count + 1, _AT_ONCE):
        yield np.arange(first, min(first + _AT_ONCE, count + 1), dtype="<i8").tobytes()


def _document_table(written: int, id_bytes: array, source_of: array) -> Iterator[bytes]:
    """What follows the ids in a .docs of which `written` bytes are there."""
    yield bytes(-written % 8)
    yield bytes(8)  # the first begins at 0
    sizes, before = np.frombuffer(id_bytes, np.int32), 0
    for first in range(0, len(sizes), _AT_ONCE):
        ends = before + np.cumsum(sizes[first : first + _AT_ONCE], dtype=np.int64)
        yield ends.astype("<i8").tobytes()
        before = int(ends[-1])
    sources = np.frombuffer(source_of, np.uint16)
    for first in range(0, len(sources), _AT_ONCE):
        yield sources[first : first + _AT_ONCE].astype("<u2").tobytes()


def _joined(names: Iterable[str]) -> str:
    """A few names in a line; many are told only in the list of sources."""
    distinct = [name for name in dict.fromkeys(names) if name]
    return ", ".join(distinct[:8]) + (", ..." if len(distinct) > 8 else "")


def _read_index_header(prefix: Path) -> tuple[int, int, np.dtype]:
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


def _last_end(prefix: Path, sequences: int, dtype: np.dtype) -> int:
    """The token behind the last sequence, read without mapping the index."""
    _, offsets_at, boundaries_at = index_layout(sequences)
    with open(with_suffix(prefix, ".idx"), "rb", buffering=0) as file:
        (length,) = struct.unpack("<i", os.pread(file.fileno(), 4, offsets_at - 4))
        (offset,) = struct.unpack("<q", os.pread(file.fileno(), 8, boundaries_at - 8))
    return offset // dtype.itemsize + length


def index_layout(sequences: int) -> tuple[int, int, int]:
    """Byte positions of lengths (int32), offsets (int64) and document boundaries (int64)."""
    return _FIXED.size, _FIXED.size + 4 * sequences, _FIXED.size + 12 * sequences


def _check_sizes(prefix: Path, info: StoreInfo, boundaries_at: int) -> dict[str, FileState]:
    """The state of each file, once its size is what the sidecar and the index make it."""
    expected = {
        ".bin": info.tokens * np.dtype(info.dtype).itemsize,
        ".idx": boundaries_at + 8 * (info.documents + 1),
    }
    if info.format_version > 1:
        expected[".sums"] = info.sums_bytes
    if ".docs" in info.files:
        expected[".docs"] = info.files[".docs"].bytes
    states = {}
    for suffix, size in expected.items():
        path = with_suffix(prefix, suffix)
        try:
            states[suffix] = _file_state(os.stat(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: no such file, but a store needs it") from error
        found = states[suffix][1]
        if found != size:
            raise ValueError(
                f"{path}: {found} bytes where {size} are expected; the file was cut off, changed, "
                "or belongs to another store; tokenize again"
            )
    return states


def _write_synced(path: Path, content: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
