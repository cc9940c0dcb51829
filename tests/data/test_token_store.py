import errno
import fcntl
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from data.adopt_store import adopt
from data.store_format import dtype_for
from data.store_writer import TokenStoreWriter
from data.token_store import TokenStore

DOCUMENTS = [[5, 6, 7], [], [8], list(range(100, 200))]
ABOUT: dict[str, Any] = {
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


def as_version_1(prefix: Path) -> None:
    """Makes a store into what the first version of the format was: less of the same."""
    record = json.loads(prefix.with_suffix(".json").read_text())
    names = [
        *("language", "family", "tokenizer_fingerprint", "vocab_size", "eod_id", "source"),
        *("license", "documents", "tokens", "dtype", "bin_sha256", "idx_sha256"),
    ]
    old = {name: record[name] for name in names} | {"format_version": 1}
    prefix.with_suffix(".json").write_text(json.dumps(old, indent=1, ensure_ascii=False) + "\n")
    for suffix in (".docs", ".sums"):
        prefix.with_suffix(suffix).unlink()


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
    files = ["de.bin", "de.docs", "de.idx", "de.json", "de.sums"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files


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
    """Also where a document is several of their sequences, or has no token at all."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "de.bin"), dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5, 0]), [2, 4])
    builder.add_document(torch.tensor([], dtype=torch.int64), [0])
    builder.add_document(torch.tensor([6, 7, 0]), [3])
    builder.finalize(str(tmp_path / "de.idx"))

    with pytest.raises(FileNotFoundError, match=r"data.adopt_store.adopt"):
        TokenStore(tmp_path / "de")
    with pytest.raises(ValueError, match="id 7 is outside the vocabulary of 7, at token 7"):
        adopt(tmp_path / "de", vocab_size=7, **ABOUT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["de.bin", "de.idx"]
    store = adopt(tmp_path / "de", vocab_size=8192, **ABOUT)
    assert (store.documents, store.tokens, store.info.dtype) == (3, 9, dtype.__name__)
    assert store.document(0).tolist() == [1, 2, 3, 4, 5, 0]
    assert store.document(1).tolist() == []
    assert store.document(2).tolist() == [6, 7, 0]
    assert [store.document_of(token) for token in range(9)] == [0] * 6 + [2] * 3
    assert [part.tolist() for part in store.documents_ending(0, 9)] == [[0, 1, 2], [6, 6, 9]]
    assert store.read(4, 8).tolist() == [5, 0, 6, 7]
    assert store.document_source(2) == ("", "somewhere")
    assert store.info.ends_in_eod
    store.verify()
    with pytest.raises(FileExistsError, match="complete store of this name"):
        adopt(tmp_path / "de", vocab_size=8192, **ABOUT)


def test_stores_without_ends_of_documents_are_adopted(megatron: ModuleType, tmp_path: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "de.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3]), [3])
    builder.finalize(str(tmp_path / "de.idx"))
    store = adopt(tmp_path / "de", vocab_size=8192, **ABOUT)
    assert not store.info.ends_in_eod
    store.verify()
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "fr.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([], dtype=torch.int64), [0])
    builder.finalize(str(tmp_path / "fr.idx"))
    with pytest.raises(ValueError, match="fr: there is no token in it"):
        adopt(tmp_path / "fr", vocab_size=8192, **ABOUT)


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


def test_documents_are_found_by_token_and_known_by_name(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(0, 30, 500).tolist()
    with TokenStoreWriter(tmp_path / "de", vocab_size=8192, **ABOUT) as writer:
        for number, length in enumerate(lengths):
            writer.add_document(
                generator.integers(1, 8192, length),
                doc_id=f"größe-{number}" if number != 7 else "\ud800 alone",
                source=("web", "books", "")[number % 3],
                license="CC0" if number % 3 == 1 else "",
                characters=length,
                utf8_bytes=2 * length,
            )
        assert (writer.documents, writer.tokens) == (500, sum(lengths) + 500)
    store = TokenStore(tmp_path / "de")
    store.verify()
    ends = np.cumsum(np.array(lengths) + 1)
    expected = np.searchsorted(ends, np.arange(store.tokens), side="right")
    assert [store.document_of(token) for token in range(store.tokens)] == expected.tolist()
    for start, stop in [(0, store.tokens), (100, 101), (333, 2000)]:
        numbers, found = store.documents_ending(start, stop)
        inside = (ends > start) & (ends <= stop)
        assert numbers.tolist() == np.flatnonzero(inside).tolist()
        assert found.tolist() == ends[inside].tolist()
    assert store.document_span(1) == (ends[0], ends[1])
    assert store.document_source(0) == ("größe-0", "web")
    assert store.document_source(7) == ("\ud800 alone", "books")
    assert store.document_source(2) == ("größe-2", "somewhere")
    for call in (store.document_source, store.document_span):
        with pytest.raises(IndexError, match="document 500 of 500"):
            call(500)
    for token in (-1, store.tokens):
        with pytest.raises(IndexError, match=f"token {token} of {store.tokens}"):
            store.document_of(token)
    assert [(s["source"], s["license"], s["documents"]) for s in store.info.sources] == [
        ("web", "BSD-3-Clause", 167),
        ("books", "CC0", 167),
        ("somewhere", "BSD-3-Clause", 166),
    ]
    assert (store.info.characters, store.info.utf8_bytes) == (sum(lengths), 2 * sum(lengths))
    assert store.info.bin_sha256 == hashlib.sha256((tmp_path / "de.bin").read_bytes()).hexdigest()
    assert store.info.idx_sha256 == hashlib.sha256((tmp_path / "de.idx").read_bytes()).hexdigest()


def test_sources_are_collections_not_documents(tmp_path: Path) -> None:
    about = ABOUT | {"source": ""}
    with TokenStoreWriter(tmp_path / "de", vocab_size=9, **about) as writer:
        for number in range(10):
            writer.add_document([1], source=f"s{number}")
    assert TokenStore(tmp_path / "de").info.source == "s0, s1, s2, s3, s4, s5, s6, s7, ..."
    with (
        pytest.raises(ValueError, match="more than 65536 pairs of source and licence"),
        TokenStoreWriter(tmp_path / "fr", vocab_size=9, **about) as writer,
    ):
        for number in range(65537):
            writer.add_document([], source=str(number))


def test_version_1_still_opens(tmp_path: Path) -> None:
    write(tmp_path / "de")
    as_version_1(tmp_path / "de")
    store = TokenStore(tmp_path / "de")
    assert store.info.format_version == 1 and store.info.files == {}
    assert store.document(2).tolist() == [8, 0]
    assert store.document_of(5) == 2 and store.document_source(2) == ("", "somewhere")
    store.verify()
    path = tmp_path / "de.json"
    path.write_text(path.read_text().replace('"eod_id"', '"eod_di"'))
    with pytest.raises(ValueError, match="fields are not those of format version 1"):
        TokenStore(tmp_path / "de")


def run_script(script: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


PREAMBLE = """
import os, random, resource, signal, sys, time
from pathlib import Path
import numpy as np
from data.store_writer import TokenStoreWriter
from data.token_store import TokenStore

def writer(prefix):
    return TokenStoreWriter(
        prefix, language="de", family="germanic", tokenizer_fingerprint="f", vocab_size=9, eod_id=0
    )
"""

KILLED_WRITER = """
calls = 0
def killing(real):
    def call(*names):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        real(*names)
    return call
os.replace, os.link = killing(os.replace), killing(os.link)
with writer(sys.argv[1]) as store:
    for _ in range(1000):
        store.add_document([1, 2, 3])
    if sys.argv[2] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", range(6))
def test_a_killed_writer_never_leaves_a_store_that_opens(tmp_path: Path, moment: int) -> None:
    """SIGKILL while documents are added (0), before each of four renames and before the link."""
    result = run_script(KILLED_WRITER, tmp_path / "de", moment)
    assert result.returncode == -signal.SIGKILL, result.stderr
    with pytest.raises(FileNotFoundError, match="no complete store"):
        TokenStore(tmp_path / "de")
    write(tmp_path / "de")  # and is not in the way of the next one
    TokenStore(tmp_path / "de").verify()


# One process forks and kills all the others: it alone pays for the imports.
KILLED_AT_RANDOM = """
draw = random.Random(3)
whole = cut = 0
for round in range(20):
    folder = Path(sys.argv[1]) / str(round)
    begun, begins = os.pipe()
    child = os.fork()
    if not child:
        number = 0
        while True:
            with writer(folder / str(number)) as store:
                os.write(begins, b".")
                for _ in range(500):
                    store.add_document([1, 2, 3] * 50, doc_id="name")
            number += 1
    os.read(begun, 1)
    time.sleep(draw.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for prefix in {path.with_suffix("") for path in folder.glob("[0-9]*")}:
        try:
            store = TokenStore(prefix)
        except FileNotFoundError:
            cut += 1
            with writer(prefix) as again:
                again.add_document([1])
            store = TokenStore(prefix)
        else:
            whole += 1
            assert store.documents == 500
        store.verify()
    cut += any(folder.glob(".*.tmp"))
print(whole, cut)
"""


def test_writers_killed_at_random_moments(tmp_path: Path) -> None:
    result = run_script(KILLED_AT_RANDOM, tmp_path)
    assert result.returncode == 0, result.stderr
    whole, cut = map(int, result.stdout.split())
    assert cut >= 5 and whole + cut >= 20, result.stdout


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    prefix = tmp_path / "de"
    with TokenStoreWriter(prefix, vocab_size=8192, **ABOUT) as first:
        first.add_document([1, 2])
        who = rf"process {os.getpid()} on .* is writing this store; wait for it"
        with pytest.raises(FileExistsError, match=who):
            TokenStoreWriter(prefix, vocab_size=8192, **ABOUT)
    assert TokenStore(prefix).document(0).tolist() == [1, 2, 0]
    assert not list(tmp_path.glob(".*"))


def test_a_lock_that_was_just_given_up_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before removes the lock's file after we have opened it and before we lock it."""
    prefix, lock = tmp_path / "de", tmp_path / ".de.lock"
    real = fcntl.flock
    opened: list[int] = []

    def flock(descriptor: int, how: int) -> None:
        if not opened:
            lock.unlink()
        opened.append(descriptor)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with TokenStoreWriter(prefix, vocab_size=8192, **ABOUT) as writer:
        writer.add_document([1])
        assert len(opened) == 2 and lock.exists()
        with pytest.raises(FileExistsError, match="is writing this store"):
            TokenStoreWriter(prefix, vocab_size=8192, **ABOUT)


RACING_WRITERS = """
for round in range(12):
    prefix = Path(sys.argv[1]) / str(round)
    children = []
    for child in range(4):
        children.append(os.fork())
        if not children[-1]:
            try:
                with writer(prefix) as store:
                    for _ in range(50 * (child + 1)):
                        store.add_document([child + 1])
            except FileExistsError as error:
                os._exit(1)
            os._exit(0)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(ends) <= {0, 1} and ends.count(0) == 1, ends
    store = TokenStore(prefix)
    assert store.documents == 50 * (ends.index(0) + 1), (store.documents, ends)
    store.verify()
    assert not list(prefix.parent.glob(".*"))
"""


def test_of_racing_writers_exactly_one_writes(tmp_path: Path) -> None:
    result = run_script(RACING_WRITERS, tmp_path)
    assert result.returncode == 0, result.stderr


def no_flock(*_: object) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_without_flock_the_second_writer_is_told_on_completing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have none."""
    monkeypatch.setattr(fcntl, "flock", no_flock)
    prefix = tmp_path / "de"
    with (
        pytest.raises(FileExistsError, match="complete store of this name"),
        TokenStoreWriter(prefix, vocab_size=8192, **ABOUT) as second,
    ):
        second.add_document([3])
        write(prefix)
    TokenStore(prefix).verify()
    assert TokenStore(prefix).documents == len(DOCUMENTS)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("foreign", [".bin", ".json"])
def test_without_flock_a_writer_notices_another_between_its_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: str
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    prefix = tmp_path / "de"
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        if str(target).endswith(".sums"):  # the last before the sidecar
            prefix.with_suffix(foreign).unlink(missing_ok=True)
            prefix.with_suffix(foreign).write_bytes(b"of another writer")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(FileExistsError, match="another process wrote a store of this name"):
        write(prefix)
    with pytest.raises((FileNotFoundError, ValueError)):
        TokenStore(prefix)


def test_a_writer_takes_its_sidecar_back_if_another_came_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "de"
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        prefix.with_suffix(".bin").unlink()

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(FileExistsError, match="another process wrote a store of this name"):
        write(prefix)
    assert not prefix.with_suffix(".json").exists()


def test_file_systems_without_hard_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    write(tmp_path / "de").verify()


# limit of a file's size, tokens and bytes of name in a document, documents, the file it hits
DISK_FULL = """
cases = [
    (300_000, 1000, 5, 500, ".bin"),
    (70_000, 0, 5, 20_000, ".idx"),
    (300_000, 1, 1000, 500, ".docs"),
    (300_000, 1, 2000, 200, ".docs"),
    (1000, 1, 1, 9, ".json"),
]
for limit, tokens, name, documents, suffix in cases:
    prefix = Path(sys.argv[1]) / f"de{limit}-{name}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with writer(prefix) as store:
            for _ in range(documents):
                store.add_document(np.ones(tokens, int), doc_id="n" * name)
        raise AssertionError("a disk that was never full")
    except OSError as error:
        assert "File too large" in str(error) and suffix in str(error), (error, suffix)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not list(prefix.parent.iterdir()), list(prefix.parent.iterdir())
"""


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    result = run_script(DISK_FULL, tmp_path / "stores")
    assert result.returncode == 0, result.stderr


READER = """
store = TokenStore(sys.argv[1])
store.read(0, 5)
print("ready", flush=True)
sys.stdin.readline()
read = store.read if sys.argv[2] == "guarded" else lambda start, stop: store._ids[start:stop]
try:
    for start in range(0, store.tokens, 2048):
        read(start, start + 2048).astype(np.int64)
except OSError as error:
    print(error)
    sys.exit(7)
"""


def read_while(prefix: Path, change: Callable[[], object], how: str) -> tuple[int, str]:
    with subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + READER, str(prefix), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        change()
        output, _ = process.communicate("go\n", timeout=60)
    return process.returncode, output


def test_a_store_cut_off_under_a_running_job(tmp_path: Path) -> None:
    """Without the check the kernel kills the process without a word: that is the first half."""
    prefix, path = tmp_path / "de", tmp_path / "de.bin"
    for how in "unguarded", "guarded":
        with TokenStoreWriter(prefix, vocab_size=8192, **ABOUT) as writer:
            for _ in range(100):
                writer.add_document(np.ones(20_000, np.int64))
        size = path.stat().st_size
        code, output = read_while(prefix, partial(os.truncate, path, size // 2), how)
        if how == "unguarded":
            assert code == -signal.SIGBUS and output == ""
        else:
            assert code == 7
            assert f"de.bin: {size // 2:,} bytes where there were {size:,} on opening" in output
            assert "data.verify" in output and "Traceback" not in output
        for old in tmp_path.iterdir():
            old.unlink()


def test_a_store_that_changes_under_a_running_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = write(tmp_path / "de")
    path = tmp_path / "de.bin"
    before = store.read(0, store.tokens).tolist()

    content = path.read_bytes()
    path.unlink()
    store.check_unchanged()
    assert "de.bin was deleted while in use; this process keeps reading the old" in caplog.text
    path.write_bytes(content[::-1])
    for _ in range(600):  # told once, not every time
        assert store.read(0, store.tokens).tolist() == before
    assert caplog.text.count("while in use") == 1

    other = write(tmp_path / "fr")
    replacement = tmp_path / "new"
    replacement.write_bytes(content[::-1])
    os.utime(replacement, (1, 1))  # the clock of files ticks in milliseconds, the test is faster
    os.replace(replacement, tmp_path / "fr.bin")
    other.check_unchanged()
    assert "fr.bin was replaced while in use" in caplog.text

    third = write(tmp_path / "it")
    os.utime(tmp_path / "de.idx", (1, 1))
    os.replace(tmp_path / "de.idx", tmp_path / "it.idx")
    with pytest.raises(OSError, match=r"it.idx: this file is not the one that was there"):
        third.document(0)

    write(tmp_path / "sv")
    os.utime(tmp_path / "sv.bin", (1, 1))
    fourth = TokenStore(tmp_path / "sv")
    with open(tmp_path / "sv.bin", "r+b") as file:
        file.write(b"\1")
    with pytest.raises(OSError, match=r"sv.bin: somebody wrote to this file while it was in use"):
        for _ in range(256):
            fourth.read(0, 1)

    fifth = write(tmp_path / "da")
    with open(tmp_path / "da.bin", "ab") as file:
        file.write(b"\1")
    with pytest.raises(OSError, match=r"da.bin: 217 bytes where there were 216"):
        fifth.read(0, 1)


def test_a_file_that_the_server_lost_is_named(tmp_path: Path) -> None:
    """The map's own descriptor taken away stands for a stale one of an NFS server."""
    store = write(tmp_path / "de")
    for name in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{name}") == str(tmp_path / "de.bin"):
            os.close(int(name))
    with pytest.raises(OSError, match=r"Bad file descriptor: .*de.bin"):
        store.read(0, 1)


def test_damage_that_is_cheap_to_see_is_seen_on_opening(tmp_path: Path) -> None:
    prefix = tmp_path / "de"

    def damage(
        suffix: str,
        change: Callable[[bytes], bytes],
        words: str,
        kind: type[Exception] = ValueError,
    ) -> None:
        write(prefix)
        path = prefix.with_suffix(suffix)
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(kind, match=words):
            TokenStore(prefix)
        for old in tmp_path.iterdir():
            old.unlink()

    damage(".bin", lambda b: b[:-2], r"de.bin: 214 bytes where 216 are expected")
    damage(".docs", lambda b: b + b"x", r"de.docs: \d+ bytes where \d+ are expected")
    damage(".sums", lambda b: b[:-1], r"de.sums: 95 bytes where 96 are expected")
    damage(".idx", lambda b: b[:-8], r"de.idx: \d+ bytes where \d+ are expected")
    damage(".idx", lambda b: b[:20], "20 bytes are too few for an index")
    damage(".idx", lambda b: b"X" + b[1:], "not a Megatron index of version 1")
    damage(".idx", lambda b: b[:17] + b"\x05" + b[18:], "type code 5")
    damage(".idx", lambda b: b[:17] + b"\x04" + b[18:], "the .idx says int32, the sidecar uint16")
    damage(".idx", lambda b: b[:18] + bytes(8) + b[26:], "an index without documents")
    damage(".idx", lambda b: b[:26] + b"\x06" + b[27:], "the .idx has 5 documents, the sidecar 4")
    # the last length one higher: sizes agree, the end does not
    damage(
        ".idx", lambda b: b[:46] + bytes([102]) + b[47:], "ends at token 109, the sidecar at 108"
    )
    damage(".json", lambda b: b[:-9], "not the sidecar of a token store")
    damage(".json", lambda b: b.replace(b'"tokens"', b'"tokenz"', 1), "its own checksum is another")
    damage(".json", lambda b: b.replace(b"germanic", b"romances"), "its own checksum is another")
    damage(".json", lambda b: b.replace(b"\n", b"\r", 1), "its own checksum is another")
    damage(
        ".json", lambda b: b.replace(b'"format_version": 2', b'"format_version": 3'), "version 3"
    )

    for suffix in (".bin", ".idx", ".docs", ".sums"):
        write(prefix)
        prefix.with_suffix(suffix).unlink()
        with pytest.raises(FileNotFoundError, match=f"de{suffix}: no such file, but a store needs"):
            TokenStore(prefix)
        prefix.with_suffix(".json").unlink()


def test_a_sidecar_of_other_checksums_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "de")
    path = tmp_path / "de.json"
    content = path.read_bytes().replace(b'"chunk_bytes": 65536', b'"chunk_bytes": 65537')
    body = content[: content.index(b',\n "sidecar_sha256"')]
    seal = hashlib.sha256(body).hexdigest()
    path.write_bytes(body + f',\n "sidecar_sha256": "{seal}"\n}}\n'.encode())
    with pytest.raises(ValueError, match="checksums are not sha256 of 65536 bytes"):
        TokenStore(tmp_path / "de")


def test_verify_reads_everything(tmp_path: Path) -> None:
    prefix = tmp_path / "de"
    write(prefix)
    raw = bytearray(prefix.with_suffix(".bin").read_bytes())
    raw[4] ^= 1
    prefix.with_suffix(".bin").write_bytes(raw)
    store = TokenStore(prefix)  # same size: opening cannot know
    with pytest.raises(ValueError, match=r"damaged or mixed-up store: .bin: bytes 0 to 215 have"):
        store.verify()


def test_another_tokenizer_is_named(tmp_path: Path) -> None:
    store = write(tmp_path / "de")
    store.check_tokenizer("f" * 64, 8192, "mine.json")
    for fingerprint, size in [("0" * 64, 8192), ("f" * 64, 8000)]:
        with pytest.raises(
            ValueError, match=rf"ffff.*8192 .*mine.json is {fingerprint[:4]}.*{size}"
        ):
            store.check_tokenizer(fingerprint, size, "mine.json")
