"""The demo's tokenizer and stores, once for all tests of the data room, and small corpora."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data.store_cache import prepare_stores
from data.store_writer import TokenStoreWriter
from data.token_store import TokenStore
from data.tokenize_corpus import DEMO_CORPUS, DEMO_TOKENIZER
from data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_TOKENIZER)


@pytest.fixture(scope="session")
def demo_cache(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the demo's stores as DataConfig()'s defaults want them."""
    cache = tmp_path_factory.mktemp("cache")
    prepare_stores(DEMO_CORPUS, tokenizer, cache, 0.05)
    return cache


@pytest.fixture(scope="session")
def demo_folder(tokenizer: Tokenizer, demo_cache: Path) -> Path:
    return prepare_stores(DEMO_CORPUS, tokenizer, demo_cache, 0.05)


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., Path]:
    """write_corpus(records): a JSONL file of them."""

    def write(records: Sequence[dict], name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        return path

    return write


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., TokenStore]:
    """make_store("de", "germanic", tokens=100): ids 1, 2, 3 ... in documents of a few tokens.

    characters: of the whole store, as its sidecar says.
    """

    def make(language: str, family: str, tokens: int, characters: int = 0, **about) -> TokenStore:
        settings = {"tokenizer_fingerprint": "f" * 64, "vocab_size": 60000, "eod_id": 0} | about
        prefix = tmp_path / "stores" / language
        with TokenStoreWriter(prefix, language=language, family=family, **settings) as writer:
            longest = max(10, tokens // 50)
            for first in range(0, tokens, longest):
                length = min(longest, tokens - first)
                ids = np.arange(first, first + length - 1) % 50000 + 1
                writer.add_document(ids, characters=characters if first == 0 else 0)
        return TokenStore(prefix)

    return make
