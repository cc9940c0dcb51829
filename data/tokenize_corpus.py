"""From a corpus to token stores: one per language and split.

    corpus ─► blocks ─► tokenized by processes, each block into a part file ─► stores, in order

    FOLDER/train/LANGUAGE.{bin,idx,json,...}
    FOLDER/validation/LANGUAGE.{bin,idx,json,...}
    FOLDER/manifest.json                what it was made from, written last
    .building-FOLDER/                   beside it while it is made: the lock, the parts

A part file is named by a hash of the block and of the settings. So work that is done is found again
whatever killed it, however the corpus was mended in between, and the stores are the same bytes
whatever the number of processes. It costs the room of the tokens a second time until the end.

`python -m data.tokenize` is the command; training from a corpus does the same by itself, into a
cache folder named by a hash of everything that the result depends on (data/store_cache.py).
"""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.corpus import BLOCK_BYTES, corpus_files, read_blocks
from data.documents import Block, ReadOptions
from data.durable_files import sync_folder, write_synced
from data.folder_lock import FolderLock
from data.store_folder import MANIFEST, building_folder, is_complete, read_manifest
from data.store_format import FORMAT_VERSION
from data.token_parts import read_header
from data.tokenize_progress import Collected, Report, UnusableCorpusError
from data.tokenize_worker import (
    Executor,
    Job,
    Normalization,
    assemble,
    make_part,
    result_of,
)
from data.tokenizer import Tokenizer

DEMO = Path(__file__).parent / "demo"
DEMO_CORPUS = DEMO / "chromium_ui.jsonl.gz"
DEMO_TOKENIZER = DEMO / "tokenizer.json"

_MANIFEST_VERSION = 2
_MOST_BLOCKS = 1 << 14  # of a large corpus: blocks grow, up to _LARGEST_BLOCK
_LARGEST_BLOCK = 32 << 20
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@dataclass(frozen=True)
class TokenizeOptions:
    """How the corpus is read and what is allowed. All but `workers` and `skip_bad` shape the bytes.

    Text is normalised here and once, so that every tokenizer sees the same: with "none", text that
    says é in two characters costs two to three times the tokens and is another word to the model.
    """

    read: ReadOptions = field(default_factory=ReadOptions)
    normalize: Normalization = "nfc"
    skip_bad: int = 0  # documents that may be left out because something is wrong with them
    workers: int = 0  # processes; 0: none, the tokenizer's own threads use all cores


@dataclass(frozen=True)
class Work:
    """What is to be tokenized, and how."""

    corpus: Path
    tokenizer: Tokenizer
    validation_fraction: float
    languages: Sequence[str]
    options: TokenizeOptions

    def settings(self) -> dict[str, Any]:
        """Everything but the corpus that the stores' bytes depend on."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "eod_id": self.tokenizer.eod_id,
            "normalize": self.options.normalize,
            "validation_fraction": self.validation_fraction,
            "languages": sorted(self.languages),
            "read": asdict(self.options.read),
        }

    def file_states(self) -> dict[str, tuple[int, int]]:
        """Sizes and modification times in nanoseconds, by the path within the corpus."""
        root = self.corpus if self.corpus.is_dir() else self.corpus.parent
        files = corpus_files(self.corpus)
        states = {path.relative_to(root).as_posix(): path.stat() for path in files}
        return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}

    def job(self) -> Job:
        """What each process is told."""
        return Job(
            tokenizer=pickle.dumps(self.tokenizer),
            fingerprint=self.tokenizer.fingerprint,
            vocab_size=self.tokenizer.vocab_size,
            eod_id=self.tokenizer.eod_id,
            validation_fraction=self.validation_fraction,
            languages=frozenset(self.languages),
            normalize=self.options.normalize,
            read=self.options.read,
            skip_bad=self.options.skip_bad,
        )


def write_stores(
    corpus: Path,
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float,
    languages: Sequence[str] = (),
    *,
    options: TokenizeOptions | None = None,
    report: Report | None = None,
    wait: float = 0.0,
) -> None:
    """Tokenizes the corpus into `folder`, which appears only when it is whole.

    What a killed or failed call with the same arguments has finished is not done again: bad
    documents, a full disk and interruptions leave a folder `.building-NAME` behind for that.
    Bytes of the result depend on the corpus, the tokenizer and the options only. Memory: some
    blocks for each process, however large the corpus.

    wait: seconds to wait for another process that makes the same folder; if it gets done, its
    result stands.

    Raises FolderBusyError if it does not, BadDocumentError for more bad documents than
    options.skip_bad, ChildProcessError if a process was killed, FileExistsError if `folder` holds
    something else, OSError if the stores cannot be written, and what data.corpus raises.
    """
    work = Work(corpus, tokenizer, validation_fraction, languages, options or TokenizeOptions())
    building = building_folder(folder)
    try:
        building.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot write token stores to {folder.parent} ({error}); set data.cache_dir to a "
            "folder you may write to"
        ) from error
    try:
        with FolderLock(building, wait) as lock:
            try:
                if not is_complete(folder):
                    _check_free(folder)
                    shutil.rmtree(building / "stores", ignore_errors=True)
                    manifest = _tokenize(work, building, report)
                    _publish(building / "stores", manifest, folder, lock)
            except BaseException as error:
                shutil.rmtree(building / "stores", ignore_errors=True)  # it may be a full disk
                kept = next(building.glob("parts/*/*.part"), None)
                if kept is None or isinstance(error, UnusableCorpusError):
                    shutil.rmtree(building, ignore_errors=True)
                raise
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        with suppress(OSError):
            building.rmdir()  # there was not even room for a lock
        delete = f", or delete {building}, where finished work is kept" if building.exists() else ""
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)} while token stores were written to {folder.parent}; make "
            f"room and run again{delete}; nothing incomplete is in {folder}",
        ) from error


def differences(
    folder: Path,
    corpus: Path,
    tokenizer: Tokenizer,
    validation_fraction: float,
    languages: Sequence[str],
    options: TokenizeOptions,
) -> list[str]:
    """In what the complete stores of `folder` differ from what these arguments would give.

    The corpus is compared by names, sizes and whether a file is younger than the stores; it is not
    read. Raises ValueError if the manifest is none of ours.
    """
    try:
        made = read_manifest(folder)
        settings = made["settings"]
        files = {name: size for name, size in made["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / MANIFEST}: not the manifest of token stores of this version ({error!r}); "
            "delete the folder and tokenize again"
        ) from error
    work = Work(corpus, tokenizer, validation_fraction, languages, options)
    asked = json.loads(json.dumps(work.settings()))
    found = [
        f"{name} is {settings.get(name)!r} there and {value!r} here"
        for name, value in asked.items()
        if settings.get(name) != value
    ]
    now = work.file_states()
    made_at = (folder / MANIFEST).stat().st_mtime_ns
    for name in sorted(files.keys() | now.keys()):
        size, changed_at = now.get(name, (None, 0))
        if files.get(name) != size:
            was, is_now = ("absent" if n is None else f"{n} bytes" for n in (files.get(name), size))
            found.append(f"corpus file {name} was {was} and is {is_now}")
        elif changed_at > made_at:
            found.append(f"corpus file {name} was changed after the stores were made")
        if len(found) == 5:
            return [*found, "and more"]
    return found


def _check_free(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"{folder}: there is something else already, not a finished set of token stores; "
            "choose another name or move it away"
        )


def _publish(finished: Path, manifest: dict[str, Any], folder: Path, lock: FolderLock) -> None:
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_synced(finished / MANIFEST, text.encode())
    if not lock.is_ours():
        raise FileExistsError(
            f"{lock.folder}: another process has taken this work over, as if this one had died; "
            "let that one finish it"
        )
    finished.rename(folder)
    sync_folder(folder.parent)  # the new name


def _tokenize(work: Work, building: Path, report: Report | None) -> dict[str, Any]:
    """Fills building/stores; returns the manifest."""
    before = work.file_states()
    sizes = {name: size for name, (size, _) in before.items()}
    with Executor(work.options.workers, work.job(), work.tokenizer) as executor:
        collected = Collected(work.options.skip_bad, sum(sizes.values()), report)
        _make_parts(work, building / "parts", executor, collected)
        changed = [name for name, state in work.file_states().items() if state != before.get(name)]
        if changed:
            raise OSError(f"{work.corpus}: {changed[0]} was changed while it was read; run again")
        collected.check(work.validation_fraction, work.languages, work.corpus)
        _make_stores(building / "stores", executor, collected)
    return {
        "manifest_version": _MANIFEST_VERSION,
        "corpus": str(work.corpus),
        "corpus_digest": collected.digest.hexdigest(),
        "files": sorted(sizes.items()),
        "tokenizer": {"path": str(work.tokenizer.path), "fingerprint": work.tokenizer.fingerprint},
        "settings": work.settings(),
        "validation_fraction": work.validation_fraction,
        "languages": sorted({language for language, _ in collected.sections}),
        "bad_documents": {"count": collected.bad, "first": collected.first_bad},
        "splits": collected.by_split(),
    }


def _make_parts(work: Work, parts: Path, executor: Executor, collected: Collected) -> None:
    """A part file of every block that has none yet."""
    for unfinished in parts.glob("*/.*.tmp"):
        unfinished.unlink(missing_ok=True)
    about = [work.settings(), FORMAT_VERSION, work.tokenizer.vocab_size]
    key = json.dumps(about, sort_keys=True).encode()
    block_bytes = min(max(BLOCK_BYTES, collected.total // _MOST_BLOCKS), _LARGEST_BLOCK)
    in_work: deque[tuple[Path, int, Future | None]] = deque()
    for block, on_disk in read_blocks(work.corpus, work.options.read, block_bytes):
        path = _part_path(parts, key, block)
        done = read_header(path) is not None
        future = None if done else executor.submit(make_part, block, path)
        in_work.append((path, on_disk, future))
        # As many blocks as keep the processes busy, and no more, wait in memory
        while len(in_work) > 2 * executor.workers + 2:
            collected.add(*in_work.popleft())
    while in_work:
        collected.add(*in_work.popleft())


def _make_stores(stores: Path, executor: Executor, collected: Collected) -> None:
    collected.start_writing()
    writing = [
        executor.submit(assemble, stores / split / language, sections)
        for (language, split), sections in collected.largest_first()
    ]
    for future in writing:
        collected.written(result_of(future))


def _part_path(parts: Path, key: bytes, block: Block) -> Path:
    digest = hashlib.blake2b(key, digest_size=16)
    about = asdict(block) | {"path": "", "content": len(block.content)}
    digest.update(json.dumps(about, sort_keys=True).encode())
    digest.update(block.content)
    name = digest.hexdigest()
    return parts / name[:2] / f"{name}.part"
