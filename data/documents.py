"""What a corpus is made of: documents, and the blocks they are read in."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Document:
    text: str
    language: str
    doc_id: str  # the same id in every language for translations of one document
    family: str | None = None  # None: looked up in data/language_families.py
    source: str = ""
    license: str = ""


@dataclass(frozen=True)
class BadDocument:
    where: str  # file and line or row
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class ReadOptions:
    """How records are read. Fields that a record does not have are taken from here."""

    text_field: str = "text"
    language_field: str = "language"
    id_field: str = "doc_id"
    language: str = ""  # empty: told by the file's name (de.txt) or its folder's (de/a.txt)
    source: str = ""
    license: str = ""
    text_documents: Literal["file", "paragraph"] = "file"  # what a document of a .txt file is


@dataclass(frozen=True)
class Block:
    """Whole documents out of one file. Equal blocks hold equal documents."""

    path: str  # for messages
    name: str  # the path within the corpus: ids are made of it where records have none
    kind: Literal["lines", "paragraphs", "text", "table"]
    first: int  # number of the first line or row in the file, from 1
    content: bytes  # of a table: an Arrow IPC stream
    language: str
    source: str
    license: str
