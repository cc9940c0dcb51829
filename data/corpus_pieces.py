"""Whole documents out of one file, piece by piece: bytes between separators, or rows of a table."""

import importlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data.documents import ReadOptions

_READ_BYTES = 1 << 16
_ROWS_AT_ONCE = 256  # of a table: some hundred kilobytes to some megabytes of text

_LINE_END = re.compile(rb"\n")
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")

# First line or row, content, bytes on disk
Piece = tuple[int, bytes, int]


def contents(path: Path) -> Iterator[tuple[bytes, int]]:
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


def lines(
    path: Path, block_bytes: int, separator: re.Pattern[bytes] = _LINE_END
) -> Iterator[Piece]:
    """The file cut behind separators, the last one within block_bytes or else the first beyond.

    Where it is cut does not depend on how much the decompressor gives at once.
    """
    first, on_disk, size, enough = 1, 0, 0, block_bytes
    pieces: list[bytes] = []
    for piece, taken in contents(path):
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


def load_pyarrow(path: Path) -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: reading {path.suffix} needs a package that is not installed: "
            "pip install pyarrow"
        ) from error


def rows(path: Path, block_bytes: int, options: ReadOptions) -> Iterator[Piece]:
    """The columns we need, as Arrow IPC streams of about block_bytes."""
    pyarrow = load_pyarrow(path)
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
