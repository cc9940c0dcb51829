"""The text that ships with the package, and the program that made it."""

import gzip
import json
import re
import struct
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from data import build_demo
from data.corpus import read_documents
from data.language_families import family_of
from data.tokenize_corpus import DEMO, DEMO_CORPUS
from tests.data.corpora.made import deb, pak


def test_demo_is_wide_and_parallel() -> None:
    documents = list(read_documents(DEMO_CORPUS))
    by_language = defaultdict(dict)
    for document in documents:
        by_language[document.language][document.doc_id] = document.text.split("\n")
        assert document.family == family_of(document.language)
        assert (document.source, document.license) == ("chromium", "BSD-3-Clause")
        assert unicodedata.is_normalized("NFC", document.text)
        assert not re.search("[<>{}\u200e\u200f\ufffd]", document.text)
    assert len(by_language) >= 35
    assert len({document.family for document in documents}) >= 8
    english = by_language["en"]
    assert sum(map(len, english.values())) == build_demo.SENTENCES
    for sentences in by_language.values():
        assert {i: len(s) for i, s in sentences.items()} == {i: len(s) for i, s in english.items()}
    size = sum(len(document.text.encode()) for document in documents)
    assert 0.6e6 < size < 1.5e6


def test_demo_is_translated() -> None:
    """Outside the Latin alphabet most letters are not ASCII; and no language copies another."""
    text = defaultdict(str)
    for document in read_documents(DEMO_CORPUS):
        text[document.language] += document.text
    for code in build_demo._NON_LATIN:
        letters = [c for c in text[code] if c.isalpha()]
        assert sum(c.isascii() for c in letters) < 0.35 * len(letters), code
    sentences = Counter(s for t in text.values() for s in set(t.split("\n")))
    assert sum(n > 1 for n in sentences.values()) < 10


def test_demo_brings_its_licence() -> None:
    text = (DEMO / "LICENSE.chromium").read_text()
    assert text.startswith("Copyright The Chromium Authors")
    assert "Redistribution and use in source and binary forms" in text and "AS IS" in text
    with gzip.open(DEMO_CORPUS) as file:
        file.read(1)
        assert file.mtime == 0  # the same text gives the same bytes


COPYRIGHT = """Files: *
Copyright: The Chromium Authors. All rights reserved.
License: BSD-3-clause

License: BSD-3-clause
 Redistribution and use
 .
 AS IS
"""


def package_files(sentences: int = build_demo.SENTENCES) -> dict[str, bytes]:
    files = {"usr/share/doc/chromium-l10n/copyright": COPYRIGHT.encode()}
    for language, locale in build_demo.LOCALES.items():
        sound = "a" if language in build_demo._LATIN.split() else "ж"
        strings = {
            i: f"{language} {sound * 20} {i:03d} {sound * 30}."
            if language != "en"
            else f"This is the English sentence of number {i:03d} and no other."
            for i in range(sentences)
        }
        files[f"usr/lib/chromium/locales/{locale}.pak"] = pak(strings)
    info = "".join(f"IDS_{i},{i},../../chrome/app/strings.grdp\n" for i in range(sentences))
    files["usr/lib/chromium/locales/en-GB.pak.info"] = info.encode()
    return files


def test_reads_paks_and_cleans_strings() -> None:
    strings = {1: "plain", 2: "&amp; <b>bold</b>,<br>next", 3: "&File (&F)", 4: "\u200fe\u0301"}
    assert build_demo.read_pak(pak(strings, {9: 0})) == {
        1: "plain",
        2: "& bold, next",
        3: "File",
        4: "é",
        9: "plain",
    }
    with pytest.raises(ValueError, match="got 4 and 1"):
        build_demo.read_pak(struct.pack("<IB3xHH", 4, 1, 0, 0) + bytes(6))


def test_builds_the_same_bytes_from_the_same_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_demo, "VOCAB_SIZE", 300)
    path = deb(tmp_path / "chromium-l10n_1_all.deb", package_files())
    build_demo.build(path, tmp_path / "one")
    monkeypatch.setattr("sys.argv", ["x", "--deb", str(path), "--out", str(tmp_path / "two")])
    build_demo.main()
    names = {"chromium_ui.jsonl.gz", "tokenizer.json", "LICENSE.chromium", "README.md"}
    assert {file.name for file in (tmp_path / "one").iterdir()} == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with gzip.open(tmp_path / "one" / "chromium_ui.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    assert len(records) == 38 * build_demo.SENTENCES // build_demo.SENTENCES_PER_DOCUMENT
    assert (tmp_path / "one" / "LICENSE.chromium").read_text() == (
        "Copyright The Chromium Authors. All rights reserved.\n\nRedistribution and use\n\nAS IS\n"
    )


def test_packages_that_will_not_do(tmp_path: Path) -> None:
    def fails(words: str, path: Path) -> None:
        with pytest.raises(ValueError, match=words):
            build_demo.build(path, tmp_path / "out")

    other = tmp_path / "other.deb"
    other.write_bytes(b"no archive")
    fails("not a Debian package", other)
    fails("no data.tar in it", deb(other, {}, archive="control.tar"))
    fails("no strings for am, ar, bn", deb(other, {}))
    fails("30 documents of parallel sentences, 33 wanted", deb(other, package_files(240)))
    files = package_files()
    files["usr/share/doc/chromium-l10n/copyright"] = b"Files: *\nLicense: other\n"
    with pytest.raises(ValueError, match="no longer has the BSD text"):
        build_demo.chromium_license(files["usr/share/doc/chromium-l10n/copyright"].decode())


def test_a_download_that_fails_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "apt-get"
    script.write_text("#!/bin/sh\necho 'Unable to locate package' >&2\nexit 100\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    with pytest.raises(
        RuntimeError, match=r"status 100; run apt-get update, or give .*--deb"
    ) as error:
        build_demo.download(tmp_path)
    assert "Unable to locate package" in str(error.value)
