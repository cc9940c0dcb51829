"""Checks of token stores, one store at a time: what data.verify and TokenStore.verify stand on.

Everything is read with pread, never through a memory map: a file that is cut off while it is
checked is a finding, not a SIGBUS.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.checksums import (
    CHUNK_BYTES,
    LEAF_BYTES,
    chunks_of,
    hash_file,
    leaves_of,
    read_at,
    summarise,
)
from data.store_format import DATA_SUFFIXES, DOCS_MAGIC, index_layout, with_suffix
from data.token_store import TokenStore

_TASK_BYTES = 128 * CHUNK_BYTES  # one thread reads 8 MiB at a time
_TASK_ENTRIES = 1 << 20  # of the index
_SHOWN = 5  # places in one file


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. what: a sentence with the file's name and the place in it."""

    store: Path  # prefix, or the folder if it is about several stores
    what: str

    def __str__(self) -> str:
        return f"{self.store}: {self.what}"


# ---- one store, the cheap part


def check_edges(store: TokenStore) -> list[Problem]:
    """First and last chunk of each file against the sidecar."""
    problems = []
    buffer = bytearray(CHUNK_BYTES)
    for suffix, expected in store.info.files.items():
        path = with_suffix(store.prefix, suffix)
        last = (chunks_of(expected.bytes) - 1) * CHUNK_BYTES
        edges = [("first", 0, expected.first), ("last", last, expected.last)]
        with open(path, "rb", buffering=0) as file:
            for place, at, leaf in edges if last else edges[:1]:
                found = leaves_of(read_at(file.fileno(), at, CHUNK_BYTES, buffer)).hex()
                if found != leaf:
                    what = f"{suffix}: its {place} {CHUNK_BYTES >> 10} KiB have changed, or it is "
                    problems.append(Problem(store.prefix, what + "the file of another store"))
                    break
    return problems


# ---- one store, all of it


@dataclass
class _Found:
    """What a pass over one file found; the parts in the order of the file."""

    leaves: bytearray = field(default_factory=bytearray)
    problems: list[str] = field(default_factory=list)


def check_contents(
    stores: Sequence[TokenStore], threads: int, progress: Callable[[int], None]
) -> list[Problem]:
    """Every byte of every store. The indexes come first: the check of the ids leans on them."""
    problems: list[Problem] = []
    done = 0
    with ThreadPoolExecutor(threads) as pool:

        def collect(tasks: "list[Future[_Found]]") -> _Found:
            nonlocal done
            whole = _Found()
            for task in tasks:
                try:
                    found = task.result()
                except OSError as error:
                    found = _Found(problems=[f"cannot be read: {error}"])
                whole.leaves += found.leaves
                whole.problems += found.problems
                done += len(found.leaves) // LEAF_BYTES * CHUNK_BYTES
                progress(done)
            return whole

        def submit(
            store: TokenStore, suffix: str, index_is_good: bool = False
        ) -> "list[Future[_Found]]":
            size = store.file_states[suffix][1]
            return [
                pool.submit(_check_range, store, suffix, start, index_is_good)
                for start in range(0, size, _TASK_BYTES)
            ]

        first = [
            {
                ".idx": [pool.submit(_check_index, store), *submit(store, ".idx")],
                ".docs": [pool.submit(_check_document_ids, store), *submit(store, ".docs")]
                if ".docs" in store.info.files
                else [],
            }
            for store in stores
        ]
        second = []
        for store, tasks in zip(stores, first, strict=True):
            found = {suffix: collect(parts) for suffix, parts in tasks.items()}
            index_is_good = not found[".idx"].problems and not _changes(store, found, [".idx"])
            second.append((store, found, index_is_good, submit(store, ".bin", index_is_good)))
        for store, found, index_is_good, parts in second:
            found[".bin"] = collect(parts)
            what = _contradictions(store) + _changes(store, found, DATA_SUFFIXES, index_is_good)
            for suffix in DATA_SUFFIXES:
                what += [f"{suffix}: {problem}" for problem in _few(found[suffix].problems)]
            problems += [Problem(store.prefix, words) for words in what]
    return problems


_buffers = threading.local()


def _buffer() -> bytearray:
    if not hasattr(_buffers, "content"):
        _buffers.content = bytearray(_TASK_BYTES)
    return _buffers.content


def _check_range(store: TokenStore, suffix: str, start: int, index_is_good: bool = False) -> _Found:
    """Leaves of up to 8 MiB of a file; of a .bin also the ids and the documents' ends in it."""
    with open(with_suffix(store.prefix, suffix), "rb", buffering=0) as file:
        content = read_at(file.fileno(), start, _TASK_BYTES, _buffer())
    found = _Found(bytearray(leaves_of(content)))
    if suffix != ".bin":
        return found
    size = store.dtype.itemsize
    # a file cut off meanwhile may end within an id, one that grew has ids that nobody counted
    whole = min(len(content) // size * size, store.tokens * size - start)
    # unsigned: a negative id is far outside the vocabulary, too
    ids = np.frombuffer(content[:whole], f"<u{size}")
    first = start // size
    if len(ids) and ids.max() >= store.info.vocab_size:
        place = int(np.argmax(ids >= store.info.vocab_size))
        value = int(ids[place].astype(f"i{size}")) if size == 4 else int(ids[place])
        where = _documents(store, first + place, first + place) if index_is_good else ""
        found.problems.append(
            f"id {value} is outside the vocabulary of {store.info.vocab_size}, at token "
            f"{first + place:,}{where}"
        )
    if index_is_good and len(ids):
        numbers, ends = store.documents_ending(first, first + len(ids))
        lacking = numbers[ids[ends - 1 - first] != store.info.eod_id]
        if len(lacking) and store.info.ends_in_eod:
            where = _name(store, int(lacking[0]))
            found.problems.append(
                f"{len(lacking):,} documents do not end in {store.info.eod_id}, the first is "
                f"document {int(lacking[0]):,}{where}"
            )
    return found


def _check_index(store: TokenStore) -> _Found:
    """Lengths, offsets and boundaries against each other; the header was checked on opening."""
    found = _Found()
    itemsize, sequences, documents = store.dtype.itemsize, store.sequences, store.documents
    lengths_at, offsets_at, boundaries_at = index_layout(sequences)
    with open(with_suffix(store.prefix, ".idx"), "rb", buffering=0) as file:
        begin = 0
        for first in range(0, sequences, _TASK_ENTRIES):
            count = min(_TASK_ENTRIES, sequences - first)
            lengths = _numbers(file.fileno(), lengths_at + 4 * first, count, "<i4")
            offsets = _numbers(file.fileno(), offsets_at + 8 * first, count, "<i8")
            if len(lengths) < count or len(offsets) < count:
                found.problems.append("ends too early")
                return found
            if lengths.min() < 0:
                place = first + int(np.argmax(lengths < 0))
                found.problems.append(f"sequence {place:,} has a negative length")
            ends = begin + np.cumsum(lengths, dtype=np.int64) * itemsize
            wrong = np.flatnonzero(offsets != np.concatenate([[begin], ends[:-1]]))
            if len(wrong):
                place = int(wrong[0])
                found.problems.append(
                    f"sequence {first + place:,} begins at byte {int(offsets[place]):,}, which is "
                    "not where the one before ends"
                )
                return found  # all that follow are off, too
            begin = int(ends[-1])
        if begin != store.tokens * itemsize:
            found.problems.append(f"its lengths add up to {begin // itemsize:,} tokens")
        # boundaries: one more than documents, from 0 up to the number of sequences
        end = _end_of_increasing(file.fileno(), boundaries_at, documents + 1)
        if end is None:
            found.problems.append("the boundaries of documents do not increase from 0")
        elif end != sequences:
            found.problems.append(f"its documents end at sequence {end:,} of {sequences:,}")
    return found


def _check_document_ids(store: TokenStore) -> _Found:
    """The tables of a .docs against each other and against the sidecar's counts by source."""
    found = _Found()
    documents, size = store.documents, store.info.files[".docs"].bytes
    table = size - 10 * documents - 8
    counts = np.zeros(len(store.info.sources), np.int64)
    with open(with_suffix(store.prefix, ".docs"), "rb", buffering=0) as file:
        if os.pread(file.fileno(), len(DOCS_MAGIC), 0) != DOCS_MAGIC:
            found.problems.append("does not begin as it should")
        end = _end_of_increasing(file.fileno(), table, documents + 1)
        if end is None:
            found.problems.append("the places of the ids do not increase from 0")
            return found
        if not 0 <= table - len(DOCS_MAGIC) - end < 8:
            found.problems.append(f"its ids end at byte {end:,}, its tables begin at {table:,}")
        for first in range(0, documents, _TASK_ENTRIES):
            count = min(_TASK_ENTRIES, documents - first)
            sources = _numbers(file.fileno(), size - 2 * (documents - first), count, "<u2")
            if len(sources) < count or sources.max() >= len(counts):
                found.problems.append(f"a source is outside the sidecar's list of {len(counts)}")
                return found
            counts += np.bincount(sources, minlength=len(counts))
    if counts.tolist() != [source["documents"] for source in store.info.sources]:
        found.problems.append("its documents by source are not as many as the sidecar says")
    return found


def _contradictions(store: TokenStore) -> list[str]:
    """Where the sidecar does not agree with itself; only a faulty writer can do that."""
    info, what = store.info, []
    if not 0 <= info.eod_id < info.vocab_size:
        what.append(f"end of document {info.eod_id} is outside the vocabulary {info.vocab_size}")
    if info.format_version > 1:
        for name in "documents", "tokens", "characters", "utf8_bytes":
            total = sum(source[name] for source in info.sources)
            if total != getattr(info, name):
                what.append(f"{total:,} {name} in its list of sources, {getattr(info, name):,}")
        for suffix in ".bin", ".idx":
            if info.files[suffix].bytes != store.file_states[suffix][1]:
                what.append(f"a {suffix} of {info.files[suffix].bytes:,} bytes")
    return [f"the sidecar contradicts itself: {words}" for words in what]


def _changes(
    store: TokenStore,
    found: dict[str, _Found],
    suffixes: Sequence[str],
    index_is_good: bool = False,
) -> list[str]:
    """Files that are not what the sidecar vouches for, and where."""
    try:
        if store.info.format_version == 1:
            return _changes_in_version_1(store, suffixes)
        stored = with_suffix(store.prefix, ".sums").read_bytes()
    except OSError as error:
        return [f"cannot be read: {error}"]
    what = []
    sums_are_good, at = True, 0
    for suffix, expected in store.info.files.items():
        saved = stored[at : at + LEAF_BYTES * chunks_of(expected.bytes)]
        at += len(saved)
        if suffix not in suffixes:
            continue
        leaves = found[suffix].leaves
        saved_is_good = summarise(expected.bytes, saved).root == expected.root
        sums_are_good &= saved_is_good
        if summarise(expected.bytes, leaves).root == expected.root:
            continue
        if not saved_is_good:
            what.append(f"{suffix}: has changed; .sums, which knows where, has changed, too")
            continue
        theirs = np.frombuffer(saved, f"V{LEAF_BYTES}")
        ours = np.frombuffer(leaves.ljust(len(saved), b"\0")[: len(saved)], f"V{LEAF_BYTES}")
        places = [
            _place(store, suffix, first, last, index_is_good)
            for first, last in _runs(np.flatnonzero(theirs != ours))
        ]
        # none: the file grew after it was opened
        what += [f"{suffix}: {place}" for place in _few(places) or ["has changed"]]
    if not sums_are_good or at != len(stored):
        what.append(".sums: has changed")
    return what


def _changes_in_version_1(store: TokenStore, suffixes: Sequence[str]) -> list[str]:
    sha256 = {".bin": store.info.bin_sha256, ".idx": store.info.idx_sha256}
    return [
        f"{suffix}: its sha256 is not the sidecar's (a store of version 1, which cannot say where "
        "it changed)"
        for suffix in suffixes
        if suffix in sha256 and hash_file(with_suffix(store.prefix, suffix))[2] != sha256[suffix]
    ]


def _place(store: TokenStore, suffix: str, first: int, last: int, index_is_good: bool) -> str:
    """Chunks first to last of a file in words."""
    begin = first * CHUNK_BYTES
    end = min((last + 1) * CHUNK_BYTES, store.info.files[suffix].bytes) - 1
    words = f"bytes {begin:,} to {end:,} have changed"
    if suffix == ".bin":
        tokens = begin // store.dtype.itemsize, end // store.dtype.itemsize
        words += f": tokens {tokens[0]:,} to {tokens[1]:,}"
        return words + (_documents(store, *tokens) if index_is_good else "")
    if suffix == ".idx":
        lengths, offsets, boundaries = index_layout(store.sequences)
        tables = [
            ("header", 0, lengths, lengths),
            ("lengths of sequences", lengths, offsets, 4),
            ("offsets of sequences", offsets, boundaries, 8),
            ("boundaries of documents", boundaries, end + 1, 8),
        ]
    else:
        size = store.info.files[suffix].bytes
        sources = size - 2 * store.documents
        table = sources - 8 * (store.documents + 1)
        tables = [
            ("text of the ids", 0, table, 1),
            ("places of the ids of documents", table, sources, 8),
            ("sources of documents", sources, size, 2),
        ]
    hit = []
    for name, at, stop, entry in tables:
        low, high = max(begin, at), min(end, stop - 1)
        if low <= high:
            hit.append(f"{name} {(low - at) // entry:,} to {(high - at) // entry:,}")
    return f"{words}: {', '.join(hit)}"


def _documents(store: TokenStore, first_token: int, last_token: int) -> str:
    """ ", documents 3 (its id) to 5 (its id)" """
    first, last = store.document_of(first_token), store.document_of(last_token)
    if first == last:
        return f", document {first:,}{_name(store, first)}"
    return f", documents {first:,}{_name(store, first)} to {last:,}{_name(store, last)}"


def _name(store: TokenStore, document: int) -> str:
    """The document's id in brackets, as far as it can be read: the .docs may be damaged, too."""
    try:
        doc_id, _ = store.document_source(document)
    except (OSError, ValueError, IndexError):
        return ""
    return f" ({doc_id[:60]!r})" if doc_id else ""


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
        if len(run):
            yield int(run[0]), int(run[-1])


def _few(sentences: list[str]) -> list[str]:
    if len(sentences) <= _SHOWN:
        return sentences
    return [*sentences[:_SHOWN], f"and {len(sentences) - _SHOWN:,} more places"]


def _end_of_increasing(descriptor: int, at: int, entries: int) -> int | None:
    """The last of int64 entries that begin with 0 and never fall; None where they do not."""
    before = 0
    for first in range(0, entries, _TASK_ENTRIES):
        count = min(_TASK_ENTRIES, entries - first)
        part = _numbers(descriptor, at + 8 * first, count, "<i8")
        steps = np.diff(part, prepend=before)
        if len(part) < count or (first == 0 and part[0] != 0) or steps.min() < 0:
            return None
        before = int(part[-1])
    return before


def _numbers(descriptor: int, start: int, count: int, dtype: str) -> np.ndarray:
    """Up to `count` entries of a table in a file; fewer if the file ends before."""
    size = np.dtype(dtype).itemsize
    raw = os.pread(descriptor, count * size, start)
    return np.frombuffer(raw[: len(raw) // size * size], dtype)
