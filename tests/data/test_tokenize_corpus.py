import json
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data import store_cache, tokenize_corpus
from data.corpus import read_documents
from data.folder_lock import FolderBusyError, FolderLock
from data.store_cache import prepare_stores, stores_folder
from data.store_folder import is_complete, open_stores, read_manifest
from data.token_parts import PartBuilder, read_header
from data.tokenize_corpus import (
    DEMO_CORPUS,
    DEMO_TOKENIZER,
    TokenizeOptions,
    differences,
    write_stores,
)
from data.tokenize_progress import BadDocumentError, Progress
from data.tokenize_worker import is_validation
from data.tokenizer import Tokenizer, load_tokenizer


def records(documents: int, languages: str = "de fr") -> list[dict]:
    return [
        {"text": f"Text {i} in {language}.", "language": language, "doc_id": f"doc {i}"}
        for language in languages.split()
        for i in range(documents)
    ]


def test_demo_stores_hold_the_demo(tokenizer: Tokenizer, demo_folder: Path) -> None:
    expected: dict[tuple[str, str], list[int]] = {}
    for document in read_documents(DEMO_CORPUS):
        split = "validation" if is_validation(document.doc_id, 0.05) else "train"
        stream = expected.setdefault((split, document.language), [])
        stream += [*tokenizer.encode(document.text), tokenizer.eod_id]
    for split in ("train", "validation"):
        stores = open_stores(demo_folder, split)
        assert [s.language for s in stores] == sorted(c for s, c in expected if s == split)
        for store in stores:
            assert store.read(0, store.tokens).tolist() == expected[split, store.language]
            assert store.info.tokenizer_fingerprint == tokenizer.fingerprint
            assert (store.info.license, store.info.source) == ("BSD-3-Clause", "chromium")
            store.verify()
            infos = [d for d in read_documents(DEMO_CORPUS) if d.language == store.language]
            infos = [d for d in infos if is_validation(d.doc_id, 0.05) == (split == "validation")]
            assert store.info.characters == sum(len(d.text) for d in infos)
            assert store.info.utf8_bytes == sum(len(d.text.encode()) for d in infos)
            for number, document in enumerate(infos):
                assert store.document_source(number) == (document.doc_id, document.source)


def test_the_split_is_the_same_in_every_language(demo_folder: Path) -> None:
    for split, documents in (("train", 30), ("validation", 3)):
        assert {store.documents for store in open_stores(demo_folder, split)} == {documents}


def test_split_fraction_and_stability() -> None:
    ids = [f"id {i}" for i in range(20_000)]
    held_out = {i for i in ids if is_validation(i, 0.05)}
    assert abs(len(held_out) / len(ids) - 0.05) < 0.005
    assert held_out < {i for i in ids if is_validation(i, 0.1)}  # a larger part holds the smaller


def test_the_demo_s_key_is_stable(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Any change to the shipped text, the tokenizer or the split is a deliberate one."""
    folder = stores_folder(DEMO_CORPUS, tokenizer, tmp_path, 0.05)
    assert folder.name == "chromium_ui-967d963dda0dea1f64ae"


def test_key_follows_everything_the_result_depends_on(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    corpus = write_corpus(records(3))
    other = write_corpus(records(4), name="other.jsonl")
    keys = {
        stores_folder(*arguments).name.split("-")[1]
        for arguments in (
            (corpus, tokenizer, tmp_path, 0.05),
            (corpus, tokenizer, tmp_path, 0.06),
            (corpus, tokenizer, tmp_path, 0.05, ["de"]),
            (corpus, tokenizer, tmp_path, 0.05, ["de", "fr"]),
            (other, tokenizer, tmp_path, 0.05),
        )
    }
    assert len(keys) == 5
    assert stores_folder(corpus, tokenizer, tmp_path, 0.05, ["fr", "de"]) == stores_folder(
        corpus, tokenizer, tmp_path, 0.05, ["de", "fr"]
    )


def test_second_call_does_not_build_again(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    corpus = write_corpus(records(40))
    folder = prepare_stores(corpus, tokenizer, tmp_path / "cache", 0.2)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare_stores(corpus, tokenizer, tmp_path / "cache", 0.2) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_large_files_are_hashed_once(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "large.jsonl"
    line = json.dumps({"text": "x" * 1000, "language": "de", "doc_id": "1"}) + "\n"
    corpus.write_text(line * 1100)
    hashed = []
    real = store_cache._sha256
    monkeypatch.setattr(store_cache, "_sha256", lambda p: hashed.append(p) or real(p))

    first = stores_folder(corpus, tokenizer, tmp_path / "cache", 0.05)
    assert stores_folder(corpus, tokenizer, tmp_path / "cache", 0.05) == first
    assert len(hashed) == 1
    os.utime(corpus, ns=(1, 1))  # touched, not changed: hashed again, the same key
    assert stores_folder(corpus, tokenizer, tmp_path / "cache", 0.05) == first
    assert len(hashed) == 2
    corpus.write_text(line * 1101)
    assert stores_folder(corpus, tokenizer, tmp_path / "cache", 0.05) != first
    for memory in (tmp_path / "cache" / "corpus_hashes").iterdir():
        memory.write_text("damaged")
    stores_folder(corpus, tokenizer, tmp_path / "cache", 0.05)
    assert len(hashed) == 4


PREPARE = """
import sys
from pathlib import Path
from data.store_cache import prepare_stores
from data.tokenize_corpus import DEMO_TOKENIZER
from data.tokenizer import load_tokenizer
corpus, cache = map(Path, sys.argv[1:3])
print(prepare_stores(corpus, load_tokenizer(DEMO_TOKENIZER), cache, 0.2))
"""


def test_many_processes_at_once(tmp_path: Path, write_corpus: Callable[..., Path]) -> None:
    corpus, cache = write_corpus(records(500)), tmp_path / "cache"
    command = [sys.executable, "-c", PREPARE, str(corpus), str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    folders = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert len(folders) == 1
    assert [str(path) for path in cache.iterdir()] == list(folders)  # nothing half-built is left
    for split in ("train", "validation"):
        for store in open_stores(
            Path(folders.pop() if split == "x" else next(iter(folders))), split
        ):
            store.verify()


def test_a_folder_in_the_way(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    corpus, folder = write_corpus(records(40)), tmp_path / "stores"
    folder.mkdir()
    write_stores(corpus, tokenizer, folder, 0.2)  # an empty one is not in the way
    inode = folder.stat().st_ino
    write_stores(corpus, tokenizer, folder, 0.2)
    assert folder.stat().st_ino == inode and is_complete(folder)  # what is finished stands
    (folder / "manifest.json").unlink()
    with pytest.raises(FileExistsError, match="something else already, not a finished set"):
        write_stores(corpus, tokenizer, folder, 0.2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "stores"]


def files_of(folder: Path) -> dict[str, bytes]:
    """By path; without hidden ones, where others keep what they derive from stores."""
    found = ((p.relative_to(folder), p) for p in folder.rglob("*") if p.is_file())
    return {
        str(name): path.read_bytes()
        for name, path in found
        if not any(part.startswith(".") for part in name.parts)
    }


# Small blocks, so that a small corpus has many
WRITE = """
import os, resource, sys
from pathlib import Path
from data import tokenize_corpus
from data.tokenizer import load_tokenizer
tokenize_corpus.BLOCK_BYTES = 20_000
{before}
if __name__ == "__main__":
    tokenize_corpus.write_stores(
        tokenize_corpus.DEMO_CORPUS, load_tokenizer(tokenize_corpus.DEMO_TOKENIZER),
        Path(sys.argv[1]), 0.05, report={report},
        options=tokenize_corpus.TokenizeOptions(workers=int(sys.argv[2])),
    )
"""


@pytest.fixture(scope="module")
def small_blocks(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The demo's stores, made in one go of blocks like those of write_in_process."""
    out = tmp_path_factory.mktemp("small_blocks") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_corpus, "BLOCK_BYTES", 20_000)
        write_stores(DEMO_CORPUS, tokenizer, out, 0.05)
    return files_of(out)


def write_in_process(
    folder: Path, workers: int, before: str = "", report: str = "None"
) -> subprocess.CompletedProcess:
    code = WRITE.format(before=before, report=report)
    command = [sys.executable, "-c", code, str(folder), str(workers)]
    return subprocess.run(command, capture_output=True, text=True)


def test_neither_processes_nor_blocks_change_anything(
    tokenizer: Tokenizer, demo_folder: Path, small_blocks: dict[str, bytes], tmp_path: Path
) -> None:
    """But for the digest of the parts in the manifest, which tells what blocks were read."""
    assert write_in_process(tmp_path / "out", 2).returncode == 0
    assert files_of(tmp_path / "out") == small_blocks
    expected = files_of(demo_folder)
    found = dict(small_blocks)
    manifests = [json.loads(content.pop("manifest.json")) for content in (found, expected)]
    assert found == expected
    assert manifests[0].pop("corpus_digest") != manifests[1].pop("corpus_digest")
    assert manifests[0] == manifests[1]


KILL_AFTER = """
import json, psutil
def report(now, seen=[]):
    seen.append(now)
    if (now.stage, len(seen)) == ({stage!r}, {number}) or (now.stage == {stage!r} == "writing"):
        print(json.dumps([p.pid for p in psutil.Process().children(recursive=True)]), flush=True)
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("workers", "stage"), [(0, "tokenizing"), (2, "tokenizing"), (2, "writing")]
)
def test_a_killed_run_goes_on_where_it_was(
    workers: int,
    stage: str,
    tokenizer: Tokenizer,
    small_blocks: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenize_corpus, "BLOCK_BYTES", 20_000)
    killed = write_in_process(
        tmp_path / "out", workers, KILL_AFTER.format(stage=stage, number=20), "report"
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    children = json.loads(killed.stdout)
    for _ in range(200):
        if not any(psutil.pid_exists(pid) for pid in children):
            break
        time.sleep(0.05)
    assert [pid for pid in children if psutil.pid_exists(pid)] == []  # nobody works on alone
    building = tmp_path / ".building-out"
    assert [p.name for p in tmp_path.iterdir()] == [".building-out"]
    there = {p: p.stat().st_ino for p in building.glob("parts/*/*.part")}
    assert len(there) >= 20

    made = set()
    real = tokenize_corpus.make_part
    monkeypatch.setattr(
        tokenize_corpus, "make_part", lambda block, path: made.add(path) or real(block, path)
    )
    seen: list[Progress] = []
    write_stores(
        DEMO_CORPUS,
        tokenizer,
        tmp_path / "out",
        0.05,
        report=lambda p: seen.append(Progress(**vars(p))),
    )
    assert not made & there.keys()  # what was finished is not done again
    tokenizing = [progress for progress in seen if progress.stage == "tokenizing"]
    assert 0 < tokenizing[-1].resumed <= tokenizing[-1].done == tokenizing[-1].total
    assert files_of(tmp_path / "out") == small_blocks
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_mended_corpus_costs_only_what_was_mended(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_corpus, "BLOCK_BYTES", 200)
    corpus = tmp_path / "corpus.jsonl"
    lines = [json.dumps(r) for r in records(40, "de")]
    corpus.write_text("\n".join([*lines[:39], "{", lines[39]]))
    with pytest.raises(BadDocumentError, match=r"line 40: not a line of JSON.*--skip-bad N"):
        write_stores(corpus, tokenizer, tmp_path / "out", 0.2)
    there = set((tmp_path / ".building-out").glob("parts/*/*.part"))
    assert len(there) > 10 and not (tmp_path / ".building-out" / "stores").exists()

    corpus.write_text("\n".join([*lines[:39], "  ", lines[39]]))
    made = []
    real = tokenize_corpus.make_part
    monkeypatch.setattr(
        tokenize_corpus, "make_part", lambda block, path: made.append(path) or real(block, path)
    )
    write_stores(corpus, tokenizer, tmp_path / "out", 0.2)
    assert len(made) == 1 and not there & set(made)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk(workers: int, tokenizer: Tokenizer, tmp_path: Path, demo_folder: Path) -> None:
    """A limit to the size of a file stands in for it: parts fit, the larger stores do not."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, resource.RLIM_INFINITY))"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    full = write_in_process(tmp_path / "out", workers, limit)
    assert full.returncode == 1
    assert "File too large while token stores were written to" in full.stderr.splitlines()[-1]
    assert "nothing incomplete is in" in full.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".building-out"]
    assert not (tmp_path / ".building-out" / "stores").exists()
    assert not list(tmp_path.rglob("*.tmp"))

    again = write_in_process(tmp_path / "out", workers, "", "lambda now: print(now.resumed)")
    assert again.returncode == 0, again.stderr
    assert f"{DEMO_CORPUS.stat().st_size}\n" in again.stdout  # all of it was there
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for split in ("train", "validation"):
        for store in open_stores(tmp_path / "out", split):
            store.verify()

    tiny = limit.replace("15_000", "100")
    assert "File too large" in write_in_process(tmp_path / "new", workers, tiny).stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # there was nothing worth keeping


def test_a_killed_process_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    report = "lambda now: os.kill(__import__('psutil').Process().children()[-1].pid, 9)"
    killed = write_in_process(tmp_path / "out", 2, "", report)
    assert killed.returncode == 1
    assert "a tokenizing process was killed, perhaps because memory" in killed.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".building-out"]
    assert write_in_process(tmp_path / "out", 2).returncode == 0


def test_two_at_once(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    corpus = write_corpus(records(40))
    with FolderLock(tmp_path / ".building-out"):
        with pytest.raises(FolderBusyError, match=rf"process {os.getpid()} on .* is at work here"):
            write_stores(corpus, tokenizer, tmp_path / "out", 0.2)
        assert (tmp_path / ".building-out" / "lock").exists()  # nothing was taken from the first
    write_stores(corpus, tokenizer, tmp_path / "out", 0.2)


def test_whoever_lost_the_lock_does_not_publish(
    tokenizer: Tokenizer,
    tmp_path: Path,
    write_corpus: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FolderLock, "is_ours", lambda self: False)
    with pytest.raises(FileExistsError, match="another process has taken this work over"):
        write_stores(write_corpus(records(40)), tokenizer, tmp_path / "out", 0.2)
    assert not (tmp_path / "out").exists()


def test_leftovers_in_the_cache(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    corpus, cache = write_corpus(records(40)), tmp_path / "cache"
    command = [sys.executable, "-c", "{}" + PREPARE, str(corpus), str(cache)]
    # killed between the rename of the finished folder and the removal of the other
    command[2] = command[2].format(
        "import os, shutil\nreal = shutil.rmtree\n"
        "shutil.rmtree = lambda p, **k: os.kill(os.getpid(), 9) "
        "if p.name.startswith('.building') else real(p, **k)"
    )
    assert subprocess.run(command).returncode == -signal.SIGKILL
    folder = stores_folder(corpus, tokenizer, cache, 0.2)
    assert is_complete(folder)
    for name, days in (
        (".building-recent", 6),
        (".building-old-123-abc", 8),
        (".building-held", 8),
    ):
        (cache / name / "parts").mkdir(parents=True)
        for path in (cache / name / "parts", cache / name):
            os.utime(path, (time.time() - days * 86400,) * 2)
    with FolderLock(cache / ".building-held"):
        assert prepare_stores(corpus, tokenizer, cache, 0.2) == folder
        left = {".building-recent", ".building-held", folder.name}
        assert {path.name for path in cache.iterdir()} == left


def test_bad_documents(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    lines = [json.dumps(r).encode() for r in records(40)]
    bad = [b'{"text": "", "language": "de"}', b'{"text": "\xff"}', b"{"]
    corpus.write_bytes(b"\n".join([lines[0], *bad, *lines[1:]]))
    for allowed, number, what in ((0, 2, "without any text"), (2, 4, "number 3, and --skip-bad 2")):
        with pytest.raises(BadDocumentError, match=rf"corpus\.jsonl, line {number}: .*{what}"):
            options = TokenizeOptions(skip_bad=allowed)
            write_stores(corpus, tokenizer, tmp_path / "out", 0.2, options=options)
    options = TokenizeOptions(skip_bad=3)
    with caplog.at_level(logging.WARNING):
        write_stores(corpus, tokenizer, tmp_path / "out", 0.2, options=options)
    assert "3 bad documents were left out" in caplog.text
    told = read_manifest(tmp_path / "out")["bad_documents"]
    assert told["count"] == 3 and "line 3: not UTF-8" in told["first"][1]
    stores = [s for split in ("train", "validation") for s in open_stores(tmp_path / "out", split)]
    assert sum(store.documents for store in stores) == 80


def test_text_is_normalised_once(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    plain = load_tokenizer(without_normalizer(tmp_path))
    text = "Zoë hat Äpfel, 한국어."
    apart = unicodedata.normalize("NFD", text)
    assert plain.encode(apart) != plain.encode(text)
    lines = [r | {"text": apart} for r in records(40, "de")]
    for form, expected in (("nfc", text), ("none", apart)):
        out = tmp_path / form
        options = TokenizeOptions(normalize=form)  # type: ignore[arg-type]
        write_stores(write_corpus(lines), plain, out, 0.2, options=options)
        (store,) = open_stores(out, "train")
        assert plain.decode(store.document(0)[:-1]) == expected
        assert store.info.characters == len(expected) * store.documents
        assert store.info.utf8_bytes == len(expected.encode()) * store.documents
        assert read_manifest(out)["settings"]["normalize"] == form


def without_normalizer(folder: Path) -> Path:
    content = json.loads(DEMO_TOKENIZER.read_text())
    content["normalizer"] = None
    (folder / "plain.json").write_text(json.dumps(content))
    return folder / "plain.json"


def test_differences(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    corpus, out = write_corpus(records(40)), tmp_path / "out"
    write_stores(corpus, tokenizer, out, 0.2)
    options = TokenizeOptions()

    def found(tokenizer=tokenizer, fraction=0.2, languages=(), options=options) -> str:
        return "; ".join(differences(out, corpus, tokenizer, fraction, languages, options))

    assert found() == found(options=TokenizeOptions(workers=3, skip_bad=9)) == ""
    other = load_tokenizer(without_normalizer(tmp_path))
    assert (
        found(other)
        == f"tokenizer is {tokenizer.fingerprint!r} there and {other.fingerprint!r} here"
    )
    assert found(fraction=0.3) == "validation_fraction is 0.2 there and 0.3 here"
    assert found(languages=["de"]) == "languages is [] there and ['de'] here"
    assert "normalize is 'nfc' there" in found(options=TokenizeOptions(normalize="none"))
    later = time.time() + 10
    os.utime(corpus, (later, later))
    assert found() == "corpus file corpus.jsonl was changed after the stores were made"
    was = corpus.stat().st_size
    write_corpus(records(41))
    now = corpus.stat().st_size
    assert found() == f"corpus file corpus.jsonl was {was} bytes and is {now} bytes"
    manifest = read_manifest(out)
    manifest["files"] = [[f"{i}.jsonl", 1] for i in range(9)]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert "0.jsonl was 1 bytes and is absent" in found() and found().endswith("and more")
    (out / "manifest.json").write_text('{"corpus": "x"}')
    with pytest.raises(ValueError, match="not the manifest of token stores of this version"):
        found()


def test_a_corpus_that_changes_while_it_is_read(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    corpus = write_corpus(records(40))
    with pytest.raises(OSError, match=r"corpus\.jsonl was changed while it was read; run again"):
        write_stores(corpus, tokenizer, tmp_path / "out", 0.2, report=lambda p: os.utime(corpus))


def test_damaged_parts_are_made_anew(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the machine can leave them cut off, empty, or with other bytes."""
    part = PartBuilder(tokenizer.vocab_size)
    about = {"language": "de", "split": "train", "family": "germanic", "doc_id": "ä\n"}
    about |= {"source": "s", "license": "l"}
    part.add([1, 2, 3], characters=4, utf8_bytes=5, **about)
    part.add([], characters=0, utf8_bytes=0, **about | {"source": "t"})
    path = tmp_path / "parts" / "a.part"
    part.write(path)
    header = read_header(path)
    assert header
    documents = [(d.ids.tolist(), d.doc_id, d.source) for d in header.sections[0].read()]
    assert documents == [([1, 2, 3], "ä\n", "s"), ([], "ä\n", "t")]
    whole = path.read_bytes()
    for cut in (0, 10, 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert read_header(path) is None
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ValueError, match="this piece of the work is damaged and was removed; run"):
        list(header.sections[0].read())
    assert read_header(path) is None

    with pytest.raises(ValueError, match="'de' into two families, 'germanic' and 'x'"):
        part.add([1], characters=1, utf8_bytes=1, **about | {"family": "x"})
    part.add([tokenizer.vocab_size], characters=1, utf8_bytes=1, **about)
    with pytest.raises(ValueError, match="ids from 1 to 8192 for text in 'de', outside its vocab"):
        part.write(path)


def test_a_part_that_vanishes(tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tokenize_corpus, "make_part", lambda block, path: [])
    with pytest.raises(OSError, match="this piece of the work has vanished; run the command again"):
        write_stores(DEMO_CORPUS, tokenizer, tmp_path / "out", 0.05)


def test_a_tokenizer_that_changes_meanwhile(tmp_path: Path) -> None:
    path = without_normalizer(tmp_path)
    tokenizer = load_tokenizer(path)
    path.write_bytes(DEMO_TOKENIZER.read_bytes())
    with pytest.raises(ValueError, match="the file has changed since"):
        options = TokenizeOptions(workers=1)
        write_stores(DEMO_CORPUS, tokenizer, tmp_path / "out", 0.05, options=options)
    assert pickle.loads(pickle.dumps(load_tokenizer(path))).fingerprint != tokenizer.fingerprint


def test_family_of_the_record_wins(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    kannada = [r | {"language": "kn", "family": "indic"} for r in records(40, "kn")]
    invented = [r | {"family": "constructed"} for r in records(40, "tlh")]
    corpus = write_corpus(kannada + invented + records(40, "de"))
    folder = prepare_stores(corpus, tokenizer, tmp_path / "cache", 0.2)
    families = {store.language: store.family for store in open_stores(folder, "train")}
    assert families == {"de": "germanic", "kn": "indic", "tlh": "constructed"}


def test_unusable_corpora(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    def fails(words: str, corpus: Path, fraction: float = 0.2, languages: list[str] = []) -> None:  # noqa: B006
        with pytest.raises(ValueError, match=words):
            prepare_stores(corpus, tokenizer, tmp_path / "cache", fraction, languages)
        assert list((tmp_path / "cache").iterdir()) == []

    fails("line 1: language 'tlh' is not in the family table", write_corpus(records(9, "tlh")))
    two = records(9) + [r | {"family": "uralic"} for r in records(9, "de")]
    fails("'de' into two families, 'germanic' and 'uralic'", write_corpus(two))
    fails(
        r"data.languages: en, hi are not in .*\. There are de, fr",
        write_corpus(records(9)),
        0.2,
        ["hi", "en"],
    )
    fails("line 1: a document without any text", write_corpus([{"text": "", "language": "de"}]))
    fails("no document with text", write_corpus([]))
    fails(
        "data.validation_fraction=0.001 leaves none of the 18 .* for validation; raise it",
        write_corpus(records(9)),
        0.001,
    )
    fails(r"fraction=0.9999 leaves none .* for train; lower it", write_corpus(records(9)), 0.9999)


def test_one_family_a_language_over_blocks(
    tokenizer: Tokenizer,
    tmp_path: Path,
    write_corpus: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenize_corpus, "BLOCK_BYTES", 100)
    two = records(9) + [r | {"family": "uralic"} for r in records(9, "de")]
    with pytest.raises(ValueError, match="'de' into two families, 'germanic' and 'uralic'"):
        write_stores(write_corpus(two), tokenizer, tmp_path / "out", 0.2)


def test_unwritable_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"set data.cache_dir to a folder you may write to"):
        prepare_stores(DEMO_CORPUS, tokenizer, tmp_path / "file" / "cache", 0.05)


def test_a_language_without_a_split_is_told(
    tokenizer: Tokenizer,
    tmp_path: Path,
    write_corpus: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = records(40)
    held_out = next(r["doc_id"] for r in lines if is_validation(r["doc_id"], 0.2))
    lines.append({"text": "Solo.", "language": "it", "doc_id": held_out})
    with caplog.at_level(logging.WARNING):
        prepare_stores(write_corpus(lines), tokenizer, tmp_path / "cache", 0.2)
    assert "no train document of it" in caplog.text


def test_languages_select(demo_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert [s.language for s in open_stores(demo_folder, "train", ["hi", "de"])] == ["de", "hi"]
    assert open_stores(demo_folder, "test") == []
    with pytest.raises(
        ValueError, match=r"no training store of tlh; did you mean th\? It has am, ar"
    ):
        open_stores(demo_folder, "train", ["tlh"])
    folder = prepare_stores(DEMO_CORPUS, tokenizer, tmp_path, 0.05, ["hi", "de"])
    assert sorted(p.name for p in (folder / "train").glob("*.bin")) == ["de.bin", "hi.bin"]


def test_a_store_without_its_sidecar_is_an_error(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    folder = prepare_stores(write_corpus(records(40)), tokenizer, tmp_path / "cache", 0.2)
    (folder / "train" / "fr.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"fr\.json"):
        open_stores(folder, "train")
