"""Reads documents out of the files people have: JSON Lines, Parquet, Arrow, plain text.

    corpus_files(corpus)   which files those are
    read_blocks(corpus)    pieces of about a mebibyte, cut between documents, still unparsed
    parse_block(block)     the documents of a piece, and what is wrong with those that are none
    read_documents(corpus) both in one, for those who read with one process

Blocks are what data/tokenize_corpus.py hands to its processes: reading them is cheap (a
decompression and a search for the last line end), parsing them is not.

    *.jsonl, .jsonl.gz, .jsonl.zst     one JSON object a line
    *.parquet                          one document a row; needs pyarrow
    *.txt, .txt.gz, .txt.zst           one document a file, or one a paragraph
    folders of datasets.save_to_disk   one document a row; needs pyarrow, not datasets
"""

import functools
import importlib
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from data.language_families import LANGUAGES, family_of, find_language

logger = logging.getLogger(__name__)

_COMPRESSIONS = ("", ".gz", ".zst")
_LINES = tuple(".jsonl" + compression for compression in _COMPRESSIONS)
_TEXT = tuple(".txt" + compression for compression in _COMPRESSIONS)
_TABLES = (".parquet", ".arrow")
SUFFIXES = (*_LINES, *_TABLES, *_TEXT)

BLOCK_BYTES = 1 << 20
_READ_BYTES = 1 << 16
_ROWS_AT_ONCE = 256  # of a table: some hundred kilobytes to some megabytes of text

_LANGUAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # it becomes a file name
_SHARD = re.compile(r"[-_.]\d+([-_]of[-_]\d+)?$")  # de-00003, de-00003-of-00012
_FLORES = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # deu_Latn
_LINE_END = re.compile(rb"\n")
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


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


def corpus_files(corpus: Path, setting: str = "data.corpus=") -> list[Path]:
    """The files of a corpus, sorted by path; a folder is searched recursively.

    Names that begin with a dot are passed over, and so are .txt files where there is a file of
    another kind, because those are notes and licences. A folder that datasets.save_to_disk wrote
    gives its Arrow files; of one with several splits only `train`, unless the splits are named by
    language codes. `setting` is how messages call the path.

    Raises FileNotFoundError if there is nothing there, ValueError for a file of another kind.
    """
    if corpus.is_dir():
        files = _folder_files(corpus)
        if not files:
            raise FileNotFoundError(
                f"{setting}{corpus}: the folder holds no file named "
                + ", ".join(f"*{suffix}" for suffix in SUFFIXES)
            )
        return files
    if not corpus.is_file():
        raise FileNotFoundError(
            f"{setting}{corpus}: no such file or folder"
            + ("; leave data.corpus empty for the text that ships with the package" * bool(setting))
        )
    if not corpus.name.endswith(SUFFIXES):
        raise ValueError(
            f"{setting}{corpus}: expected a folder, or a file named "
            + ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        )
    return [corpus]


def read_documents(
    corpus: Path, options: ReadOptions | None = None, setting: str = "data.corpus="
) -> Iterator[Document]:
    """Every document of the corpus, in file and line order; blank lines are skipped.

    Text comes as it is in the file, not normalised. Raises ValueError naming file and line for
    anything that is not a document in UTF-8 with a text and a known language, OSError where a file
    cannot be read, ModuleNotFoundError where a package is needed to read it.
    """
    options = options or ReadOptions()
    for block, _ in read_blocks(corpus, options, setting=setting):
        for document in parse_block(block, options):
            if isinstance(document, BadDocument):
                raise ValueError(str(document))
            yield document


def read_blocks(
    corpus: Path,
    options: ReadOptions,
    block_bytes: int = BLOCK_BYTES,
    setting: str = "data.corpus=",
) -> Iterator[tuple[Block, int]]:
    """The corpus in blocks of about block_bytes, each with the bytes on disk read for it.

    A pure function of the files and the arguments. Never more than one block in memory, however
    large the file; a document that is larger than a block makes its block larger.
    """
    root = corpus if corpus.is_dir() else corpus.parent
    for path in corpus_files(corpus, setting):
        known = {
            "path": str(path),
            "name": path.relative_to(root).as_posix(),
            "language": options.language or _language_of(path, root),
            "source": options.source,
            "license": options.license,
        }
        if path.name.endswith(_LINES):
            pieces: Iterable[_Piece] = _lines(path, block_bytes)
            kind: Any = "lines"
        elif path.name.endswith(_TEXT) and options.text_documents == "paragraph":
            pieces, kind = _lines(path, block_bytes, _BLANK_LINE), "paragraphs"
        elif path.name.endswith(_TEXT):
            content = b"".join(content for content, _ in _contents(path))
            pieces, kind = [(1, content, path.stat().st_size)], "text"
        else:
            known["license"] = options.license or _dataset_license(path)
            pieces, kind = _rows(path, block_bytes, options), "table"
        for first, content, on_disk in pieces:
            yield Block(kind=kind, first=first, content=content, **known), on_disk


def parse_block(block: Block, options: ReadOptions) -> Iterator[Document | BadDocument]:
    """The documents of a block in order. What is wrong with one is told, not raised."""
    if block.kind == "text":
        where = block.path
        try:
            text = _without_mark(block.content).decode()
        except UnicodeDecodeError as error:
            yield BadDocument(where, _not_utf8(error))
            return
        yield _document({}, text, where, block.name, block, options)
    elif block.kind == "paragraphs":
        yield from _paragraphs(block, options)
    elif block.kind == "lines":
        for number, line in enumerate(block.content.split(b"\n"), start=block.first):
            if number == 1:
                line = _without_mark(line)
            if not line or line.isspace():
                continue
            where = f"{block.path}, line {number}"
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                yield BadDocument(where, _not_utf8(error))
            except (json.JSONDecodeError, RecursionError) as error:
                yield BadDocument(where, f"not a line of JSON ({error})")
            else:
                yield _record(record, where, f"{block.name}:{number}", block, options)
    else:
        pyarrow = _pyarrow(Path(block.path))
        table = pyarrow.ipc.open_stream(block.content).read_all()
        columns = {name: _values(table.column(name)) for name in table.column_names}
        for row in range(table.num_rows):
            record = {name: values[row] for name, values in columns.items()}
            number = block.first + row
            where = f"{block.path}, row {number}"
            damaged = [name for name, value in record.items() if isinstance(value, BadDocument)]
            if damaged:
                yield BadDocument(where, f'field "{damaged[0]}" is {record[damaged[0]].what}')
            else:
                yield _record(record, where, f"{block.name}:{number}", block, options)


# First line or row, content, bytes on disk
_Piece = tuple[int, bytes, int]


def _folder_files(folder: Path) -> list[Path]:
    inside = [
        path
        for path in sorted(folder.rglob("*"))
        if path.name.endswith((*SUFFIXES, "state.json", "dataset_dict.json"))
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    left_out: set[Path] = set()
    for path in inside:
        if path.name == "dataset_dict.json":
            splits = json.loads(path.read_text("utf-8"))["splits"]
            if "train" in splits and len(splits) > 1:
                others = [split for split in splits if split not in ("train", *LANGUAGES)]
                left_out.update(path.parent / split for split in others)
                if others:
                    logger.warning(
                        "%s: of its splits, %s is read and %s left out; name the folder of a "
                        "split to read that one",
                        path.parent,
                        ", ".join(split for split in splits if split not in others),
                        ", ".join(others),
                    )
        elif path.name == "state.json":
            _check_state(path)
    files = [
        path
        for path in inside
        if path.name.endswith(SUFFIXES) and not left_out.intersection(path.parents)
    ]
    return [path for path in files if not path.name.endswith(_TEXT)] or files


def _check_state(path: Path) -> None:
    """Refuses a folder of save_to_disk that lacks files, or holds a selection of its rows."""
    try:
        state = json.loads(path.read_text("utf-8"))
    except ValueError:
        return
    if not isinstance(state, dict) or "_data_files" not in state:
        return  # someone else's state.json
    missing = [
        f["filename"] for f in state["_data_files"] if not (path.parent / f["filename"]).is_file()
    ]
    if missing:
        raise ValueError(f"{path.parent}: its state.json names {missing[0]}, which is not there")
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{path.parent}: the dataset is a selection of the rows in its files; save it again "
            "with a version of datasets from 2.0 on, or after flatten_indices()"
        )


def _dataset_license(path: Path) -> str:
    try:
        about = json.loads((path.parent / "dataset_info.json").read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    return str(about.get("license") or "") if isinstance(about, dict) else ""


def _language_of(path: Path, root: Path) -> str:
    """The language that the file's name or the nearest folder's tells, empty if none does."""
    stem = path.name[: -len(next(s for s in SUFFIXES if path.name.endswith(s)))]
    inner = path.relative_to(root).parts[:-1]
    for name in (stem, _SHARD.sub("", stem), *reversed(inner), root.resolve().name):
        name = name.removeprefix("language=").removeprefix("lang=")  # as Hive names partitions
        if name in LANGUAGES:
            return name
        if _FLORES.fullmatch(name) and (found := find_language(name)):
            return found.code
    return ""


def _contents(path: Path) -> Iterator[tuple[bytes, int]]:
    """The file decompressed, in pieces, each with the bytes on disk it took."""
    with open(path, "rb") as raw:
        if path.name.endswith(".gz"):
            yield from _decompressed(raw, path, lambda: zlib.decompressobj(wbits=31), zlib.error)
        elif path.name.endswith(".zst"):
            new_frame, error = _zstandard(path)
            yield from _decompressed(raw, path, new_frame, error)
        else:
            while piece := raw.read(_READ_BYTES):
                yield piece, len(piece)


def _decompressed(
    raw: BinaryIO, path: Path, new_frame: Callable[[], Any], error: type[Exception]
) -> Iterator[tuple[bytes, int]]:
    """Frames (gzip: members) back to back. A file cut off in the middle of one is an error."""
    frame, begun, written = new_frame(), False, 0
    try:
        while piece := raw.read(_READ_BYTES):
            on_disk = len(piece)
            while piece:
                if frame.eof:
                    piece = piece.lstrip(b"\0")  # padding, as of tapes, is no member
                    if not piece:
                        break
                    frame = new_frame()
                begun = True
                content = frame.decompress(piece)
                piece = frame.unused_data if frame.eof else b""
                written += len(content)
                yield content, on_disk
                on_disk = 0
    except error as reason:
        raise ValueError(
            f"{path}: damaged file, readable up to byte {written} of its content ({reason})"
        ) from reason
    if begun and not frame.eof:
        raise ValueError(
            f"{path}: damaged file, cut off after byte {written} of its content; fetch it again"
        )


def _zstandard(path: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a decompressor of one zstd frame, and what it raises."""
    for name in ("compression.zstd", "backports.zstd"):  # the former comes with Python 3.14
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        return module.ZstdDecompressor, module.ZstdError
    try:
        zstandard = importlib.import_module("zstandard")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: reading .zst needs a package that is not installed: pip install zstandard"
        ) from error
    # archives made with --long need more than the default window
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    return decompressor.decompressobj, zstandard.ZstdError


def _lines(
    path: Path, block_bytes: int, separator: re.Pattern[bytes] = _LINE_END
) -> Iterator[_Piece]:
    """The file cut behind separators, the last one within block_bytes or else the first beyond.

    Where it is cut does not depend on how much the decompressor gives at once.
    """
    first, on_disk, size, enough = 1, 0, 0, block_bytes
    pieces: list[bytes] = []
    for piece, taken in _contents(path):
        on_disk += taken
        pieces.append(piece)
        size += len(piece)
        if size < enough:
            continue
        content, start = b"".join(pieces), 0
        while len(content) - start >= block_bytes:
            cut = _last_end(separator, content, start, block_bytes)
            if not cut:
                break
            yield first, content[start:cut], on_disk
            first += content.count(b"\n", start, cut)
            start, on_disk = cut, 0
        pieces, size = [content[start:]], len(content) - start
        # no end yet in a very long line: doubling keeps the time to search for it proportional
        enough = block_bytes if size < block_bytes else 2 * size
    content = b"".join(pieces)
    if content or on_disk:
        yield first, content, on_disk


def _last_end(separator: re.Pattern[bytes], content: bytes, start: int, block_bytes: int) -> int:
    """Where the last separator within block_bytes ends, or else the first one beyond; or 0."""
    cut = 0
    if separator is _LINE_END:  # several times faster than the pattern
        cut = content.rfind(b"\n", start, start + block_bytes) + 1
        return cut or content.find(b"\n", start + block_bytes) + 1
    for match in separator.finditer(content, start):
        if cut and match.end() > start + block_bytes:
            break
        cut = match.end()
    return cut


def _paragraphs(block: Block, options: ReadOptions) -> Iterator[Document | BadDocument]:
    """Documents between blank lines, each named by the line that it begins on."""
    number, start = block.first, 0
    content = _without_mark(block.content) if block.first == 1 else block.content
    ends = [(match.start(), match.end()) for match in _BLANK_LINE.finditer(content)]
    for end, following in [*ends, (len(content), len(content))]:
        paragraph = content[start:end]
        if paragraph and not paragraph.isspace():
            leading = paragraph[: len(paragraph) - len(paragraph.lstrip())].count(b"\n")
            where = f"{block.path}, line {number + leading}"
            try:
                text = paragraph.strip().decode()
            except UnicodeDecodeError as error:
                yield BadDocument(where, _not_utf8(error))
            else:
                made_up = f"{block.name}:{number + leading}"
                yield _document({}, text, where, made_up, block, options)
        number += content.count(b"\n", start, following)
        start = following


def _pyarrow(path: Path) -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: reading {path.suffix} needs a package that is not installed: "
            "pip install pyarrow"
        ) from error


def _rows(path: Path, block_bytes: int, options: ReadOptions) -> Iterator[_Piece]:
    """The columns we need, as Arrow IPC streams of about block_bytes."""
    pyarrow = _pyarrow(path)
    on_disk = path.stat().st_size
    first, rows, size, taken = 1, 0, 0, 0
    batches: list[Any] = []
    try:
        for total, batch in _batches(pyarrow, path, options):
            batches.append(batch)
            rows += batch.num_rows
            size += batch.nbytes
            if size >= block_bytes:
                reached = min(on_disk * (first - 1 + rows) // max(total, 1), on_disk)
                yield first, _ipc(pyarrow, batches), reached - taken
                first, taken = first + rows, reached
                batches, rows, size = [], 0, 0
        if batches:
            yield first, _ipc(pyarrow, batches), on_disk - taken
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: damaged file, readable up to row {first - 1 + rows} ({error})"
        ) from error


def _batches(pyarrow: Any, path: Path, options: ReadOptions) -> Iterator[tuple[int, Any]]:
    """How many rows the file has (for Arrow a guess), and a batch of them with what we need."""

    def columns(schema: Any) -> list[str]:
        if options.text_field not in schema.names:
            raise ValueError(
                f'{path}: there is no column "{options.text_field}", only '
                f"{', '.join(schema.names)}; name the one with the text (--text-field)"
            )
        wanted = [options.text_field, options.language_field, options.id_field]
        wanted += ["family", "source", "license"]
        return [name for name in dict.fromkeys(wanted) if name in schema.names]

    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as table:
            names = columns(table.schema_arrow)
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=names):
                yield table.metadata.num_rows, batch
        return
    with pyarrow.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            opened = pyarrow.ipc.open_file(mapped)
            parts: Iterable[Any] = (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:
            mapped.seek(0)
            opened = parts = pyarrow.ipc.open_stream(mapped)
        names, rows = columns(opened.schema), 0
        for part in parts:
            rows += part.num_rows
            total = rows * mapped.size() // max(mapped.tell(), 1)  # told by how far we have come
            part = part.select(names)
            for start in range(0, part.num_rows, _ROWS_AT_ONCE):
                yield total, part.slice(start, _ROWS_AT_ONCE)


def _ipc(pyarrow: Any, batches: list[Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batches[0].schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _values(column: Any) -> list[Any]:
    """The column's values, a BadDocument for each that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values: list[Any] = []
        for value in column:
            try:
                values.append(value.as_py())
            except UnicodeDecodeError as error:
                values.append(BadDocument("", _not_utf8(error)))
        return values


def _record(
    record: Any, where: str, made_up_id: str, block: Block, options: ReadOptions
) -> Document | BadDocument:
    if not isinstance(record, dict):
        return BadDocument(where, f"expected a JSON object, got {type(record).__name__}")
    text = record.get(options.text_field)
    if not isinstance(text, str):
        got = "nothing" if options.text_field not in record else repr(text)[:60]
        return BadDocument(where, f'field "{options.text_field}" must be a string, got {got}')
    return _document(record, text, where, made_up_id, block, options)


def _document(
    record: dict[str, Any],
    text: str,
    where: str,
    made_up_id: str,
    block: Block,
    options: ReadOptions,
) -> Document | BadDocument:
    if not text or text.isspace():
        return BadDocument(where, "a document without any text")
    if lone := _lone_surrogate(text):
        return BadDocument(where, f"half a surrogate pair, {lone}, is no character")
    language = record.get(options.language_field)
    if language is None:
        language = block.language
        if not language:
            return BadDocument(
                where,
                f'no field "{options.language_field}", and neither the file nor a folder it is in '
                "has a language code for a name; give the language of all such text (--language)",
            )
    elif not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
        return BadDocument(
            where,
            f'field "{options.language_field}" must be a code such as "de", got {language!r}'[:200],
        )
    family = record.get("family") or None
    if family is not None and not isinstance(family, str):
        return BadDocument(where, f'field "family" must be a string, got {family!r}'[:200])
    if family is None and (unknown := _unknown(language)):
        return BadDocument(where, unknown)
    doc_id = record.get(options.id_field)
    if doc_id is None:
        doc_id = made_up_id
    elif isinstance(doc_id, bool) or not isinstance(doc_id, str | int) or doc_id == "":
        return BadDocument(
            where,
            f'field "{options.id_field}" must be a string or a whole number, got {doc_id!r}'[:200],
        )
    doc_id = str(doc_id)
    source = str(record.get("source") or block.source)
    license = str(record.get("license") or block.license)
    if lone := _lone_surrogate(doc_id + source + license):
        return BadDocument(where, f"half a surrogate pair, {lone}, in the id, source or licence")
    return Document(text, language, doc_id, family, source, license)


def _lone_surrogate(text: str) -> str:
    """The first one, spelled out; empty if there is none. JSON can hold them, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return ""


@functools.lru_cache(maxsize=4096)
def _unknown(language: str) -> str:
    """What is wrong with a language code, empty if nothing is."""
    try:
        family_of(language)
    except ValueError as error:
        return str(error)
    return ""


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"


def _without_mark(content: bytes) -> bytes:
    return content.removeprefix(b"\xef\xbb\xbf")  # the byte order mark some editors write
