import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from data.token_store import TokenStore, TokenStoreWriter, adopt, dtype_for

DOCUMENTS = [[5, 6, 7], [], [8], list(range(100, 200))]
ABOUT = {
    "language": "de",
    "family": "germanic",
    "tokenizer_fingerprint": "f" * 64,
    "eod_id": 0,
    "source": "somewhere",
    "license": "BSD-3-Clause",
}


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    """megatron-core's own reader and writer; the door to megatron-core has to come first."""
    importlib.import_module("parallel.megatron")
    return importlib.import_module("megatron.core.datasets.indexed_dataset")


def write(prefix: Path, vocab_size: int = 8192) -> TokenStore:
    with TokenStoreWriter(prefix, vocab_size=vocab_size, **ABOUT) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return TokenStore(prefix)


def rewrite_sidecar(prefix: Path, **changes: object) -> None:
    path = prefix.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(8192, "uint16"), (70000, "int32")])
def test_round_trip(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    store = write(tmp_path / "de", vocab_size)
    stream = [token for document in DOCUMENTS for token in [*document, 0]]
    assert store.tokens == len(stream) and store.documents == 4
    assert store.read(0, store.tokens).tolist() == stream
    assert store.read(3, 7).dtype == dtype
    for number, document in enumerate(DOCUMENTS):
        assert store.document(number).tolist() == [*document, 0]
    with pytest.raises(IndexError, match="document 4 of 4"):
        store.document(4)
    assert store.info.vocab_size == vocab_size and store.info.source == "somewhere"
    assert (store.language, store.family) == ("de", "germanic")
    store.verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["de.bin", "de.idx", "de.json"]


def test_dtype_rule_is_megatrons(megatron: ModuleType) -> None:
    for size in (1, 65499, 65500, 65536, 200_000):
        assert dtype_for(size) == megatron.DType.optimal_dtype(size).__name__


@pytest.mark.parametrize("vocab_size", [8192, 70000])
def test_megatron_reads_ours(megatron: ModuleType, tmp_path: Path, vocab_size: int) -> None:

    store = write(tmp_path / "de", vocab_size)
    theirs = megatron.IndexedDataset(str(tmp_path / "de"))
    assert len(theirs) == store.documents
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    for number in range(store.documents):
        assert theirs[number].tolist() == store.document(number).tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons(megatron: ModuleType, tmp_path: Path, dtype: type) -> None:
    """Also where a document is several of their sequences."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "de.bin"), dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5, 0]), [2, 4])
    builder.add_document(torch.tensor([6, 7, 0]), [3])
    builder.finalize(str(tmp_path / "de.idx"))

    with pytest.raises(FileNotFoundError, match=r"data.token_store.adopt"):
        TokenStore(tmp_path / "de")
    store = adopt(tmp_path / "de", vocab_size=8192, **ABOUT)
    assert (store.documents, store.tokens, store.info.dtype) == (2, 9, dtype.__name__)
    assert store.document(0).tolist() == [1, 2, 3, 4, 5, 0]
    assert store.document(1).tolist() == [6, 7, 0]
    assert store.read(4, 8).tolist() == [5, 0, 6, 7]
    store.verify()
    with pytest.raises(ValueError, match="id 7 is outside the vocabulary of 7"):
        adopt(tmp_path / "de", vocab_size=7, **ABOUT)


def test_negative_ids_of_others_are_refused(megatron: ModuleType, tmp_path: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "de.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, -2, 0]), [3])
    builder.finalize(str(tmp_path / "de.idx"))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        adopt(tmp_path / "de", vocab_size=8192, **ABOUT)


@pytest.mark.parametrize("ids", [[5, 8192], [-1, 5]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, ids: list[int]) -> None:
    with (
        pytest.raises(ValueError, match=r"document 0 has ids from .* vocabulary of 8192"),
        TokenStoreWriter(tmp_path / "de", vocab_size=8192, **ABOUT) as writer,
    ):
        writer.add_document(ids)
    assert list(tmp_path.iterdir()) == []  # nothing of a failed store remains


def test_writer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eod_id=0 is outside the vocabulary of 0"):
        TokenStoreWriter(tmp_path / "de", vocab_size=0, **ABOUT)
    with (
        pytest.raises(ValueError, match="at least one document"),
        TokenStoreWriter(tmp_path / "de", vocab_size=8192, **ABOUT),
    ):
        pass
    too_long = np.broadcast_to(np.int64(1), (2**31 - 1,))  # no memory behind it
    with (
        pytest.raises(ValueError, match="at most 2147483646; split it"),
        TokenStoreWriter(tmp_path / "de", vocab_size=8192, **ABOUT) as writer,
    ):
        writer.add_document(too_long)
    write(tmp_path / "de")
    with pytest.raises(FileExistsError, match="complete store of this name"):
        TokenStoreWriter(tmp_path / "de", vocab_size=8192, **ABOUT)


KILLED_WRITER = """
import os, sys
from data.token_store import TokenStoreWriter
real, calls = os.replace, 0
def replace(*names):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    real(*names)
os.replace = replace
with TokenStoreWriter(
    sys.argv[1], language="de", family="germanic", tokenizer_fingerprint="f", vocab_size=9, eod_id=0
) as writer:
    for _ in range(1000):
        writer.add_document([1, 2, 3])
    if sys.argv[2] == "0":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("moment", [0, 1, 2, 3])
def test_a_killed_writer_never_leaves_a_store_that_opens(tmp_path: Path, moment: int) -> None:
    """SIGKILL while documents are added (0) and before each of the three renames."""
    result = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "de"), str(moment)]
    )
    assert result.returncode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="no complete store"):
        TokenStore(tmp_path / "de")
    write(tmp_path / "de")  # and is not in the way of the next one
    TokenStore(tmp_path / "de").verify()


def test_damage_that_is_cheap_to_see_is_seen_on_opening(tmp_path: Path) -> None:
    prefix = tmp_path / "de"

    def damage(suffix: str, change: Callable[[bytes], bytes], words: str, kind=ValueError) -> None:
        write(prefix)
        path = prefix.with_suffix(suffix)
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(kind, match=words):
            TokenStore(prefix)
        for old in tmp_path.iterdir():
            old.unlink()

    damage(".bin", lambda b: b[:-2], r"de.bin: 214 bytes where 216 are expected")
    damage(".idx", lambda b: b[:-8], r"de.idx: \d+ bytes where \d+ are expected")
    damage(".idx", lambda b: b[:20], "20 bytes are too few for an index")
    damage(".idx", lambda b: b"X" + b[1:], "not a Megatron index of version 1")
    damage(".idx", lambda b: b[:17] + b"\x05" + b[18:], "type code 5")
    damage(".idx", lambda b: b[:17] + b"\x04" + b[18:], "the .idx says int32, the sidecar uint16")
    damage(".idx", lambda b: b[:18] + bytes(8) + b[26:], "an index without documents")
    # the last length one higher: sizes agree, the end does not
    damage(
        ".idx", lambda b: b[:46] + bytes([102]) + b[47:], "ends at token 109, the sidecar at 108"
    )
    damage(".json", lambda b: b[:-9], "not the sidecar of a token store")
    damage(".json", lambda b: b.replace(b'"tokens"', b'"tokenz"'), "not the sidecar")
    damage(
        ".json", lambda b: b.replace(b'"format_version": 1', b'"format_version": 2'), "version 2"
    )
    damage(".json", lambda b: b.replace(b'"documents": 4', b'"documents": 5'), "has 4 documents")

    for suffix in (".bin", ".idx"):
        write(prefix)
        prefix.with_suffix(suffix).unlink()
        with pytest.raises(FileNotFoundError, match=f"de{suffix}: no such file, but a store needs"):
            TokenStore(prefix)
        prefix.with_suffix(".json").unlink()


def test_verify_reads_everything(tmp_path: Path) -> None:
    prefix = tmp_path / "de"
    write(prefix)
    raw = bytearray(prefix.with_suffix(".bin").read_bytes())
    raw[4] ^= 1
    prefix.with_suffix(".bin").write_bytes(raw)
    store = TokenStore(prefix)  # same size: opening cannot know
    with pytest.raises(ValueError, match=r"damaged or mixed-up store: .bin has sha256"):
        store.verify()
    raw[4] ^= 1
    prefix.with_suffix(".bin").write_bytes(raw)
    rewrite_sidecar(prefix, vocab_size=150)
    with pytest.raises(ValueError, match="id 199 is outside the vocabulary of 150"):
        TokenStore(prefix).verify()


def test_another_tokenizer_is_named(tmp_path: Path) -> None:
    store = write(tmp_path / "de")
    store.check_tokenizer("f" * 64, 8192, "mine.json")
    for fingerprint, size in [("0" * 64, 8192), ("f" * 64, 8000)]:
        with pytest.raises(
            ValueError, match=rf"ffff.*8192 .*mine.json is {fingerprint[:4]}.*{size}"
        ):
            store.check_tokenizer(fingerprint, size, "mine.json")
