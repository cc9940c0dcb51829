"""Writes token stores; data/store_format.py tells what their files hold."""

import fcntl
import os
import socket
import uuid
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from data.checksums import HashingFile
from data.durable_files import sync_folder, write_synced
from data.store_format import (
    DATA_SUFFIXES,
    DOCS_MAGIC,
    LONGEST_DOCUMENT,
    MOST_SOURCES,
    FileState,
    StoreInfo,
    document_table,
    dtype_for,
    file_state,
    index_parts,
    sidecar_bytes,
    with_suffix,
)


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
        if len(ids) >= LONGEST_DOCUMENT:
            raise ValueError(
                f"{self.prefix}: document {self.documents} has {len(ids)} tokens, the format holds "
                f"at most {LONGEST_DOCUMENT - 1}; split it"
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
            if len(self._sources) == MOST_SOURCES:
                raise ValueError(
                    f"{self.prefix}: more than {MOST_SOURCES} pairs of source and licence; a "
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
            for part in index_parts(lengths, self._dtype):
                index.write(part)
            for part in document_table(self._docs.bytes, self._id_bytes, self._source_of):
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
        write_synced(
            self._temporary(".sums"), b"".join(leaves for _, leaves, _ in finished.values())
        )
        write_synced(self._temporary(".json"), sidecar_bytes(info))
        self._publish()

    def _publish(self) -> None:
        self._refuse_if_complete()
        ours = {}
        for suffix in (*DATA_SUFFIXES, ".sums"):
            ours[suffix] = file_state(os.stat(self._temporary(suffix)))
            os.replace(self._temporary(suffix), with_suffix(self.prefix, suffix))
        # all names are on disk before the sidecar vouches for them
        sync_folder(self.prefix.parent)
        self._check_nobody_interfered(ours)
        sidecar = with_suffix(self.prefix, ".json")
        try:
            os.link(self._temporary(".json"), sidecar)  # unlike a rename, replaces nothing
        except FileExistsError:
            self._interfered()
        except OSError:  # a file system without hard links
            os.replace(self._temporary(".json"), sidecar)
        sync_folder(self.prefix.parent)
        try:
            self._check_nobody_interfered(ours)
        except FileExistsError:
            sidecar.unlink(missing_ok=True)
            raise

    def _check_nobody_interfered(self, ours: "dict[str, FileState]") -> None:
        for suffix, state in ours.items():
            try:
                found = file_state(os.stat(with_suffix(self.prefix, suffix)))
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


def _joined(names: Iterable[str]) -> str:
    """A few names in a line; many are told only in the list of sources."""
    distinct = [name for name in dict.fromkeys(names) if name]
    return ", ".join(distinct[:8]) + (", ..." if len(distinct) > 8 else "")
