"""From settings to the stream of training samples, without torch: for the run and for its tools.

    settings -> token stores (built from the corpus where they are missing) -> grouping of their
    languages into families -> LanguageMixture

`data.open_data` adds the loaders that a training run needs.
"""

import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.config import DataConfig, Verify
from data.family_grouping import load_grouping
from data.language_mixture import LanguageMixture
from data.store_cache import prepare_stores, stores_folder
from data.store_folder import is_complete, open_stores, read_manifest
from data.token_store import TokenStore
from data.tokenize_corpus import DEMO_CORPUS, DEMO_TOKENIZER
from data.tokenizer import Tokenizer, load_tokenizer
from data.verify import verify_stores

logger = logging.getLogger(__name__)


@dataclass
class OpenedMixture:
    """The stream and what belongs to it."""

    config: DataConfig
    mixture: LanguageMixture
    validation_stores: list[TokenStore]
    folder: Path  # of the token stores

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded when it is first asked for: a large one takes a third of a second."""
        return open_tokenizer(self.config)


def prepare(config: DataConfig) -> Path:
    """Builds the token stores unless they exist, checks them, and returns their folder.

    Call it on one rank per file system and let the others wait; calling it everywhere is safe and
    only wastes work. With data.store_dir there is nothing to build.

    Raises ValueError for damaged stores, as far as data.verify looks (see there).
    """
    if config.store_dir:
        folder = _store_dir(config)
    else:
        folder = prepare_stores(*_what_to_build(config, open_tokenizer(config)))
    if config.verify is not Verify.none:
        problems = verify_stores(folder, full=config.verify is Verify.full)
        if problems:
            raise ValueError(
                f"data.verify={config.verify.value}: {folder} is damaged:\n  "
                + "\n  ".join(str(problem) for problem in problems)
            )
    return folder


def open_mixture(
    config: DataConfig, seq_length: int, *, check_tokenizer: bool = True
) -> OpenedMixture:
    """Opens what `prepare` built. seq_length: data.seq_length, or the model's if that is not set.

    check_tokenizer: compare it with the stores; without, it need not be there to look at them.

    Raises FileNotFoundError if the stores are not there, ValueError if they belong to another
    tokenizer, lack a language of data.languages, or do not fit data.mixture or data.families.
    """
    tokenizer = None
    if config.store_dir:
        folder = _store_dir(config)
    else:
        tokenizer = open_tokenizer(config)  # part of what the folder is named by
        folder = stores_folder(*_what_to_build(config, tokenizer))
        if not is_complete(folder):
            raise FileNotFoundError(
                f"{folder}: the token stores have not been built; data.open_mixture.prepare builds "
                "them, on a file system that every rank sees (data.cache_dir)"
            )
    train = open_stores(folder, "train", config.languages)
    grouping = load_grouping(config.families, {s.language: s.family for s in train})
    families = grouping.families_of([store.language for store in train])
    train = [store for store in train if store.language in families]
    validation = open_stores(folder, "validation", list(families))
    lacking = sorted({s.language for s in train} - {s.language for s in validation})
    if lacking:
        logger.warning("no validation store of %s in %s", ", ".join(lacking), folder)
    mixture = LanguageMixture(
        train,
        seq_length,
        config.mixture,
        config.seed,
        config.packing,
        families,
        plan_folder=cache_dir_of(config) / "packing_plans",
    )
    opened = OpenedMixture(config, mixture, validation, folder)
    if tokenizer is not None:
        opened.tokenizer = tokenizer  # not to be loaded again
    if check_tokenizer:
        tokenizer = opened.tokenizer
        for store in [*train, *validation]:
            store.check_tokenizer(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.path)
    return opened


def built_stores(config: DataConfig, tokenizer: Tokenizer) -> Path | None:
    """The folder of token stores that `prepare` made of data.corpus; None where it has not yet."""
    folder = stores_folder(*_what_to_build(config, tokenizer))
    return folder if is_complete(folder) else None


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """data.tokenizer; if that is empty the one data.store_dir was made with, or the demo's."""
    path = config.tokenizer
    if config.store_dir and not path:
        path = tokenizer_of(Path(config.store_dir).expanduser())
    return load_tokenizer(Path(path).expanduser() if path else DEMO_TOKENIZER, config.eod_token)


def tokenizer_of(folder: Path) -> str:
    """The path of the tokenizer that a folder of token stores was made with; empty if not known.

    A relative path counts from here, and if there is nothing from the folder.
    """
    try:
        path = Path(read_manifest(folder)["tokenizer"]["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return next((str(p) for p in (path, folder / path) if p.is_file()), "")


def _what_to_build(
    config: DataConfig, tokenizer: Tokenizer
) -> tuple[Path, Tokenizer, Path, float, list[str]]:
    corpus = Path(config.corpus).expanduser() if config.corpus else DEMO_CORPUS
    return corpus, tokenizer, cache_dir_of(config), config.validation_fraction, config.languages


def cache_dir_of(config: DataConfig) -> Path:
    """data.cache_dir; if that is empty a folder of the user's cache. Raises RuntimeError for the
    home of nobody."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "magnetron" / "token_stores"


def _store_dir(config: DataConfig) -> Path:
    folder = Path(config.store_dir).expanduser()
    if not (folder / "train").is_dir():
        raise FileNotFoundError(
            f"data.store_dir={config.store_dir}: no folder with a train/ folder of token stores in "
            "it; python -m data.tokenize makes one"
        )
    return folder
