"""The command, as a user types it."""

import errno
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from data import tokenize, tokenize_corpus
from data.folder_lock import FolderLock
from data.token_store import TokenStore
from data.tokenize import describe, main, table
from data.tokenize_corpus import DEMO_TOKENIZER
from data.tokenize_progress import Progress
from tests.disks import small_disk


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a corpus in it."""
    monkeypatch.chdir(tmp_path)
    lines = [
        {"text": f"Größe {i} in {language}.", "language": language, "doc_id": f"doc {i}"}
        for language in ("de", "fr")
        for i in range(40)
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


COMMAND = ["text.jsonl", "--validation-fraction", "0.2", "--workers", "1"]


def test_the_command(folder: Path) -> None:
    command = [sys.executable, "-m", "data.tokenize", *COMMAND, "--out", "deep/stores"]
    command += ["--tokenizer", str(DEMO_TOKENIZER), "--languages", "de", "--source", "mine"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "germanic        de        train " in done.stdout
    assert done.stderr.startswith("deep/stores: done in ")
    stores = [
        TokenStore(folder / "deep/stores" / split / "de") for split in ("train", "validation")
    ]
    assert sum(store.documents for store in stores) == 40
    assert {store.info.source for store in stores} == {"mine"}
    unneeded = {"torch", "megatron", "pyarrow", "rich", "matplotlib"}
    code = f"import sys, data.tokenize; assert not {unneeded} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(folder / "text.jsonl", "a") as file:
        file.write("{\n")
    assert main([*COMMAND, "--out", "stores", "--skip-bad", "1", "--quiet"]) == 0
    printed, said = capsys.readouterr()
    assert said == "" and printed == table(Path("stores"))
    rows = [line.split() for line in printed.splitlines() if line]
    assert rows[0] == [
        "family",
        "language",
        "split",
        "documents",
        "tokens",
        "bytes/token",
        "chars/token",
    ]
    assert [row[:3] for row in rows[1:5]] == [
        [family, language, split]
        for family, language in (("germanic", "de"), ("romance", "fr"))
        for split in ("train", "validation")
    ]
    assert [row[:4] for row in rows[5:8]] == [
        ["germanic", "1", "both", "40"],
        ["romance", "1", "both", "40"],
        ["all", "2", "both", "80"],
    ]
    stores = [TokenStore(f"stores/{split}/de") for split in ("train", "validation")]
    tokens = sum(store.tokens for store in stores)
    assert rows[5][4] == str(tokens)
    bare = tokens - 40
    sizes = [len(f"Größe {i} in de.") for i in range(40)]
    assert rows[5][5] == f"{(sum(sizes) + 80) / bare:.2f}"  # ö and ß are two bytes each
    assert rows[5][6] == f"{sum(sizes) / bare:.2f}"
    assert rows[8] == ["left", "out", "as", "bad:", "1", "documents"]
    assert rows[9][:4] == ["text.jsonl,", "line", "81:", "not"]


def test_the_plot(folder: Path) -> None:
    assert main([*COMMAND, "--out", "stores", "--quiet", "--plot", "ratios.png"]) == 0
    assert (folder / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_twice_is_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--out", "stores"]) == 0
    first = capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in Path("stores").rglob("*")}
    assert main([*COMMAND, "--out", "stores"]) == 0
    again = capsys.readouterr()
    assert again.out == first.out and "stores is finished already" in again.err
    assert {path: path.stat().st_mtime_ns for path in Path("stores").rglob("*")} == before

    content = json.loads(DEMO_TOKENIZER.read_text()) | {"normalizer": None}
    Path("other.json").write_text(json.dumps(content))
    assert main([*COMMAND, "--out", "stores", "--tokenizer", "other.json"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --out stores: there are finished token stores already, and they")
    assert "tokenizer is '9b181d0d" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--validation-fraction", "2"], "--validation-fraction 2.0: must lie between 0 and 1"),
        (["--validation-fraction", "1e-9"], "--validation-fraction 1e-09 leaves none of the 80"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--skip-bad", "-1"], "--skip-bad -1: must be at least 0"),
        (["--languages", "tlh"], "--languages: tlh is not in text.jsonl. There are de, fr"),
        (["--tokenizer", "none.json"], "--tokenizer none.json: no such file"),
        (["--eod-token", "<end>"], "--eod-token <end> is not in the vocabulary of --tokenizer"),
        (
            ["--text-field", "body"],
            'text.jsonl, line 1: field "body" must be a string, got nothing',
        ),
        (["--out", "text.jsonl/stores"], "cannot write token stores to text.jsonl"),
        (["--out", "full"], "full: there is something else already"),
    ],
)
def test_errors_are_one_line(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("")
    before = sorted(folder.rglob("*"))
    assert main([*COMMAND, "--out", "new", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and len(said.splitlines()) == 1
    assert "data." not in said.replace("data.tokenize", "")
    assert sorted(folder.rglob("*")) == before


def test_no_such_corpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["none.jsonl", "--out", "new"]) == 2
    assert capsys.readouterr().err == "error: none.jsonl: no such file or folder\n"
    assert main([".", "--out", "stores"]) == 2
    assert "error: --out stores: lies in the corpus ." in capsys.readouterr().err


def test_a_full_disk_is_told_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (folder / ".building-stores" / "parts" / "00").mkdir(parents=True)
    (folder / ".building-stores" / "parts" / "00" / "00.part").write_text("")
    monkeypatch.setattr(tokenize_corpus, "_publish", full)
    assert main([*COMMAND, "--out", "stores"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: No space left on device while token stores were written to .;")
    assert said.count("finished work is kept") == 1


def test_a_disk_without_any_room(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even the lock fits: there is no work that was kept, and no folder to name."""
    with small_disk(folder / "disk", "1m") as disk:
        with suppress(OSError), open(disk / "fills", "wb") as file:
            file.write(bytes(2 << 20))
        assert main([*COMMAND, "--out", "disk/stores"]) == 2
        assert [path.name for path in disk.iterdir()] == ["fills"]
    assert capsys.readouterr().err == (
        "error: No space left on device while token stores were written to disk; make room and run "
        "again; nothing incomplete is in disk/stores\n"
    )


def test_two_writers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FolderLock(folder / ".building-stores"):
        assert main([*COMMAND, "--out", "stores"]) == 2
    assert "is at work here already; let it finish" in capsys.readouterr().err
    assert main([*COMMAND, "--out", "stores"]) == 0


def test_what_is_kept_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "more").mkdir()
    (folder / "text.jsonl").rename(folder / "more" / "a.jsonl")
    (folder / "more" / "b.jsonl").write_text("{")
    command = ["more", *COMMAND[1:], "--out", "stores"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "more/b.jsonl, line 1: not a line of JSON" in said
    assert "leave out up to N bad documents with --skip-bad N [" in said
    assert said.endswith(
        "[finished work is kept in .building-stores; the same command goes on there]\n"
    )

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "write_stores", interrupt)
        assert main(command) == 130
    assert capsys.readouterr().err.startswith("interrupted [finished work is kept")
    assert main([*command, "--skip-bad", "1"]) == 0


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = Progress(
        "tokenizing", done=30_000_000, total=100_000_000, resumed=0, documents=5, tokens=7
    )
    assert describe(now, 10.0) == (
        "tokenizing  30.0%  5 documents, 7 tokens, 3.0 MB/s, 0:00:23 left"
    )
    now.resumed = 20_000_000  # the speed is that of this run: 1 MB/s
    assert describe(now, 10.0) == (
        "tokenizing  30.0%  5 documents, 7 tokens, 1.0 MB/s, 0:01:10 left (20% was there already)"
    )
    now.resumed = now.done
    assert "0.0 MB/s, ? left" in describe(now, 10.0)
    now.stage, now.done, now.total = "writing", 7, 14
    assert describe(now, 10.0) == "writing stores  50.0%  5 documents, 7 tokens"

    lines = tokenize._Lines()
    lines(now)
    assert capsys.readouterr().err == ""  # not yet
    monkeypatch.setattr(tokenize, "_LINE_EVERY_SECONDS", 0.0)
    lines(now)
    assert capsys.readouterr().err == "writing stores  50.0%  5 documents, 7 tokens\n"
    with tokenize._Bar() as bar:
        bar(now)
    assert "50%" in capsys.readouterr().err
