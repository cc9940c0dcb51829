"""Reads documents out of the files people have: JSON Lines, Parquet, Arrow, plain text.

    corpus_files(corpus)   which files those are
    read_blocks(corpus)    pieces of about a mebibyte, cut between documents, still unparsed
    parse_block(block)     its documents, and what is wrong with others (data/parse_documents.py)
    read_documents(corpus) both in one, for those who read with one process

Blocks are what data/tokenize_corpus.py hands to its processes: reading them is cheap (a
decompression and a search for the last line end), parsing them is not.

    *.jsonl, .jsonl.gz, .jsonl.zst     one JSON object a line
    *.parquet                          one document a row; needs pyarrow
    *.txt, .txt.gz, .txt.zst           one document a file, or one a paragraph
    folders of datasets.save_to_disk   one document a row; needs pyarrow, not datasets
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.corpus_pieces import BLANK_LINE, Piece, contents, lines, rows
from data.documents import BadDocument, Block, Document, ReadOptions
from data.language_families import LANGUAGES, find_language
from data.parse_documents import parse_block

logger = logging.getLogger(__name__)

_COMPRESSIONS = ("", ".gz", ".zst")
_LINES = tuple(".jsonl" + compression for compression in _COMPRESSIONS)
_TEXT = tuple(".txt" + compression for compression in _COMPRESSIONS)
_TABLES = (".parquet", ".arrow")
SUFFIXES = (*_LINES, *_TABLES, *_TEXT)

BLOCK_BYTES = 1 << 20

_SHARD = re.compile(r"[-_.]\d+([-_]of[-_]\d+)?$")  # de-00003, de-00003-of-00012
_FLORES = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # deu_Latn


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
        if url := re.fullmatch(r"([a-z][a-z0-9+.-]*:)/(.*)", str(corpus)):  # of // a path keeps one
            raise FileNotFoundError(
                f"{setting}{url[1]}//{url[2]}: URLs are not read; copy what is there to a folder, "
                "and give its path"
            )
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
            pieces: Iterable[Piece] = lines(path, block_bytes)
            kind: Any = "lines"
        elif path.name.endswith(_TEXT) and options.text_documents == "paragraph":
            pieces, kind = lines(path, block_bytes, BLANK_LINE), "paragraphs"
        elif path.name.endswith(_TEXT):
            content = b"".join(content for content, _ in contents(path))
            pieces, kind = [(1, content, path.stat().st_size)], "text"
        else:
            known["license"] = options.license or _dataset_license(path)
            pieces, kind = rows(path, block_bytes, options), "table"
        for first, content, on_disk in pieces:
            yield Block(kind=kind, first=first, content=content, **known), on_disk


def _not_to_be_read(error: OSError) -> None:
    """Text below a folder that cannot be listed must not be missing without a word."""
    if not isinstance(error, PermissionError):
        raise error


def _folder_files(folder: Path) -> list[Path]:
    inside = []
    for above, folders, names in os.walk(folder, onerror=_not_to_be_read):  # rglob is slow
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside += [
            Path(above, name)
            for name in names
            if name.endswith((*SUFFIXES, "state.json", "dataset_dict.json"))
            and not name.startswith(".")
        ]
    inside = sorted(path for path in inside if path.is_file())
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
