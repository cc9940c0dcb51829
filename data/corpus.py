"""Reads documents from JSON Lines: {"text", "language", "doc_id", ...} a line, gzipped or not."""

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LANGUAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # it becomes a file name

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Document:
    text: str
    language: str
    doc_id: str  # the same id in every language for translations of one document
    family: str | None = None  # None: looked up in data/language_families.py
    source: str = ""
    license: str = ""


def corpus_files(corpus: Path) -> list[Path]:
    """The JSONL files of a corpus, sorted by path; a folder is searched recursively.

    Raises FileNotFoundError if there is nothing there, ValueError for a file of another kind.
    """
    if corpus.is_dir():
        files = sorted(p for p in corpus.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        if not files:
            raise FileNotFoundError(
                f"data.corpus={corpus}: the folder holds no *.jsonl and no *.jsonl.gz file"
            )
        return files
    if not corpus.is_file():
        raise FileNotFoundError(
            f"data.corpus={corpus}: no such file or folder; leave data.corpus empty for the text "
            "that ships with the package"
        )
    if not corpus.name.endswith(SUFFIXES):
        raise ValueError(
            f"data.corpus={corpus}: expected a folder, or a file named *.jsonl or *.jsonl.gz"
        )
    return [corpus]


def read_documents(corpus: Path) -> Iterator[Document]:
    """Every document of the corpus, in file and line order; blank lines are skipped.

    A document's text may be empty: callers decide. Raises ValueError naming file and line for
    anything that is not UTF-8 JSON with string fields "text", "language" and "doc_id", OSError
    where a file cannot be read.
    """
    for path in corpus_files(corpus):
        opener = gzip.open if path.name.endswith(".gz") else open
        number = 0
        try:
            with opener(path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _parse(line, f"{path}, line {number}")
        except (gzip.BadGzipFile, EOFError) as error:
            raise ValueError(
                f"{path}: damaged gzip file, readable up to line {number} ({error})"
            ) from error


def _parse(line: bytes, where: str) -> Document:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not a line of UTF-8 JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for field in ("text", "language", "doc_id"):
        if not isinstance(record.get(field), str):
            got = "nothing" if field not in record else repr(record[field])[:60]
            raise ValueError(f'{where}: field "{field}" must be a string, got {got}')
    if not _LANGUAGE.fullmatch(record["language"]):
        raise ValueError(
            f'{where}: field "language" must be a code such as "de", got {record["language"]!r}'
        )
    return Document(
        text=record["text"],
        language=record["language"],
        doc_id=record["doc_id"],
        family=record.get("family") or None,
        source=str(record.get("source", "")),
        license=str(record.get("license", "")),
    )
