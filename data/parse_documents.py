"""From blocks of a corpus to documents, and what is wrong with those that are none."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.corpus_pieces import BLANK_LINE, load_pyarrow
from data.documents import BadDocument, Block, Document, ReadOptions
from data.language_families import family_of

_LANGUAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # it becomes a file name


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
        yield from _lines(block, options)
    else:
        yield from _rows(block, options)


def _lines(block: Block, options: ReadOptions) -> Iterator[Document | BadDocument]:
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


def _rows(block: Block, options: ReadOptions) -> Iterator[Document | BadDocument]:
    pyarrow = load_pyarrow(Path(block.path))
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


def _paragraphs(block: Block, options: ReadOptions) -> Iterator[Document | BadDocument]:
    """Documents between blank lines, each named by the line that it begins on."""
    number, start = block.first, 0
    content = _without_mark(block.content) if block.first == 1 else block.content
    ends = [(match.start(), match.end()) for match in BLANK_LINE.finditer(content)]
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
                "has a language code for a name; give the language of all such text "
                "(--language of python -m data.tokenize)",
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
