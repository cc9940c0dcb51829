"""Is the text there, whole and of the right tokenizer? Looks, and builds nothing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, Verify
from data.corpus import read_blocks
from data.documents import BadDocument, ReadOptions
from data.open_mixture import built_stores, cache_dir_of, open_mixture, open_tokenizer
from data.packing_config import PackingConfig
from data.parse_documents import parse_block
from data.store_format import dtype_for
from data.token_store import TokenStore
from data.tokenize_corpus import DEMO_CORPUS
from data.tokenizer import Tokenizer
from data.verify import verify_stores
from launch.check_languages import chosen, not_of_the_table, of_shipped_text
from launch.check_mixture import TOPIC, check_mixture
from launch.check_paths import not_writable, path_of
from launch.check_presence import find_corpus, stores_are_there
from launch.findings import Findings, many
from pretrain.config import PretrainConfig
from pretrain.run_identity import vocabulary_of

# Of a corpus that is not tokenized yet: up to so many bytes are hashed to find its stores, and of
# so many files the first documents are read.
_HASHED_BYTES = 64 << 20
_FILES_LOOKED_INTO = 20
_LOOKED_AT_BYTES = 1 << 16
_IDS_LOOKED_AT = 1 << 16


@dataclass
class DataFacts:
    """What other checks need to know of the data; None: not known."""

    vocab_size: int | None = None  # the model's, before padding
    fingerprint: dict[str, Any] | None = None  # of the stream of samples


def check_data(config: PretrainConfig, facts: DataFacts, findings: Findings) -> None:
    """Looks at tokenizer, token stores or corpus, mixture, and supply for the steps planned; fills
    in `facts`."""
    facts.vocab_size = config.model.vocab_size
    setting = "store_dir" if config.data.store_dir else "corpus"
    with path_of(f"data.{setting}", getattr(config.data, setting), findings):
        _check_text(config, facts, findings)


def _check_text(config: PretrainConfig, facts: DataFacts, findings: Findings) -> None:
    store_dir = Path(config.data.store_dir).expanduser() if config.data.store_dir else None
    if store_dir is not None and not stores_are_there(config.data, findings):
        return
    if store_dir is not None and config.data.corpus:
        unread = f"data.corpus={config.data.corpus} is not read, because data.store_dir="
        unread += f"{config.data.store_dir} is there; leave one of them out"
        findings.warnings(TOPIC, [unread])
    tokenizer = _tokenizer(config.data, findings)
    if tokenizer is not None:
        try:
            facts.vocab_size = vocabulary_of(config.model, tokenizer.vocab_size, tokenizer.path)
        except ValueError as error:
            findings.errors(TOPIC, [str(error)])
        findings.warnings(TOPIC, _unused_rows(config, tokenizer))
    if store_dir is not None:
        found: Path | None = store_dir
    else:
        found = _stores_of_corpus(config.data, tokenizer, findings)
    if found is not None and _whole(found, config.data, findings):
        _open(config, found, tokenizer, facts, findings)


def _tokenizer(config: DataConfig, findings: Findings) -> Tokenizer | None:
    try:
        return open_tokenizer(config)
    except RuntimeError as error:  # ~NAME of nobody
        findings.errors(TOPIC, [f"data.tokenizer={config.tokenizer}: {error}; give another path"])
        return None
    except (OSError, ValueError, ModuleNotFoundError) as error:
        findings.errors(TOPIC, [str(error)])
        return None


def _unused_rows(config: PretrainConfig, tokenizer: Tokenizer) -> list[str]:
    wanted, needed = config.model.vocab_size, tokenizer.vocab_size
    multiple = config.model.make_vocab_size_divisible_by
    if wanted is None or wanted <= 1.1 * needed + multiple:
        return []
    return [
        f"model.vocab_size={wanted} has {wanted - needed:,} rows more than the tokenizer's "
        f"vocabulary of {needed} ({tokenizer.path}): no text trains them; leave it out, or use "
        f"model.vocab_size={needed}"
    ]


# ---- a corpus, tokenized already or not


def _stores_of_corpus(
    config: DataConfig, tokenizer: Tokenizer | None, findings: Findings
) -> Path | None:
    """The folder of its token stores, where they have been made."""
    corpus = Path(config.corpus).expanduser() if config.corpus else DEMO_CORPUS
    files = find_corpus(corpus, findings)
    if not files:
        return None
    size = sum(path.stat().st_size for path in files)
    cache, unwritable = _cache(config, findings)
    if cache and tokenizer is not None and size <= _HASHED_BYTES:
        folder = built_stores(config, tokenizer)
        if folder is not None:
            return folder
    findings.errors(TOPIC, unwritable)
    if not config.corpus:
        with _warnings_of_data() as said:
            findings.errors(TOPIC, of_shipped_text(config))
        findings.warnings(TOPIC, said)
        text = "the text that ships is tokenized when the run starts: epochs are not counted here"
        findings.notes(TOPIC, [text])
        return None
    try:
        findings.warnings(TOPIC, not_of_the_table(config))
    except (OSError, ValueError) as error:  # of data.families
        findings.errors(TOPIC, [str(error)])
    tell = findings.warnings if chosen(config) else findings.notes
    tell(
        TOPIC,
        [
            f"data.corpus={config.corpus}: {many(len(files), 'file')} of {size / 1e6:,.1f} MB; "
            "tokenized when the run starts, if that has not been done: whether the languages and "
            "families of the settings are in it, and enough of them, is not checked here. "
            "python -m data.tokenize does it beforehand"
        ],
    )
    bad = _bad_documents(files[:_FILES_LOOKED_INTO])
    findings.errors(TOPIC, [f"data.corpus={config.corpus}: {text}" for text in bad])
    return None


def _cache(config: DataConfig, findings: Findings) -> tuple[bool, list[str]]:
    """Whether the folder that stores are built in is there, and why nothing can be written there;
    what a start finds there it reads, and needs not write."""
    with path_of("data.cache_dir", config.cache_dir, findings):
        folder = cache_dir_of(config)
        return folder.is_dir(), not_writable("data.cache_dir", folder)
    return False, []


def _bad_documents(files: list[Path]) -> list[str]:
    """The first thing that is wrong with the beginning of each file; the same of several, once."""
    alike: dict[str, list[str]] = {}
    for path in files:
        for text in _bad_beginning(path):
            alike.setdefault(text.replace(str(path), ""), []).append(text)
    return [
        texts[0] + f"; and so {many(len(texts) - 1, 'other file')}" * (len(texts) > 1)
        for texts in alike.values()
    ]


def _bad_beginning(path: Path) -> Iterator[str]:
    try:
        block, _ = next(read_blocks(path, ReadOptions(), _LOOKED_AT_BYTES), (None, 0))
        documents = parse_block(block, ReadOptions()) if block is not None else iter(())
        bad = next((one for one in documents if isinstance(one, BadDocument)), None)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        yield str(error)
        return
    if block is None:
        yield f"{path}: holds no document; remove it, or write the text again"
    elif bad is not None:
        yield f"{bad}; mend or remove the document"


# ---- token stores


def _whole(folder: Path, config: DataConfig, findings: Findings) -> bool:
    """Whether the stores are what was written there, as far as a run looks before it starts."""
    try:
        problems = verify_stores(folder, full=False)
    except OSError as error:
        findings.errors(TOPIC, [str(error)])
        return False
    findings.errors(
        TOPIC,
        [
            f"{problem}; put the store back from a copy, or tokenize again (python -m data.verify "
            f"{folder} reads all of it)"
            for problem in problems
        ],
    )
    if config.verify is Verify.none:
        findings.warnings(
            TOPIC,
            ["data.verify=none: a run would train on damaged stores; use quick, which is free"],
        )
    return not problems


def _open(
    config: PretrainConfig,
    folder: Path,
    tokenizer: Tokenizer | None,
    facts: DataFacts,
    findings: Findings,
) -> None:
    try:
        replace(config.data.mixture)  # keeps its rules
    except ValueError:  # told with the settings; what a mixture says of these values would be again
        return
    data = replace(config.data, verify=Verify.none, store_dir=str(folder))
    if data.packing.needs_plan:  # computing one takes minutes, and writes it
        cache, unwritable = _cache(config.data, findings)
        if not (cache and (cache_dir_of(config.data) / "packing_plans").is_dir()):
            findings.errors(TOPIC, unwritable)
        data = replace(data, packing=PackingConfig())
        findings.notes(
            TOPIC,
            [
                f"data.packing.mode={config.data.packing.mode.value}: epochs are counted here as "
                "with concatenate, and the order of samples is not compared with a checkpoint's"
            ],
        )
    with _warnings_of_data() as said:
        try:
            opened = open_mixture(data, config.seq_length, check_tokenizer=False)
        except (OSError, ValueError) as error:
            findings.errors(TOPIC, str(error).splitlines())
            return
    findings.warnings(TOPIC, said)
    mixture = opened.mixture
    if data.packing is config.data.packing:
        facts.fingerprint = mixture.fingerprint()
    if not opened.validation_stores:
        findings.errors(
            TOPIC,
            [
                f"{opened.folder} has no validation stores; raise data.validation_fraction="
                f"{data.validation_fraction:g} so that some documents fall into validation, or "
                "give a data.store_dir with a validation folder"
            ],
        )
    for store in [*mixture.stores, *opened.validation_stores]:
        findings.errors(TOPIC, _wrong_ids(store))
        if tokenizer is not None:
            findings.errors(TOPIC, _other_tokenizer(store, tokenizer, data))
    check_mixture(config, mixture, facts.vocab_size, findings)


def _wrong_ids(store: TokenStore) -> list[str]:
    """Ids that the store's type or vocabulary does not hold; looks at both ends of it."""
    info, found = store.info, []
    if store.dtype.itemsize < np.dtype(dtype_for(info.vocab_size)).itemsize:
        found.append(
            f"{store.prefix}: ids are stored as {info.dtype}, which ends at 65,535, and the "
            f"vocabulary has {info.vocab_size}; tokenize again"
        )
    ends = (0, max(0, store.tokens - _IDS_LOOKED_AT))
    highest = max(
        int(store.read(start, min(start + _IDS_LOOKED_AT, store.tokens)).max()) for start in ends
    )
    if highest >= info.vocab_size:
        found.append(
            f"{store.prefix}: holds the id {highest}, outside the vocabulary of {info.vocab_size}; "
            "it was written with another tokenizer: tokenize again"
        )
    return found


def _other_tokenizer(store: TokenStore, tokenizer: Tokenizer, config: DataConfig) -> list[str]:
    try:
        store.check_tokenizer(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.path)
    except ValueError as error:
        return [str(error)]
    if store.info.eod_id != tokenizer.eod_id:
        return [
            f"{store.prefix}: documents end in id {store.info.eod_id}, and data.eod_token="
            f"{config.eod_token} is id {tokenizer.eod_id}; leave data.eod_token out, or tokenize "
            "again with it"
        ]
    return []


@contextmanager
def _warnings_of_data() -> Iterator[list[str]]:
    """What the data room logs as warnings meanwhile, instead of having it printed."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("data")
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
