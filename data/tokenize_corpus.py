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
cache folder named by a hash of everything that the result depends on.
"""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
import unicodedata
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Literal

from data.corpus import (
    BLOCK_BYTES,
    BadDocument,
    Block,
    Document,
    ReadOptions,
    corpus_files,
    parse_block,
    read_blocks,
)
from data.folder_lock import FolderLock, describe_holder
from data.language_families import family_of
from data.token_parts import PartBuilder, PartSection, check_family, read_header
from data.token_store import FORMAT_VERSION, TokenStore, TokenStoreWriter
from data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEMO = Path(__file__).parent / "demo"
DEMO_CORPUS = DEMO / "chromium_ui.jsonl.gz"
DEMO_TOKENIZER = DEMO / "tokenizer.json"

SPLITS = ("train", "validation")
Normalization = Literal["nfc", "none"]

_MANIFEST = "manifest.json"
_MANIFEST_VERSION = 2
# Text that goes to the tokenizer at once: what it returns takes some hundred bytes a token
_BATCH_CHARACTERS = 1 << 17
_MOST_BLOCKS = 1 << 14  # of a large corpus: blocks grow, up to _LARGEST_BLOCK
_LARGEST_BLOCK = 32 << 20
# Files below this are hashed every time; larger ones are known again by size and modification time
_ALWAYS_HASHED_BYTES = 1 << 20
_FORGOTTEN_SECONDS = 7 * 86400.0
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class BadDocumentError(ValueError):
    """More bad documents than allowed."""


class UnusableCorpusError(ValueError):
    """The corpus has not what the arguments ask for; nothing of the work helps another call."""


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


@dataclass
class Progress:
    """Told again and again while stores are made."""

    stage: Literal["tokenizing", "writing"]
    done: int  # of the corpus's bytes on disk while tokenizing, of tokens while writing
    total: int
    resumed: int  # how much of `done` an earlier run had left
    documents: int
    tokens: int


Report = Callable[[Progress], None]


def is_validation(doc_id: str, validation_fraction: float) -> bool:
    """Whether a document is held out: by a hash of its id alone.

    Translations share their doc_id and so fall on the same side: no validation document has been
    seen in another language. Adding documents moves none of the others.
    """
    digest = hashlib.blake2b(doc_id.encode(), digest_size=8, person=b"split").digest()
    return int.from_bytes(digest, "big") < validation_fraction * 2**64


def prepare_stores(
    corpus: Path,
    tokenizer: Tokenizer,
    cache_dir: Path,
    validation_fraction: float,
    languages: Sequence[str] = (),
    options: TokenizeOptions | None = None,
    report: Report | None = None,
) -> Path:
    """The folder of token stores for a corpus; built unless it is there already.

    The folder's name is a hash of the corpus's bytes, the tokenizer, the split and the languages.
    Any number of processes may call this at once: one builds, the others wait for it. What a killed
    builder has left is taken up by the next one for the same folder; what nobody has taken up for a
    week is removed.

    Files of 1 MiB and more are not hashed again while their size and modification time stay the
    same; the cache folder remembers their hash.

    Raises what data.corpus raises, and ValueError where nothing would be left to train on.
    """
    folder = stores_folder(corpus, tokenizer, cache_dir, validation_fraction, languages, options)
    if not is_complete(folder):
        write_stores(
            corpus,
            tokenizer,
            folder,
            validation_fraction,
            languages,
            options=options,
            report=report,
            wait=float("inf"),
        )
    _remove_leftovers(cache_dir, folder)
    return folder


def stores_folder(
    corpus: Path,
    tokenizer: Tokenizer,
    cache_dir: Path,
    validation_fraction: float,
    languages: Sequence[str] = (),
    options: TokenizeOptions | None = None,
) -> Path:
    """Where prepare_stores puts, or has put, the stores."""
    options = options or TokenizeOptions()
    root = corpus if corpus.is_dir() else corpus.parent
    settings = {
        "store_format": FORMAT_VERSION,
        "corpus": [
            [path.relative_to(root).as_posix(), _corpus_sha256(path, cache_dir)]
            for path in corpus_files(corpus)
        ],
        **_settings(tokenizer, validation_fraction, languages, options),
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=10)
    return cache_dir / f"{corpus.name.split('.')[0]}-{digest.hexdigest()}"


def is_complete(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _MANIFEST).read_text("utf-8"))


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
    options = options or TokenizeOptions()
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
                    manifest = _tokenize(
                        corpus, tokenizer, building, validation_fraction, languages, options, report
                    )
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
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)} while token stores were written to {folder.parent}; make "
            f"room and run again, or delete {building}, where finished work is kept; nothing "
            f"incomplete is in {folder}",
        ) from error


def building_folder(folder: Path) -> Path:
    """Where the stores of `folder` are made, and finished work is kept if that fails."""
    return folder.with_name(f".building-{folder.name}")


def open_stores(folder: Path, split: str, languages: Sequence[str] = ()) -> list[TokenStore]:
    """The stores of one split, sorted by language; only those of `languages` if any are named.

    An absent split is an empty list. Raises ValueError if a named language has no training store.
    """
    # also by .idx: a store without its sidecar is an error, not a language less
    files = [*(folder / split).glob("*.json"), *(folder / split).glob("*.idx")]
    stores = [TokenStore(prefix) for prefix in {path.with_suffix("") for path in files}]
    found = {store.language for store in stores}
    missing = sorted(set(languages) - found)
    if missing and split == "train":
        raise ValueError(
            f"data.languages: {folder} has no training store of {', '.join(missing)}; it has "
            f"{', '.join(sorted(found))}"
        )
    return sorted(
        (s for s in stores if not languages or s.language in languages), key=lambda s: s.language
    )


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
            f"{folder / _MANIFEST}: not the manifest of token stores of this version ({error!r}); "
            "delete the folder and tokenize again"
        ) from error
    asked = json.loads(json.dumps(_settings(tokenizer, validation_fraction, languages, options)))
    found = [
        f"{name} is {settings.get(name)!r} there and {value!r} here"
        for name, value in asked.items()
        if settings.get(name) != value
    ]
    now = _file_states(corpus)
    made_at = (folder / _MANIFEST).stat().st_mtime_ns
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


@dataclass(frozen=True)
class _Job:
    """What a process needs to know besides the block."""

    tokenizer: bytes  # pickled: each process reads the file again, which must not have changed
    fingerprint: str
    vocab_size: int
    eod_id: int
    validation_fraction: float
    languages: frozenset[str]
    normalize: Normalization
    read: ReadOptions
    skip_bad: int


def _settings(
    tokenizer: Tokenizer,
    validation_fraction: float,
    languages: Sequence[str],
    options: TokenizeOptions,
) -> dict[str, Any]:
    """Everything but the corpus that the stores' bytes depend on."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "eod_id": tokenizer.eod_id,
        "normalize": options.normalize,
        "validation_fraction": validation_fraction,
        "languages": sorted(languages),
        "read": asdict(options.read),
    }


def _file_states(corpus: Path) -> dict[str, tuple[int, int]]:
    """Sizes and modification times in nanoseconds, by the path within the corpus."""
    root = corpus if corpus.is_dir() else corpus.parent
    states = {path.relative_to(root).as_posix(): path.stat() for path in corpus_files(corpus)}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def _check_free(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(
            f"{folder}: there is something else already, not a finished set of token stores; "
            "choose another name or move it away"
        )


def _publish(finished: Path, manifest: dict[str, Any], folder: Path, lock: FolderLock) -> None:
    with open(finished / _MANIFEST, "w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if not lock.is_ours():
        raise FileExistsError(
            f"{lock.folder}: another process has taken this work over, as if this one had died; "
            "let that one finish it"
        )
    finished.rename(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name
    finally:
        os.close(descriptor)


def _tokenize(
    corpus: Path,
    tokenizer: Tokenizer,
    building: Path,
    validation_fraction: float,
    languages: Sequence[str],
    options: TokenizeOptions,
    report: Report | None,
) -> dict[str, Any]:
    job = _Job(
        tokenizer=pickle.dumps(tokenizer),
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        validation_fraction=validation_fraction,
        languages=frozenset(languages),
        normalize=options.normalize,
        read=options.read,
        skip_bad=options.skip_bad,
    )
    settings = _settings(tokenizer, validation_fraction, languages, options)
    states = _file_states(corpus)
    sizes = {name: size for name, (size, _) in states.items()}
    parts = building / "parts"
    for unfinished in parts.glob("*/.*.tmp"):
        unfinished.unlink(missing_ok=True)
    key = json.dumps([settings, FORMAT_VERSION, tokenizer.vocab_size], sort_keys=True).encode()
    with _Executor(options.workers, job, tokenizer) as executor:
        collected = _Collected(options.skip_bad, sum(sizes.values()), report)
        block_bytes = min(max(BLOCK_BYTES, collected.total // _MOST_BLOCKS), _LARGEST_BLOCK)
        in_work: deque[tuple[Path, int, Future | None]] = deque()
        for block, on_disk in read_blocks(corpus, options.read, block_bytes):
            path = _part_path(parts, key, block)
            done = read_header(path) is not None
            future = None if done else executor.submit(_make_part, block, path)
            in_work.append((path, on_disk, future))
            # As many blocks as keep the processes busy, and no more, wait in memory
            while len(in_work) > 2 * executor.workers + 2:
                collected.add(*in_work.popleft())
        while in_work:
            collected.add(*in_work.popleft())
        changed = [
            name for name, state in _file_states(corpus).items() if state != states.get(name)
        ]
        if changed:
            raise OSError(f"{corpus}: {changed[0]} was changed while it was read; run again")
        collected.check(validation_fraction, languages, corpus)
        collected.start_writing()
        stores = building / "stores"
        writing = [
            executor.submit(_assemble, stores / split / language, sections)
            for (language, split), sections in collected.largest_first()
        ]
        for future in writing:
            collected.written(_result(future))
    return {
        "manifest_version": _MANIFEST_VERSION,
        "corpus": str(corpus),
        "corpus_digest": collected.digest.hexdigest(),
        "files": sorted(sizes.items()),
        "tokenizer": {"path": str(tokenizer.path), "fingerprint": tokenizer.fingerprint},
        "settings": settings,
        "validation_fraction": validation_fraction,
        "languages": sorted({language for language, _ in collected.sections}),
        "bad_documents": {"count": collected.bad, "first": collected.first_bad},
        "splits": {
            split: {
                language: {
                    name: sum(getattr(section, name) for section in sections)
                    for name in ("documents", "tokens", "characters", "utf8_bytes")
                }
                for (language, of), sections in sorted(collected.sections.items())
                if of == split
            }
            for split in SPLITS
        },
    }


def _part_path(parts: Path, key: bytes, block: Block) -> Path:
    digest = hashlib.blake2b(key, digest_size=16)
    about = asdict(block) | {"path": "", "content": len(block.content)}
    digest.update(json.dumps(about, sort_keys=True).encode())
    digest.update(block.content)
    name = digest.hexdigest()
    return parts / name[:2] / f"{name}.part"


class _Collected:
    """What the parts are, in the order of the corpus."""

    def __init__(self, skip_bad: int, total: int, report: Report | None):
        self.sections: dict[tuple[str, str], list[PartSection]] = {}
        self.families: dict[str, str] = {}
        self.present: set[str] = set()
        self.bad = 0
        self.first_bad: list[str] = []
        self.total = total
        self.digest = hashlib.blake2b(digest_size=16)
        self._skip_bad = skip_bad
        self._report = report or (lambda progress: None)
        self._progress = Progress("tokenizing", 0, total, 0, 0, 0)

    def add(self, path: Path, on_disk: int, future: Future | None) -> None:
        """Waits for a part. Raises what went wrong with it."""
        bad = [] if future is None else _result(future)
        header = read_header(path)
        if header is None and not bad:
            raise OSError(f"{path}: this piece of the work has vanished; run the command again")
        for what in bad if header is None else header.bad:
            self.bad += 1
            if self.bad > self._skip_bad:
                raise BadDocumentError(self._too_many(what))
            if len(self.first_bad) < 100:
                self.first_bad.append(what)
        assert header is not None
        self.digest.update(path.stem.encode())
        self.present.update(header.present)
        progress = self._progress
        progress.done += on_disk
        progress.resumed += on_disk if future is None else 0
        for section in header.sections:
            before = self.families.setdefault(section.language, section.family)
            check_family(section.language, before, section.family, section.example)
            self.sections.setdefault((section.language, section.split), []).append(section)
            progress.documents += section.documents
            progress.tokens += section.tokens + section.documents
        self._report(progress)

    def largest_first(self) -> list[tuple[tuple[str, str], list[PartSection]]]:
        """The order that keeps all processes busy to the end."""
        return sorted(
            self.sections.items(), key=lambda item: (-sum(s.tokens for s in item[1]), item[0])
        )

    def start_writing(self) -> None:
        self._progress = Progress(
            "writing", 0, self._progress.tokens, 0, self._progress.documents, self._progress.tokens
        )
        self._report(self._progress)

    def written(self, tokens: int) -> None:
        self._progress.done += tokens
        self._report(self._progress)

    def _too_many(self, what: str) -> str:
        if not self._skip_bad:
            return f"{what}. Mend it, or leave out up to N bad documents with --skip-bad N"
        return (
            f"{what}. That is bad document number {self.bad}, and --skip-bad {self._skip_bad} "
            "allows no more"
        )

    def check(self, validation_fraction: float, languages: Sequence[str], corpus: Path) -> None:
        missing = sorted(set(languages) - self.present)
        if missing:
            raise UnusableCorpusError(
                f"data.languages: {', '.join(missing)} is not in data.corpus={corpus}, which has "
                f"{', '.join(sorted(self.present))}"
            )
        documents = self._progress.documents
        if not documents:
            raise UnusableCorpusError(f"data.corpus={corpus}: there is no document with text in it")
        of_split = {
            s: {language for language, split in self.sections if split == s} for s in SPLITS
        }
        for split in SPLITS:
            if not of_split[split]:
                raise UnusableCorpusError(
                    f"data.validation_fraction={validation_fraction} leaves none of the "
                    f"{documents} documents of {corpus} for {split}; "
                    + ("raise it" if split == "validation" else "lower it")
                    + ", or give more documents"
                )
        for split, other in (SPLITS, SPLITS[::-1]):
            lacking = sorted(of_split[other] - of_split[split])
            if lacking:
                logger.warning("%s: no %s document of %s", corpus, split, ", ".join(lacking))
        if self.bad:
            logger.warning("%s: %d bad documents were left out", corpus, self.bad)


class _Executor:
    """Runs _make_part and _assemble: in processes, or right away where there are none."""

    def __init__(self, workers: int, job: _Job, tokenizer: Tokenizer):
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            # Not by fork: our caller may have threads. It costs half a second a process.
            self._pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), _start_worker, (job,)
            )
        else:
            _held.update(job=job, tokenizer=tokenizer)

    def submit(self, function: Callable, *arguments: Any) -> Future:
        if self._pool:
            try:
                return self._pool.submit(function, *arguments)
            except BrokenProcessPool as error:
                raise _killed() from error
        future: Future = Future()
        future.set_result(function(*arguments))
        return future

    def __enter__(self) -> "_Executor":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            # parts in work are finished and kept; what only waits is dropped
            self._pool.shutdown(wait=True, cancel_futures=True)
        else:
            _held.clear()


def _result(future: Future) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _killed() from error


def _killed() -> ChildProcessError:
    return ChildProcessError(
        "a tokenizing process was killed, perhaps because memory ran out; run the same command "
        "again, which takes up where this one stopped, perhaps with fewer --workers"
    )


# In each process that tokenizes: the job, and the tokenizer once it is needed
_held: dict[str, Any] = {}


def _start_worker(job: _Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells us when to stop
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _held["job"] = job


def _end_with(parent: int) -> None:
    """A killed parent tells nobody; its pipe closes."""
    wait_for([parent])
    os._exit(1)


def _make_part(block: Block, path: Path) -> list[str]:
    """Tokenizes a block into a part file. Returns what is wrong if no file could be made of it."""
    job = _held["job"]
    if "tokenizer" not in _held:
        _held["tokenizer"] = pickle.loads(job.tokenizer)
    tokenizer = _held["tokenizer"]
    part = PartBuilder(job.vocab_size)
    batch: list[tuple[Document, str]] = []
    characters = 0
    for document in parse_block(block, job.read):
        if isinstance(document, BadDocument):
            part.bad.append(str(document))
            if len(part.bad) > job.skip_bad:
                return part.bad
            continue
        part.present.add(document.language)
        if job.languages and document.language not in job.languages:
            continue
        text = document.text
        if job.normalize == "nfc" and not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
        batch.append((document, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            _add_batch(part, batch, job, tokenizer)
            batch, characters = [], 0
    _add_batch(part, batch, job, tokenizer)
    part.write(path)
    return []


def _add_batch(
    part: PartBuilder, batch: list[tuple[Document, str]], job: _Job, tokenizer: Tokenizer
) -> None:
    encoded = tokenizer.encode_batch([text for _, text in batch])
    for (document, text), ids in zip(batch, encoded, strict=True):
        part.add(
            ids,
            language=document.language,
            split=SPLITS[is_validation(document.doc_id, job.validation_fraction)],
            family=document.family or family_of(document.language),
            doc_id=document.doc_id,
            source=document.source,
            license=document.license,
            characters=len(text),
            utf8_bytes=len(text.encode()),
        )


def _assemble(prefix: Path, sections: list[PartSection]) -> int:
    """Writes one store out of its sections; returns its tokens."""
    job = _held["job"]
    with TokenStoreWriter(
        prefix,
        language=sections[0].language,
        family=sections[0].family,
        tokenizer_fingerprint=job.fingerprint,
        vocab_size=job.vocab_size,
        eod_id=job.eod_id,
    ) as writer:
        for section in sections:
            for document in section.read():
                writer.add_document(
                    document.ids,
                    doc_id=document.doc_id,
                    source=document.source,
                    license=document.license,
                    characters=document.characters,
                    utf8_bytes=document.utf8_bytes,
                )
        return writer.tokens


def _remove_leftovers(cache_dir: Path, folder: Path) -> None:
    """Half-built folders in the cache that nobody will take up.

    That is the one of a finished folder (its builder was killed on the last step), and those that
    were left alone for a week.
    """
    for building in cache_dir.glob(".building-*"):
        try:
            idle = time.time() - max(p.stat().st_mtime for p in [building, *building.glob("*")])
        except OSError:
            continue  # it is being removed at this moment
        target = building.name.removeprefix(".building-")
        done = is_complete(cache_dir / target)
        if describe_holder(building) or not (done or idle > _FORGOTTEN_SECONDS):
            continue
        shutil.rmtree(building, ignore_errors=True)


def _corpus_sha256(path: Path, cache_dir: Path) -> str:
    """The file's hash; of a large file the one remembered for its size and modification time."""
    status = path.stat()
    if status.st_size < _ALWAYS_HASHED_BYTES:
        return _sha256(path)
    name = hashlib.blake2b(str(path.resolve()).encode(), digest_size=10).hexdigest()
    memory = cache_dir / "corpus_hashes" / f"{name}.json"
    state = {"path": str(path.resolve()), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    try:
        remembered = json.loads(memory.read_text())
        if remembered["state"] == state:
            return remembered["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing usable is remembered
    sha256 = _sha256(path)
    memory.parent.mkdir(parents=True, exist_ok=True)
    temporary = memory.with_name(f".{memory.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    temporary.write_text(json.dumps({"state": state, "sha256": sha256}))
    temporary.replace(memory)
    return sha256


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
