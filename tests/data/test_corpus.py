import gzip
import json
from pathlib import Path

import pytest

from data.corpus import Document, corpus_files, read_documents

RECORD = {"text": "Ein Satz.", "language": "de", "doc_id": "1"}


def test_reads_plain_and_gzipped_files_of_a_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    lines = [json.dumps(RECORD | {"doc_id": str(i)}) for i in range(3)]
    (tmp_path / "b.jsonl").write_text(lines[1] + "\n\n  \n")  # blank lines are skipped
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines[0])
    (tmp_path / "sub" / "c.jsonl").write_text(lines[2])
    (tmp_path / "notes.txt").write_text("not a corpus")

    assert [path.name for path in corpus_files(tmp_path)] == ["a.jsonl.gz", "b.jsonl", "c.jsonl"]
    assert [document.doc_id for document in read_documents(tmp_path)] == ["0", "1", "2"]


def test_optional_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    extra = {"family": "germanic", "source": "s", "license": "l"}
    path.write_text(json.dumps(RECORD) + "\n" + json.dumps(RECORD | extra))
    assert list(read_documents(path)) == [
        Document("Ein Satz.", "de", "1"),
        Document("Ein Satz.", "de", "1", "germanic", "s", "l"),
    ]


def test_missing_corpus(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.corpus=.*leave data.corpus empty"):
        corpus_files(tmp_path / "nothing.jsonl")
    with pytest.raises(FileNotFoundError, match="holds no"):
        corpus_files(tmp_path)
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(ValueError, match=r"named \*.jsonl"):
        corpus_files(tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "x"', "not a line of UTF-8 JSON"),
        (b'{"text": "\xff"}', "not a line of UTF-8 JSON"),
        (b'["text"]', "expected a JSON object, got list"),
        (b'{"text": "x", "language": "de"}', 'field "doc_id" must be a string, got nothing'),
        (b'{"text": 5, "language": "de", "doc_id": "1"}', 'field "text" must be .* got 5'),
        (b'{"text": "x", "language": "../de", "doc_id": "1"}', 'field "language" must be a code'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(RECORD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: {words}"):
        list(read_documents(path))


@pytest.mark.parametrize("damage", ["cut", "not gzip"])
def test_damaged_gzip(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(json.dumps(RECORD).encode() + b"\n" for _ in range(2000)))
    path.write_bytes(whole[:-20] if damage == "cut" else b"plain text")
    with pytest.raises(ValueError, match="damaged gzip file"):
        list(read_documents(path))
