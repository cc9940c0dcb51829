"""Part files: what tokenizing one piece of a corpus gave, until all pieces are there.

    magic, bytes of the header, bytes of the file; the header as JSON; the sections

A section is one language and split: its ids, a table with a row per document (tokens, characters,
UTF-8 bytes, number of its source, bytes of its id) and the documents' ids. A part that is there is
whole, because it is renamed into place; `read_header` notices one that a crash of the machine cut
off, and `PartSection.read` one that it damaged.
"""

import json
import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.store_format import dtype_for

_MAGIC = b"MAGPART1"
_FIXED = struct.Struct("<8sQQ")
_COLUMNS = 5


@dataclass(frozen=True)
class PartDocument:
    ids: np.ndarray  # without the end-of-document id
    doc_id: str
    source: str
    license: str
    characters: int
    utf8_bytes: int


@dataclass(frozen=True)
class PartSection:
    """Where in a part file the documents of one language and split are."""

    path: Path
    language: str
    split: str
    family: str
    example: str  # the id of one of its documents, for messages
    documents: int
    tokens: int  # end-of-document tokens not counted
    characters: int
    utf8_bytes: int
    dtype: str
    start: int
    id_bytes: int
    crc: int
    sources: tuple[tuple[str, str], ...]  # of the whole part: source and licence

    def read(self) -> Iterator[PartDocument]:
        """Its documents. Raises ValueError, and removes the part, if it is damaged."""
        dtype = np.dtype(self.dtype)
        table_bytes = 8 * _COLUMNS * self.documents
        size = self.tokens * dtype.itemsize + table_bytes + self.id_bytes
        with open(self.path, "rb") as file:
            file.seek(self.start)
            content = file.read(size)
        if len(content) != size or zlib.crc32(content) != self.crc:
            self.path.unlink(missing_ok=True)
            raise ValueError(
                f"{self.path}: this piece of the work is damaged and was removed; run the same "
                "command again, which makes it anew"
            )
        ids = np.frombuffer(content, dtype, self.tokens)
        table = np.frombuffer(content, "<i8", _COLUMNS * self.documents, ids.nbytes)
        names_at = ids.nbytes + table_bytes
        start = 0
        for tokens, characters, utf8_bytes, source, name in table.reshape(-1, _COLUMNS).tolist():
            yield PartDocument(
                ids=ids[start : start + tokens],
                doc_id=content[names_at : names_at + name].decode(),
                source=self.sources[source][0],
                license=self.sources[source][1],
                characters=characters,
                utf8_bytes=utf8_bytes,
            )
            start += tokens
            names_at += name


@dataclass(frozen=True)
class PartHeader:
    sections: tuple[PartSection, ...]
    present: tuple[str, ...]  # every language met, also those that were not wanted
    bad: tuple[str, ...]  # what was wrong with the documents left out


@dataclass
class PartBuilder:
    """Collects documents; `write` makes the file."""

    vocab_size: int
    present: set[str] = field(default_factory=set)
    bad: list[str] = field(default_factory=list)
    _sources: dict[tuple[str, str], int] = field(default_factory=dict)
    _sections: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def add(
        self,
        ids: Sequence[int],
        *,
        language: str,
        split: str,
        family: str,
        doc_id: str,
        source: str,
        license: str,
        characters: int,
        utf8_bytes: int,
    ) -> None:
        """Adds a document. Raises ValueError if its language had another family in this part."""
        section = self._sections.setdefault(
            (language, split),
            {"family": family, "example": doc_id, "ids": array("i"), "table": [], "names": []},
        )
        check_family(language, section["family"], family, doc_id)
        name = doc_id.encode()
        number = self._sources.setdefault((source, license), len(self._sources))
        section["ids"].extend(array("i", ids))  # twice as fast as extend(ids)
        section["table"].append((len(ids), characters, utf8_bytes, number, len(name)))
        section["names"].append(name)

    def write(self, path: Path) -> None:
        """Makes the file, under a hidden name first. An equal one is replaced.

        Raises ValueError for ids outside the vocabulary, OSError if it cannot be written.
        """
        contents, about, start = [], [], 0
        dtype = dtype_for(self.vocab_size)
        for (language, split), section in self._sections.items():
            ids = np.frombuffer(section["ids"], np.int32)
            if len(ids) and not (ids.min() >= 0 and ids.max() < self.vocab_size):
                raise ValueError(
                    f"the tokenizer gave ids from {ids.min()} to {ids.max()} for text in "
                    f"{language!r}, outside its vocabulary of {self.vocab_size}"
                )
            ids = ids.astype(dtype)
            table = np.array(section["table"], dtype="<i8")
            names = b"".join(section["names"])
            content = ids.tobytes() + table.tobytes() + names
            about.append(
                {
                    "language": language,
                    "split": split,
                    "family": section["family"],
                    "example": section["example"],
                    "documents": len(table),
                    "tokens": len(ids),
                    "characters": int(table[:, 1].sum()),
                    "utf8_bytes": int(table[:, 2].sum()),
                    "dtype": dtype,
                    "start": start,
                    "id_bytes": len(names),
                    "crc": zlib.crc32(content),
                }
            )
            contents.append(content)
            start += len(content)
        header = json.dumps(
            {
                "sections": about,
                "sources": list(self._sources),
                "present": sorted(self.present),
                "bad": self.bad,
            }
        ).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                total = _FIXED.size + len(header) + start
                file.write(_FIXED.pack(_MAGIC, len(header), total) + header)
                file.writelines(contents)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read_header(path: Path) -> PartHeader | None:
    """None if there is no such part, or only the beginning of one."""
    try:
        with open(path, "rb") as file:
            fixed = file.read(_FIXED.size)
            if len(fixed) < _FIXED.size:
                return None
            magic, header_bytes, total = _FIXED.unpack(fixed)
            if magic != _MAGIC or os.fstat(file.fileno()).st_size != total:
                return None
            header = json.loads(file.read(header_bytes))
    except (FileNotFoundError, ValueError):
        return None
    sources = tuple((source, license) for source, license in header["sources"])
    first = _FIXED.size + header_bytes
    sections = tuple(
        PartSection(path=path, sources=sources, **section | {"start": first + section["start"]})
        for section in header["sections"]
    )
    return PartHeader(sections, tuple(header["present"]), tuple(header["bad"]))


def check_family(language: str, before: str, family: str, doc_id: str) -> None:
    """ValueError if a language has had another family before."""
    if before != family:
        raise ValueError(
            f"the corpus puts language {language!r} into two families, {before!r} and "
            f"{family!r} (document {doc_id!r}); give all its records the same one"
        )
