"""What each tokenizing process does: blocks of a corpus to part files, parts to token stores."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Literal

from data.documents import BadDocument, Block, Document, ReadOptions
from data.language_families import family_of
from data.parse_documents import parse_block
from data.store_folder import SPLITS
from data.store_writer import TokenStoreWriter
from data.token_parts import PartBuilder, PartSection
from data.tokenizer import Tokenizer

Normalization = Literal["nfc", "none"]

# Text that goes to the tokenizer at once: what it returns takes some hundred bytes a token
_BATCH_CHARACTERS = 1 << 17


@dataclass(frozen=True)
class Job:
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


def is_validation(doc_id: str, validation_fraction: float) -> bool:
    """Whether a document is held out: by a hash of its id alone.

    Translations share their doc_id and so fall on the same side: no validation document has been
    seen in another language. Adding documents moves none of the others.
    """
    digest = hashlib.blake2b(doc_id.encode(), digest_size=8, person=b"split").digest()
    return int.from_bytes(digest, "big") < validation_fraction * 2**64


class Executor:
    """Runs make_part and assemble: in processes, or right away where there are none."""

    def __init__(self, workers: int, job: Job, tokenizer: Tokenizer):
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

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            # parts in work are finished and kept; what only waits is dropped
            self._pool.shutdown(wait=True, cancel_futures=True)
        else:
            _held.clear()


def result_of(future: Future) -> Any:
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


def _start_worker(job: Job) -> None:
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


def make_part(block: Block, path: Path) -> list[str]:
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
    part: PartBuilder, batch: list[tuple[Document, str]], job: Job, tokenizer: Tokenizer
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


def assemble(prefix: Path, sections: list[PartSection]) -> int:
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
