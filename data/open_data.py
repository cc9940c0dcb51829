"""The data room's front door: settings in, loaders out.

prepare(config.data)                    # on one rank, the others wait; builds what is missing
data = open_data(config.data, seq_length)         # on every rank
loader = data.train_loader(...)         # loader.micro_batches(consumed_sequences)
validation = data.validation_set(...)   # validation.micro_batches()
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from data.language_mixture import LanguageMixture
from data.loader import MicroBatchLoader, ValidationSet
from data.token_store import TokenStore
from data.tokenize_corpus import (
    DEMO_CORPUS,
    DEMO_TOKENIZER,
    is_complete,
    open_stores,
    prepare_stores,
    stores_folder,
)
from data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Opened data. `mixture` is the training stream."""

    tokenizer: Tokenizer
    mixture: LanguageMixture
    validation_stores: list[TokenStore]
    folder: Path  # of the token stores

    @property
    def languages(self) -> list[str]:
        """Sorted codes; a batch's language ids are places in this list."""
        return self.mixture.languages

    @property
    def families(self) -> list[str]:
        return self.mixture.families

    @property
    def family_of(self) -> dict[str, str]:
        """Language code -> family."""
        return self.mixture.family_of

    def train_loader(
        self,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> MicroBatchLoader:
        return MicroBatchLoader(
            self.mixture,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
        )

    def validation_set(
        self,
        *,
        sequences_per_language: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        micro_batch_multiple: int = 1,
    ) -> ValidationSet:
        return ValidationSet(
            self.validation_stores,
            self.mixture.seq_length,
            languages=self.languages,
            sequences_per_language=sequences_per_language,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            micro_batch_multiple=micro_batch_multiple,
        )


def prepare(config: DataConfig) -> Path:
    """Builds the token stores unless they exist, and returns their folder.

    Call it on one rank per file system and let the others wait; calling it everywhere is safe and
    only wastes work. With data.store_dir there is nothing to build.
    """
    if config.store_dir:
        return _store_dir(config)
    return prepare_stores(
        _corpus(config),
        open_tokenizer(config),
        _cache_dir(config),
        config.validation_fraction,
        config.languages,
    )


def open_data(config: DataConfig, seq_length: int) -> Data:
    """Opens what `prepare` built. seq_length: data.seq_length, or the model's if that is not set.

    Raises FileNotFoundError if the stores are not there, ValueError if they belong to another
    tokenizer, lack a language of data.languages, or do not fit data.mixture.
    """
    tokenizer = open_tokenizer(config)
    if config.store_dir:
        folder = _store_dir(config)
    else:
        folder = stores_folder(
            _corpus(config),
            tokenizer,
            _cache_dir(config),
            config.validation_fraction,
            config.languages,
        )
        if not is_complete(folder):
            raise FileNotFoundError(
                f"{folder}: the token stores have not been built; data.open_data.prepare builds "
                "them, on a file system that every rank sees (data.cache_dir)"
            )
    train = open_stores(folder, "train", config.languages)
    validation = open_stores(folder, "validation", [store.language for store in train])
    for store in [*train, *validation]:
        store.check_tokenizer(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.path)
    lacking = sorted({s.language for s in train} - {s.language for s in validation})
    if lacking:
        logger.warning("no validation store of %s in %s", ", ".join(lacking), folder)
    return Data(
        tokenizer=tokenizer,
        mixture=LanguageMixture(train, seq_length, config.mixture, config.seed),
        validation_stores=validation,
        folder=folder,
    )


def open_tokenizer(config: DataConfig) -> Tokenizer:
    return load_tokenizer(
        Path(config.tokenizer).expanduser() if config.tokenizer else DEMO_TOKENIZER,
        config.eod_token,
    )


def _corpus(config: DataConfig) -> Path:
    return Path(config.corpus).expanduser() if config.corpus else DEMO_CORPUS


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "magnetron" / "token_stores"


def _store_dir(config: DataConfig) -> Path:
    folder = Path(config.store_dir).expanduser()
    if not (folder / "train").is_dir():
        raise FileNotFoundError(
            f"data.store_dir={config.store_dir}: no folder with a train/ folder of token stores in "
            "it; python -m data.tokenize_corpus makes one"
        )
    return folder
