"""Token stores: one stream of token ids on disk, memory-mapped, in Megatron's .bin/.idx format.

    NAME.bin   the ids, back to back, little-endian uint16 or int32
    NAME.idx   "MMIDIDX" header, version 1, type code, counts, lengths, byte offsets, document ends
    NAME.json  ours: which tokenizer, language, family, source, licence; counts, sha256 of both

The first two are what megatron.core.datasets.indexed_dataset.IndexedDataset reads and writes. The
sidecar is written last, so a store is complete exactly if its sidecar exists.
"""

import hashlib
import json
import os
import struct
import uuid
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1

_HEADER = b"MMIDIDX\x00\x00"
_FIXED = struct.Struct("<9sQBQQ")  # header, version, type code, sequences, document boundaries
# megatron.core.datasets.indexed_dataset.DType
_CODE_OF_DTYPE = {"int32": 4, "uint16": 8}
_DTYPE_OF_CODE = {code: np.dtype(name).newbyteorder("<") for name, code in _CODE_OF_DTYPE.items()}
_LONGEST_DOCUMENT = 2**31 - 1  # lengths are int32 in the format


def dtype_for(vocab_size: int) -> str:
    """uint16 below 65 500 ids, else int32: megatron-core's own rule (DType.optimal_dtype)."""
    return "uint16" if vocab_size < 65500 else "int32"


@dataclass(frozen=True)
class StoreInfo:
    """The sidecar."""

    language: str
    family: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod_id: int
    source: str
    license: str
    documents: int
    tokens: int  # end-of-document tokens included
    dtype: str
    bin_sha256: str
    idx_sha256: str
    format_version: int = FORMAT_VERSION


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)  # Path.with_suffix would cut "zh.v2" to "zh"


class TokenStoreWriter:
    """Writes one store; a context manager. Leaving it normally completes the store.

    Everything goes to hidden temporary names, is fsynced and renamed, the sidecar last: whatever
    kills the process, a store that opens is whole. A killed writer leaves hidden *.tmp files
    behind. Raises FileExistsError if the store exists already, ValueError for ids outside the
    vocabulary and for a store without any document (a memory map cannot be empty).
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
        if _with_suffix(self.prefix, ".json").exists():
            raise FileExistsError(f"{self.prefix}: there is a complete store of this name already")
        if not 0 <= eod_id < vocab_size:
            raise ValueError(f"eod_id={eod_id} is outside the vocabulary of {vocab_size}")
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._about: dict[str, Any] = {
            "language": language,
            "family": family,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "vocab_size": vocab_size,
            "eod_id": eod_id,
            "source": source,
            "license": license,
        }
        self._dtype = np.dtype(dtype_for(vocab_size)).newbyteorder("<")
        self._lengths = array("i")
        self._hash = hashlib.sha256()
        self._unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._bin = open(self._temporary(".bin"), "wb")  # noqa: SIM115 closed in __exit__

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Appends the ids and the end-of-document id."""
        if len(ids) >= _LONGEST_DOCUMENT:
            raise ValueError(
                f"{self.prefix}: document {self.documents} has {len(ids)} tokens, the format holds "
                f"at most {_LONGEST_DOCUMENT - 1}; split it"
            )
        ids = np.asarray(ids, dtype=np.int64)
        vocab_size = self._about["vocab_size"]
        if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
            raise ValueError(
                f"{self.prefix}: document {self.documents} has ids from {ids.min()} to "
                f"{ids.max()}, outside the tokenizer's vocabulary of {vocab_size}"
            )
        raw = np.append(ids, self._about["eod_id"]).astype(self._dtype).tobytes()
        self._bin.write(raw)
        self._hash.update(raw)
        self._lengths.append(len(ids) + 1)

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if kind is None:
                self._complete()
        finally:
            self._bin.close()
            for suffix in (".bin", ".idx", ".json"):
                self._temporary(suffix).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}{suffix}.{self._unique}.tmp")

    def _complete(self) -> None:
        if not self._lengths:
            raise ValueError(f"{self.prefix}: a store needs at least one document")
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        index = (
            _FIXED.pack(
                _HEADER, 1, _CODE_OF_DTYPE[self._dtype.name], len(lengths), len(lengths) + 1
            )
            + lengths.astype("<i4").tobytes()
            + ((ends - lengths) * self._dtype.itemsize).astype("<i8").tobytes()
            + np.arange(len(lengths) + 1, dtype="<i8").tobytes()
        )
        self._bin.flush()
        os.fsync(self._bin.fileno())
        _write_synced(self._temporary(".idx"), index)
        info = StoreInfo(
            **self._about,
            documents=len(lengths),
            tokens=int(ends[-1]),
            dtype=self._dtype.name,
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )
        _write_synced(self._temporary(".json"), _sidecar_bytes(info))
        for suffix in (".bin", ".idx"):
            os.replace(self._temporary(suffix), _with_suffix(self.prefix, suffix))
        _sync_folder(
            self.prefix.parent
        )  # both names are on disk before the sidecar vouches for them
        os.replace(self._temporary(".json"), _with_suffix(self.prefix, ".json"))
        _sync_folder(self.prefix.parent)


class TokenStore:
    """A complete store, memory-mapped read-only.

    info: the sidecar. tokens, documents: sizes. Opening costs the same whatever the size: it
    compares file sizes, header, type and counts with the sidecar. `verify` reads everything.
    Raises FileNotFoundError for an incomplete store, ValueError for files that disagree.
    """

    def __init__(self, prefix: Path | str):
        self.prefix = Path(prefix)
        self.info = self._read_sidecar()
        self.tokens, self.documents = self.info.tokens, self.info.documents
        self.language, self.family = self.info.language, self.info.family

        sequences, boundaries, dtype = _read_index_header(self.prefix)
        if dtype.name != self.info.dtype:
            self._disagree(f"the .idx says {dtype.name}, the sidecar {self.info.dtype}")
        _check_sizes(self.prefix, sequences, boundaries, self.tokens * dtype.itemsize)
        if boundaries != self.documents + 1:
            self._disagree(f"the .idx has {boundaries - 1} documents, the sidecar {self.documents}")
        # asarray: slicing a plain view is several times faster than slicing an np.memmap
        self._ids = np.asarray(np.memmap(_with_suffix(self.prefix, ".bin"), dtype=dtype, mode="r"))
        index = np.asarray(np.memmap(_with_suffix(self.prefix, ".idx"), dtype=np.uint8, mode="r"))
        _, offsets_at, ends_at = _index_layout(sequences)
        self._offsets = index[offsets_at:ends_at].view("<i8")
        self._boundaries = index[ends_at:].view("<i8")
        last_end = int(self._offsets[-1]) // dtype.itemsize + int(
            index[offsets_at - 4 : offsets_at].view("<i4")[0]
        )
        if last_end != self.tokens:
            self._disagree(f"the .idx ends at token {last_end}, the sidecar at {self.tokens}")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) of the concatenated documents: a view of the map, as stored."""
        return self._ids[start:stop]

    def document(self, number: int) -> np.ndarray:
        """The ids of one document, its end-of-document id included."""
        if not 0 <= number < self.documents:
            raise IndexError(f"{self.prefix}: document {number} of {self.documents}")
        # entry d of the boundaries is the first sequence of document d
        first, last = self._boundaries[number], self._boundaries[number + 1]
        start = self._offsets[first] // self._ids.itemsize
        stop = (
            self._offsets[last] // self._ids.itemsize if last < len(self._offsets) else self.tokens
        )
        return self._ids[start:stop]

    def verify(self) -> None:
        """Reads the whole store; ValueError if a checksum or an id is not what it should be."""
        for suffix, expected in (".bin", self.info.bin_sha256), (".idx", self.info.idx_sha256):
            found = _sha256(_with_suffix(self.prefix, suffix))
            if found != expected:
                self._disagree(f"{suffix} has sha256 {found}, the sidecar says {expected}")
        highest = _highest_id(self._ids)
        if highest >= self.info.vocab_size:
            self._disagree(f"id {highest} is outside the vocabulary of {self.info.vocab_size}")

    def check_tokenizer(self, fingerprint: str, vocab_size: int, name: str) -> None:
        """ValueError naming both sides unless the store was written with this tokenizer."""
        if (fingerprint, vocab_size) != (self.info.tokenizer_fingerprint, self.info.vocab_size):
            raise ValueError(
                f"{self.prefix}: this store was written with the tokenizer "
                f"{self.info.tokenizer_fingerprint[:16]} of {self.info.vocab_size} entries, but "
                f"data.tokenizer={name} is {fingerprint[:16]} of {vocab_size}; "
                "give the tokenizer of the stores, or tokenize the corpus again"
            )

    def _read_sidecar(self) -> StoreInfo:
        path = _with_suffix(self.prefix, ".json")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file, so there is no complete store; it may never have been "
                "written, its writer may have been killed, or it may be .bin and .idx files of "
                "Megatron's own, for which data.token_store.adopt writes a sidecar"
            )
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            version = record["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, this program reads {FORMAT_VERSION}")
            return StoreInfo(**record)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: not the sidecar of a token store ({error})") from error

    def _disagree(self, what: str) -> None:
        raise ValueError(
            f"{self.prefix}: damaged or mixed-up store: {what}; delete it and tokenize again"
        )


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
    """Writes the sidecar for .bin/.idx files that Megatron's own tools wrote, and opens the store.

    Reads everything once. Whether documents end in eod_id is the other writer's business and not
    checked. Raises ValueError if an id is outside the vocabulary or the files do not fit together.
    """
    prefix = Path(prefix)
    sequences, boundaries, dtype = _read_index_header(prefix)
    bin_path = _with_suffix(prefix, ".bin")
    tokens = bin_path.stat().st_size // dtype.itemsize
    _check_sizes(prefix, sequences, boundaries, tokens * dtype.itemsize)
    highest = _highest_id(np.memmap(bin_path, dtype=dtype, mode="r"))
    if highest >= vocab_size:
        raise ValueError(f"{bin_path}: id {highest} is outside the vocabulary of {vocab_size}")
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
        bin_sha256=_sha256(bin_path),
        idx_sha256=_sha256(_with_suffix(prefix, ".idx")),
    )
    temporary = prefix.with_name(f".{prefix.name}.json.{os.getpid()}.tmp")
    _write_synced(temporary, _sidecar_bytes(info))
    os.replace(temporary, _with_suffix(prefix, ".json"))
    return TokenStore(prefix)


def _read_index_header(prefix: Path) -> tuple[int, int, np.dtype]:
    """Sequences, document boundaries (one more than documents) and the type of the ids."""
    path = _with_suffix(prefix, ".idx")
    try:
        with open(path, "rb") as file:
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


def _index_layout(sequences: int) -> tuple[int, int, int]:
    """Byte positions of lengths (int32), offsets (int64) and document boundaries (int64)."""
    return _FIXED.size, _FIXED.size + 4 * sequences, _FIXED.size + 12 * sequences


def _check_sizes(prefix: Path, sequences: int, boundaries: int, bin_bytes: int) -> None:
    expected = {".bin": bin_bytes, ".idx": _index_layout(sequences)[2] + 8 * boundaries}
    for suffix, size in expected.items():
        path = _with_suffix(prefix, suffix)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, but a store needs it")
        found = path.stat().st_size
        if found != size:
            raise ValueError(
                f"{path}: {found} bytes where {size} are expected; the file was cut off, changed, "
                "or belongs to another store"
            )


def _highest_id(ids: np.ndarray) -> int:
    """The highest id; a negative one counts as 2**31, beyond any vocabulary."""
    highest, step = 0, 1 << 24
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        highest = max(highest, int(part.max()), 2**31 if part.min() < 0 else 0)
    return highest


def _sidecar_bytes(info: StoreInfo) -> bytes:
    return (json.dumps(asdict(info), indent=1, ensure_ascii=False) + "\n").encode()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
