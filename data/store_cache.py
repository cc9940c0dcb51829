"""Token stores of a corpus in a cache folder, by a hash of everything that they depend on."""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from data.corpus import corpus_files
from data.folder_lock import describe_holder
from data.store_folder import is_complete
from data.store_format import FORMAT_VERSION
from data.tokenize_corpus import TokenizeOptions, Work, write_stores
from data.tokenize_progress import Report
from data.tokenizer import Tokenizer

# Files below this are hashed every time; larger ones are known again by size and modification time
_ALWAYS_HASHED_BYTES = 1 << 20
_FORGOTTEN_SECONDS = 7 * 86400.0


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
    work = Work(corpus, tokenizer, validation_fraction, languages, options or TokenizeOptions())
    root = corpus if corpus.is_dir() else corpus.parent
    settings = {
        "store_format": FORMAT_VERSION,
        "corpus": [
            [path.relative_to(root).as_posix(), _corpus_sha256(path, cache_dir)]
            for path in corpus_files(corpus)
        ],
        **work.settings(),
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=10)
    return cache_dir / f"{corpus.name.split('.')[0]}-{digest.hexdigest()}"


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
