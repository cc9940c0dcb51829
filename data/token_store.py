"""Opens and reads token stores; data/store_format.py tells what their files hold."""

import logging
import mmap
import os
from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from data.store_format import (
    DOCS_MAGIC,
    FileState,
    StoreInfo,
    file_state,
    index_layout,
    last_end,
    read_index_header,
    read_sidecar,
    with_suffix,
)

logger = logging.getLogger(__name__)

_READS_BETWEEN_CHECKS = 256


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

        sequences, boundaries, dtype = read_index_header(self.prefix)
        if dtype.name != self.info.dtype:
            self._disagree(f"the .idx says {dtype.name}, the sidecar {self.info.dtype}")
        if boundaries != self.documents + 1:
            self._disagree(f"the .idx has {boundaries - 1} documents, the sidecar {self.documents}")
        self.dtype, self.sequences = dtype, sequences
        # of each file as it was on opening, by suffix
        self.file_states = _check_sizes(self.prefix, self.info, index_layout(sequences)[2])
        self._map, self._ids = self._open_map(".bin", dtype)
        self._bytes, self._reads, self._gone_is_logged = len(self._map), 0, False
        end = last_end(self.prefix, sequences, dtype)
        if end != self.tokens:
            self._disagree(f"the .idx ends at token {end}, the sidecar at {self.tokens}")

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
            found = file_state(os.stat(path))
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
            if file_state(os.fstat(file.fileno()))[1:] != self.file_states[suffix][1:]:
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
            states[suffix] = file_state(os.stat(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: no such file, but a store needs it") from error
        found = states[suffix][1]
        if found != size:
            raise ValueError(
                f"{path}: {found} bytes where {size} are expected; the file was cut off, changed, "
                "or belongs to another store; tokenize again"
            )
    return states
