import gzip
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data import tokenize_corpus
from data.corpus import read_documents
from data.token_store import TokenStore
from data.tokenize_corpus import (
    DEMO_CORPUS,
    DEMO_TOKENIZER,
    is_complete,
    is_validation,
    open_stores,
    prepare_stores,
    stores_folder,
)
from data.tokenizer import Tokenizer


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
    assert folder.name == "chromium_ui-3f37cfc7a8dc87a4fab2"


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
    real = tokenize_corpus._sha256
    monkeypatch.setattr(tokenize_corpus, "_sha256", lambda p: hashed.append(p) or real(p))

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
from data.tokenize_corpus import DEMO_TOKENIZER, prepare_stores
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


def test_losing_the_race_keeps_the_winner(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    """The second builder finds the folder there when it renames."""
    corpus = write_corpus(records(40))
    folder = prepare_stores(corpus, tokenizer, tmp_path / "cache", 0.2)
    inode = folder.stat().st_ino
    tokenize_corpus.write_stores(corpus, tokenizer, folder, 0.2)
    assert folder.stat().st_ino == inode and is_complete(folder)
    assert list(folder.parent.iterdir()) == [folder]

    (folder / "manifest.json").unlink()  # in the way, and not a result: not silently accepted
    with pytest.raises(OSError, match=r"not empty|File exists"):
        tokenize_corpus.write_stores(corpus, tokenizer, folder, 0.2)


def test_a_killed_builder_leaves_nothing_that_counts(
    tokenizer: Tokenizer, tmp_path: Path, write_corpus: Callable[..., Path]
) -> None:
    corpus, cache = write_corpus(records(40)), tmp_path / "cache"
    kill = "import os, pathlib\npathlib.Path.rename = lambda *a: os.kill(os.getpid(), 9)\n"
    result = subprocess.run([sys.executable, "-c", kill + PREPARE, str(corpus), str(cache)])
    assert result.returncode == -signal.SIGKILL
    assert not is_complete(stores_folder(corpus, tokenizer, cache, 0.2))
    assert is_complete(prepare_stores(corpus, tokenizer, cache, 0.2))


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

    fails("'tlh' is not in the family table", write_corpus(records(9, "tlh")))
    two = records(9) + [r | {"family": "uralic"} for r in records(9, "de")]
    fails("'de' into two families, 'germanic' and 'uralic'", write_corpus(two))
    fails(
        "data.languages: en, hi is not in .* has de, fr",
        write_corpus(records(9)),
        0.2,
        ["hi", "en"],
    )
    fails("no document with text", write_corpus([r | {"text": ""} for r in records(9)]))
    fails("no document with text", write_corpus([]))
    fails(
        "data.validation_fraction=0.001 leaves none of the 18 .* for validation; raise it",
        write_corpus(records(9)),
        0.001,
    )
    fails(r"fraction=0.9999 leaves none .* for train; lower it", write_corpus(records(9)), 0.9999)


def test_unwritable_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"set data.cache_dir to a folder you may write to"):
        prepare_stores(DEMO_CORPUS, tokenizer, tmp_path / "file" / "cache", 0.05)


def test_what_is_left_out_is_reported(
    tokenizer: Tokenizer,
    tmp_path: Path,
    write_corpus: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = records(40)
    lines[3]["text"] = ""
    held_out = next(r["doc_id"] for r in lines if is_validation(r["doc_id"], 0.2))
    lines.append({"text": "Solo.", "language": "it", "doc_id": held_out})
    with caplog.at_level(logging.WARNING):
        folder = prepare_stores(write_corpus(lines), tokenizer, tmp_path / "cache", 0.2)
    assert "1 documents without any text were left out" in caplog.text
    assert "no train document of it" in caplog.text
    assert sum(store.documents for store in open_stores(folder, "train")) < 80
    assert json.loads((folder / "manifest.json").read_text())["documents_without_text"] == 1


def test_languages_select(demo_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert [s.language for s in open_stores(demo_folder, "train", ["hi", "de"])] == ["de", "hi"]
    assert open_stores(demo_folder, "test") == []
    with pytest.raises(ValueError, match="no training store of tlh; it has am, ar"):
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


def test_command_line(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records(40))
    out = tmp_path / "deep" / "stores"
    command = [sys.executable, "-m", "data.tokenize_corpus", "--out", str(out)]
    command += ["--corpus", str(tmp_path / "corpus.jsonl.gz"), "--tokenizer", str(DEMO_TOKENIZER)]
    command += ["--validation-fraction", "0.2", "--languages", "de"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train       germanic        de" in done.stdout
    assert (
        TokenStore(out / "train" / "de").documents + TokenStore(out / "validation" / "de").documents
        == 40
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "."], "exists already"),
        (["--out", "new", "--validation-fraction", "2"], "between 0 and 1"),
        (["--out", "new", "--corpus", "none.jsonl"], "data.corpus=none.jsonl: no such file"),
        (["--out", "new", "--languages", "tlh"], "data.languages: tlh is not in"),
    ],
)
def test_command_line_errors_are_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        tokenize_corpus.main(arguments)
    assert stopped.value.code
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
