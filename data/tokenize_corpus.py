"""From a corpus to token stores: one per language and split.

    python -m data.tokenize_corpus --corpus FILE_OR_FOLDER --tokenizer tokenizer.json --out FOLDER

    FOLDER/train/LANGUAGE.{bin,idx,json}
    FOLDER/validation/LANGUAGE.{bin,idx,json}
    FOLDER/manifest.json                      what it was made from, written last

Training from a corpus does the same by itself, into a cache folder named by a hash of everything
the result depends on.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from data.corpus import Document, corpus_files, read_documents
from data.language_families import family_of
from data.token_store import FORMAT_VERSION, TokenStore, TokenStoreWriter
from data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

DEMO = Path(__file__).parent / "demo"
DEMO_CORPUS = DEMO / "chromium_ui.jsonl.gz"
DEMO_TOKENIZER = DEMO / "tokenizer.json"

SPLITS = ("train", "validation")
_MANIFEST = "manifest.json"
_DOCUMENTS_AT_ONCE = 256
# Files below this are hashed every time; larger ones are known again by size and modification time
_ALWAYS_HASHED_BYTES = 1 << 20


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
) -> Path:
    """The folder of token stores for a corpus; built unless it is there already.

    The folder's name is a hash of the corpus's bytes, the tokenizer, the split and the languages.
    Any number of processes may call this at once: each that finds nothing builds in a folder of its
    own and renames it into place, and those that come second throw theirs away. To build only once,
    let one rank call it first. A killed builder leaves a folder `.building-*` behind.

    Files of 1 MiB and more are not hashed again while their size and modification time stay the
    same; the cache folder remembers their hash.

    Raises what data.corpus raises, and ValueError where nothing would be left to train on.
    """
    folder = stores_folder(corpus, tokenizer, cache_dir, validation_fraction, languages)
    if not is_complete(folder):
        write_stores(corpus, tokenizer, folder, validation_fraction, languages)
    return folder


def stores_folder(
    corpus: Path,
    tokenizer: Tokenizer,
    cache_dir: Path,
    validation_fraction: float,
    languages: Sequence[str] = (),
) -> Path:
    """Where prepare_stores puts, or has put, the stores."""
    settings = {
        "store_format": FORMAT_VERSION,
        "corpus": [_corpus_sha256(path, cache_dir) for path in corpus_files(corpus)],
        "tokenizer": tokenizer.fingerprint,
        "eod_id": tokenizer.eod_id,
        "validation_fraction": validation_fraction,
        "languages": sorted(languages),
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=10)
    return cache_dir / f"{corpus.name.split('.')[0]}-{digest.hexdigest()}"


def is_complete(folder: Path) -> bool:
    return (folder / _MANIFEST).is_file()


def write_stores(
    corpus: Path,
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float,
    languages: Sequence[str] = (),
) -> None:
    """Tokenizes the corpus into `folder`, which appears only when it is whole.

    If another process finishes the same folder first, its result stands.
    """
    building = folder.with_name(f".building-{folder.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"cannot write token stores to {folder.parent} ({error}); set data.cache_dir to a "
            "folder you may write to"
        ) from error
    try:
        manifest = _tokenize(corpus, tokenizer, building, validation_fraction, languages)
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        try:
            building.rename(folder)
        except OSError:
            # Renaming onto a folder that is not empty fails: someone else was first.
            if not is_complete(folder):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


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


def _tokenize(
    corpus: Path,
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float,
    languages: Sequence[str],
) -> dict[str, Any]:
    wanted, empty = set(languages), 0
    present: set[str] = set()
    families: dict[str, str] = {}
    writers: dict[tuple[str, str], TokenStoreWriter] = {}
    with ExitStack() as stack:
        for batch in _batches(read_documents(corpus), _DOCUMENTS_AT_ONCE):
            present.update(document.language for document in batch)
            batch = [d for d in batch if not wanted or d.language in wanted]
            empty += sum(not document.text for document in batch)
            batch = [document for document in batch if document.text]
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                family = _family(document, families)
                split = SPLITS[is_validation(document.doc_id, validation_fraction)]
                if (document.language, split) not in writers:
                    writers[document.language, split] = stack.enter_context(
                        TokenStoreWriter(
                            folder / split / document.language,
                            language=document.language,
                            family=family,
                            tokenizer_fingerprint=tokenizer.fingerprint,
                            vocab_size=tokenizer.vocab_size,
                            eod_id=tokenizer.eod_id,
                            source=document.source,
                            license=document.license,
                        )
                    )
                writers[document.language, split].add_document(ids)
        missing = sorted(wanted - present)
        if missing:
            raise ValueError(
                f"data.languages: {', '.join(missing)} is not in data.corpus={corpus}, which has "
                f"{', '.join(sorted(present))}"
            )
        _check_splits(writers, validation_fraction, corpus)
    if empty:
        logger.warning("%s: %d documents without any text were left out", corpus, empty)
    return {
        "corpus": str(corpus),
        "tokenizer": {"path": tokenizer.path, "fingerprint": tokenizer.fingerprint},
        "validation_fraction": validation_fraction,
        "languages": sorted({language for language, _ in writers}),
        "documents_without_text": empty,
    }


def _family(document: Document, families: dict[str, str]) -> str:
    """The record's family, else the table's; ValueError if the language has had another one."""
    family = document.family or family_of(document.language)
    before = families.setdefault(document.language, family)
    if before != family:
        raise ValueError(
            f"the corpus puts language {document.language!r} into two families, {before!r} and "
            f"{family!r} (document {document.doc_id!r}); give all its records the same one"
        )
    return family


def _check_splits(
    writers: dict[tuple[str, str], TokenStoreWriter], validation_fraction: float, corpus: Path
) -> None:
    documents = sum(writer.documents for writer in writers.values())
    if not documents:
        raise ValueError(f"data.corpus={corpus}: there is no document with text in it")
    of_split = {s: {language for language, split in writers if split == s} for s in SPLITS}
    for split in SPLITS:
        if not of_split[split]:
            raise ValueError(
                f"data.validation_fraction={validation_fraction} leaves none of the {documents} "
                f"documents of {corpus} for {split}; "
                + ("raise it" if split == "validation" else "lower it")
                + ", or give more documents"
            )
    for split, other in SPLITS, SPLITS[::-1]:
        lacking = sorted(of_split[other] - of_split[split])
        if lacking:
            logger.warning(
                "%s: no %s document of %s (data.validation_fraction=%s)",
                corpus,
                split,
                ", ".join(lacking),
                validation_fraction,
            )


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, size)):
        yield batch


def _corpus_sha256(path: Path, cache_dir: Path) -> str:
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.tokenize_corpus", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--corpus", type=Path, default=DEMO_CORPUS, help="default: the demo text")
    parser.add_argument("--tokenizer", type=Path, default=DEMO_TOKENIZER, help="a tokenizer.json")
    parser.add_argument("--eod-token", default="", help="the token that ends a document")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--validation-fraction", type=float, default=0.05)
    parser.add_argument("--languages", default="", help="codes with commas; default: all")
    given = parser.parse_args(arguments)
    if given.out.exists():
        parser.error(f"--out {given.out} exists already")
    if not 0 < given.validation_fraction < 1:
        parser.error("--validation-fraction must lie between 0 and 1, both excluded")
    languages = [code for code in given.languages.split(",") if code]
    try:
        tokenizer = load_tokenizer(given.tokenizer, given.eod_token)
        write_stores(given.corpus, tokenizer, given.out, given.validation_fraction, languages)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{'split':<12}{'family':<16}{'language':<10}{'documents':>12}{'tokens':>15}")
    for split in SPLITS:
        for store in open_stores(given.out, split):
            print(
                f"{split:<12}{store.family:<16}{store.language:<10}{store.documents:>12,}"
                f"{store.tokens:>15,}"
            )


if __name__ == "__main__":
    main()
