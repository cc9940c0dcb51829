import gzip
import importlib
import json
import logging
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.corpus import corpus_files, read_blocks, read_documents
from data.documents import BadDocument, Document, ReadOptions
from data.parse_documents import parse_block

RECORD = {"text": "Ein Satz.", "language": "de", "doc_id": "1"}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


def texts(corpus: Path, **options: Any) -> list[str]:
    return [document.text for document in read_documents(corpus, ReadOptions(**options))]


def save_to_disk(folder: Path, rows: list[dict], shards: int = 2, **about: Any) -> None:
    """The layout of datasets.save_to_disk: shards in Arrow's stream format, two JSON files."""
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    size = -(-len(rows) // shards)
    for i, name in enumerate(names):
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table.slice(i * size, size), max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None} | about
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"license": "CC0-1.0", "features": {}}))


def test_reads_the_files_of_a_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    lines = [json.dumps(RECORD | {"doc_id": str(i)}) for i in range(4)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[0].encode()))
    (tmp_path / "b.jsonl").write_text(lines[1] + "\r\n\n  \n")  # blank lines are skipped
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines[2].encode()))
    (tmp_path / "sub" / "d.jsonl").write_text("\ufeff" + lines[3])  # with a byte order mark
    (tmp_path / "notes.txt").write_text("not a corpus where there is one")
    (tmp_path / "state.json").write_text("[]")
    (tmp_path / ".hidden" / "e.jsonl").write_text("{")

    names = ["a.jsonl.gz", "b.jsonl", "c.jsonl.zst", "d.jsonl"]
    assert [path.name for path in corpus_files(tmp_path)] == names
    assert [document.doc_id for document in read_documents(tmp_path)] == ["0", "1", "2", "3"]


def test_a_folder_that_cannot_be_listed_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here because its path is too long; a file system that fails says as much by other numbers."""
    (tmp_path / "corpus" / "de").mkdir(parents=True)
    (tmp_path / "corpus" / "en.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path / "corpus" / "de")
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    with pytest.raises(OSError, match="File name too long"):
        corpus_files(tmp_path / "corpus")


def test_optional_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    extra = {"family": "germanic", "source": "s", "license": "l"}
    path.write_text(json.dumps(RECORD) + "\n" + json.dumps(RECORD | extra))
    assert list(read_documents(path, ReadOptions(source="mine"))) == [
        Document("Ein Satz.", "de", "1", source="mine"),
        Document("Ein Satz.", "de", "1", "germanic", "s", "l"),
    ]


def test_fields_have_the_names_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "Ein Satz.", "lang": "de", "id": 7, "text": 3}))
    options = ReadOptions(text_field="body", language_field="lang", id_field="id")
    assert list(read_documents(path, options)) == [Document("Ein Satz.", "de", "7")]


def test_an_id_is_made_of_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text('\n{"text": "x", "language": "de"}')
    assert [d.doc_id for d in read_documents(tmp_path)] == ["sub/a.jsonl:2"]
    assert [d.doc_id for d in read_documents(tmp_path / "sub")] == ["a.jsonl:2"]


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("de.jsonl", "de"),
        ("zh-Hant.jsonl", "zh-Hant"),
        ("de-00003-of-00012.jsonl", "de"),
        ("fr/part.jsonl", "fr"),
        ("fr/de.jsonl", "de"),
        ("deu_Latn/part.jsonl", "de"),
        ("language=fi/part.jsonl", "fi"),
        ("part.jsonl", None),
    ],
)
def test_language_told_by_names(tmp_path: Path, name: str, language: str | None) -> None:
    path = tmp_path / "corpus" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"text": "x"}')
    if language is None:
        with pytest.raises(ValueError, match=r'line 1: no field "language", and neither .*--lang'):
            list(read_documents(tmp_path / "corpus"))
    else:
        assert [d.language for d in read_documents(tmp_path / "corpus")] == [language]
    assert [d.language for d in read_documents(tmp_path, ReadOptions(language="it"))] == ["it"]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "fr").mkdir()
    (tmp_path / "de.txt").write_text("Eins.\nZwei.\n\n \nDrei.\n")
    (tmp_path / "fr" / "a.txt.gz").write_bytes(gzip.compress(b"Un.\n\nDeux."))
    (tmp_path / "fr" / "b.txt.zst").write_bytes(zstandard.compress(b"Trois."))
    whole = [(d.doc_id, d.language, d.text) for d in read_documents(tmp_path)]
    assert whole == [
        ("de.txt", "de", "Eins.\nZwei.\n\n \nDrei.\n"),
        ("fr/a.txt.gz", "fr", "Un.\n\nDeux."),
        ("fr/b.txt.zst", "fr", "Trois."),
    ]
    options = ReadOptions(text_documents="paragraph")
    assert [(d.doc_id, d.text) for d in read_documents(tmp_path, options)] == [
        ("de.txt:1", "Eins.\nZwei."),
        ("de.txt:5", "Drei."),
        ("fr/a.txt.gz:1", "Un."),
        ("fr/a.txt.gz:3", "Deux."),
        ("fr/b.txt.zst:1", "Trois."),
    ]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_block_size_changes_nothing(tmp_path: Path, kind: str, compression: str) -> None:
    """Down to blocks smaller than a document, over several frames of the compressed file."""
    path = tmp_path / f"de.{kind}{compression}"
    sentences = [f"Satz {i}: " + "ä" * (i % 700) + "." for i in range(500)]
    if kind == "jsonl":
        content = "".join(json.dumps({"text": s}, ensure_ascii=False) + "\n" for s in sentences)
    else:
        content = "\n \n\n".join(sentences)
    raw = content.encode()
    half = len(raw) // 2
    compress = COMPRESS[compression]
    path.write_bytes(compress(raw[:half]) + compress(raw[half:]) + b"\0" * 512 * bool(compression))
    options = ReadOptions(text_documents="paragraph")
    expected = None
    for block_bytes in (1, 777, 5000, 1 << 30):
        blocks = list(read_blocks(tmp_path, options, block_bytes))
        assert sum(on_disk for _, on_disk in blocks) == path.stat().st_size
        found = [d for block, _ in blocks for d in parse_block(block, options)]
        assert [d.text for d in found if isinstance(d, Document)] == sentences
        expected = expected or found
        assert found == expected  # ids too
    assert len(list(read_blocks(tmp_path, options, 1 << 30))) == 1


def test_parquet(tmp_path: Path) -> None:
    rows = [{"text": f"Satz {i}.", "doc_id": i, "extra": i, "source": "s"} for i in range(1000)]
    path = tmp_path / "de" / "a.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
    documents = list(read_documents(tmp_path))
    assert [d.text for d in documents] == [row["text"] for row in rows]
    assert documents[7] == Document("Satz 7.", "de", "7", source="s")
    for block_bytes in (1, 3000):
        blocks = list(read_blocks(tmp_path, ReadOptions(), block_bytes))
        assert len(blocks) > 2 and {len(b.content) < 30_000 for b, _ in blocks} == {True}
        assert sum(on_disk for _, on_disk in blocks) == path.stat().st_size
        assert [d for b, _ in blocks for d in parse_block(b, ReadOptions())] == documents

    with pytest.raises(ValueError, match=r'no column "body", only text, doc_id.*--text-field'):
        texts(tmp_path, text_field="body")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"a\.parquet: damaged file, readable up to row 0"):
        texts(tmp_path)


def test_bad_rows_are_named(tmp_path: Path) -> None:
    raw = pyarrow.array([b"gut", b"\xff\xfe", b"gut"]).view(pyarrow.string())
    ids = pyarrow.array(["a", "b", None])
    table = pyarrow.table({"text": raw, "doc_id": ids})
    pyarrow.parquet.write_table(table, tmp_path / "de.parquet")
    ((block, _),) = read_blocks(tmp_path, ReadOptions())
    found = list(parse_block(block, ReadOptions()))
    assert found[0] == Document("gut", "de", "a")
    assert isinstance(found[1], BadDocument)
    assert str(found[1]).endswith(
        'de.parquet, row 2: field "text" is not UTF-8: byte 0xff at byte 1'
    )
    assert found[2] == Document("gut", "de", "de.parquet:3")


def test_saved_datasets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"Satz {i}.", "language": "de", "n": i} for i in range(20)]
    save_to_disk(tmp_path / "one", rows)
    documents = list(read_documents(tmp_path / "one"))
    assert [d.text for d in documents] == [row["text"] for row in rows]
    assert documents[0] == Document(
        "Satz 0.", "de", "data-00000-of-00002.arrow:1", license="CC0-1.0"
    )
    blocks = list(read_blocks(tmp_path / "one", ReadOptions(), 1))
    assert len(blocks) > 2
    assert [d for b, _ in blocks for d in parse_block(b, ReadOptions())] == documents

    for split in ("train", "test"):
        save_to_disk(tmp_path / "dict" / split, rows[: 5 if split == "test" else 20])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with caplog.at_level(logging.WARNING):
        assert len(texts(tmp_path / "dict")) == 20
    assert "its splits, train is read and test left out" in caplog.text
    assert len(texts(tmp_path / "dict" / "test")) == 5

    languages = [{"text": row["text"]} for row in rows]
    for split in ("de", "fr"):
        save_to_disk(tmp_path / "languages" / split, languages)
    (tmp_path / "languages" / "dataset_dict.json").write_text('{"splits": ["de", "fr"]}')
    assert {d.language for d in read_documents(tmp_path / "languages")} == {"de", "fr"}


def test_arrow_file_format(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"text": f"Satz {i}."} for i in range(10)])
    with pyarrow.ipc.new_file(tmp_path / "de.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=4)
    assert len(texts(tmp_path)) == 10


def test_unusable_datasets(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "short", [RECORD] * 4)
    (tmp_path / "short" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(
        ValueError, match=r"state.json names data-00001-of-00002.arrow, which is not"
    ):
        texts(tmp_path / "short")
    save_to_disk(tmp_path / "chosen", [RECORD], 1, _indices_data_files=[{"filename": "i.arrow"}])
    with pytest.raises(ValueError, match="a selection of the rows"):
        texts(tmp_path / "chosen")
    save_to_disk(tmp_path / "cut", [RECORD | {"text": "x" * 5000}] * 50, 1)
    path = next((tmp_path / "cut").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="damaged file, readable up to row"):
        texts(tmp_path / "cut")


def test_missing_corpus(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.corpus=.*leave data.corpus empty"):
        corpus_files(tmp_path / "nothing.jsonl")
    with pytest.raises(FileNotFoundError, match=r"holds no file named \*.jsonl, .*\*.parquet"):
        corpus_files(tmp_path)
    (tmp_path / "text.doc").write_text("x")
    with pytest.raises(ValueError, match=r"a file named \*.jsonl, .*\*.txt"):
        corpus_files(tmp_path / "text.doc")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "x"', "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
        (b'{"text": "x\xff"}', "not UTF-8: byte 0xff at byte 12"),
        (b'["text"]', "expected a JSON object, got list"),
        (b'{"language": "de"}', 'field "text" must be a string, got nothing'),
        (b'{"text": 5, "language": "de"}', 'field "text" must be a string, got 5'),
        (b'{"text": "", "language": "de"}', "a document without any text"),
        (b'{"text": " \\n\\u3000", "language": "de"}', "a document without any text"),
        (b'{"text": "a\\ud800b", "language": "de"}', r"half a surrogate pair, \\ud800, is no"),
        (b'{"text": "x", "language": "de", "doc_id": "\\udc00"}', r"\\udc00, in the id"),
        (b'{"text": "x", "language": "../de"}', 'field "language" must be a code such as "de"'),
        (b'{"text": "x", "language": 3}', 'field "language" must be a code such as "de", got 3'),
        (b'{"text": "x", "language": "dee"}', "language 'dee' is not in the family table.*did you"),
        (b'{"text": "x", "language": "de", "family": 3}', 'field "family" must be a string, got 3'),
        (b'{"text": "x", "language": "de", "doc_id": []}', 'field "doc_id" must be a string or'),
        (b'{"text": "x", "language": "de", "doc_id": ""}', 'field "doc_id" must be a string or'),
        (b'{"text": "x", "language": "de", "doc_id": true}', 'field "doc_id" must be .* got True'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(RECORD).encode() + b"\n" + line + b"\n" + b'{"text": "x"')
    documents = read_documents(path)
    assert next(documents).text == "Ein Satz."
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{words}"):
        next(documents)


def test_bad_text_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_bytes(b"Gut.\n\n\nGr\xfc\xdfe.\n")
    with pytest.raises(ValueError, match=r"de\.txt: not UTF-8: byte 0xfc at byte 10"):
        texts(tmp_path)
    with pytest.raises(ValueError, match=r"de\.txt, line 4: not UTF-8: byte 0xfc"):
        texts(tmp_path, text_documents="paragraph")


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "changed", "none of the kind"])
def test_damaged_compressed_files(tmp_path: Path, compression: str, damage: str) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    lines = b"".join(json.dumps(RECORD | {"n": i}).encode() + b"\n" for i in range(2000))
    whole = bytearray(
        gzip.compress(lines)
        if compression == ".gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(lines)
    )
    if damage == "changed":
        whole[len(whole) // 2] ^= 64
    path.write_bytes({"cut": bytes(whole[:-5]), "changed": whole}.get(damage, b"plain text"))
    with pytest.raises(ValueError, match=r"a\.jsonl\.\w+: damaged file"):
        list(read_documents(path))


def test_empty_files_hold_nothing(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name[0] == "d" else b"")
    assert texts(tmp_path) == []


@pytest.mark.parametrize("name", ["de.jsonl.zst", "de.parquet"])
def test_a_missing_package_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "zstandard" if name.endswith(".zst") else "pyarrow"
    (tmp_path / name).write_bytes(zstandard.compress(b"x"))
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)  # what Python leaves after a failed import
    with pytest.raises(ModuleNotFoundError, match=rf"{name}: .*pip install {package}"):
        texts(tmp_path)


def test_zstd_of_newer_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compression.zstd has the interface of zstandard's decompressobj, but for its names."""

    class Error(Exception):
        pass

    class Module:
        ZstdError = Error
        ZstdDecompressor = staticmethod(lambda: zlib.decompressobj(wbits=31))

    real = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda n: Module if n == "compression.zstd" else real(n)
    )
    (tmp_path / "de.jsonl.zst").write_bytes(gzip.compress(b'{"text": "x"}'))
    assert texts(tmp_path) == ["x"]
